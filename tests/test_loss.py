import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_DIST, random_ids, run_worker
from torch.profiler import ProfilerActivity, profile

from engine import loss as loss_module
from engine.data import Batch, make_batch
from engine.loss import HeadLoss, SummedLoss, compile_cross_entropy, cross_entropy_
from model import GPT, GPTConfig


def head_loss(x, weight, targets, dtype, cross_entropy=cross_entropy_) -> torch.Tensor:
    """Compute the loss, and its gradients, of hidden states `x` for a vocabulary of 1000."""
    return HeadLoss.apply(
        x.to(dtype), weight, targets, 1000, True, cross_entropy
    )  # True: with_grad


def test_untrained_loss_is_log_vocab_size():
    """A new model predicts the uniform distribution over the real vocabulary."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64)), random_ids(4, 64, vocab_size=50257)
    loss = SummedLoss(model)(Batch(idx, idx.roll(1))) / idx.numel()
    assert abs(loss.item() - math.log(50257)) < 0.05


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_loss_equals_plain_cross_entropy(tiny_model, chunk_rows, dtype, monkeypatch):
    """Loss and gradients match fp32 cross-entropy over the real vocabulary, even if computed in
    chunks or from bf16 logits. Positions without a target are ignored; without any target, the loss
    is 0. Padding rows of the head get no gradient. A second backward pass is refused.
    """
    monkeypatch.setattr(loss_module, "CPU_CHUNK_ROWS", chunk_rows)
    idx, targets = random_ids(3, 40), random_ids(3, 40).roll(1)
    targets[0, :11] = -100
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, empty_loss = (
            SummedLoss(tiny_model)(make_batch(idx.numpy(), t.numpy()))
            for t in (targets, torch.full_like(targets, -100))
        )
        hidden = tiny_model.hidden(idx, residual_dtype=dtype)
        logits = tiny_model.logits(hidden).flatten(0, 1).float()
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    params = list(tiny_model.parameters())
    gradients, expected = (
        torch.autograd.grad(value, params, retain_graph=True) for value in (loss, plain)
    )
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 if dtype is None else 2e-2)
    assert gradients[0].shape == (1024, 64)
    assert (gradients[0][1000:] == 0).all()
    assert empty_loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(empty_loss, params))
    with pytest.raises(TypeError):
        loss.backward()


def test_a_frozen_head_in_bf16(tiny_model, monkeypatch):
    """A bf16 head gives the loss and gradient of its fp32 copy without allocating that copy."""
    monkeypatch.setattr(loss_module, "CAST_ROWS", 300)  # does not divide the 1024 rows
    monkeypatch.setattr(loss_module, "CPU_SMALL_CHUNK_ROWS", 32)
    x = torch.randn(100, 64, requires_grad=True)
    targets, head = random_ids(100, 1)[:, 0], tiny_model.lm_head.weight.detach().bfloat16()
    plain = F.cross_entropy(x @ head[:1000].float().t(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loss = head_loss(x, head, targets, torch.float32)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert max(event.cpu_memory_usage for event in prof.events()) < 4 * head.numel()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "kind"),
    [
        (torch.bfloat16, 3e-2, "eager"),
        (torch.float16, 4e-3, "uncompiled kernel"),
        pytest.param(torch.bfloat16, 3e-2, "compiled kernel", marks=pytest.mark.slow),
    ],
)
def test_gradients_in_16_bits_if_the_model_is_certain(monkeypatch, dtype, tolerance, kind):
    """For a target with p = 0.997, the gradient p - 1 has 16-bit precision, compiled or not.
    Rounding p itself to 16 bits would lose most of it. The loss is within 1% of float64.
    """
    if kind == "compiled kernel" and shutil.which("gcc") is None:
        pytest.skip("torch.compile on a CPU needs gcc")
    if kind == "uncompiled kernel":  # test its formula without compiling it
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cross_entropy = cross_entropy_ if kind == "eager" else compile_cross_entropy(CPU_DIST.device)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (300, 1024))
    targets = torch.randint(1000, (300,), generator=generator)
    weight *= 0.1
    x = 0.3 * x + 20 * F.normalize(weight[targets], dim=-1)  # target logits 16 above others
    leaves = [t.to(dtype).float().requires_grad_() for t in (x, weight)]
    loss = head_loss(*leaves, targets, dtype, cross_entropy)
    gradients = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = exact[0] @ exact[1][:1000].t()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert torch.exp(-expected / 300) > 0.99
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_the_residual_stream_is_in_bf16(tiny_model, dtype, expected):
    """Under bf16 autocast, the loss keeps the residual stream in bf16, but not under fp16 autocast,
    and never outside the loss: samples and HellaSwag stay as they are. Gradients are in fp32.
    """
    idx, dtypes = random_ids(8, 40), []
    for block in tiny_model.transformer.h:
        block.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", dtype):
        loss = SummedLoss(tiny_model)(Batch(idx, idx.roll(1)))
        tiny_model(idx)
    n_layer = len(tiny_model.transformer.h)
    assert dtypes == [expected] * n_layer + [torch.float32] * n_layer
    gradients = torch.autograd.grad(loss, [*tiny_model.parameters()])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_layer_norm_computes_in_fp32(monkeypatch):
    """With the residual stream in bf16, the gradients of LayerNorms are about as close to those of
    fp32 training as with the stream in fp32. On a CPU, too, LayerNorm computes in fp32.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=1000, n_layer=2, n_head=2, n_embd=64))
    for param in model.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.15)
    idx, hidden, gradients = random_ids(8, 40), model.hidden, []
    params = [p for name, p in model.named_parameters() if ".ln_" in name]
    for dtype, is_stream_rounded in (
        (None, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        if not is_stream_rounded:
            monkeypatch.setattr(model, "hidden", lambda idx, residual_dtype: hidden(idx))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = SummedLoss(model)(Batch(idx, idx.roll(1)))
        gradients.append(torch.cat(torch.autograd.grad(loss, params)))
        monkeypatch.undo()
    exact, with_fp32_stream, with_bf16_stream = gradients
    assert (with_bf16_stream - exact).norm() < 1.3 * (with_fp32_stream - exact).norm()


def test_the_triton_kernel_equals_float64():
    """In Triton's interpreter, losses and gradients equal float64, for any number of columns."""
    pytest.importorskip("triton", reason="needs Triton")
    assert run_worker("triton_cross_entropy.py") == "equal\n"


def test_loss_never_holds_all_logits(monkeypatch):
    """Neither the loss nor its backward allocates a quarter of the (B*T, V) logits at once."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK_ROWS", 32)
    config = GPTConfig(block_size=64, vocab_size=8192, n_layer=1, n_head=1, n_embd=8)
    model, idx = GPT(config), random_ids(16, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        SummedLoss(model)(Batch(idx, idx)).backward()
    largest = max(event.cpu_memory_usage for event in prof.events())
    logits_bytes = 16 * 64 * 8192 * 4
    assert largest < logits_bytes / 4


def test_bf16_matmuls_of_the_head_share_shapes(tiny_model):
    """In bf16 on a CPU, 1 to 64 targets share matmul shapes, so oneDNN builds few kernels."""
    shapes, matmul_names = [], ("aten::mm", "aten::addmm_")
    for n_targets in (1, 33, 64):
        x = torch.randn(n_targets, 64, requires_grad=True)
        weight, ids = tiny_model.lm_head.weight, random_ids(n_targets)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
            head_loss(x, weight, ids, torch.bfloat16)
        matmuls = [event.input_shapes for event in prof.events() if event.name in matmul_names]
        assert len(matmuls) == 3  # logits, and the gradients of x and weight
        shapes.append(matmuls)
    assert shapes[0] == shapes[1] == shapes[2]
