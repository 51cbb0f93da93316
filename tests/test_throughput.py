"""FLOPs of a model, peak FLOPS of a GPU, peak memory, and readable times."""

from pathlib import Path

import pytest
import torch
from conftest import CPU_DIST

from engine.throughput import flops_per_token, format_seconds, peak_flops, peak_memory
from model import GPT, GPTConfig


def test_peak_memory_matches_the_kernel():
    """The peak memory of this process, in bytes, is what the kernel reports."""
    try:
        text = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        pytest.skip("needs /proc")
    kib = int(text.split("VmHWM:")[1].split()[0])
    assert peak_memory(CPU_DIST.device) == pytest.approx(kib * 1024, rel=0.05)


def test_flops_at_124m():
    """By hand: 6 FLOPs per token for each parameter used in a matmul, plus attention."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert flops_per_token(model, 1024) == 6 * (124_475_904 - 786_432) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_belong_to_the_card(monkeypatch, name, peak):
    """The driver's name of a GPU gives the peak of that GPU, not of one with a similar name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_times_are_readable():
    """A time has about two digits, in the largest unit that fits more than once."""
    texts = {0.0123: "0.012 s", 59.6: "60 s", 2640: "44 minutes", 1e5: "28 hours", 1e9: "32 years"}
    assert {seconds: format_seconds(seconds) for seconds in texts} == texts
