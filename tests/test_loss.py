import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from torch.profiler import ProfilerActivity, profile

from engine import loss as loss_module
from engine.data import Batch
from engine.loss import SummedLoss
from model import GPT, GPTConfig


def mean_loss(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return SummedLoss(model)(Batch(idx, targets)) / (targets != -100).sum()


def test_untrained_loss_is_uniform():
    """A new model predicts the uniform distribution over the real vocabulary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=64))
    idx = random_ids(8, 64, vocab_size=50257)
    assert abs(mean_loss(model, idx, idx.roll(1)).item() - math.log(50257)) < 0.05


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_loss_equals_plain_cross_entropy(tiny_model, reduction, chunk_rows, monkeypatch):
    """Loss and gradients equal those of cross-entropy over the real vocabulary, in chunks or not,
    with ignored targets; padding rows get no gradient.
    """
    monkeypatch.setitem(loss_module.CHUNK_ROWS, "cpu", chunk_rows)
    idx, targets = random_ids(3, 40), random_ids(3, 40).roll(1)
    targets[0, :11] = -100
    plain = F.cross_entropy(
        tiny_model(idx).flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=-100
    )
    expected = torch.autograd.grad(plain, list(tiny_model.parameters()))
    loss = SummedLoss(tiny_model)(Batch(idx, targets))
    if reduction == "mean":
        loss = loss / (3 * 40 - 11)
    gradients = torch.autograd.grad(loss, list(tiny_model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(plain.detach()))
    assert gradients[0].shape == (1024, 64)
    assert (gradients[0][1000:] == 0).all()


@pytest.mark.parametrize("chunk_rows", [16, 1000])
def test_loss_keeps_its_precision_under_autocast(tiny_model, chunk_rows, monkeypatch):
    """Under bf16 autocast the loss is summed in fp32: its error is that of bf16 logits, not of a
    bf16 sum.
    """
    monkeypatch.setitem(loss_module.CHUNK_ROWS, "cpu", chunk_rows)
    idx = random_ids(8, 48)
    exact = SummedLoss(tiny_model)(Batch(idx, idx.roll(1)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = SummedLoss(tiny_model)(Batch(idx, idx.roll(1)))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=3e-4)
    rounded.backward()
    assert tiny_model.transformer.wte.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_head_skips_rows_that_do_not_count(tiny_model, dtype):
    """Loss and gradients are the same up to rounding whether the head computes ignored rows or not;
    a batch where nothing counts has loss 0; a second backward pass is refused.
    """
    idx, targets = random_ids(2, 30), random_ids(2, 30)
    targets[:, :20] = -100
    rows = (targets.flatten() != -100).nonzero()[:, 0]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = [SummedLoss(tiny_model)(Batch(idx, targets, r)) for r in (None, rows)]
        ignored = torch.full_like(targets, -100)
        nothing = SummedLoss(tiny_model)(Batch(idx, ignored, rows[:0]))
    params = list(tiny_model.parameters())
    all_rows, few_rows = (torch.autograd.grad(loss, params, retain_graph=True) for loss in losses)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for a, b in zip(all_rows, few_rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 if dtype is None else 1e-2)
    assert nothing.item() == 0
    with pytest.raises(TypeError):
        losses[0].backward()


def test_loss_never_holds_all_logits(monkeypatch):
    """No single allocation of a loss with its backward is as large as the (B·T, V) logits."""
    monkeypatch.setitem(loss_module.CHUNK_ROWS, "cpu", 32)
    config = GPTConfig(block_size=64, vocab_size=8192, n_layer=1, n_head=1, n_embd=8)
    model, idx = GPT(config), random_ids(16, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        SummedLoss(model)(Batch(idx, idx)).backward()
    largest = max(event.cpu_memory_usage for event in prof.events())
    assert largest < 16 * 64 * 8192 * 4 / 4
