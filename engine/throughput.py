"""FLOPs of a model; name, peak speed and memory of a device."""

import platform
import re
import sys

import torch

from model import GPT

if sys.platform != "win32":
    import resource

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


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def format_seconds(seconds: float) -> str:
    """Rounded, in the largest unit of which there is more than one."""
    for size, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
