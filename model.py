"""GPT-2, exactly: OpenAI's architecture under the names that Hugging Face's checkpoints use."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import pretrained
from tokenizer import IGNORE_INDEX

VOCAB_MULTIPLE = 128  # tensor cores want the head's columns in whole tiles: 50257 becomes 50304
INIT_STD = 0.02  # GPT-2 paper, section 2.3, and OpenAI's code
FEW_ROWS = 8  # up to here `Linear` is bound by reading its weight, see there
# Tokens whose logits are alive at once in `loss`: 100 MB on a CPU, where fewer have the gradient of
# the head read and written too often; elsewhere enough to keep it busy.
LOSS_CHUNK_ROWS = {"cpu": 512}
LOSS_CHUNK_ROWS_ELSEWHERE = 4096
HEAD_COLUMNS = 2048  # of the vocabulary at once in `log_probs`: the logits stay in the cache


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M model."""

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
            raise ValueError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} equal heads; "
                f"choose n_embd as a multiple of n_head"
            )

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Linear(nn.Linear):
    """`nn.Linear`, faster where a decoding step on a CPU brings a handful of rows.

    There the work is reading the weight once. MKL reads it on one thread for one row, and badly
    for two to eight; a batch of row blocks, weight first, is read on all threads at full speed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.size(-1)
        if torch.is_grad_enabled() or x.device.type != "cpu" or rows > FEW_ROWS:
            return super().forward(x)
        blocks = torch.get_num_threads()
        if self.out_features % blocks:
            return super().forward(x)
        weight = self.weight.view(blocks, -1, self.in_features)
        x_t = x.reshape(rows, -1).t().expand(blocks, -1, -1)  # (blocks, in, rows)
        y = torch.bmm(weight, x_t).view(self.out_features, rows).t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


class KVCache:
    """One layer's keys and values of the tokens seen so far, up to `block_size` of them."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.length = 0
        self.k = self.v = torch.empty(0)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, nh, T, hs) new ones and return all, (B, nh, length, hs)."""
        B, nh, T, hs = k.size()
        if self.length == 0:
            self.k, self.v = (t.new_empty(B, nh, self.block_size, hs) for t in (k, v))
        end = self.length + T
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


def run(function: Callable, *args: object, recompute: bool) -> torch.Tensor:
    """`function(*args)`. With `recompute` the backward pass gets nothing but `args`, and computes
    what else it needs again: up to the last matrix product, whose output nobody asks for.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: torch.Tensor,
        norm: nn.Module,
        cache: KVCache | None = None,
        mask: torch.Tensor | None = None,
        light: bool = False,
    ) -> torch.Tensor:
        B, T, C = x.size()
        qkv = run(lambda x: self.c_attn(norm(x)), x, recompute=light)
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for t in qkv.split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        # A single new token may look at everything cached; several start from an empty cache.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, norm: nn.Module, light: bool = False) -> torch.Tensor:
        x = run(lambda x: self.c_fc(norm(x)), x, recompute=light)
        return run(lambda x: self.c_proj(F.gelu(x, approximate="tanh")), x, recompute=light)


class Block(nn.Module):
    """A transformer block. What it keeps for the backward pass is up to `recompute`: "none" keeps
    everything, "light" all but the outputs of LayerNorm and GELU, which cost next to nothing to
    compute again, "block" the inputs of attention and MLP only.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.recompute = "none"
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        light, whole = self.recompute == "light", self.recompute == "block"
        x = x + run(self.attn, x, self.ln_1, cache, mask, light, recompute=whole)
        return x + run(self.mlp, x, self.ln_2, light, recompute=whole)


class HeadLoss(torch.autograd.Function):
    """The head and its summed cross-entropy in fp32, so many rows at a time. A chunk's gradient is
    taken while its logits are there, so that nothing of them is kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's FunctionCtx, which takes any attribute
        x: torch.Tensor,  # (n, C)
        weight: torch.Tensor,  # (padded V, C)
        targets: torch.Tensor,  # (n)
        vocab_size: int,
        dtype: torch.dtype,  # of the matrix products
        with_grad: bool,
    ) -> torch.Tensor:
        weight_needs_grad = with_grad and weight.requires_grad
        head, total = weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if with_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        chunk_rows = LOSS_CHUNK_ROWS.get(x.device.type, LOSS_CHUNK_ROWS_ELSEWHERE)
        chunk_rows = max(1, min(chunk_rows, len(x)))
        # One piece of memory for all: touching a fresh one costs a CPU more than the softmax does.
        logits_memory = x.new_empty(chunk_rows, len(weight), dtype=dtype)
        in_place = dtype == torch.float32
        log_probs_memory = logits_memory if in_place else logits_memory.float()
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                x_chunk = x[start : start + chunk_rows].to(dtype)
                ids = targets[start : start + chunk_rows, None]
                counts, ids = ids != IGNORE_INDEX, ids.clamp(min=0)
                logits = torch.mm(x_chunk, head.t(), out=logits_memory[: len(ids)])
                logits[:, vocab_size:] = -torch.inf  # the padding is not among the choices
                log_probs = log_probs_memory[: len(ids)]
                torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=log_probs)
                total -= (log_probs.gather(1, ids) * counts).sum()
                if d_x is not None:
                    d_logits = torch.exp(log_probs, out=logits)
                    d_logits.scatter_add_(1, ids, d_logits.new_full(ids.shape, -1.0))
                    d_x[start : start + chunk_rows] = (d_logits @ head) * counts
                    x_chunk = x_chunk * counts  # cheaper than d_logits, which is 65 times as wide
                if d_weight is not None and dtype == torch.float32:
                    d_weight.addmm_(d_logits.t(), x_chunk)
                elif d_weight is not None:
                    d_weight += d_logits.t() @ x_chunk
        ctx.gradients = d_x, d_weight if d_weight is None else d_weight.to(weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_x, d_weight), ctx.gradients = ctx.gradients, None  # scaled in place, so good only once
        return d_x.mul_(grad), d_weight if d_weight is None else d_weight.mul_(grad), *[None] * 4


class Transformer(nn.Module):
    """All but the head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT(nn.Module):
    """GPT-2. `wte` and `lm_head` have `padded_vocab_size` rows; those past `vocab_size` are zero,
    get no gradient, and are neither returned nor sampled nor saved.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.name_or_path: str | None = None  # where the weights came from, as in transformers
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self._tie_weights()
        self._init_weights()

    def _tie_weights(self) -> None:
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def _init_weights(self) -> None:
        residual_std = INIT_STD / (2 * self.config.n_layer) ** 0.5  # two additions a block
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):
                param.normal_(std=residual_std)
            elif param.dim() == 2:
                param.normal_(std=INIT_STD)
            elif name.endswith(".bias"):
                param.zero_()
            else:  # the weight of a LayerNorm
                param.fill_(1.0)
        self._zero_vocab_padding()

    def _zero_vocab_padding(self) -> None:
        for table in (self.transformer.wte.weight, self.lm_head.weight):
            table.data[self.config.vocab_size :] = 0.0

    def hidden(
        self,
        idx: torch.Tensor,
        caches: list[KVCache] | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) to the head's input (B, T, C). With `caches` (one a layer) the tokens
        are those after the cached ones: any number into empty caches, then one at a time.

        `positions` (T) or (B, T) and the boolean `mask` (B, 1, T, T), true where a token may look
        at another, stand in for 0, 1, 2, ... and the causal mask; several texts can share a row.
        """
        T = idx.size(1)
        start = caches[0].length if caches else 0
        if start and T > 1:
            raise ValueError(f"{T} tokens at once after {start} cached ones, expected 1")
        if positions is None and start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit the model's block_size {self.config.block_size}"
            )
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V)."""
        return self._logits(self.hidden(idx))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x)[..., : self.config.vocab_size]

    def loss(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor,
        reduction: str = "mean",
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy in nats of `targets` (B, T) after `idx` (B, T), as "mean" or "sum" over the
        targets that are not -100. Where these are few, `rows` (n), their positions in the flat
        targets, spares the head all others.
        """
        return self.loss_from_hidden(self.hidden(idx), targets, reduction, rows)

    def loss_from_hidden(
        self,
        x: torch.Tensor,
        targets: torch.Tensor,
        reduction: str = "mean",
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`loss` from the head's input (B, T, C); the (B·T, V) logits never exist at once."""
        device_type = x.device.type
        x, targets = x.flatten(0, 1), targets.flatten()
        if rows is not None:
            x, targets = x[rows], targets[rows]
        cast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if cast else x.dtype
        total = HeadLoss.apply(
            x, self.lm_head.weight, targets, self.config.vocab_size, dtype, torch.is_grad_enabled()
        )
        return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()

    @torch.no_grad()
    def log_probs(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        nodes: torch.Tensor,
        which: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (N) in nats of the tokens `targets` (N), and whether each is the
        likeliest (N). Token n comes after token `nodes[which[n]]` of `idx` (B, T) read row by row;
        `positions` and `mask` are those of `hidden`. Logits are not rounded by autocast.
        """
        x = self.hidden(idx, positions=positions, mask=mask).flatten(0, 1)[nodes]  # (P, C)
        weight = self.lm_head.weight[: self.config.vocab_size]
        x = x.to(weight.dtype)
        target_logits = torch.zeros(len(targets), device=x.device)
        sums, maxima = [], []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(weight), HEAD_COLUMNS):
                logits = F.linear(x, weight[start : start + HEAD_COLUMNS]).float()
                sums.append(logits.logsumexp(-1))
                maxima.append(logits.amax(-1))
                column, last = targets - start, logits.size(1) - 1
                found = logits[which, column.clamp(0, last)]
                inside = (column >= 0) & (column <= last)
                target_logits = torch.where(inside, found, target_logits)
        log_sum, maximum = torch.stack(sums).logsumexp(0), torch.stack(maxima).amax(0)
        return target_logits - log_sum[which], target_logits == maximum[which]

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """Continue the prompts (B, T) to (B, T + n), n ≤ max_new_tokens; options as in `stream`."""
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
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """The next ids (B, 1) of the prompts (B, T), one step after another as they are drawn.
        Temperature 0 is greedy. A row that has produced `eos` is filled up with it; all rows there
        end the generation.
        """
        finished = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        caches: list[KVCache] = []
        for _ in range(max_new_tokens):
            logits = self._logits(self._extend(idx, caches))
            next_id = sample_next(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                next_id = next_id.masked_fill(finished, eos)
                finished |= next_id == eos
            yield next_id
            idx = torch.cat([idx, next_id], dim=1)
            if eos is not None and finished.all():
                break

    def _extend(self, idx: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        """The head's input (B, C) after the last token of `idx`, through `caches` where they reach.

        GPT-2 has learnt positions, so a full window cannot slide by one: it restarts from the last
        half window, which costs one long pass every block_size / 2 tokens. The prompt itself may
        use the window whole.
        """
        block_size = self.config.block_size
        if caches and caches[0].length < block_size:
            return self.hidden(idx[:, -1:], caches)[:, -1]
        window = max(1, block_size // 2) if caches else block_size
        caches[:] = [KVCache(block_size) for _ in self.transformer.h]
        return self.hidden(idx[:, -window:], caches)[:, -1]

    def hf_tensors(self, params: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The parameters (this model's, or copies of them) as Hugging Face stores them: the linears
        of the blocks transposed (its Conv1D), the vocabulary without padding. Views, so they serve
        to read and to write.
        """
        tensors = {}
        for name in dict(self.named_parameters()):
            if not name.endswith((".weight", ".bias")):
                raise ValueError(
                    f"{name} is no parameter of GPT-2; merge_lora or save_adapter come first"
                )
            tensor = params[name] if params else self.get_parameter(name).data
            if name in ("transformer.wte.weight", "lm_head.weight"):
                tensor = tensor[: self.config.vocab_size]
            elif name.startswith("transformer.h.") and tensor.dim() == 2:
                tensor = tensor.t()
            tensors[name] = tensor
        return tensors

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors, which transformers opens as GPT2LMHeadModel."""
        pretrained.write_folder(Path(folder), asdict(self.config), self.hf_tensors())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT":
        """The fp32 model of a Hugging Face folder or hub name (`gpt2`, `gpt2-xl`, ...). ValueError
        names the tensor that is missing, unexpected or misshapen, or the option not supported.
        """
        folder = pretrained.find_folder(name_or_path)
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            model = cls(GPTConfig(**pretrained.read_config(folder)))
        model.to_empty(device="cpu")
        model._tie_weights()
        model._zero_vocab_padding()
        pretrained.read_weights_into(model.hf_tensors(), folder)
        local = Path(name_or_path).exists()
        model.name_or_path = str(Path(name_or_path).resolve() if local else name_or_path)
        return model


def sample_next(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw token ids (B, 1) from logits (B, V): the `top_k` likeliest, and of these the smallest
    set that holds probability `top_p`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # The largest becomes 0, so that nothing overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what stands before it is enough
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
