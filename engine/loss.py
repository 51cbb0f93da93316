"""Fused linear cross-entropy: the loss of the head without the (B*T, V) logits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.data import Batch
from engine.tensors import matmul_dtype, product_in_fp32
from model import GPT

# How many rows of logits to compute at a time. On a CPU, 512 rows take 100 MB. Smaller chunks fit
# the cache better, but add to the gradient of the head more often, so we use them only without that
# gradient. Elsewhere, a chunk has to keep the device busy.
CPU_CHUNK_ROWS, CPU_SMALL_CHUNK_ROWS = 512, 256
DEFAULT_CHUNK_ROWS = 4096
# If the head has a narrower dtype than the matmuls, cast this many rows at a time: 25 MB for 124M.
CAST_ROWS = 8192
# For 16-bit matmuls on a CPU, oneDNN keeps a kernel for each number of rows. This number varies if
# only completions are targets. So we add rows of zeros up to a multiple.
CPU_ROW_MULTIPLE = 64
CPU_SOFTMAX_ROWS = 32  # 6 MB in fp32: small enough to stay in the cache from pass to pass

WeightParts = tuple[Tensor, ...]  # the weight of the head, split by rows
CrossEntropy = Callable[[Tensor, Tensor, int], Tensor]


def cross_entropy_(logits: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Turn `logits` (n, padded V) into their gradient in place. Return the log-probabilities (n, 1)
    of `ids` (n, 1) in fp32.
    """
    logits[:, vocab_size:] = -torch.inf  # padding is not in the vocabulary
    n_rows = CPU_SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    target_log_probs = []
    for rows, row_ids in zip(logits.split(n_rows), ids.split(n_rows), strict=True):
        out = rows if rows.dtype == torch.float32 else None  # fp32 logits are overwritten
        log_probs = torch.log_softmax(rows, dim=-1, dtype=torch.float32, out=out)
        target_log_probs.append(log_probs.gather(1, row_ids))
        torch.exp(log_probs, out=rows)
    return subtract_targets_(logits, ids, torch.cat(target_log_probs))


def subtract_targets_(probs: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Subtract 1 from the probabilities of `ids`. Return `log_probs`, their logarithms."""
    # Compute p - 1 from log p in fp32, because p near 1 has been rounded to bf16.
    probs.scatter_(1, ids, log_probs.expm1().to(probs.dtype))
    return log_probs


def compile_cross_entropy(device: torch.device) -> CrossEntropy:
    """Return a `cross_entropy_` for 16-bit logits: a Triton kernel on CUDA, else compiled code."""
    if device.type == "cuda":
        from engine.triton_loss import triton_cross_entropy_  # other devices may lack Triton

        return triton_cross_entropy_

    @torch.compile
    def normalize_(logits: Tensor, vocab_size: int) -> Tensor:
        logits[:, vocab_size:] = -torch.inf
        log_sum_exp = logits.float().logsumexp(dim=-1, keepdim=True)
        logits.copy_((logits.float() - log_sum_exp).exp())
        return log_sum_exp

    def cross_entropy(logits: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
        target_logits = logits.gather(1, ids).float()
        return subtract_targets_(logits, ids, target_logits - normalize_(logits, vocab_size))

    return cross_entropy


class HeadLoss(torch.autograd.Function):
    """The head and its summed cross-entropy in fp32, a chunk of rows at a time.

    The logits of a whole batch, (n, padded V), would take more memory than the model. So we compute
    them for one chunk of rows at a time, with their gradient right away:

        logits   = x W'                   (rows, V)
        p        = softmax(logits)        (rows, V), overwrites the logits
        loss    += -log p[target]
        d_logits = p - one_hot(target)    (rows, V), overwrites p
        d_x      = d_logits W             (rows, C)
        d_W     += d_logits' x            (V, C)

    Nothing is computed twice: backward only multiplies d_x and d_W by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which accepts any attribute
        x: Tensor,  # (n, C), in the dtype for the matmuls
        weight: Tensor,  # (padded V, C)
        targets: Tensor,  # (n), without IGNORE_INDEX
        vocab_size: int,
        with_grad: bool,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        if x.device.type == "cpu" and x.dtype != torch.float32:
            # Rows of zeros have logits of zero. Below, `cross_entropy` skips them, so these zeros
            # remain as their gradient.
            x = F.pad(x, (0, 0, 0, -len(x) % CPU_ROW_MULTIPLE))
        needs_d_weight = with_grad and weight.requires_grad
        weight_parts = split_head(weight, x.dtype)
        chunk_rows = choose_chunk_rows(len(x), x.device, needs_d_weight)
        # One buffer for all chunks: on a CPU, touching new memory costs more than the softmax.
        buffer = x.new_empty(chunk_rows, len(weight))
        total = x.new_zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if with_grad else None
        d_weight = None

        with torch.autocast(x.device.type, enabled=False):
            # Even if x is empty, run once, so that the gradients are zeros rather than None.
            for start in range(0, max(1, len(x)), chunk_rows):
                rows = slice(start, start + chunk_rows)
                x_chunk, ids = x[rows], targets[rows, None]
                logits = buffer[: len(x_chunk)]
                multiply_by_head(x_chunk, weight_parts, out=logits)
                total -= cross_entropy(logits[: len(ids)], ids, vocab_size).sum()
                d_logits = logits  # overwritten by `cross_entropy`
                if d_x is None:
                    continue
                multiply_gradient(d_logits, weight_parts, out=d_x[rows])
                if needs_d_weight:
                    d_weight = add_product(d_weight, d_logits.t(), x_chunk)

        d_x = None if d_x is None else d_x[: len(targets)]
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        ctx.gradients = d_x, d_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (d_x, d_weight), ctx.gradients = ctx.gradients, None  # scaled in place, so used only once
        d_weight = None if d_weight is None else d_weight.mul_(grad)
        return d_x.mul_(grad), d_weight, None, None, None, None


def choose_chunk_rows(n: int, device: torch.device, needs_d_weight: bool) -> int:
    """Return how many of n rows to process at a time."""
    cpu_rows = CPU_CHUNK_ROWS if needs_d_weight else CPU_SMALL_CHUNK_ROWS
    return max(1, min(cpu_rows if device.type == "cpu" else DEFAULT_CHUNK_ROWS, n))


def split_head(weight: Tensor, dtype: torch.dtype) -> WeightParts:
    """Return the weight of the head (padded V, C) in `dtype`, as a single part. But if the weight
    is stored in fewer bits, split it into parts that are cast one by one when they are used, so
    that there is never a complete copy in `dtype`.
    """
    if weight.dtype.itemsize < dtype.itemsize:
        return weight.split(CAST_ROWS)
    return (weight.to(dtype),)


def multiply_by_head(x: Tensor, weight_parts: WeightParts, out: Tensor) -> None:
    """out = x W'. Each part of the weight gives some columns of the logits."""
    columns = out.split([len(part) for part in weight_parts], dim=1)
    for part, logits in zip(weight_parts, columns, strict=True):
        torch.mm(x, part.to(x.dtype).t(), out=logits)


def multiply_gradient(d_logits: Tensor, weight_parts: WeightParts, out: Tensor) -> None:
    """out = d_logits W"""
    columns = d_logits.split([len(part) for part in weight_parts], dim=1)
    for i, (part, d_columns) in enumerate(zip(weight_parts, columns, strict=True)):
        out.addmm_(d_columns, part.to(d_columns.dtype), beta=int(i > 0))  # 0: overwrite


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to `total` in place, in fp32; None starts a new total. On CUDA, the product of
    16-bit matrices is not rounded to 16 bits first.
    """
    if total is None:
        return product_in_fp32(a, b)
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(a @ b)


class SummedLoss(nn.Module):
    """The summed cross-entropy of a batch in nats, as a module that DDP can wrap.

    The trunk is everything but the head. Compiled code is kept here. The model itself only gets
    hooks on its LayerNorms.
    """

    def __init__(self, model: GPT, *, trunk_mode: str | None = None, compile_head: bool = False):
        """`trunk_mode` is a mode of torch.compile, or None to run the trunk eagerly. In mode
        reduce-overhead, training replays a CUDA graph for each shape.
        """
        super().__init__()
        self.model, self.use_graphs = model, trunk_mode == "reduce-overhead"
        self.trunk = self.evaluation_trunk = self.run_trunk
        if trunk_mode:
            # torch.compile assumes a static length. If that changes, it compiles for a dynamic one.
            self.trunk = torch.compile(self.run_trunk, mode=trunk_mode)
            self.evaluation_trunk = torch.compile(self.run_trunk)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(cast_to_weight_dtype)
        self.cross_entropy_for_16_bits: CrossEntropy = cross_entropy_
        if compile_head:
            self.cross_entropy_for_16_bits = compile_cross_entropy(model.lm_head.weight.device)

    def run_trunk(self, idx: Tensor) -> Tensor:
        """Return the final hidden states (B*T, C) in the dtype of the head's matmuls. If that is
        bf16, the residual stream is in bf16, too.
        """
        dtype = matmul_dtype(self.model.transformer.wpe.weight)
        residual_dtype = dtype if dtype == torch.bfloat16 else None
        return self.model.hidden(idx, residual_dtype=residual_dtype).flatten(0, 1).to(dtype)

    def forward(self, batch: Batch) -> Tensor:
        with_grad = torch.is_grad_enabled()
        if self.use_graphs:  # compile once for all lengths; dynamic=True would include floats
            torch._dynamo.maybe_mark_dynamic(batch.idx, 1)  # noqa: SLF001  # no public name
        x = (self.trunk if with_grad else self.evaluation_trunk)(batch.idx)
        targets = batch.targets.flatten()
        if batch.target_positions is not None:  # skip the head for rows without a target
            x = x.index_select(0, batch.target_positions)  # faster backward than x[positions]
            targets = targets[batch.target_positions]
        is_fp32 = x.dtype == torch.float32
        cross_entropy = cross_entropy_ if is_fp32 else self.cross_entropy_for_16_bits
        weight, vocab_size = self.model.lm_head.weight, self.model.config.vocab_size
        return HeadLoss.apply(x, weight, targets, vocab_size, with_grad, cross_entropy)


def cast_to_weight_dtype(layer_norm: nn.LayerNorm, args: tuple[Tensor]) -> Tensor:
    """A forward pre-hook: cast the input to the dtype of the weight, as autocast does on CUDA."""
    return args[0].to(layer_norm.weight.dtype)
