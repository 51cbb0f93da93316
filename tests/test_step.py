import copy
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_DIST, make_data, make_step, new_step_model, on_cpu_and_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from engine.data import PretrainingData
from engine.lora import convert_linear_layer_to_lora, lora_linears, only_optimize_lora_parameters
from engine.loss import SummedLoss
from engine.optim import learning_rate
from engine.step import TrainingStep
from model import GPT


def test_recomputed_attention_uses_the_same_kernels(shards, monkeypatch):
    """Whether attention may use cuDNN is the same in the forward pass and when the backward pass
    recomputes it, and is restored after the step.
    """
    before, allowed = torch.backends.cuda.cudnn_sdp_enabled(), []

    def record_setting(*args, **kwargs) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", record_setting)
    model = new_step_model()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        make_step(model, shards, recompute="block")(1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    n_micro_steps = 192 // (4 * model.config.block_size)
    assert allowed == [True] * 2 * model.config.n_layer * n_micro_steps


def test_steps_equal_a_plain_loop_in_transformers(shards, tmp_path):
    """Five steps of 12 micro-batches equal five steps of a plain loop that trains transformers'
    GPT-2 on each batch at once, with unfused AdamW and clipping by hand.
    """
    model = new_step_model()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    step = make_step(model, shards, batch_size=1, grad_clip=0.5)
    batches = make_data(shards, 12)
    for s in range(1, 6):
        idx, targets, _ = batches.micro_batch(s, 1)
        logits = theirs(idx).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step.config)
        optimizer.step()
        optimizer.zero_grad()
        my_loss, my_norm = (value.item() for value in step(s))
        assert my_loss == pytest.approx(loss.item(), rel=1e-5)
        assert my_norm == pytest.approx(norm, rel=1e-6)
    model.save_pretrained(tmp_path)
    mine = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: name + m)


def test_micro_batch_size_does_not_change_the_curve(shards):
    """With 1, 4 and 12 sequences per micro-step, losses are the same up to the order of sums, even
    with the short window at the end of an epoch.
    """
    curves = []
    for batch_size in (1, 4, 12):
        step = make_step(new_step_model(), shards, batch_size)
        curves.append([step(s)[0].item() for s in range(1, 7)])  # an epoch has fewer than 4 steps
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


OPTIMIZERS = [{}, {"optimizer": "muon"}, {"optimizer": "muon", "muon_beta2": 0.95}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["AdamW", "Muon", "NorMuon"])
def test_state_continues_bit_for_bit(shards, options):
    """A snapshot does not change while training continues. Restoring it repeats the next steps."""
    step = make_step(new_step_model(), shards, **options)
    for s in (1, 2, 3):
        step(s)
    weights, state = step.snapshot()
    expected = [step(s) for s in (4, 5, 6)]
    model = new_step_model()
    model.load_state_dict(weights, strict=False)  # a tied head has two names
    step = make_step(model, shards, **options)
    step.restore(state)
    assert [step(s) for s in (4, 5, 6)] == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_follows_fp32(shards, precision):
    """In bf16, and in fp16 with its scaler, losses stay close to fp32. Weights stay in fp32."""
    exact = make_step(new_step_model(), shards)
    model = new_step_model()
    rounded = make_step(model, shards, precision=precision)
    for s in range(1, 9):
        assert rounded(s)[0].item() == pytest.approx(exact(s)[0].item(), rel=5e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded.scaler.is_enabled() == (precision == "fp16")


def lora_model() -> GPT:
    """Make a model with LoRA in the summed form, in which nothing is zero."""
    model = only_optimize_lora_parameters(convert_linear_layer_to_lora(new_step_model()))
    for linear in lora_linears(model).values():
        torch.nn.init.normal_(linear.lora_B, std=0.1)
        linear.use_summed_form = True
    return model


@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        (new_step_model, {"precision": "fp16"}),
        (new_step_model, {"optimizer": "muon", "muon_beta2": 0.95}),
        (lora_model, {"precision": "bf16"}),
    ],
    ids=["AdamW, fp16", "NorMuon", "LoRA"],
)
def test_gradients_kept_for_graphs_change_nothing(shards, monkeypatch, make_model, options):
    """With CUDA graphs, weights, gradients and LoRA's copies stay at their addresses. A run that
    makes new gradients in each step has the same losses, norms and weights, bit for bit: with three
    micro-steps, after a skipped step, and after restoring a snapshot.
    """
    plain = make_step(make_model(), shards, **options)
    monkeypatch.setattr(PretrainingData, "graph_lengths", [16, 8])
    model = make_model()
    kept = make_step(model, shards, **options)
    assert kept(1) == plain(1)
    tensors = [*model.parameters(), *model.buffers(), *kept.kept_grads]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert kept(2) == plain(2)
    for step in (kept, plain):
        parameter = next(p for p in step.model.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda grad: grad * math.nan)
        assert not step(3)[1].isfinite()
        handle.remove()
    weights, state = kept.snapshot()
    assert kept(4) == plain(4)
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all(map(torch.equal, model.parameters(), plain.model.parameters()))
    restored = make_model()
    restored.load_state_dict(weights, strict=False)
    step = make_step(restored, shards, **options)
    step.restore(state)
    step(4)
    assert all(map(torch.equal, restored.parameters(), model.parameters()))


class CountOps(TorchDispatchMode):
    """Counts the operations on tensors."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def test_clipping_takes_few_operations_on_a_gpu(monkeypatch):
    """On CUDA, the norm of 148 gradients and the factor for clipping take a handful of operations,
    each of them on all gradients. (The GPU is fake, so nothing is computed.)
    """
    # This is true of real tensors on a GPU, but not of fake ones.
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(8, 8, device="cuda")) for _ in range(148)]
        for param in params:
            param.grad = torch.empty(8, 8, device="cuda")
        optimizer = SimpleNamespace()
        step = SimpleNamespace(
            model=SimpleNamespace(parameters=lambda: params),
            dist=SimpleNamespace(device=torch.device("cuda")),
            config=SimpleNamespace(grad_clip=1.0),
            optimizers=[optimizer],
        )
        with CountOps() as counter:
            norm = TrainingStep._clip_gradients(step)
    assert counter.n <= 8
    assert norm.device == optimizer.grad_scale.device == torch.device("cuda", 0)


def test_the_norm_on_a_cpu_is_exact():
    """The norm of the gradients of a large embedding and a vector equals numpy's in float64,
    although one row and one element are so large that fp32 sums lose the squares of the others.
    """
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in ((50_304, 16), (9999,))]
    for param in params:
        param.grad = 1e-4 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
        param.grad[198] = 1.0
    step = SimpleNamespace(
        model=SimpleNamespace(parameters=lambda: params),
        dist=CPU_DIST,
        config=SimpleNamespace(grad_clip=1.0),
        optimizers=[],
    )
    expected = np.linalg.norm([np.linalg.norm(p.grad.numpy().astype(np.float64)) for p in params])
    assert TrainingStep._clip_gradients(step).item() == pytest.approx(expected, rel=1e-7)


class CountCasts(TorchDispatchMode):
    """Counts casts of fp32 tensors of one shape to bf16."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func == torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.casts += out.dtype == torch.bfloat16 and out.shape == self.shape
        return out


def test_weights_are_cast_once_a_step(shards):
    """In bf16, three micro-steps cast each matrix once, and match one large micro-step."""
    models = [new_step_model(), new_step_model()]
    three, one = (
        make_step(m, shards, n, precision="bf16") for m, n in zip(models, (4, 12), strict=True)
    )
    with CountCasts(models[0].transformer.h[0].mlp.c_fc.weight.shape) as counter:
        loss, norm = three(1)
    assert counter.casts == len(models[0].transformer.h)
    torch.testing.assert_close((loss, norm), one(1), atol=0, rtol=1e-2)


@on_cpu_and_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_skipped(shards, precision, optimizer, dist):
    """A NaN gradient changes neither weights nor optimizer state, not even step counters."""
    model = new_step_model().to(dist.device)
    options = {"muon_weight_decay": 0.1, "muon_beta2": 0.95, "precision": precision}
    step = make_step(model, shards, dist=dist, optimizer=optimizer, **options)
    step(1)
    state = copy.deepcopy(step.snapshot()[1]["optimizer"]["state"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.nan)
    step(2)
    step(3)
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = step.snapshot()[1]["optimizer"]["state"]
    for name, tensors in state.items():
        assert all(torch.equal(tensor, after[name][key]) for key, tensor in tensors.items())
    assert step(4)[1].isfinite()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_the_eager_one(shards, monkeypatch, backend):
    """Compiled and eager loss and gradients are equal. Parameter names do not change."""
    if backend == "inductor" and shutil.which("gcc") is None:
        pytest.skip("torch.compile on a CPU needs gcc")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = new_step_model(), new_step_model()
    batch = make_data(shards, 12, 0).micro_batch(1, 1)
    losses = [SummedLoss(eager)(batch), SummedLoss(compiled, trunk_mode="default")(batch)]
    sum(losses).backward()
    torch.testing.assert_close(*losses, atol=0, rtol=1e-5)
    for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert "_orig_mod" not in name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
