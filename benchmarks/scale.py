"""Memory, communication and time of a training step computed from its config, as in docs/scale.md.

python benchmarks/scale.py   # in seconds
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import run_command
from engine.loss import DEFAULT_CHUNK_ROWS
from engine.throughput import flops_per_token
from model import GPTConfig

MODELS = {
    "124M": GPTConfig(),
    "350M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5B": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
# Bytes of memory, peak FLOP/s, and the bytes per second that a GPU sends to the others of its node:
# PCIe 4.0 x16, and NVLink of the A100 and the H100 in one direction (NVIDIA's data sheets).
CARDS = {
    "24 GB (RTX 4090)": (24e9, 165.2e12, 25e9),
    "40 GB (A100)": (40e9, 312e12, 300e9),
    "80 GB (H100)": (80e9, 989e12, 450e9),
}
USABLE = 0.92  # of a GPU's memory; the rest is CUDA's own and fragmentation
MFU = 0.4  # llm.c on an H100 at 124M
WORLD_SIZE, TOTAL_BATCH_SIZE = 8, 524_288
MAX_BATCH_SIZE = 512  # larger ones bring nothing


@dataclass(frozen=True)
class ScaleBenchmarkConfig:
    """There are no flags."""


class Setup(NamedTuple):
    """How a model is trained, with matrix products in 16 bits."""

    ranks: int = 1  # more than 1: sharded over so many by FSDP
    recompute: bool = False  # --recompute block


class Memory(NamedTuple):
    """Bytes on a device at the end of the forward pass, with several micro-steps."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float


@functools.cache
def count_params(config: GPTConfig) -> int:
    return sum(p.numel() for p in harness.meta_model(config).parameters())


def predict_memory(config: GPTConfig, batch_size: int, setup: Setup) -> Memory:
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    tokens, P = batch_size * config.block_size, count_params(config)
    weights = 4 * P / setup.ranks
    if setup.ranks > 1:  # the root and one block are gathered while they are used
        root = (V + config.block_size) * C
        weights += 2 * (root + max(root, (P - root) / L))
    else:  # autocast's copies, which the backward pass needs again
        weights += 2 * P
    # What a block keeps of a token, in widths: its input and the residual after attention (fp32);
    # the outputs of both LayerNorms 2, q k v 3, attention 1, the MLP before and after GELU 8.
    kept = (2 * 4 + 14 * 2) * C
    activations = tokens * (L * 2 * 4 * C + kept if setup.recompute else L * kept)
    activations += tokens * 3 * 4 * C  # the last block's output, ln_f's, and its gradient
    logits = (
        min(tokens, DEFAULT_CHUNK_ROWS) * V * 2 + V * C * 4
    )  # of a chunk, and the head's gradient
    # Gradients are not sharded: they are synchronized once a step.
    return Memory(weights, 4 * P, 8 * P / setup.ranks, activations, logits)


def predict_peak(config: GPTConfig, batch_size: int, setup: Setup) -> float:
    """The larger of the memory at the end of the forward pass and at the end of the backward pass,
    when activations are gone, and wte's gradients from head and lookup and their sum are there.
    """
    memory = predict_memory(config, batch_size, setup)
    gradients = memory.gradients + 3 * 4 * config.padded_vocab_size * config.n_embd
    return max(sum(memory), memory.weights + memory.optimizer + gradients)


def find_largest_batch(config: GPTConfig, capacity: float, setup: Setup) -> int:
    """The largest batch size that fits, 0 if none does."""
    sizes = range(1, MAX_BATCH_SIZE + 1)
    return sum(predict_peak(config, n, setup) <= USABLE * capacity for n in sizes)


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}"


def print_memory() -> None:
    parts = "weights", "gradients", "AdamW", "activations", "recomputed", "logits"
    rows = []
    for name, config in MODELS.items():
        m, recomputed = (predict_memory(config, 1, Setup(recompute=r)) for r in (False, True))
        values = *m[:4], recomputed.activations, m.logits
        rows.append([name, f"{count_params(config) / 1e6:,.0f} M", *map(gb, values)])
    harness.print_table(["size", "parameters", *parts], rows)


def print_cards() -> None:
    """What fits on a GPU; the GB sent and the seconds of a step on WORLD_SIZE of them."""
    setups = {
        "DDP": Setup(),
        "DDP, recompute": Setup(recompute=True),
        "FSDP": Setup(ranks=WORLD_SIZE),
        "FSDP, recompute": Setup(ranks=WORLD_SIZE, recompute=True),
    }
    costs = "sent, DDP", "sent, FSDP", "step, DDP", "step, FSDP"
    share, rows = (WORLD_SIZE - 1) / WORLD_SIZE, []
    for name, config in MODELS.items():
        P, model = count_params(config), harness.meta_model(config)
        flops = flops_per_token(model, config.block_size) * TOTAL_BATCH_SIZE
        for card, (capacity, peak_flops, bandwidth) in CARDS.items():
            batch = {s: find_largest_batch(config, capacity, setup) for s, setup in setups.items()}
            micro_batch = WORLD_SIZE * config.block_size * max(1, batch["FSDP"])
            micro_steps = math.ceil(TOTAL_BATCH_SIZE / micro_batch)
            # Gradients are reduced once; FSDP also gathers 16-bit weights twice per micro-step.
            sent = {"DDP": share * 2 * 4 * P, "FSDP": share * (2 * 2 * P * micro_steps + 4 * P)}
            compute = flops / WORLD_SIZE / (peak_flops * MFU)
            seconds = [
                f"{compute + n_bytes / bandwidth:.2f}" if batch[s] else "-"
                for s, n_bytes in sent.items()
            ]
            fits = [n or "-" for n in batch.values()]
            rows.append([name, card, *fits, *map(gb, sent.values()), *seconds])
    harness.print_table(["size", "GPU", *setups, *costs], rows)


def main(_: ScaleBenchmarkConfig) -> None:
    print_memory()
    print_cards()


if __name__ == "__main__":
    run_command(main, ScaleBenchmarkConfig, __doc__)
