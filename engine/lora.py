"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers, stored as PEFT adapters."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from engine.files import read_json, write_json
from engine.tensors import copy_tensors, read_tensors

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
LORA_STATE_FILE = "lora.pt"
EXPECTED = f"expected a folder with {ADAPTER_CONFIG_FILE} and its weights, or a {LORA_STATE_FILE}"
PEFT_PREFIX = "base_model.model."  # of tensor names in PEFT's files
# Options of adapter_config.json that are read, and those that do not change what is computed.
READ_OPTIONS = {"target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
METADATA = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
INERT = {"fan_in_fan_out", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config"}
# The supported values of two more; any other option has to be off.
SUPPORTED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base's weights
}
OFF: tuple = (None, False, "none", [], {})

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


class AdapterConfig(NamedTuple):
    """The contents of an adapter_config.json."""

    base_model: str | None
    target_modules: str | list[str]  # endings of module names, a pattern, or "all-linear"
    lora: LoRAConfig


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


def is_adapter(folder: Path | str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_FILE).is_file()


def save_adapter(
    model: nn.Module, folder: Path, base_model: str | None = None, tensors: Tensors | None = None
) -> None:
    """Write the adapter in PEFT's format and as `lora.pt`. `base_model` is the name or folder of
    its base model; `tensors` are the result of `get_lora_state_dict`, or copies of it.
    """
    tensors = {n: t.cpu().contiguous() for n, t in (tensors or get_lora_state_dict(model)).items()}
    linears = lora_linears(model)
    lora = next(iter(linears.values())).config  # the same in all
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": target_modules(list(linears), convertible_linears(model)),
        "r": lora.lora_dim,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "fan_in_fan_out": True,  # GPT2LMHeadModel has Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ADAPTER_CONFIG_FILE, config)
    named = {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    torch.save(tensors, folder / LORA_STATE_FILE)


def target_modules(names: list[str], others: list[str]) -> list[str]:
    """Endings of names ("attn.c_proj") that match none of the others, or else the full names."""
    endings = sorted({re.sub(r".*\.\d+\.", "", name) for name in names})
    if any(other.endswith(f".{ending}") for other in others for ending in endings):
        return names
    return endings


def read_adapter_config(folder: Path | str) -> AdapterConfig:
    """Read adapter_config.json; ValueError for an option that LoRALinear does not have."""
    path = Path(folder) / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter; {EXPECTED}")
    options = read_json(path, "save the adapter again")
    for option in sorted(options.keys() - READ_OPTIONS - METADATA - INERT):
        if (value := options[option]) not in SUPPORTED_VALUES.get(option, OFF):
            raise ValueError(
                f"{path}: {option} {value!r} is not supported; merge the adapter with PEFT"
            )
    base, targets = options.get("base_model_name_or_path"), options.get("target_modules")
    try:
        if isinstance(targets, str):
            re.compile(targets)
        elif not isinstance(targets, list) or not targets:
            raise ValueError(f"target_modules is {targets!r}, expected names or a pattern")
        if not isinstance(base, str | None):
            raise ValueError(f"base_model_name_or_path is {base!r}, expected a name or null")
        lora: dict[str, Any] = {
            "lora_dim": options.get("r"),
            "lora_alpha": options.get("lora_alpha"),
        }
        lora |= {key: options[key] for key in ("lora_dropout", "use_rslora") if key in options}
        return AdapterConfig(base, targets, LoRAConfig(**lora))
    except (ValueError, re.error) as error:
        raise ValueError(f"{path} is damaged: {error}; save the adapter again") from error


def match_targets(names: list[str], targets: str | list[str]) -> list[str]:
    """The layers that PEFT selects: by endings of their names, by a pattern, or all."""
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return [name for name in names if targets == "all-linear" or re.fullmatch(targets, name)]


def load_adapter(model: Model, path: Path | str, config: LoRAConfig | None = None) -> Model:
    """Add LoRA to a model and load an adapter into it: a folder in PEFT's format, or a `lora.pt`,
    which needs `config` where no adapter_config.json is beside it.
    """
    path = Path(path)
    file = path / ADAPTER_WEIGHTS_FILE if path.is_dir() else path
    has_config = path.is_dir() or is_adapter(file.parent)
    adapter = read_adapter_config(file.parent) if has_config else None
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {EXPECTED}")
    config = adapter.lora if adapter else config
    if config is None:
        raise ValueError(
            f"{path} holds no lora_alpha, and no {ADAPTER_CONFIG_FILE} is beside it; give an "
            "adapter's folder, or lora_dim and lora_alpha"
        )
    tensors = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in read_tensors(file).items()
    }
    targets = adapter.target_modules if adapter else [n.removesuffix(".lora_A") for n in tensors]
    chosen = match_targets(convertible_linears(model), targets)
    if not chosen:
        raise ValueError(f"{path} has LoRA for none of the model's linear layers")
    replace_linears(model, chosen, config)
    load_lora(model, tensors, str(path))
    return model
