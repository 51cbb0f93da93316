"""Decoding: prompts of different lengths in one batch, a repetition penalty, and more speed. On a
CPU, linear layers use all threads even for a few rows. On CUDA, all kernels of a token are launched
at once, as a CUDA graph.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, KVCache

FEW_ROWS = 8  # up to this many, reading the weight takes most of a linear layer's time


def speed_up_decoding(model: GPT) -> None:
    """Speed up a model, in place, that will only generate on its current device. Merge LoRA first,
    because layers with LoRA are left alone.
    """
    device_type = next(model.parameters()).device.type
    if device_type == "cuda":
        model.last_hidden = GraphedDecoder(model)  # type: ignore[method-assign]
    elif device_type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Linear) and not hasattr(module, "lora_A"):
                module.forward = partial(linear_few_rows, weight=module.weight, bias=module.bias)  # type: ignore[method-assign]  # for this instance


def force_prompts(idx: Tensor, logits: Tensor, prompts: list[list[int]]) -> Tensor:
    """While a row's prompt is longer than `idx` (B, T), force the next token of the prompt. So
    prompts of different lengths run in one batch, all from position 0 and without padding.
    """
    T = idx.size(1)
    if rows := [row for row, prompt in enumerate(prompts) if len(prompt) > T]:
        logits[rows] = -torch.inf
        logits[rows, [prompts[row][T] for row in rows]] = 0.0
    return logits


def penalize_repetition(idx: Tensor, logits: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `idx` (B, T) less likely: divide their logits (B, V) by `penalty` if they
    are positive, else multiply them, as in transformers (CTRL, arXiv:1909.05858).
    """
    seen = logits.gather(1, idx)
    return logits.scatter(1, idx, torch.where(seen < 0, seen * penalty, seen / penalty))


def linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but faster for at most FEW_ROWS rows on a CPU without gradients.

    For one row, MKL reads the weight on a single thread. For two to eight rows, it is also slower
    than the memory. We split the weight into one block of outputs per thread and multiply all
    blocks in one batched matmul. That reads the weight at the full speed of the memory.
    """
    threads, (out_features, in_features) = torch.get_num_threads(), weight.size()
    rows = x.numel() // in_features
    is_decoding = x.device.type == "cpu" and rows <= FEW_ROWS and not torch.is_grad_enabled()
    if not is_decoding or out_features % threads:
        return F.linear(x, weight, bias)
    # (threads, out / threads, in) @ (threads, in, rows)
    x_t = x.reshape(rows, in_features).t().expand(threads, -1, -1)
    y = torch.bmm(weight.view(threads, -1, in_features), x_t).view(out_features, rows).t()
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], out_features)


class StaticCache(KVCache):
    """A cache whose tensors never change their shape or address, as a CUDA graph requires. `append`
    writes one token at `position`, a tensor of shape (1,) on the device. It returns all block_size
    slots, including unused ones.
    """

    def __init__(self, batch_size: int, model: GPT, position: Tensor):
        config, weight = model.config, model.lm_head.weight
        super().__init__(config.block_size)
        self.position = position
        shape = batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k.index_copy_(2, self.position, k), self.v.index_copy_(2, self.position, v)


class TokenGraph:
    """The forward pass over one new token per row of a batch, captured as a CUDA graph."""

    def __init__(self, model: GPT, batch_size: int):
        self.model, device = model, model.lm_head.weight.device
        self.idx = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.caches = [StaticCache(batch_size, model, self.position) for _ in model.transformer.h]
        self.key_positions = torch.arange(model.config.block_size, device=device)
        self.capture()

    def compute_hidden(self) -> Tensor:
        mask = (self.key_positions <= self.position)[None, None, None]
        # For one query, the other backends leave most of a GPU idle. The list is copied only for
        # mypy, because a list[StaticCache] is not a list[KVCache].
        with sdpa_kernel(SDPBackend.MATH):
            return self.model.hidden(self.idx, [*self.caches], self.position, mask)[:, -1]

    def capture(self) -> None:
        device = self.idx.device
        side_stream = torch.cuda.Stream(device)  # libraries initialize here, before the capture
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            self.compute_hidden()
        torch.cuda.current_stream(device).wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self.compute_hidden()

    def load(self, caches: list[KVCache]) -> None:
        """Copy the keys and values of a prompt, without the unused slots: they may hold NaN, and
        masking does not remove it, because 0 * NaN is NaN.
        """
        for mine, cache in zip(self.caches, caches, strict=True):
            mine.k[:, :, : cache.length] = cache.k[:, :, : cache.length]
            mine.v[:, :, : cache.length] = cache.v[:, :, : cache.length]

    def __call__(self, idx: Tensor, position: int) -> Tensor:
        self.idx.copy_(idx)
        self.position.fill_(position)
        self.graph.replay()
        return self.hidden


class GraphedDecoder:
    """Replaces `GPT.last_hidden`. Of its `caches`, only the lengths stay current. A prompt runs
    through the ordinary forward pass. So does the half of the window that is computed again when
    the caches are full. Every other token replays a CUDA graph, because launching its kernels one
    by one takes longer than running them.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.graphs: dict[int, TokenGraph] = {}  # by batch size

    def __call__(self, idx: Tensor, caches: list[KVCache]) -> Tensor:
        if len(idx) not in self.graphs:
            self.graphs[len(idx)] = TokenGraph(self.model, len(idx))
        graph = self.graphs[len(idx)]
        if not caches or caches[0].length == self.model.config.block_size:
            # A new prompt, or full caches: this computes all keys and values and puts them in
            # `caches`. See GPT.last_hidden.
            x = GPT.last_hidden(self.model, idx, caches)
            graph.load(caches)
            return x
        # The graph has its own keys and values. In `caches`, only the lengths are up to date.
        x = graph(idx[:, -1:], caches[0].length)
        for cache in caches:
            cache.length += 1
        return x
