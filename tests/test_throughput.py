"""FLOPs, MFU's peaks, memory, and the estimate of how long a run takes."""

from pathlib import Path

import pytest
import torch
from conftest import CPU, make_data, new_model

from engine import throughput
from engine.config import TrainConfig
from engine.throughput import (
    estimate_times,
    flops_per_token,
    format_seconds,
    measure_flops,
    peak_flops,
    peak_memory,
)
from model import GPT, GPTConfig


def test_peak_memory_is_the_kernels():
    """The peak memory of this process is the kernel's figure, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        pytest.skip("needs /proc")
    kib = int(text.split("VmHWM:")[1].split()[0])
    assert peak_memory(CPU.device) == pytest.approx(kib * 1024, rel=0.05)


def test_flops_at_124m():
    """6 FLOPs per token and parameter of a matrix product, plus attention, computed by hand."""
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
    """Names as drivers report them find their own card's peak, not that of a similar card."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (59.6, "60 s"),
        (2640, "44 minutes"),
        (1e5, "28 hours"),
        (1e9, "32 years"),
    ],
)
def test_times_are_readable(seconds, text):
    """Two digits or so, in the largest unit of which there is more than one."""
    assert format_seconds(seconds) == text


def test_a_slow_start_says_so(shards, monkeypatch):
    """An evaluation, a step and the run are estimated from the speed of a matrix product,
    0.6 of which training reaches, and the FLOPs of the model; on a CPU that is too slow a line
    names configs for it.
    """
    model, data = new_model(), make_data(shards)  # 192 tokens a step
    config = TrainConfig(max_steps=1000, eval_every=100, precision="fp32")
    flops = flops_per_token(model, 16)
    # A step of 5 minutes.
    monkeypatch.setattr(throughput, "measure_flops", lambda *_: 192 * flops / 300 / 0.6)
    text = estimate_times(model, data, config, CPU, eval_tokens=3 * 192)
    assert "parameters, 192 tokens in the first step" in text
    expected = "5 minutes for an evaluation, 5 minutes for a step, 4 days for the run"
    assert f"estimate: {expected}; configs/demo.yaml" in text
    monkeypatch.setattr(throughput, "measure_flops", lambda *_: 192 * flops / 0.6)
    assert "configs" not in estimate_times(model, data, config, CPU, eval_tokens=10)


def test_the_speed_of_this_machine_is_plausible():
    """A CPU multiplies at more than 1 and less than 100,000 GFLOP/s."""
    assert 1e9 < measure_flops(torch.device("cpu"), torch.float32) < 1e14
