"""FLOPs of a model; name, peak speed and memory of a device."""

import platform
import re
import sys

import torch

from model import GPT

if sys.platform != "win32":
    import resource

# Dense peak TFLOP/s of the matrix units in 16-bit floating point with fp32 accumulation, from the
# vendors' data sheets.
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
    """The device's dense 16-bit peak in FLOP/s, None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    cards = ((card, peak) for peak, cards in PEAK_TFLOPS.items() for card in cards)
    found = [(len(card), peak) for card, peak in cards if re.search(rf"\b{card}\b", name)]
    return max(found)[1] * 1e12 if found else None  # of the longest name: H100 PCIe, not H100


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
