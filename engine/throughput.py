"""A model's FLOPs, and a device's name, peak speed and peak memory."""

import platform
import re
import sys

import torch

from model import GPT

# Dense peak TFLOP/s of the tensor cores in 16-bit floating point with fp32 accumulation, from the
# data sheets.
PEAK_TFLOPS = {
    2500: ("GB300", "GB200"),
    2250: ("B300", "B200"),
    989: ("H200", "GH200", "H100", "H800"),
    835: ("H200 NVL", "H100 NVL"),
    756: ("H100 PCIe",),
    503.8: ("RTX PRO 6000 Blackwell Workstation Edition",),
    364.2: ("RTX 6000 Ada",),
    362: ("L40S",),
    312: ("A100", "A800"),
    209.5: ("RTX 5090",),
    181: ("L40",),
    165.2: ("RTX 4090",),
    154.8: ("RTX A6000",),
    149.7: ("A40",),
    148: ("H20",),
    125: ("V100",),
    121: ("L4",),
    71: ("RTX 3090",),
    70: ("A10G",),
    65: ("T4",),
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense 16-bit peak in FLOP/s, or None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {card: peak for peak, cards in PEAK_TFLOPS.items() for card in cards}
    matches = [card for card in peaks if re.search(rf"\b{card}\b", name)]
    # The longest match wins: "H100 PCIe" also matches "H100".
    return peaks[max(matches, key=len)] * 1e12 if matches else None


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: that of CUDA tensors, or else of the process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def flops_per_token(model: GPT, block_size: int) -> int:
    """Return the forward and backward FLOPs per token, as in appendix B of the PaLM paper: 6 per
    parameter (4 if it is frozen), plus 12 * n_layer * n_embd * block_size for attention. Position
    embeddings do not count.
    """
    positions = model.transformer.wpe.weight  # looked up, not multiplied
    params = [p for p in model.parameters() if p is not positions]
    param_flops = sum((6 if p.requires_grad else 4) * p.numel() for p in params)
    return param_flops + 12 * model.config.n_layer * model.config.n_embd * block_size


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def format_seconds(seconds: float) -> str:
    """Format a duration, rounded, in the largest unit that gives at least 2."""
    for size, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
