"""GPT-2: OpenAI's architecture, with module names that mirror Hugging Face's checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB_MULTIPLE = 128  # tensor cores want whole tiles, so 50257 tokens are padded to 50304
INIT_STD = 0.02  # as in transformers; OpenAI's code uses 0.01 for wpe


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 model. The defaults give the 124M model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5
    tie_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class KVCache:
    """The keys and values of one layer for all tokens so far, up to `block_size` of them."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0
        self.k = self.v = torch.empty(0)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values (B, nh, T, hs). Return all of them, (B, nh, length, hs)."""
        B, nh, T, hs = k.size()
        if self.length == 0:
            self.k, self.v = (t.new_empty(B, nh, self.block_size, hs) for t in (k, v))
        end = self.length + T
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.attend(self.c_attn(x), cache, mask)

    def attend(
        self, qkv: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for t in qkv.split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new token may attend to everything in the cache. Several tokens need the causal
        # mask; `GPT.hidden` only allows them while the cache is empty.
        is_causal = mask is None and (cache is None or T > 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The modules of GPT-2 under the names that transformers uses. `GPT.hidden` runs them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT(nn.Module):
    """GPT-2 with a language-model head.

    `wte` and `lm_head` have `padded_vocab_size` rows. The padding rows and their gradients are
    zero. Their logits are never returned, their ids never sampled, and they are not saved. The
    training loss is in engine/loss.py.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.name_or_path: str | None = None  # where the weights came from, as in transformers
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT":
        """Load a model from a Hugging Face folder or the hub (`gpt2`, `gpt2-xl`, ...) in fp32."""
        from engine.pretrained import load_pretrained

        return load_pretrained(name_or_path)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors, so that GPT2LMHeadModel can load them."""
        from engine.pretrained import save_pretrained

        save_pretrained(self, Path(folder))

    def tie_weights(self) -> None:
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        # GPT-2 paper, section 2.3. Every block adds to the residual stream twice.
        residual_std = INIT_STD / (2 * self.config.n_layer) ** 0.5
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):
                param.normal_(std=residual_std)
            elif param.dim() == 2:
                param.normal_(std=INIT_STD)
            elif name.endswith(".bias"):
                param.zero_()
            else:  # LayerNorm weight
                param.fill_(1.0)
        self.zero_vocab_padding()

    @torch.no_grad()
    def zero_vocab_padding(self) -> None:
        for table in (self.transformer.wte.weight, self.lm_head.weight):
            table[self.config.vocab_size :] = 0.0

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) for token ids (B, T)."""
        return self.logits(self.hidden(idx))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x)[..., : self.config.vocab_size]

    def hidden(
        self,
        idx: torch.Tensor,
        caches: list[KVCache] | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states (B, T, C) for token ids (B, T). Pass them to `logits`.

        With `caches`, one per layer, `idx` continues the cached tokens. The first call may pass any
        number of tokens, later calls one token each. `residual_dtype` casts the residual stream.
        `positions` (T) or (B, T) replaces 0, 1, 2, ... The boolean `mask` (B, 1, T, T), true if a
        token may attend to another, replaces the causal mask. Both together let several texts share
        a row.
        """
        T = idx.size(1)
        start = caches[0].length if caches else 0
        if start and T > 1:
            raise ValueError(f"{T} tokens at once after {start} cached ones, expected 1")
        if positions is None:
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens exceed block_size {self.config.block_size}")
            positions = torch.arange(start, start + T, device=idx.device)
        x = (self.transformer.wte(idx) + self.transformer.wpe(positions)).to(residual_dtype)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None, mask)
        return self.transformer.ln_f(x)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """Return prompts (B, T) plus up to `max_new_tokens` new ids; options as in `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        suppress_tokens: list[int] | None = None,
        process_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the next token ids (B, 1) of prompts (B, T) as they are sampled.

        Temperature 0 is greedy. A row that has produced `eos` yields only `eos` from then on, and
        generation ends when all rows have. `suppress_tokens` are never sampled. `process_logits`
        takes the ids so far and the logits (B, V), and returns other logits.
        """
        finished = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        caches: list[KVCache] = []
        for _ in range(max_new_tokens):
            logits = self.logits(self.last_hidden(idx, caches))
            if suppress_tokens:
                logits[:, suppress_tokens] = -torch.inf
            if process_logits:
                logits = process_logits(idx, logits)
            next_id = sample_next(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                next_id = next_id.masked_fill(finished, eos)
                finished |= next_id == eos
            yield next_id
            idx = torch.cat([idx, next_id], dim=1)
            if eos is not None and finished.all():
                break

    def last_hidden(self, idx: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        """Return the final hidden state (B, C) at the last token of `idx`. `caches`, empty at
        first, are updated in place.

        The model has learned one embedding per position, so the window cannot slide by one token.
        When the caches are full, we start again from the last block_size / 2 tokens. For example,
        with block_size 8 and a prompt of 6 tokens:

            [0 1 2 3 4 5]        one pass over the prompt, or over its last block_size tokens
            [0 1 2 3 4 5] 6 7    one pass per new token, until the caches are full
                      [5  6 7 8] one pass over the last half, now at positions 0 to 3
        """
        block_size = self.config.block_size
        if caches and caches[0].length < block_size:
            return self.hidden(idx[:, -1:], caches)[:, -1]
        window = max(1, block_size // 2) if caches else block_size
        caches[:] = [KVCache(block_size) for _ in self.transformer.h]
        return self.hidden(idx[:, -window:], caches)[:, -1]


def sample_next(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sample token ids (B, 1) from logits (B, V). `top_k` keeps only the most likely tokens. Of
    these, `top_p` keeps the smallest set whose total probability is at least top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # Make the largest logit 0, so that dividing by a small temperature does not overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        excluded = probs.cumsum(dim=-1) - probs >= top_p  # the tokens before it already reach top_p
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
