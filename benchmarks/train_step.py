"""A training step on a CPU beside transformers' GPT-2: speed, its parts, peak memory.

    python benchmarks/train_step.py                    # both sizes, two threads, fp32: 7 minutes
    python benchmarks/train_step.py --peer ../nanoGPT  # beside a checkout of nanoGPT, too

A peer is a folder with `model.py` or `train_gpt2.py` that defines `GPT` and `GPTConfig` as nanoGPT
and build-nanogpt do: `GPT(config)(idx, targets)` returns logits and loss.

Each contender lives in a process of its own, with the allocator as its user has it: ours as the
training commands set it, the others as they come. They take turns step by step, and medians are
compared. Ours is the real `TrainingStep`; the others get build-nanogpt's loop: forward, backward,
clipping, fused AdamW. Our loss takes its own gradient in the forward pass, so only the sum of
forward and backward compares; clipping is part of "optimizer". Memory is the highest resident size
of the process over that after a step of a tiny model. The peak of matrix products is the best of
the blocks' own sizes, timed in a further process in each round; a step is held against its round's.
"""

import gc
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from benchmarks.data import random_shards
from data import PretrainingData
from model import GPT, GPTConfig
from report import flops_per_token
from runtime import Distributed, keep_freed_memory
from step import BETAS, TrainingStep, parameter_groups
from train_gpt2 import PretrainConfig

SIZES = {  # n_layer, n_head, n_embd, batch_size, T
    "124M": (12, 12, 768, 2, 512),
    "6 x 384": (6, 6, 384, 8, 256),
}
TINY = (1, 1, 8, 1, 8)
VOCAB_SIZE = 50257
PARTS = ("forward", "backward", "optimizer")
COLUMNS = (
    "size",
    "contender",
    "tokens/s (to transformers)",
    *(f"{part} ms" for part in PARTS),
    "peak MB (to transformers)",
    "of matmul peak",
)
CPU = Distributed(0, 1, torch.device("cpu"))
PEER_FILES = ("model", "train_gpt2")


@dataclass(frozen=True)
class StepBenchmarkConfig:
    rounds: int = 7
    """steps of each contender that count; two more come first"""
    sizes: str = ",".join(SIZES)
    """which of the sizes to measure"""
    peer: str | None = None
    """folder of a checked-out nanoGPT or build-nanogpt"""
    recompute: Literal["none", "light", "block"] = "none"
    """of this project"""
    threads: int = 2
    """CPU threads of each"""
    worker: str = ""
    """contender:n_layer,n_head,n_embd,batch_size,T to serve here; used by the benchmark itself"""


class TimedStep(TrainingStep):
    """The real training step, which notes when its parts begin and end."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.times: dict[str, float] = {}
        self.loss = partial(self._timed, self.loss)

    def _timed(self, loss_of: Callable[..., torch.Tensor], *batch: torch.Tensor) -> torch.Tensor:
        self._note("start")
        loss = loss_of(*batch)
        self._note("forward")
        return loss

    def _note(self, what: str) -> None:
        self.times[what] = time.perf_counter()

    def _clip(self) -> torch.Tensor:
        self._note("backward")
        return super()._clip()


def ours(shape: tuple[int, ...], config: StepBenchmarkConfig) -> Callable[[], dict[str, float]]:
    n_layer, n_head, n_embd, batch_size, T = shape
    keep_freed_memory(CPU)
    model = GPT(GPTConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(folder, 100 * batch_size * T)
        data = PretrainingData(shards, T, batch_size, batch_size * T, seed=0)
        train_config = PretrainConfig(
            batch_size=batch_size,
            total_batch_size=batch_size * T,
            precision="fp32",
            compile=False,
            recompute=config.recompute,
        )
        training_step = TimedStep(model, data, train_config, CPU)
        training_step(1)  # opens the shard, whose folder is about to go
    numbers = iter(range(2, 100))

    def step() -> dict[str, float]:
        started = time.perf_counter()
        training_step(next(numbers))
        return parts(started, training_step.times, time.perf_counter())

    return step


def theirs(
    model: torch.nn.Module, loss_of: Callable, shape: tuple[int, ...]
) -> Callable[[], dict[str, float]]:
    """build-nanogpt's step, with its groups for weight decay."""
    *_, batch_size, T = shape
    groups = parameter_groups(model.train(), weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=BETAS, fused=True)

    def step() -> dict[str, float]:
        idx = torch.randint(VOCAB_SIZE, (batch_size, T))
        times, started = {}, time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        times["start"] = time.perf_counter()
        loss = loss_of(model, idx)
        times["forward"] = time.perf_counter()
        loss.backward()
        times["backward"] = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return parts(started, times, time.perf_counter())

    return step


def parts(started: float, times: dict[str, float], ended: float) -> dict[str, float]:
    return {
        "forward": times["forward"] - times["start"],
        "backward": times["backward"] - times["forward"],
        "optimizer": ended - times["backward"],
        "step": ended - started,
    }


def transformers_gpt2(shape: tuple[int, ...]) -> Callable[[], dict[str, float]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd, _, T = shape
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": T}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    padded = GPTConfig(vocab_size=VOCAB_SIZE).padded_vocab_size
    model = GPT2LMHeadModel(GPT2Config(vocab_size=padded, use_cache=False, **sizes, **no_dropout))
    return theirs(model, lambda model, idx: model(idx, labels=idx).loss, shape)


def peer_gpt(folder: str, shape: tuple[int, ...]) -> Callable[[], dict[str, float]]:
    """The `GPT` of a folder, whose modules stand in for this project's of the same name."""
    found = [name for name in PEER_FILES if (Path(folder) / f"{name}.py").exists()]
    if not found:
        raise ValueError(f"peer {folder} has neither model.py nor train_gpt2.py")
    for name in PEER_FILES:
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    module = importlib.import_module(found[0])
    n_layer, n_head, n_embd, _, T = shape
    sizes: dict[str, float] = {
        "block_size": T,
        "vocab_size": GPTConfig(vocab_size=VOCAB_SIZE).padded_vocab_size,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
    }
    if "dropout" in inspect.signature(module.GPTConfig).parameters:
        sizes["dropout"] = 0.0
    model = module.GPT(module.GPTConfig(**sizes))
    return theirs(model, lambda model, idx: model(idx, idx)[1], shape)


def matmul_peak(shape: tuple[int, ...]) -> Callable[[], dict[str, float]]:
    """FLOP/s of the fastest of the blocks' products, and of a large square one."""
    _, _, C, batch_size, T = shape
    rows = batch_size * T
    sizes = ((rows, C, 3 * C), (rows, C, 4 * C), (rows, 4 * C, C), (2048, 2048, 2048))
    operands = [(torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)) for m, k, n in sizes]

    def step() -> dict[str, float]:
        best = 0.0
        for a, b, out in operands * 8:
            started = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            flops = 2 * a.numel() * len(b)
            best = max(best, flops / (time.perf_counter() - started))
        return {"peak": best}

    return step


def memory_mb(field: str) -> float:
    """VmRSS or VmHWM, the highest so far, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def worker(config: StepBenchmarkConfig) -> None:
    """Answer each line on stdin with a step's times and the peak so far, as JSON on stdout."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    kind, _, sizes = config.worker.partition(":")
    shape = tuple(map(int, sizes.split(",")))
    makers = {
        "ours": lambda shape: ours(shape, config),
        "transformers": transformers_gpt2,
        "peer": lambda shape: peer_gpt(config.peer or "", shape),
        "matmul": matmul_peak,
    }
    makers[kind](TINY)()  # code that is loaded on use is no memory of a step
    gc.collect()
    before = memory_mb("VmRSS")
    step = makers[kind](shape)
    for _ in sys.stdin:
        times = step()
        print("RESULT " + json.dumps({**times, "mb": memory_mb("VmHWM") - before}), flush=True)


class Contender:
    """A worker process, asked for a step at a time."""

    def __init__(self, kind: str, shape: tuple[int, ...], config: StepBenchmarkConfig):
        flags = {"worker": f"{kind}:{','.join(map(str, shape))}", "threads": config.threads}
        flags["recompute"] = config.recompute
        if config.peer:
            flags["peer"] = config.peer
        command = [sys.executable, __file__]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        # What a shell says about OpenMP's threads would count for --threads here.
        env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        self.kind = kind
        self.process = subprocess.Popen(
            command, text=True, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def step(self) -> dict[str, float]:
        print("step", file=self.process.stdin, flush=True)
        for line in self.process.stdout or ():
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise ValueError(f"the process of {self.kind} ended with {self.process.wait()}, see above")

    def stop(self) -> None:
        self.process.communicate()  # closes its stdin, and waits for its end


def measure(size: str, config: StepBenchmarkConfig) -> dict[str, list[dict[str, float]]]:
    """The results of each contender's steps, the two first ones left out."""
    kinds = ["matmul", "ours", "transformers", *(["peer"] if config.peer else [])]
    contenders = [Contender(kind, SIZES[size], config) for kind in kinds]
    try:
        rounds = [{c.kind: c.step() for c in contenders} for _ in range(config.rounds + 2)][2:]
    finally:
        for contender in contenders:
            contender.stop()
    return {kind: [one[kind] for one in rounds] for kind in kinds}


def rows(size: str, results: dict[str, list[dict[str, float]]], peer: str | None) -> None:
    n_layer, n_head, n_embd, batch_size, T = SIZES[size]
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    flops, tokens = flops_per_token(model, T), batch_size * T

    def median(kind: str, key: str) -> float:
        return statistics.median(one[key] for one in results[kind])

    peaks = [one["peak"] for one in results.pop("matmul")]
    for kind, steps in results.items():
        name = {"ours": "this project", "peer": Path(peer or "").name}.get(kind, kind)
        seconds, megabytes = median(kind, "step"), steps[-1]["mb"]
        faster = median("transformers", "step") / seconds
        memory = megabytes / results["transformers"][-1]["mb"]
        cells = [f"{size}, {batch_size} x {T}", name, f"{tokens / seconds:.0f} ({faster:.2f} x)"]
        cells += [f"{median(kind, part) * 1e3:.0f}" for part in PARTS]
        of_peak = [
            flops * tokens / one["step"] / peak for one, peak in zip(steps, peaks, strict=True)
        ]
        cells += [f"{megabytes:.0f} ({memory:.2f})", f"{statistics.median(of_peak):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(config: StepBenchmarkConfig) -> None:
    if config.worker:
        worker(config)
        return
    unknown = set(config.sizes.split(",")) - SIZES.keys()
    if unknown:
        raise ValueError(f"sizes is {config.sizes}, expected some of {', '.join(SIZES)}")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for size in config.sizes.split(","):
        rows(size, measure(size, config), config.peer)


if __name__ == "__main__":
    cli.run(main, StepBenchmarkConfig, __doc__)
