"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model import GPT, Block, KVCache


def apply_recompute(model: GPT, mode: str) -> None:
    """Replace the forward of each block. `none` stores all activations. `light` recomputes the
    outputs of LayerNorm and GELU, which costs almost nothing. `block` stores only the inputs of
    attention and MLP.
    """
    forwards = {"light": forward_light, "block": forward_block}
    for block in model.modules():
        if isinstance(block, Block) and mode in forwards:
            # deepcopy copies the arguments of a partial, so a copied block runs its own layers. It
            # would not copy a closure.
            block.forward = partial(forwards[mode], block)  # type: ignore[method-assign]


def forward_light(
    block: Block, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`Block.forward` without storing the outputs of LayerNorm and GELU."""
    attn, mlp = block.attn, block.mlp
    x = x + attn.attend(recompute(block.ln_1, attn.c_attn, x), cache, mask)
    return x + recompute(mlp.gelu, mlp.c_proj, recompute(block.ln_2, mlp.c_fc, x))


def forward_block(block: Block, x: torch.Tensor, *cache_and_mask: Any) -> torch.Tensor:
    """`Block.forward`, storing only the inputs of attention and MLP."""
    x = x + recompute(block.ln_1, block.attn, x, *cache_and_mask)
    return x + recompute(block.ln_2, block.mlp, x)


def recompute(first: nn.Module, second: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """second(first(x), *args), recomputed from x in the backward pass."""

    def run_both(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return second(first(x), *args)

    if not torch.is_grad_enabled():
        return run_both(x, *args)
    # Backward does not need the output of the last matmul. An eager checkpoint stops recomputing
    # before it, but a compiled one does not. So if `second` is a single linear layer, compiled code
    # stores its output rather than computing it twice.
    if isinstance(second, nn.Linear) and torch.compiler.is_compiling():
        return checkpoint(run_both, x, *args, use_reentrant=False, context_fn=keep_matmuls_contexts)
    return checkpoint(run_both, x, *args, use_reentrant=False)


def keep_matmuls_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """A `context_fn` for `checkpoint`: recompute everything but matmuls."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default])
