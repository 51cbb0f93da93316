"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers."""

import functools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engine.config import Settings, flag
from engine.tensors import matmul_dtype
from model import GPT

CPU_ROWS = 128  # of a gradient, read twice: at 124M 1.5 MB, which stay in the cache
Model = TypeVar("Model", bound=nn.Module)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoRAConfig(Settings):
    lora_dim: int = flag(8, "r in PEFT")
    lora_alpha: float = flag(16.0, "scaling is lora_alpha / lora_dim", above=0)
    lora_dropout: float = flag(0.0, "on the inputs of lora_A", at_least=0, below=1)
    use_rslora: bool = flag(False, "scaling is lora_alpha / sqrt(lora_dim)")  # Kalajdzievski, 2023

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_dim) if self.use_rslora else self.lora_dim)


class LoRAFunction(torch.autograd.Function):
    """A LoRALinear, except for the product x W', which the caller adds without autograd: returns
    b + scaling * (x A') B', or only b if `weight` is W + scaling * B A already. The gradients are
    those of the complete layer; those of A and B come from thin products in either case.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which accepts any attribute
        x: torch.Tensor,  # (n, in)
        dropped: torch.Tensor | None,  # x after dropout, if there is any
        weight: torch.Tensor,  # (out, in), maybe in a smaller dtype
        bias: torch.Tensor,
        down: torch.Tensor,  # A (r, in)
        up: torch.Tensor,  # scaling * B' (r, out)
        is_summed: bool,
    ) -> torch.Tensor:
        low = (x if dropped is None else dropped) @ down.t()
        needs_input = dropped is None or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if needs_input else None, dropped, weight, down, up, low)
        ctx.is_summed = is_summed
        return bias.repeat(len(x), 1) if is_summed else torch.addmm(bias, low, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dropped, weight, down, up, low = ctx.saved_tensors
        needs_x, needs_dropped, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_x = d_y @ weight.to(d_y.dtype) if needs_x else None
        d_low, d_up = thin_products(d_y, low, up)
        d_down = d_low.t() @ (x if dropped is None else dropped)
        d_dropped = d_low @ down if needs_dropped else None
        if d_x is not None and dropped is None and not ctx.is_summed:
            d_x.addmm_(d_low, down)
        d_weight = d_y.t() @ x if needs_weight else None
        d_bias = d_y.sum(0) if needs_bias else None
        return d_x, d_dropped, d_weight, d_bias, d_down, d_up, None


def thin_products(
    d_y: torch.Tensor, low: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_y up' (n, r) and low' d_y (r, out). On a CPU both take rows of `d_y` that fit the cache."""
    is_chunked = d_y.device.type == "cpu" and d_y.dtype.itemsize >= 4  # sums in 16 bits would round
    n_rows = CPU_ROWS if is_chunked and not torch.compiler.is_compiling() else len(d_y)
    rows = zip(d_y.split(n_rows), low.split(n_rows), strict=True)
    products = [(d_rows @ up.t(), low_rows.t() @ d_rows) for d_rows, low_rows in rows]
    d_low, d_up = zip(*products, strict=True)
    return torch.cat(d_low), functools.reduce(torch.add, d_up)


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
        self.is_merged = False
        self.sums_weight = False  # whether training sums W + scaling * B A, once a step
        self.summed_weight: torch.Tensor | None = None  # in `summed_weights`
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(matmul_dtype(x))
        if self.is_merged:
            return F.linear(x, self._matrix().to(x.dtype), self.bias.to(x.dtype))
        shape, x = x.shape[:-1], x.flatten(0, -2)
        weight = self._matrix() if self.summed_weight is None else self.summed_weight
        up = (self.scaling * self.lora_B).t().contiguous()  # row-major is several times faster
        bias, down, up = (t.to(x.dtype) for t in (self.bias, self.lora_A, up))
        is_dropping = self.training and self.config.lora_dropout > 0
        dropped = F.dropout(x, self.config.lora_dropout) if is_dropping else None
        is_summed = self.summed_weight is not None
        y = LoRAFunction.apply(x, dropped, weight, bias, down, up, is_summed)
        with torch.no_grad():  # last, so that recomputation can stop before it
            y.addmm_(x, weight.t().to(x.dtype))
        return y.view(*shape, self.out_features)

    @torch.no_grad()
    def sum_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W + scaling * B A, a copy (out, in) in `dtype`, by default that of A."""
        with torch.autocast(self.weight.device.type, enabled=False):  # W would lose the update
            matrix = self._matrix().to(self.lora_A.dtype)
            return torch.addmm(matrix, self.lora_B, self.lora_A, alpha=self.scaling).to(dtype)

    def _matrix(self) -> torch.Tensor:  # (out, in)
        return self.weight.t() if self.is_conv1d else self.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, in fp32, and drop lora_A and lora_B."""
        update = self.scaling * self.lora_B.float() @ self.lora_A.float()
        self.weight.copy_(self.weight.float() + (update.t() if self.is_conv1d else update))
        del self.lora_A, self.lora_B
        self.is_merged = True


def lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with LoRA that is not merged, by name."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, LoRALinear) and not m.is_merged}


@contextmanager
def summed_weights(linears: list[LoRALinear], dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, the layers multiply with W + scaling * B A as it is at the start, in `dtype`, that
    of the products (default: fp32). Layers with dropout, or with a trained W, stay as they are.
    """
    for linear in linears:
        if not linear.config.lora_dropout and not linear.weight.requires_grad:
            linear.summed_weight = linear.sum_weight(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.summed_weight = None


def cast_frozen_weights(model: GPT, dtype: torch.dtype) -> None:
    """Store the frozen embedding, the head and the frozen linear weights in `dtype`. Each use casts
    the weight to the dtype of its input. The rest, under 1% of the model, stays in fp32.
    """
    for module in model.modules():
        is_embedding = module is model.transformer.wte
        if not (is_embedding or isinstance(module, nn.Linear)) or module.weight.requires_grad:
            continue
        module.weight.data = module.weight.data.to(dtype)
        if not is_embedding and not isinstance(module, LoRALinear):
            module.forward = partial(frozen_linear, module)  # type: ignore[arg-type]


def frozen_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return FrozenLinear.apply(x.to(matmul_dtype(x)), linear.weight, linear.bias)


class FrozenLinear(torch.autograd.Function):
    """A linear layer whose weight is cast in both passes, so that the cast one is not stored."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        d_bias = d_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return d_y @ weight.to(d_y.dtype), None, d_bias


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
    return {
        f"{name}.{matrix}": linear.get_parameter(matrix).detach()
        for name, linear in linears.items()
        for matrix in ("lora_A", "lora_B")
    }


def merge_lora(model: Model) -> Model:
    """Add every update to its weight, for good. `save_pretrained` then writes an ordinary model."""
    get_lora_state_dict(model)  # raises if there is nothing to merge
    for linear in lora_linears(model).values():
        linear.merge()
    return model
