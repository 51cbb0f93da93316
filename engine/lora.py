"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers."""

import math
import re
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from engine.tensors import copy_tensors

Model = TypeVar("Model", bound=nn.Module)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoRAConfig:
    lora_dim: int = 8  # r in PEFT
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False  # rank-stabilized scaling (Kalajdzievski, 2023)

    def __post_init__(self) -> None:
        dim, alpha, dropout = self.lora_dim, self.lora_alpha, self.lora_dropout
        for name, is_valid, expected in (
            ("lora_dim", type(dim) is int and dim >= 1, "at least 1, an integer"),
            ("lora_alpha", type(alpha) in (int, float) and 0 < alpha < math.inf, "above 0"),
            ("lora_dropout", type(dropout) in (int, float) and 0 <= dropout < 1, "0 to below 1"),
            ("use_rslora", type(self.use_rslora) is bool, "true or false"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_dim) if self.use_rslora else self.lora_dim)


class LoRALinear(nn.Linear):
    """A linear layer with weight W + scaling * B A, where lora_A is (r, in) and lora_B (out, r). It
    replaces an `nn.Linear`, or transformers' Conv1D, whose weight is (in, out).
    """

    def __init__(self, linear: nn.Module, config: LoRAConfig):
        nn.Module.__init__(self)  # nn.Linear's would allocate a second weight
        self.config, self.scaling = config, config.scaling
        self.is_conv1d = not isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        self.out_features, self.in_features = self._matrix().shape
        self.lora_A = nn.Parameter(self.weight.new_empty(config.lora_dim, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.lora_dim))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in PEFT and nn.Linear
        self.before_merge: tuple[torch.Tensor, nn.Parameter, nn.Parameter] | None = None
        self.train(linear.training)

    @property
    def is_merged(self) -> bool:
        return self.before_merge is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_merged:
            return F.linear(x, self._matrix(), self.bias)
        if not torch.is_grad_enabled():
            update = F.linear(self._project_down(x), self.lora_B)
            return F.linear(x, self._matrix(), self.bias) + self.scaling * update
        shape, device_type = x.shape[:-1], x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        x = x.flatten(0, -2)
        # The low-rank products first, then the full one added in place: one pass over the output.
        # It is last so that recomputation can stop before it.
        low = self._project_down(x)
        up = self.lora_B.t().contiguous()  # row-major: its gradients are several times faster
        y = torch.addmm(self.bias, low, up, alpha=self.scaling)
        return y.addmm_(x, self._matrix().t().to(x.dtype)).view(*shape, self.out_features)

    def _project_down(self, x: torch.Tensor) -> torch.Tensor:  # (..., r)
        return F.linear(F.dropout(x, self.config.lora_dropout, self.training), self.lora_A)

    def _matrix(self) -> torch.Tensor:  # (out, in)
        return self.weight.t() if self.is_conv1d else self.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, in fp32. lora_A and lora_B are then no parameters."""
        self.before_merge = self.weight.detach().clone(), self.lora_A, self.lora_B
        update = self.scaling * self.lora_B.float() @ self.lora_A.float()
        self.weight.copy_(self.weight.float() + (update.t() if self.is_conv1d else update))
        del self.lora_A, self.lora_B

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.before_merge is not None:
            weight, self.lora_A, self.lora_B = self.before_merge
            self.weight.copy_(weight)
            self.to(self.weight)  # the model may have been moved since
            self.before_merge = None


def lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def convertible_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers without LoRA, except the head, whose weight is the embedding."""
    return [
        name
        for name, module in model.named_modules()
        # Conv1D by name, because importing transformers is slow.
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not (isinstance(module, LoRALinear) or name.endswith("lm_head"))
    ]


def convert_linear_layer_to_lora(
    model: Model, part_module_name: str = "h.", config: LoRAConfig = LoRAConfig()
) -> Model:
    """Add LoRA in place to the linear layers whose names contain one of the parts, such as
    "attn.c_attn,mlp". ValueError for a part that matches none, or a rank above a layer's width.
    """
    names = convertible_linears(model)
    parts = [part.strip() for part in part_module_name.split(",")]
    for part in parts:
        if not part or not any(part in name for name in names):
            kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})) or "none"
            raise ValueError(
                f"no linear layer has {part!r} in its name; those without LoRA are {kinds}"
            )
    chosen = [name for name in names if any(part in name for part in parts)]
    for name in chosen:
        if config.lora_dim > (width := min(model.get_parameter(f"{name}.weight").shape)):
            raise ValueError(
                f"lora_dim is {config.lora_dim}, expected at most {width}, the width of {name}"
            )
    replace_linears(model, chosen, config)
    return model


def replace_linears(model: nn.Module, names: list[str], config: LoRAConfig) -> None:
    for name in names:
        linear = model.get_submodule(name)
        if linear.bias is None:
            raise ValueError(f"{name} has no bias, but LoRALinear needs one; GPT-2's all have")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, config))


def only_optimize_lora_parameters(model: Model) -> Model:
    """Freeze everything but lora_A and lora_B."""
    trained = get_lora_state_dict(model)
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained)
    return model


def get_lora_state_dict(model: nn.Module) -> Tensors:
    """lora_A and lora_B of all layers by name, as in `lora.pt`; ValueError if there are none."""
    linears = lora_linears(model)
    if not linears:
        raise ValueError("the model has no LoRA; call convert_linear_layer_to_lora first")
    if merged := [name for name, linear in linears.items() if linear.is_merged]:
        raise ValueError(f"{merged[0]} is merged into its weight; call unmerge_lora first")
    return {
        f"{name}.{matrix}": linear.get_parameter(matrix).detach()
        for name, linear in linears.items()
        for matrix in ("lora_A", "lora_B")
    }


def load_lora(model: nn.Module, tensors: Tensors, source: str = "lora") -> None:
    """Copy tensors from `get_lora_state_dict` into a model with LoRA in the same places. ValueError
    names the `source` and the tensors that are missing, unexpected or misshapen.
    """
    copy_tensors(tensors, get_lora_state_dict(model), source)


def merge_lora(model: Model) -> Model:
    """Add every update to its weight, after which `save_pretrained` writes an ordinary model."""
    get_lora_state_dict(model)  # raises if there is nothing to merge
    for linear in lora_linears(model).values():
        linear.merge()
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, bit for bit."""
    merged = [linear for linear in lora_linears(model).values() if linear.is_merged]
    if not merged:
        raise ValueError("the model has no merged LoRA")
    for linear in merged:
        linear.unmerge()
    return model
