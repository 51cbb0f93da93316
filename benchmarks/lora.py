"""LoRA at GPT-2 124M against full fine-tuning and against peft, side by side: time and memory.

    python benchmarks/lora.py                   # the comparison, one thread, fp32: 20 minutes
    python benchmarks/lora.py --table true      # ranks 1 to 64, merged, full: times and memory
    python benchmarks/lora.py --table true --device cuda --precision bf16 --batch_size 16

Forward and backward are timed together, because a chunked loss does gradient work in its forward
pass. The contenders take turns; medians are compared. Memory on a CPU is the sum of all tensors
that are alive, counted at every operation; on CUDA what the allocator says.
"""

import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from lora import convert_linear_layer_to_lora, merge_lora, only_optimize_lora_parameters
from model import GPT, Block, GPTConfig
from runtime import autocast_dtype
from step import BETAS

LORA_TARGETS = ["c_attn", "c_proj", "c_fc"]


@dataclass(frozen=True)
class BenchmarkConfig:
    table: bool = False
    """print time and memory of ranks 1 to 64, merged and full"""
    rounds: int = 3
    """times that each contender is measured"""
    n_layer: int = 12
    """of the model; the width is 768"""
    batch_size: int = 4
    """sequences, for --table"""
    length: int = 128
    """tokens in each, for --table"""
    recompute: Literal["none", "light", "block"] = "light"
    """of our LoRA, for --table"""
    threads: int = 1
    """CPU threads"""
    device: str = "cpu"
    """cpu or cuda"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast"""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is on, as long as they live."""

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in before:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or not storage.nbytes():
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Contender:
    """A model, its loss, and the optimizer of what it trains."""

    def __init__(self, model: torch.nn.Module, config: BenchmarkConfig):
        self.model, self.device = model.train().to(config.device), config.device
        self.dtype = autocast_dtype(config.precision, torch.device(config.device))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=BETAS, fused=True)

    def loss(self, idx: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            if isinstance(self.model, GPT):
                return self.model.loss(idx, idx)
            return self.model(idx, labels=idx).loss

    def forward_backward(self, idx: torch.Tensor) -> tuple[float, float]:
        """Seconds of each. The gradients are gone afterwards."""
        started = self._now()
        loss = self.loss(idx)
        between = self._now()
        loss.backward()
        ended = self._now()
        self.optimizer.zero_grad()
        return between - started, ended - between

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, idx: torch.Tensor) -> tuple[int, int]:
        """Bytes alive at the peak of a step, optimizer state included; and of these, what a forward
        pass keeps for its backward pass.
        """
        self.loss(idx).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = self.loss(idx)
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            self.optimizer.step()
            peak = torch.cuda.max_memory_allocated()
        else:
            states = [t for s in self.optimizer.state.values() for t in s.values()]
            with LiveBytes(*self.model.parameters(), *self.model.buffers(), *states) as live:
                before = live.now
                loss = self.loss(idx)
                kept = live.now - before
                loss.backward()
                self.optimizer.step()
            peak = live.peak
        self.optimizer.zero_grad()
        return peak, kept


def ours(kind: str, config: BenchmarkConfig, lora_dim: int = 8) -> Contender:
    """`kind` is what is trained and what is recomputed, as in "lora light"."""
    what, recompute = kind.split()
    model = GPT(GPTConfig(n_layer=config.n_layer))
    if what != "full":
        convert_linear_layer_to_lora(model, lora_dim=lora_dim)
        only_optimize_lora_parameters(model)
    if what == "merged":  # nothing is left to train; wpe gets a gradient so that one goes through
        merge_lora(model)
        model.transformer.wpe.weight.requires_grad_()
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
    return Contender(model, config)


def theirs(kind: str, config: BenchmarkConfig) -> Contender:
    """transformers' model, whole or with peft's LoRA of rank 8 on all linears of the blocks."""
    with tempfile.TemporaryDirectory() as folder:
        GPT(GPTConfig(n_layer=config.n_layer)).save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder)
    if kind == "transformers full":
        return Contender(model, config)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS, fan_in_fan_out=True)
    if kind == "peft checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return Contender(peft.get_peft_model(model, lora), config)


def random_ids(B: int, T: int, config: BenchmarkConfig) -> torch.Tensor:
    return torch.randint(GPTConfig.vocab_size, (B, T), device=config.device)


def compare_times(
    kinds: dict[str, Callable[[], Contender]], B: int, T: int, config: BenchmarkConfig
) -> None:
    idx = random_ids(B, T, config)
    contenders = {kind: make() for kind, make in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(config.rounds + 1):
        for kind, contender in contenders.items():
            time_taken = sum(contender.forward_backward(idx))
            if number:  # the first round warms up
                seconds[kind].append(time_taken)
    full = statistics.median(seconds["full none"])
    print(f"\n| step {B} x {T} | s | / full | / full, same recomputation |\n|---|---|---|---|")
    for kind, times in seconds.items():
        same = statistics.median(seconds.get(f"full {kind.split()[1]}", seconds["full none"]))
        median = statistics.median(times)
        print(f"| {kind} | {median:.2f} | {median / full:.3f} | {median / same:.3f} |", flush=True)


def compare_memory(
    kinds: dict[str, Callable[[], Contender]], B: int, T: int, config: BenchmarkConfig
) -> None:
    idx = random_ids(B, T, config)
    print(f"\n| memory {B} x {T} | peak of a step, GB | kept for backward, kB a token |")
    print("|---|---|---|")
    for kind, make in kinds.items():
        peak, kept = make().memory(idx)
        print(f"| {kind} | {peak / 1e9:.2f} | {kept / idx.numel() / 1e3:.0f} |", flush=True)


def comparison(config: BenchmarkConfig) -> None:
    def make(*kinds: str) -> dict[str, Callable[[], Contender]]:
        peers = ("transformers full", "peft none", "peft checkpointing")
        return {k: partial(theirs if k in peers else ours, k, config) for k in kinds}

    own = ("full none", "full light", "lora none", "lora light")
    compare_times(make(*own, "full block", "lora block", "peft none"), 4, 128, config)
    compare_times(make(*own), 2, 512, config)
    long = ("full none", "full block", "lora light", "lora block")
    compare_times(make(*long), 16, 139, config)
    peers = ("transformers full", "peft none", "peft checkpointing")
    compare_memory(make(*own, "full block", "lora block", *peers), 16, 139, config)


def table(config: BenchmarkConfig) -> None:
    idx = random_ids(config.batch_size, config.length, config)
    makers: dict[str, Callable[[], Contender]] = {
        f"rank {r}": partial(ours, f"lora {config.recompute}", config, r)
        for r in (1, 8, 16, 32, 64)
    }
    makers["merged, all frozen but wpe"] = lambda: ours("merged none", config)
    makers["full"] = lambda: ours("full none", config)
    print(f"{config.device}, {config.precision}, {tuple(idx.shape)}, LoRA: {config.recompute}\n")
    print("| what | forward ms | backward ms | sum | memory GB |\n|---|---|---|---|---|")
    for name, make in makers.items():
        contender = make()
        times = [contender.forward_backward(idx) for _ in range(config.rounds + 1)][1:]
        forward, backward = (statistics.median(t) * 1e3 for t in zip(*times, strict=True))
        peak, _ = contender.memory(idx)
        print(
            f"| {name} | {forward:.1f} | {backward:.1f} | {forward + backward:.1f} "
            f"| {peak / 1e9:.2f} |",
            flush=True,
        )


def main(config: BenchmarkConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    (table if config.table else comparison)(config)


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, __doc__)
