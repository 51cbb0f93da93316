"""Memory, communication and time of a training step from the config alone, as the tables of
docs/scale.md, and a check of the memory model against measured peaks.

    python benchmarks/scale.py            # the tables
    python benchmarks/scale.py --check true   # predicted against measured, on this machine's CPU
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from benchmarks.data import random_shards
from data import PretrainingData
from model import GPT, LOSS_CHUNK_ROWS, LOSS_CHUNK_ROWS_ELSEWHERE, GPTConfig
from report import flops_per_token
from runtime import PEAK_FLOPS, Distributed
from step import TrainingStep
from train_gpt2 import PretrainConfig

SIZES = {
    "124M": GPTConfig(),
    "350M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5B": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
# Memory in bytes, peak, and the bytes a second that a GPU sends to the others of its node: PCIe 4.0
# x16, and NVLink of the A100 and of the H100 in one direction (NVIDIA's data sheets).
CARDS = {
    "24 GB (RTX 4090)": (24e9, PEAK_FLOPS["RTX 4090"], 25e9),
    "40 GB (A100)": (40e9, PEAK_FLOPS["A100"], 300e9),
    "80 GB (H100)": (80e9, PEAK_FLOPS["H100"], 450e9),
}
USABLE = 0.92  # of a card, beside CUDA's own memory and fragmentation
MFU = 0.4  # llm.c on an H100 at 124M
WORLD_SIZE, TOTAL_BATCH_SIZE = 8, 524_288


@dataclass(frozen=True)
class ScaleConfig:
    check: bool = False
    """measure two sizes here and compare"""
    measure: str = ""
    """for --check: n_layer,n_head,n_embd,batch_size,T of one size to measure in this process"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the step's peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@functools.cache
def n_params(config: GPTConfig) -> int:
    return sum(p.numel() for p in meta(config).parameters())


def memory(
    config: GPTConfig,
    batch_size: int,
    *,
    half: bool,
    ranks: int = 1,
    recompute: bool = False,
    accumulate: bool = True,
    device_type: str = "cuda",
) -> Memory:
    """Peak of a step, `ranks` > 1 meaning that parameters are sharded over so many (FSDP)."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    tokens = batch_size * config.block_size
    P, root = n_params(config), (V + config.block_size) * C
    largest_group = max(root, (P - root) / L)
    # fp32 weights and two fp32 moments. Sharded, the root's and a block's weights are whole as
    # well; under bf16 what runs has a 16-bit copy, which the backward pass needs again.
    weights = 4 * P / ranks + (2 if half else 4) * (root + largest_group) * (ranks > 1)
    weights += 2 * P * (half and ranks == 1)
    gradients = 4 * P if accumulate else 0  # from the micro-step before; whole on every rank
    # What a block keeps a token, in widths: in fp32 its input and the residual after attention; in
    # the type of matrix products the outputs of both LayerNorms 2, q k v 3, attention 1, the MLP
    # before and after GELU 8.
    a = 2 if half else 4
    kept = (2 * 4 + 14 * a) * C
    activations = tokens * (L * kept if not recompute else L * 2 * 4 * C + kept)
    activations += tokens * (4 + 4 + 4) * C  # the last block's output, ln_f's, and its gradient
    rows = min(tokens, LOSS_CHUNK_ROWS.get(device_type, LOSS_CHUNK_ROWS_ELSEWHERE))
    # A chunk of logits (in 16 bits also its log-probabilities in 32), and the head's gradient.
    logits = rows * V * (2 + 4 if half else 4) + V * C * 4
    return Memory(weights, gradients, 8 * P / ranks, activations, logits)


def peak(config: GPTConfig, batch_size: int, **how: Any) -> float:
    """The larger of the end of the forward pass, and of the end of the backward pass, when the
    activations are gone, but the gradients of wte from head and lookup and their sum are there.
    """
    m = memory(config, batch_size, **how)
    P, table = n_params(config), config.padded_vocab_size * config.n_embd
    return max(m.total, m.weights + m.optimizer + 4 * P + 3 * 4 * table)


def largest_batch(config: GPTConfig, card: float, **how: Any) -> int:
    batch_size = 0
    while peak(config, batch_size + 1, half=True, **how) <= USABLE * card and batch_size < 512:
        batch_size += 1
    return batch_size


def gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def tables() -> None:
    heads = "size, parameters, weights, gradients, AdamW, activations, recomputed, logits"
    print(f"| {heads.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in SIZES.items():
        m, r = (memory(config, 1, half=True, recompute=flag) for flag in (False, True))
        parts = (m.weights, m.gradients, m.optimizer, m.activations, r.activations, m.logits)
        print(f"| {name} | {n_params(config) / 1e6:,.0f} M | {' | '.join(map(gb, parts))} |")
    ways = {
        "DDP": {"ranks": 1, "recompute": False},
        "DDP, recompute": {"ranks": 1, "recompute": True},
        "FSDP": {"ranks": WORLD_SIZE, "recompute": False},
        "FSDP, recompute": {"ranks": WORLD_SIZE, "recompute": True},
    }
    print(f"\n| size | card | {' | '.join(ways)} | sent a step, DDP / FSDP | step, DDP / FSDP |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in SIZES.items():
        flops = flops_per_token(meta(config), config.block_size)
        P = n_params(config)
        for card, (capacity, flop_rate, bandwidth) in CARDS.items():
            best = {way: largest_batch(config, capacity, **how) for way, how in ways.items()}
            compute = flops * TOTAL_BATCH_SIZE / WORLD_SIZE / (flop_rate * MFU)
            share = (WORLD_SIZE - 1) / WORLD_SIZE
            sent = {"DDP": 2 * share * 4 * P}
            micro_steps = -(
                -TOTAL_BATCH_SIZE // (WORLD_SIZE * config.block_size * max(1, best["FSDP"]))
            )
            sent["FSDP"] = share * (2 * 2 * P * micro_steps + 4 * P)
            times = [
                f"{compute + b / bandwidth:.2f} s" if best[w] else "-" for w, b in sent.items()
            ]
            counts = " | ".join(str(b) if b else "-" for b in best.values())
            print(
                f"| {name} | {card} | {counts} | {' / '.join(map(gb, sent.values()))} GB "
                f"| {' / '.join(times)} |"
            )


def meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def measure(text: str) -> None:
    """Print the rise of this process's peak memory over three steps of one size, in bytes. A tiny
    size goes first, so that the code itself is in memory.
    """
    for shape in ((1, 1, 8, 1, 8), tuple(map(int, text.split(",")))):
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        three_steps(*shape)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def three_steps(n_layer: int, n_head: int, n_embd: int, batch_size: int, T: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(folder, 50_000)
        model = GPT(GPTConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        total = batch_size * T * 2  # two micro-steps, so that gradients accumulate
        data = PretrainingData(shards, T, batch_size, total, seed=0)
        config = PretrainConfig(
            batch_size=batch_size, total_batch_size=total, precision="fp32", compile=False
        )
        step = TrainingStep(model, data, config, Distributed(0, 1, torch.device("cpu")))
        for number in (1, 2, 3):
            step(number)


def check() -> None:
    print("| size | batch | predicted | measured | predicted / measured |")
    print("|---|---|---|---|---|")
    for shape in ((6, 6, 384, 8, 256), (12, 12, 768, 2, 512)):
        n_layer, n_head, n_embd, batch_size, T = shape
        command = [sys.executable, __file__, "--measure", ",".join(map(str, shape))]
        # With glibc giving back at once what is freed, resident memory is what is alive.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        measured = json.loads(out)
        config = GPTConfig(block_size=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        predicted = peak(config, batch_size, half=False, device_type="cpu")
        print(
            f"| {n_layer} layers x {n_embd} | {batch_size} x {T} | {gb(predicted)} GB "
            f"| {gb(measured)} GB | {predicted / measured:.2f} |"
        )


def main(config: ScaleConfig) -> None:
    if config.measure:
        measure(config.measure)
    elif config.check:
        check()
    else:
        tables()


if __name__ == "__main__":
    cli.run(main, ScaleConfig, __doc__)
