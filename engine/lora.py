"""LoRA (Hu et al., 2021): low-rank updates of frozen linear layers."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.config import Settings, flag
from engine.tensors import Tensors, batches_alike, matmul_dtype, product_in_fp32
from model import GPT

SUM_ELEMENTS = 2**24  # weights that are summed in fp32 at a time; W and the sum take 64 MB each
CPU_GRAD_ROWS = 128  # rows of a gradient in one block: 1.5 MB for 124M, which fit the cache
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig(Settings):
    lora_dim: int = flag(8, "rank of the update (r in PEFT)")
    lora_alpha: float = flag(16.0, "scaling is lora_alpha / lora_dim", above=0)
    lora_dropout: float = flag(0.0, "on the inputs of lora_A", at_least=0, below=1)
    use_rslora: bool = flag(False, "scaling is lora_alpha / sqrt(lora_dim)")  # Kalajdzievski, 2023

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.lora_dim) if self.use_rslora else self.lora_dim)


class LoRACopies(NamedTuple):
    """What a LoRALinear multiplies by. Biases, A and B are in the dtype of the matmuls. A weight
    that is not a copy may be in another dtype; it is cast where it is used.
    """

    weight: Tensor  # W (out, in), or the sum S = W + s B A, where s is the scaling
    bias: Tensor
    A: Tensor  # (r, in)
    scaled_B: Tensor  # s B' (r, out); row-major on a CPU, where that is several times faster


class LoRAFunction(torch.autograd.Function):
    """The forward pass of a LoRALinear, except x W', and its complete backward pass. s is the
    scaling, W is (out, in), A is (r, in), B is (out, r):

        y = x W' + b + s (x A') B'      x W' is added by the caller, see `LoRALinear.forward`

    or, with a summed weight S = W + s B A:

        y = x S' + b                    computed by the caller

    Backward returns the gradients of the complete layer. Those of A and B always come from
    low-rank products, never from the (out, in) gradient of S:

        d_xA = s d_y B (n, r)           d_A = d_xA' x (r, in)
        d_B  = s d_y' (x A') (out, r)   d_x = d_y W + d_xA A, or d_y S
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which accepts any attribute
        x: Tensor,  # (n, in)
        dropped: Tensor | None,  # x after dropout, if there is any
        _weight: Tensor,  # this and the next three get gradients
        bias: Tensor,
        _lora_A: Tensor,
        _lora_B: Tensor,
        copies: LoRACopies,
        scaling: float,
        is_summed: bool,  # whether copies.weight is S
    ) -> Tensor:
        needs_x = dropped is None or ctx.needs_input_grad[2]  # for d_A or d_W
        saved = x if needs_x else None, dropped, copies.weight, copies.A, copies.scaled_B
        xA = None if is_summed else (x if dropped is None else dropped) @ copies.A.t()  # (n, r)
        ctx.save_for_backward(*saved, xA)
        ctx.scaling = scaling
        if xA is None:
            return x.new_empty(len(x), len(bias))
        return torch.addmm(copies.bias, xA, copies.scaled_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, weight, A, scaled_B, xA = ctx.saved_tensors
        needs_d_x, needs_d_dropped, needs_d_weight, needs_d_bias, *_ = ctx.needs_input_grad
        d_x = d_y @ weight.to(d_y.dtype) if needs_d_x else None
        is_summed = xA is None
        xA = x @ A.t() if is_summed else xA
        d_xA, d_scaled_B = low_rank_gradients(d_y, xA, scaled_B)
        d_A = product_in_fp32(d_xA.t(), x if dropped is None else dropped)
        # d_xA A is the gradient of `dropped` if there is dropout. Otherwise it is added to that of
        # x, unless the weight is summed: then d_y S includes it.
        d_dropped = d_xA @ A if needs_d_dropped else None
        if d_x is not None and dropped is None and not is_summed:
            d_x.addmm_(d_xA, A)
        d_weight = d_y.t() @ x if needs_d_weight else None
        d_bias = d_y.sum(0) if needs_d_bias else None
        d_B = (ctx.scaling * d_scaled_B.t()).contiguous()
        return d_x, d_dropped, d_weight, d_bias, d_A, d_B, None, None, None


def low_rank_gradients(d_y: Tensor, xA: Tensor, scaled_B: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of xA (n, r) and of scaled_B (r, out). Both read all of `d_y` (n, out). On a
    CPU we take a block of its rows at a time, so that the second product finds it in the cache.
    """
    # In 16 bits, adding up the blocks would round after each of them.
    in_blocks = d_y.device.type == "cpu" and d_y.dtype.itemsize >= 4
    if not in_blocks or torch.compiler.is_compiling():
        return d_y @ scaled_B.t(), product_in_fp32(xA.t(), d_y)
    blocks = zip(d_y.split(CPU_GRAD_ROWS), xA.split(CPU_GRAD_ROWS), strict=True)
    products = [(d_rows @ scaled_B.t(), xA_rows.t() @ d_rows) for d_rows, xA_rows in blocks]
    d_xA, d_scaled_B = zip(*products, strict=True)
    return torch.cat(d_xA), reduce(torch.add, d_scaled_B)


class LoRALinear(nn.Linear):
    """A linear layer with weight W + scaling * B A: lora_A is (r, in), lora_B (out, r). It replaces
    an `nn.Linear`, or transformers' Conv1D, whose weight is (in, out).
    """

    # Buffers, see `make_buffers`.
    weight_copy: Tensor
    bias_copy: Tensor
    A_copy: Tensor
    scaled_B_copy: Tensor

    def __init__(self, linear: nn.Module, config: LoRAConfig):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.config, self.scaling = config, config.scaling
        self.is_conv1d = not isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        self.out_features, self.in_features = self.matrix().shape
        self.lora_A = nn.Parameter(self.weight.new_empty(config.lora_dim, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.lora_dim))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in PEFT and nn.Linear
        self.is_merged = False
        self.use_summed_form = False  # set by finetune_lora.py --lora_form summed
        self.uses_copies = False  # true within `hold_copies`
        self.copied: tuple | None = None  # what the copies were made for
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(matmul_dtype(x))
        if self.is_merged:
            return F.linear(x, self.matrix().to(x.dtype), self.bias.to(x.dtype))
        shape, x = x.shape[:-1], x.flatten(0, -2)
        is_dropping = self.training and self.config.lora_dropout > 0
        dropped = F.dropout(x, self.config.lora_dropout) if is_dropping else None
        copies, is_summed = self.copies(x.dtype), self.uses_copies and self.is_summed
        params = self.matrix(), self.bias, self.lora_A, self.lora_B
        y = LoRAFunction.apply(x, dropped, *params, copies, self.scaling, is_summed)
        # The large product, x W'. LoRAFunction.backward computes its gradients, so autograd need
        # not see it. It comes last because backward does not need its result: activation
        # checkpointing stops recomputing as soon as LoRAFunction has saved its tensors.
        with torch.no_grad():
            torch.addmm(copies.bias if is_summed else y, x, copies.weight.t().to(x.dtype), out=y)
        return y.view(*shape, self.out_features)

    @property
    def is_summed(self) -> bool:
        """Whether the copy of the weight is S. S cannot apply dropout to A's inputs."""
        return self.use_summed_form and not self.config.lora_dropout

    @torch.no_grad()
    def copies(self, dtype: torch.dtype) -> LoRACopies:
        """Return the buffers within `hold_copies`, or else new copies in `dtype`."""
        if self.uses_copies:
            return LoRACopies(self.weight_copy, self.bias_copy, self.A_copy, self.scaled_B_copy)
        scaled_B = (self.scaling * self.lora_B).t()
        if scaled_B.device.type == "cpu":
            scaled_B = scaled_B.contiguous()
        return LoRACopies(self.matrix(), *(t.to(dtype) for t in (self.bias, self.lora_A, scaled_B)))

    def make_buffers(self, dtype: torch.dtype) -> None:
        """Register buffers for the copies. CUDA graphs need them to stay at their addresses."""
        for name, value in self.copies(dtype)._asdict().items():
            # A frozen W that takes no more bits needs no copy. It is cast where it is used.
            is_copy = name != "weight" or self.is_summed or value.itemsize > dtype.itemsize
            buffer = value.to(dtype, copy=True) if is_copy else value
            self.register_buffer(f"{name}_copy", buffer, persistent=False)

    def matrix(self) -> Tensor:  # (out, in)
        return self.weight.t() if self.is_conv1d else self.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, in fp32, and drop lora_A and lora_B."""
        update = self.scaling * self.lora_B.float() @ self.lora_A.float()
        self.weight.copy_(self.weight.float() + (update.t() if self.is_conv1d else update))
        del self.lora_A, self.lora_B
        self._buffers.clear()  # the copies
        self.is_merged = True


def lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers with LoRA that are not merged, by name."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, LoRALinear) and not m.is_merged}


@contextmanager
def hold_copies(linears: list[LoRALinear], dtype: torch.dtype | None) -> Iterator[None]:
    """Copy each layer's weights to `dtype` (None: that of A), and multiply by the copies until the
    context ends. In the summed form, the copy of W is W + scaling * B A. Layers whose W or bias is
    trained are left alone.
    """
    linears = [m for m in linears if not (m.weight.requires_grad or m.bias.requires_grad)]
    update_copies(linears, dtype)
    for linear in linears:
        linear.uses_copies = True
    try:
        yield
    finally:
        for linear in linears:
            linear.uses_copies = False


@torch.no_grad()
def update_copies(linears: list[LoRALinear], dtype: torch.dtype | None) -> None:
    """Copy A, s B' and S. Layers share kernels, because launching one for each layer would take
    longer than running them. What is frozen is copied again only if it was changed.
    """
    for linear in linears:
        copy_dtype = dtype or linear.lora_A.dtype
        versions = linear.weight._version, linear.bias._version  # noqa: SLF001
        if linear.copied != (copy_dtype, linear.is_summed, versions):
            linear.make_buffers(copy_dtype)
            linear.copied = copy_dtype, linear.is_summed, versions

    def key(linear: LoRALinear) -> tuple:
        return linear.matrix().shape, linear.lora_A.shape, linear.scaling, linear.is_summed

    for group in batches_alike(linears, key, SUM_ELEMENTS):
        update_group(group)


def update_group(linears: list[LoRALinear]) -> None:
    """Update the copies of layers with the same shapes and settings."""
    A = torch.stack([m.lora_A for m in linears])  # (n, r, in)
    scaled_B = linears[0].scaling * torch.stack([m.lora_B for m in linears])  # (n, out, r)
    torch._foreach_copy_([m.A_copy for m in linears], A.unbind())
    torch._foreach_copy_([m.scaled_B_copy for m in linears], scaled_B.mT.unbind())
    if linears[0].is_summed:
        weights = torch.stack([m.matrix() for m in linears]).to(A.dtype)
        # Under autocast the sum would be rounded to 16 bits, and W would swallow small updates.
        with torch.autocast(A.device.type, enabled=False):
            sums = torch.baddbmm(weights, scaled_B, A).unbind()
        torch._foreach_copy_([m.weight_copy for m in linears], sums)


def cast_frozen_weights(model: GPT, dtype: torch.dtype) -> None:
    """Store the frozen embedding, head and linear weights in `dtype`. Layers cast their weight to
    the dtype of their input. Biases, LayerNorms and wpe, under 1% of the model, stay in fp32.
    """
    for module in model.modules():
        is_embedding = module is model.transformer.wte
        if (is_embedding or isinstance(module, nn.Linear)) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)
            # LoRALinear casts by itself.
            if isinstance(module, nn.Linear) and not isinstance(module, LoRALinear):
                module.forward = partial(frozen_linear, module)  # type: ignore[method-assign]  # for this instance


def frozen_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    x = x.to(matmul_dtype(x))
    return F.linear(x, linear.weight.to(x.dtype), linear.bias)


def convertible_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers without LoRA, except the head: its weight is the
    embedding.
    """
    modules = [(n, m) for n, m in model.named_modules() if not isinstance(m, LoRALinear)]
    # Conv1D by name, because importing transformers is slow.
    linears = [n for n, m in modules if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return [name for name in linears if not name.endswith("lm_head")]


def convert_linear_layer_to_lora(
    model: Model, part_module_name: str = "h.", config: LoRAConfig = LoRAConfig()
) -> Model:
    """Add LoRA, in place, to the linear layers whose names contain one of the comma-separated parts
    ("attn.c_attn,mlp"). Raises ValueError if a part matches no layer, or if the rank exceeds the
    smaller dimension of a layer.
    """
    names = convertible_linears(model)
    parts = [part.strip() for part in part_module_name.split(",")]
    for part in parts:
        if not part or not any(part in name for name in names):
            kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})) or "none"
            raise ValueError(f"no linear layer has {part!r} in its name; the layers are {kinds}")
    chosen = [name for name in names if any(part in name for part in parts)]
    for name in chosen:
        if config.lora_dim > (limit := min(model.get_parameter(f"{name}.weight").shape)):
            raise ValueError(
                f"lora_dim is {config.lora_dim}, expected at most {limit}, the width of {name}"
            )
    replace_linears(model, dict.fromkeys(chosen, config))
    return model


def replace_linears(model: nn.Module, configs: dict[str, LoRAConfig]) -> None:
    """Add LoRA to the layers with these names."""
    for name, config in configs.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), config))


def only_optimize_lora_parameters(model: Model) -> Model:
    """Freeze everything but lora_A and lora_B."""
    trained = get_lora_state_dict(model)
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained)
    return model


def get_lora_state_dict(model: nn.Module) -> Tensors:
    """Return lora_A and lora_B of all layers by name, as in `lora.pt`. Raises ValueError if no
    layer has LoRA.
    """
    params = model.named_parameters()
    state = {name: p.detach() for name, p in params if name.endswith((".lora_A", ".lora_B"))}
    if not state:
        raise ValueError("the model has no LoRA; call convert_linear_layer_to_lora first")
    return state


def merge_lora(model: Model) -> Model:
    """Add every update to its weight, for good. `save_pretrained` then saves an ordinary model."""
    get_lora_state_dict(model)  # raises if there is nothing to merge
    for linear in lora_linears(model).values():
        linear.merge()
    return model
