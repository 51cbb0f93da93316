"""Predict the memory that training needs, and refuse a run that does not fit."""

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.config import TrainConfig
from engine.data import TrainingData
from engine.distributed import Distributed
from engine.lora import lora_linears
from engine.loss import choose_chunk_rows
from engine.optim import block_matrices
from engine.tensors import autocast_dtype
from model import GPT

FP32 = 4  # bytes per element
# What a block stores per token for its matmuls, in multiples of C: LayerNorm outputs (2), q, k, v
# (3), attention output (1), and MLP before and after GELU (8). `light` recomputes the outputs of
# LayerNorm and GELU, `block` recomputes everything.
STORED = {"none": 14, "light": 8, "block": 0}
# A process on a CPU also has code and buffers, and its heap is fragmented. Both numbers are fitted
# to measured peaks, see docs/scale.md.
CPU_PROCESS_BYTES, CPU_HEAP_FACTOR = 0.45e9, 1.17
NEARLY_FULL = 0.85  # of the memory: above this, print a warning
# Linux keeps the memory limit of a container here: cgroup v2 (a number or "max"), and v1.
CGROUP_FILES = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def predict_memory(
    model: GPT, config: TrainConfig, dist: Distributed, block_size: int
) -> dict[str, float]:
    """Predict the bytes of the tensors on a device after the forward pass of the second micro-step,
    when gradients exist. docs/scale.md explains them. `model` may be on the meta device.
    """
    C, L, V = model.config.n_embd, model.config.n_layer, model.config.padded_vocab_size
    params, head = list(model.parameters()), model.lm_head.weight
    trained = sum(p.numel() for p in params if p.requires_grad)
    matmul = (autocast_dtype(config.precision) or torch.float32).itemsize  # bytes per element
    n_shards = dist.world_size if config.parallel == "fsdp" else 1
    weights = sum(p.nbytes for p in params) / n_shards
    if n_shards > 1:  # FSDP gathers the embeddings (root) and a block when they are used
        root = (V + model.config.block_size) * C
        weights += matmul * (root + max(root, (sum(p.numel() for p in params) - root) / L))
    else:  # copies made by autocast and LoRA, which the backward pass reuses
        kept = [p for p in params if p.requires_grad or p is head]
        sizes = [p.numel() for p in kept if p.itemsize > matmul]
        linears = lora_linears(model).values()
        sizes += [m.weight.numel() for m in linears if m.is_summed or m.weight.itemsize > matmul]
        weights += matmul * sum(sizes)
    muon = block_matrices(model).values() if config.optimizer == "muon" else []
    optimizer = FP32 * (2 * trained - sum(p.numel() for p in muon)) / n_shards  # Muon: one moment
    # A block also stores its input and the residual after attention. With recomputation, one block
    # at a time stores everything. Eager LayerNorms store their inputs in fp32.
    is_eager = not config.compile and config.recompute == "none"
    residual = matmul if config.precision == "bf16" and not is_eager else FP32
    none, stored = (2 * residual + matmul * STORED[mode] for mode in ("none", config.recompute))
    # ln_f has its input, its output and the gradient of its output.
    values = L * stored + (none if config.recompute != "none" else 0) + 3 * residual
    rows = choose_chunk_rows(config.batch_size * block_size, dist.device, head.requires_grad)
    logits = rows * V * matmul  # only one chunk exists at a time
    if head.requires_grad:  # its gradient; on a CPU, plus those of a chunk in 16 bits and in fp32
        casts = dist.device.type == "cpu" and matmul < FP32
        logits += V * C * (FP32 + (matmul + FP32 if casts else 0))
    # Gradients are complete on all ranks, even with FSDP, until they are reduced once per step.
    parts = {"weights": weights, "gradients": FP32 * trained, "optimizer": optimizer}
    return parts | {"activations": config.batch_size * block_size * C * values, "logits": logits}


def predict_peak(
    model: GPT, config: TrainConfig, dist: Distributed, block_size: int, n_micro_steps: int = 2
) -> float:
    """Return the bytes at the end of the forward or of the backward pass, whichever is larger. At
    the end of backward, activations are gone, but wte has three more gradients: from the head, from
    the lookup, and their sum.
    """
    parts, head = predict_memory(model, config, dist, block_size), model.lm_head.weight
    forward = sum(parts.values())
    if n_micro_steps == 1 and (dist.world_size == 1 or config.parallel == "fsdp"):
        forward -= parts["gradients"]  # they don't exist yet; those of DDP always exist
    backward = parts["weights"] + parts["gradients"] + parts["optimizer"]
    peak = max(forward, backward + 3 * FP32 * head.numel() * head.requires_grad)
    if dist.device.type != "cpu":
        return peak
    if config.save_every < config.max_steps:
        # Rank 0 keeps a copy of the trained weights and the moments until they are saved.
        peak += (parts["gradients"] + parts["optimizer"]) / dist.world_size
    return CPU_PROCESS_BYTES + CPU_HEAP_FACTOR * peak


def memory_limit(device: torch.device) -> float:
    """Return the bytes of the GPU, or of the machine or its container; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):  # MPS or Windows
        return math.inf
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such file; "max"
            limits.append(int(Path(file).read_text()))
    return min(limit for limit in limits if limit > 0)


def check_memory(model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed) -> None:
    """Raise ValueError if training needs more memory than there is, and name the largest batch size
    that fits. If memory is nearly full, print a warning.
    """
    limit = memory_limit(dist.device)
    # The ranks of a node share the memory of its CPUs. Each has its own GPU.
    n_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.device.type == "cpu" else 1

    def predict(batch_size: int, recompute: Any) -> float:
        changed = replace(config, batch_size=batch_size, recompute=recompute)
        n_micro_steps = data.rows_per_step // (batch_size * dist.world_size)
        n_micro_steps += bool(data.graph_lengths)  # then gradients exist from the start
        return n_sharing * predict_peak(model, changed, dist, data.block_size, n_micro_steps)

    needed = predict(config.batch_size, config.recompute)
    text = f"batch_size {config.batch_size} needs about {needed / 1e9:.1f} GB of memory"
    text += f", expected at most {limit / 1e9:.1f} GB"
    if NEARLY_FULL * limit < needed <= limit and dist.is_main:
        print(f"{text}; if memory runs out, use a smaller batch_size")
    if needed > limit:
        options = [(n, mode) for mode in (config.recompute, "block") for n in data.batch_sizes]
        fitting = (f"{n} --recompute {mode}" for n, mode in options if predict(n, mode) <= limit)
        remedy = "use a smaller model, or --parallel fsdp on several GPUs"
        if flags := next(fitting, None):
            remedy = f"use --batch_size {flags}, which gives the same loss curve"
        raise ValueError(f"{text}; {remedy}")
