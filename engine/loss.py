"""Fused linear cross-entropy: the loss of the head without the (B*T, V) logits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engine.data import Batch
from engine.tensors import matmul_dtype
from model import GPT

# Rows whose logits exist at once. On a CPU 512 take 100 MB, and fewer would read and write the
# gradient of the head too often, where it has one. Elsewhere enough to keep the device busy.
CPU_CHUNK_ROWS, CPU_CHUNK_ROWS_NO_GRAD = 512, 256
DEFAULT_CHUNK_ROWS = 4096
CAST_ROWS = 8192  # of a head in fewer bits than the products, cast at once: 25 MB at 124M
# In 16 bits on a CPU, oneDNN makes and keeps kernels for each number of rows, and batches of
# completions have many. So the number of rows is rounded up, with rows of zeros.
CPU_ROW_MULTIPLE = 64
CPU_SOFTMAX_ROWS = 32  # at once: 6 MB in fp32, which stay in the cache from one pass to the next

Softmax = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def softmax_(logits: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Turn `logits` (n, padded V) into probabilities, in place; return the log-probabilities (n, 1)
    of `ids` (n, 1) in fp32.
    """
    logits[:, vocab_size:] = -torch.inf  # padding is not in the vocabulary
    n_rows = CPU_SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    target_log_probs = []
    for rows, row_ids in zip(logits.split(n_rows), ids.split(n_rows), strict=True):
        in_place = rows if rows.dtype == torch.float32 else None
        log_probs = torch.log_softmax(rows, dim=-1, dtype=torch.float32, out=in_place)
        target_log_probs.append(log_probs.gather(1, row_ids))
        torch.exp(log_probs, out=rows)
    return torch.cat(target_log_probs)


def compile_softmax() -> Softmax:
    """`softmax_` for 16-bit logits as one kernel, which reads them twice and writes them once."""

    def normalize_(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        logits[:, vocab_size:] = -torch.inf
        log_sum_exp = logits.float().logsumexp(dim=-1, keepdim=True)
        logits.copy_((logits.float() - log_sum_exp).exp())
        return log_sum_exp

    compiled = torch.compile(normalize_, options={"coordinate_descent_tuning": True})

    def softmax(logits: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        target_logits = logits.gather(1, ids).float()  # inside, it would make two kernels of one
        return target_logits - compiled(logits, vocab_size)

    return softmax


class HeadLoss(torch.autograd.Function):
    """The head and its summed cross-entropy in fp32, a chunk of rows at a time. The gradient of a
    chunk is computed while its logits exist, so none are stored or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which accepts any attribute
        x: torch.Tensor,  # (n, C)
        weight: torch.Tensor,  # (padded V, C)
        targets: torch.Tensor,  # (n), without IGNORE_INDEX
        vocab_size: int,
        dtype: torch.dtype,  # of the matrix products
        with_grad: bool,
        softmax: Softmax,
    ) -> torch.Tensor:
        if x.device.type == "cpu" and dtype != torch.float32:
            x = F.pad(x, (0, 0, 0, -len(x) % CPU_ROW_MULTIPLE))
        is_cast = weight.dtype.itemsize < dtype.itemsize
        pieces = weight.split(CAST_ROWS) if is_cast else (weight.to(dtype),)
        total = x.new_zeros((), dtype=torch.float32)
        d_x = torch.zeros_like(x) if with_grad else None
        needs_d_weight = with_grad and weight.requires_grad
        d_weight = None
        chunk_rows = DEFAULT_CHUNK_ROWS
        if x.device.type == "cpu":
            chunk_rows = CPU_CHUNK_ROWS if needs_d_weight else CPU_CHUNK_ROWS_NO_GRAD
        chunk_rows = max(1, min(chunk_rows, len(x)))
        # One buffer for all chunks: on a CPU, touching new memory costs more than the softmax.
        logits_buffer = x.new_empty(chunk_rows, len(weight), dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, max(1, len(x)), chunk_rows):
                x_chunk = x[start : start + chunk_rows].to(dtype)
                ids = targets[start : start + chunk_rows, None]
                logits = logits_buffer[: len(x_chunk)]
                columns = logits.split([len(piece) for piece in pieces], dim=1)
                for piece, out in zip(pieces, columns, strict=True):
                    torch.mm(x_chunk, piece.to(dtype).t(), out=out)
                log_probs = softmax(logits[: len(ids)], ids, vocab_size)
                total -= log_probs.sum()
                if d_x is not None:
                    # p - 1 in fp32: in bf16, p near 1 is already rounded.
                    d_logits = logits.scatter_(1, ids, log_probs.expm1().to(dtype))
                    for piece, d_out in zip(pieces, columns, strict=True):
                        d_x[start : start + chunk_rows] += d_out @ piece.to(dtype)
                if needs_d_weight:
                    d_weight = add_product(d_weight, d_logits.t(), x_chunk)
        d_x = None if d_x is None else d_x[: len(targets)]
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        ctx.gradients = d_x, d_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_x, d_weight), ctx.gradients = ctx.gradients, None  # scaled in place, so used only once
        return d_x.mul_(grad), None if d_weight is None else d_weight.mul_(grad), *[None] * 5


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, or `total` plus a @ b in its memory, in fp32. On CUDA a product of 16-bit matrices is
    not rounded to 16 bits.
    """
    if a.device.type == "cuda" and a.dtype != torch.float32:
        if total is None:
            total = a.new_zeros(len(a), b.size(1), dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:
        return (a @ b).float()
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(a @ b)


class SummedLoss(nn.Module):
    """The summed cross-entropy of a batch in nats, as a module that DDP can wrap.

    The trunk is everything but the head. The compiled code lives here only: the model that is
    evaluated, sampled and saved stays as it is.
    """

    def __init__(self, model: GPT, *, compile_trunk: bool = False, compile_head: bool = False):
        super().__init__()
        self.model = model
        # Shapes are static where all batches have one; else dynamic from the second length on.
        self.hidden = torch.compile(model.hidden) if compile_trunk else model.hidden
        self.softmax_in_16_bits = compile_softmax() if compile_head else softmax_

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.hidden(batch.idx).flatten(0, 1)
        targets = batch.targets.flatten()
        if batch.rows is not None:  # the head skips the others, which have no target
            x, targets = x[batch.rows], targets[batch.rows]
        dtype = matmul_dtype(x)
        softmax = softmax_ if dtype == torch.float32 else self.softmax_in_16_bits
        weight, vocab_size = self.model.lm_head.weight, self.model.config.vocab_size
        with_grad = torch.is_grad_enabled()
        return HeadLoss.apply(x, weight, targets, vocab_size, dtype, with_grad, softmax)
