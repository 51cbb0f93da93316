"""Memory, communication and time of a training step computed from its config, as in docs/scale.md.

python benchmarks/scale.py   # takes a few seconds
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


@dataclass(frozen=True)
class ScaleBenchmarkConfig:
    """There are no flags."""


class Setup(NamedTuple):
    """How a model is trained, with matmuls in 16 bits."""

    ranks: int = 1  # if more than 1, FSDP shards the model over them
    recompute: bool = False  # --recompute block


class Memory(NamedTuple):
    """Bytes on a device after the forward pass of a second micro-step, when gradients exist."""

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
    weights = FP32 * P / setup.ranks
    if setup.ranks > 1:  # FSDP gathers the embeddings (root) and a block when they are used
        root = (V + config.block_size) * C
        weights += BITS16 * (root + max(root, (P - root) / L))
    else:  # copies that autocast makes and the backward pass needs again
        weights += BITS16 * P
    gradients = FP32 * P  # on all ranks, even with FSDP, until they are reduced once per step
    optimizer = 2 * FP32 * P / setup.ranks  # two moments
    # A block stores, per token and in multiples of C: in fp32, its input (1) and the residual after
    # attention (1); in 16 bits, LayerNorm outputs (2), q, k, v (3), attention output (1), and MLP
    # before and after GELU (8). With recomputation, one block at a time stores the 16-bit values.
    residuals = 2 * FP32 * C
    block = residuals + (2 + 3 + 1 + 8) * BITS16 * C
    activations = tokens * (L * residuals + block if setup.recompute else L * block)
    activations += tokens * 3 * FP32 * C  # input, output and output gradient of ln_f
    logits = min(tokens, DEFAULT_CHUNK_ROWS) * V * BITS16  # only one chunk exists at a time
    logits += FP32 * V * C  # the gradient of the head
    return Memory(weights, gradients, optimizer, activations, logits)


def predict_peak(config: GPTConfig, batch_size: int, setup: Setup) -> float:
    """Return the bytes at the end of the forward or of the backward pass, whichever is larger. At
    the end of backward, activations are gone, but wte has three more gradients: from the head, from
    the lookup, and their sum.
    """
    memory = predict_memory(config, batch_size, setup)
    gradients = memory.gradients + 3 * FP32 * config.padded_vocab_size * config.n_embd
    return max(sum(memory), memory.weights + memory.optimizer + gradients)


def find_largest_batch(config: GPTConfig, capacity: float, setup: Setup) -> int:
    """Return the largest batch size that fits into `capacity` bytes, 0 if none does."""
    sizes = range(1, MAX_BATCH_SIZE + 1)
    fits = (n for n in sizes if predict_peak(config, n, setup) <= USABLE * capacity)
    return max(fits, default=0)


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}"


def print_memory() -> None:
    parts = "weights", "gradients", "AdamW", "activations", "recomputed", "logits"
    rows = []
    for name, config in MODELS.items():
        *others, activations, logits = predict_memory(config, 1, Setup())
        recomputed = predict_memory(config, 1, Setup(recompute=True)).activations
        cells = map(gb, (*others, activations, recomputed, logits))
        rows.append([name, f"{count_params(config) / 1e6:,.0f} M", *cells])
    harness.print_table(["size", "parameters", *parts], rows)


def print_cards() -> None:
    """Print the largest batch that fits, and the GB and seconds of a step on WORLD_SIZE GPUs."""
    setups = {
        "DDP": Setup(),
        "DDP, recompute": Setup(recompute=True),
        "FSDP": Setup(ranks=WORLD_SIZE),
        "FSDP, recompute": Setup(ranks=WORLD_SIZE, recompute=True),
    }
    costs = "sent, DDP", "sent, FSDP", "step, DDP", "step, FSDP"  # GB per GPU; seconds
    # A ring all-gather or reduce-scatter sends this fraction of the data. An all-reduce is both.
    fraction, rows = (WORLD_SIZE - 1) / WORLD_SIZE, []
    for name, config in MODELS.items():
        P, model = count_params(config), harness.meta_model(config)
        flops = flops_per_token(model, config.block_size) * TOTAL_BATCH_SIZE
        for card, (capacity, peak_flops, bandwidth) in CARDS.items():
            largest = {n: find_largest_batch(config, capacity, s) for n, s in setups.items()}
            micro_step_tokens = WORLD_SIZE * config.block_size * max(1, largest["FSDP"])
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
    print_memory()
    print_cards()


if __name__ == "__main__":
    run_command(main, ScaleBenchmarkConfig, __doc__)
