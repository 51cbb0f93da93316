"""FLOPs of a model, speed and memory of a device, and how long a run will take."""

import math
import re
import sys
import time

import torch

from engine.config import TrainConfig
from engine.data import TrainingData
from engine.distributed import Distributed, autocast_dtype
from model import GPT

if sys.platform != "win32":
    import resource

PROBE_SIZES = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied to see the speed
PROBES = 5
EFFICIENCY = 0.6  # speed of a training step / speed of a matrix product, roughly, at any size
SLOW_STEP_SECONDS = 60
# Dense peak FLOP/s of the matrix units in 16-bit floating point with fp32 accumulation, from the
# vendors' data sheets. The first name that occurs in the device's name counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit peak in FLOP/s, None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((f for card, f in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def peak_memory(device: torch.device) -> int:
    """The peak of bytes in use: on CUDA by tensors, elsewhere by this process; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flops_per_token(model: GPT, block_size: int) -> int:
    """Forward and backward FLOPs, as in appendix B of the PaLM paper: 6 per parameter (4 if it is
    frozen) without the position embeddings, and 12 * n_layer * n_embd * T for attention.
    """
    positions = model.transformer.wpe.weight  # looked up, not multiplied
    params = [p for p in model.parameters() if p is not positions]
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in params)
    return products + 12 * model.config.n_layer * model.config.n_embd * block_size


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of a large matrix product, at the best of some tries."""
    n = PROBE_SIZES.get(device.type, PROBE_SIZES["cpu"])
    a, seconds = torch.ones(n, n, device=device, dtype=dtype), math.inf
    for _ in range(PROBES):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the product
        seconds = min(seconds, time.perf_counter() - started)
    if device.type == "cuda":
        del a
        torch.cuda.reset_peak_memory_stats(device)  # the run logs its own peak
    return 2 * n**3 / seconds


def estimate_times(
    model: GPT,
    data: TrainingData,
    config: TrainConfig,
    dist: Distributed,
    eval_tokens: int,
    start: int = 0,
) -> str:
    """The device and the sizes, and about how long an evaluation, a step and the run from step
    `start` on take: for the user, who would wait before seeing that a model is too large for the
    machine.
    """
    device, dtype = dist.device, autocast_dtype(config.precision) or torch.float32
    speed = EFFICIENCY * dist.world_size * measure_flops(device, dtype)
    per_token = flops_per_token(model, data.block_size)
    tokens = data.tokens_through(1)
    step, evaluation = (n * per_token / speed for n in (tokens, eval_tokens / 3))  # no backward
    n_steps = config.max_steps - start
    run = n_steps * step + (1 + n_steps // config.eval_every) * evaluation
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name += f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    n_params = sum(p.numel() for p in model.parameters())
    eval_time, step_time, total = (format_seconds(s) for s in (evaluation, step, run))
    is_slow = device.type == "cpu" and step > SLOW_STEP_SECONDS
    return (
        f"device: {dist.world_size} x {name}, {config.precision}, {n_params / 1e6:,.1f}M "
        f"parameters, {tokens:,} tokens in the first step\n"
        f"estimate: {eval_time} for an evaluation, {step_time} for a step, {total} for the run"
        + ("; configs/demo.yaml and configs/small.yaml are made for CPUs" if is_slow else "")
    )


def format_seconds(seconds: float) -> str:
    """Rounded, in the largest unit of which there is more than one."""
    for size, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
