"""Memory, communication and time of a training step computed from its config, as in docs/scale.md.

python benchmarks/scale.py   # takes a few seconds
"""

import math
import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import TrainConfig, run_command
from engine.distributed import Distributed
from engine.memory import predict_memory, predict_peak
from engine.throughput import flops_per_token
from model import GPT, GPTConfig

MODELS = {
    "124M": GPTConfig(),
    "350M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5B": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
# Bytes of memory, peak FLOP/s, and bytes/s to other GPUs of the node, from NVIDIA's data sheets.
# Bytes/s are for one direction: PCIe 4.0 x16 for the RTX 4090, NVLink for the others.
CARDS = {
    "24 GB (RTX 4090)": (24e9, 165.2e12, 25e9),
    "40 GB (A100)": (40e9, 312e12, 300e9),
    "80 GB (H100)": (80e9, 989e12, 450e9),
}
USABLE = 0.92  # of a GPU's memory; the CUDA context and fragmentation take the rest
MFU = 0.4  # what llm.c reaches on an H100 at 124M
WORLD_SIZE, TOTAL_BATCH_SIZE = 8, 524_288
MAX_BATCH_SIZE = 512  # larger batches don't help
FP32, BITS16 = 4, 2  # bytes per element
CONFIG = TrainConfig(batch_size=1, precision="bf16", compile=True)


@dataclass(frozen=True)
class ScaleBenchmarkConfig:
    """There are no flags."""


def on_gpus(n: int) -> Distributed:
    return Distributed(rank=0, world_size=n, device=torch.device("cuda"))


def count_params(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def find_largest_batch(model: GPT, capacity: float, config: TrainConfig) -> int:
    """Return the largest batch size that fits into `capacity` bytes, 0 if none does."""

    def peak(n: int) -> float:
        changed = replace(config, batch_size=n)
        return predict_peak(model, changed, on_gpus(WORLD_SIZE), model.config.block_size)

    return bisect_right(range(1, MAX_BATCH_SIZE + 1), USABLE * capacity, key=peak)


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}"


def print_memory(models: dict[str, GPT]) -> None:
    parts = "weights", "gradients", "AdamW", "activations", "recomputed", "logits"
    rows = []
    for name, model in models.items():
        memory, recomputing = (
            predict_memory(model, config, on_gpus(1), model.config.block_size)
            for config in (CONFIG, replace(CONFIG, recompute="block"))
        )
        *others, activations, logits = memory.values()
        cells = map(gb, (*others, activations, recomputing["activations"], logits))
        rows.append([name, f"{count_params(model) / 1e6:,.0f}M", *cells])
    harness.print_table(["size", "parameters", *parts], rows)


def print_cards(models: dict[str, GPT]) -> None:
    """Print the largest batch that fits, and the GB and seconds of a step on WORLD_SIZE GPUs."""
    setups = {
        "DDP": CONFIG,
        "DDP, recompute": replace(CONFIG, recompute="block"),
        "FSDP": replace(CONFIG, parallel="fsdp"),
        "FSDP, recompute": replace(CONFIG, parallel="fsdp", recompute="block"),
    }
    costs = "sent, DDP", "sent, FSDP", "step, DDP", "step, FSDP"  # GB per GPU; seconds
    # A ring all-gather or reduce-scatter sends this fraction of the data. An all-reduce is both.
    fraction, rows = (WORLD_SIZE - 1) / WORLD_SIZE, []
    for name, model in models.items():
        P, block_size = count_params(model), model.config.block_size
        flops = flops_per_token(model, block_size) * TOTAL_BATCH_SIZE
        for card, (capacity, peak_flops, bandwidth) in CARDS.items():
            largest = {n: find_largest_batch(model, capacity, s) for n, s in setups.items()}
            micro_step_tokens = WORLD_SIZE * block_size * max(1, largest["FSDP"])
            n_gathers = 2 * math.ceil(TOTAL_BATCH_SIZE / micro_step_tokens)  # forward and backward
            # DDP all-reduces the gradients. FSDP gathers weights and reduce-scatters gradients.
            gathered = n_gathers * BITS16 * P
            sent = {"DDP": fraction * 2 * FP32 * P, "FSDP": fraction * (gathered + FP32 * P)}
            compute = flops / WORLD_SIZE / (peak_flops * MFU)
            seconds = [
                f"{compute + n_bytes / bandwidth:.2f}" if largest[parallel] else "-"
                for parallel, n_bytes in sent.items()
            ]
            fits = [n or "-" for n in largest.values()]
            rows.append([name, card, *fits, *map(gb, sent.values()), *seconds])
    harness.print_table(["size", "GPU", *setups, *costs], rows)


def main(_: ScaleBenchmarkConfig) -> None:
    models = {name: harness.meta_model(config) for name, config in MODELS.items()}
    print_memory(models)
    print_cards(models)


if __name__ == "__main__":
    run_command(main, ScaleBenchmarkConfig, __doc__)
