"""Fused linear cross-entropy: the loss of the head without the (B*T, V) logits."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from engine.data import IGNORE_INDEX, Batch
from model import GPT

# Rows whose logits exist at once. On a CPU 512 take 100 MB, and fewer would read and write the
# gradient of the head too often; elsewhere enough to keep the device busy.
CHUNK_ROWS = {"cpu": 512}
DEFAULT_CHUNK_ROWS = 4096


class HeadLoss(torch.autograd.Function):
    """The head and its summed cross-entropy in fp32, a chunk of rows at a time. The gradient of a
    chunk is computed while its logits exist, so none are stored or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which accepts any attribute
        x: torch.Tensor,  # (n, C)
        weight: torch.Tensor,  # (padded V, C)
        targets: torch.Tensor,  # (n)
        vocab_size: int,
        dtype: torch.dtype,  # of the matrix products
        with_grad: bool,
    ) -> torch.Tensor:
        head = weight.to(dtype)
        total = x.new_zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if with_grad else None
        needs_d_weight = with_grad and weight.requires_grad
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_d_weight else None
        chunk_rows = max(1, min(CHUNK_ROWS.get(x.device.type, DEFAULT_CHUNK_ROWS), len(x)))
        # One buffer for all chunks: on a CPU, touching new memory costs more than the softmax.
        logits_buffer = x.new_empty(chunk_rows, len(weight), dtype=dtype)
        log_probs_buffer = logits_buffer
        if dtype != torch.float32:
            log_probs_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                x_chunk = x[start : start + chunk_rows].to(dtype)
                ids = targets[start : start + chunk_rows, None]
                is_target = ids != IGNORE_INDEX
                ids = ids.clamp(min=0)
                logits = torch.mm(x_chunk, head.t(), out=logits_buffer[: len(ids)])
                logits[:, vocab_size:] = -torch.inf  # padding is not in the vocabulary
                log_probs = log_probs_buffer[: len(ids)]
                torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=log_probs)
                total -= (log_probs.gather(1, ids) * is_target).sum()
                if d_x is not None:
                    d_logits = torch.exp(log_probs, out=logits)
                    d_logits.scatter_add_(1, ids, d_logits.new_full(ids.shape, -1.0))
                    d_x[start : start + chunk_rows] = (d_logits @ head) * is_target
                    x_chunk = x_chunk * is_target  # cheaper than d_logits, V / C times as wide
                if d_weight is not None and dtype == torch.float32:
                    d_weight.addmm_(d_logits.t(), x_chunk)
                elif d_weight is not None:
                    d_weight += d_logits.t() @ x_chunk
        ctx.gradients = d_x, None if d_weight is None else d_weight.to(weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_x, d_weight), ctx.gradients = ctx.gradients, None  # scaled in place, so used only once
        return d_x.mul_(grad), None if d_weight is None else d_weight.mul_(grad), *[None] * 4


class SummedLoss(nn.Module):
    """The summed cross-entropy of a batch in nats, as a module that DDP can wrap.

    With `compile_trunk` everything but the head is compiled. The compiled code lives here only: the
    model that is evaluated, sampled and saved stays as it is.
    """

    def __init__(self, model: GPT, compile_trunk: bool = False):
        super().__init__()
        self.model = model
        # Shapes are static where all batches have one; else dynamic from the second length on.
        self.hidden = torch.compile(model.hidden) if compile_trunk else model.hidden

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.hidden(batch.idx).flatten(0, 1)
        targets = batch.targets.flatten()
        if batch.rows is not None:  # the head skips the others, which have no target
            x, targets = x[batch.rows], targets[batch.rows]
        device_type, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        weight, vocab_size = self.model.lm_head.weight, self.model.config.vocab_size
        return HeadLoss.apply(x, weight, targets, vocab_size, dtype, torch.is_grad_enabled())
