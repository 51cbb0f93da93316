import math
import shutil
from fractions import Fraction
from functools import partial
from itertools import product

import pytest
import torch
import torch.optim._muon as torch_muon
from conftest import STEP_CONFIG, make_step, new_step_model, run_script
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from engine import optim
from engine.optim import Muon, build_optimizers, learning_rate, newton_schulz, parameter_groups
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig

TORCH_NEWTON_SCHULZ = torch_muon._zeropower_via_newtonschulz
SHAPES = (72, 24), (96, 24), (24, 96)  # the first stacks three matrices, like c_attn


def test_schedule_equals_build_nanogpt():
    """The rate at step s equals build-nanogpt's at step s - 1, because our steps count from 1."""

    def get_lr(it, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073):
        if it < warmup_steps:
            return max_lr * (it + 1) / warmup_steps
        ratio = (it - warmup_steps) / (max_steps - warmup_steps)
        return min_lr + (1.0 + math.cos(math.pi * ratio)) / 2 * (max_lr - min_lr)

    config = PretrainConfig()
    for step in (1, 2, 714, 715, 716, 717, 5000, 10_000, 19_072, 19_073):
        assert learning_rate(step, config) == pytest.approx(get_lr(step - 1), rel=1e-12)
    assert learning_rate(1, PretrainConfig(warmup_steps=0)) == 6e-4


def test_wsd_schedule():
    """Warmup, a constant rate, then linear decay that would reach 0 one step after the last."""
    sizes = {"max_steps": 100, "warmup_steps": 10, "max_lr": 1.0, "decay_fraction": 0.2}
    config = PretrainConfig(schedule="wsd", **sizes)
    rates = [learning_rate(s, config) for s in range(1, 102)]
    assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([s / 20 for s in range(20, -1, -1)])
    with pytest.raises(ValueError, match=r"decay_fraction is 1.5, expected at least 0 and"):
        PretrainConfig(decay_fraction=1.5)


def test_wsd_has_the_lower_of_warmup_and_decay():
    """The rate is the minimum of the warmup, max_lr and the decay, computed with fractions, also if
    the warmup reaches into the decay or is longer than the run.
    """
    grid = product((1, 2, 9, 50), (0, 1, 5, 44, 99), ("0", "0.14", "0.4", "0.56", "1"))
    for steps, warmup, fraction in grid:
        sizes = {"max_steps": steps, "warmup_steps": warmup, "decay_fraction": float(fraction)}
        config = PretrainConfig(schedule="wsd", max_lr=1.0, **sizes)
        decay = max(1, steps * Fraction(fraction))
        for s in range(1, steps + 1):
            expected = min(1, Fraction(s, warmup or s), (steps + 1 - s) / decay)
            assert learning_rate(s, config) == pytest.approx(float(expected), rel=1e-12)


def test_parameter_groups_at_124m():
    """At 124M, 50 tensors with 124,354,560 parameters have weight decay; 98 with 121,344 do not."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    groups = parameter_groups(model, 0.1)
    sizes = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]
    assert sizes == [(50, 124_354_560), (98, 121_344)]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


class IgnoreBF16Cast(torch.Tensor):
    """A tensor that stays in fp32 when it is cast to bf16."""

    def bfloat16(self):
        return self.as_subclass(torch.Tensor).clone()


def newton_schulz_fp32(gradient: torch.Tensor, *args: object) -> torch.Tensor:
    """Run the Newton-Schulz iteration of PyTorch without its one cast to bf16."""
    return TORCH_NEWTON_SCHULZ(gradient.as_subclass(IgnoreBF16Cast), *args)


@pytest.mark.parametrize(
    ("precision", "has_units", "expected"),
    [("bf16", True, torch.bfloat16), ("bf16", False, torch.float32), ("fp32", True, torch.float32)],
)
def test_newton_schulz_dtype_on_a_cpu(monkeypatch, precision, has_units, expected):
    """On a CPU, Newton-Schulz runs in bf16 only if training does and the CPU has bf16 units. In
    either dtype, the singular values end between 0.3 and 1.3.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_units})
    config = PretrainConfig(optimizer="muon", precision=precision)
    _, muon = build_optimizers(new_step_model(), config)
    assert muon.dtype == expected
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 48, 96).to(muon.dtype)).float())
    assert 0.3 < values.min() <= values.max() < 1.3


def test_steps_equal_torch_muon(monkeypatch):
    """Five steps on matrices of all shapes equal those of torch.optim.Muon in fp32."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", newton_schulz_fp32)
    torch.manual_seed(0)
    qkv, tall, wide = mine = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    parts = [*qkv.detach().chunk(3), tall.detach(), wide.detach()]
    theirs = [torch.nn.Parameter(part.clone()) for part in parts]
    groups = [{"params": [qkv], "parts": 3}, {"params": [tall, wide]}]
    ours = Muon(groups, lr=0.02, weight_decay=0.1, dtype=torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(5):
        a, b, c = (torch.randn(shape) for shape in SHAPES)
        for param, grad in zip([*mine, *theirs], [a, b, c, *a.chunk(3), b, c], strict=True):
            param.grad = grad.clone()
        ours.step()
        reference.step()
    for param, expected in zip(mine, (torch.cat(theirs[:3]), *theirs[3:]), strict=True):
        torch.testing.assert_close(param, expected, atol=1e-5, rtol=1e-4)


def normuon_by_hand(
    matrix: torch.Tensor, grads: list[torch.Tensor], *, lr: float, beta2: float
) -> torch.Tensor:
    """Return `matrix` after NorMuon steps as in modded-nanogpt, in fp64. Updates are normalized row
    by row, or column by column if the matrix is wide.
    """
    weights = matrix.double().clone()
    mean = torch.zeros_like(weights)
    is_wide = weights.size(0) < weights.size(1)
    moments = [0.0] * max(weights.shape)
    for grad in grads:
        mean = 0.95 * mean + 0.05 * grad.double()
        lookahead = 0.05 * grad + 0.95 * mean
        update = newton_schulz(lookahead.float()[None])[0].double()
        rows = list(update.T if is_wide else update)
        for i, row in enumerate(rows):
            moments[i] = beta2 * moments[i] + (1 - beta2) * row.square().mean().item()
            rows[i] = row / math.sqrt(moments[i])
        normalized = torch.stack(rows)
        normalized *= update.norm() / normalized.norm()
        factor = math.sqrt(max(1.0, weights.size(0) / weights.size(1)))
        weights -= lr * factor * (normalized.T if is_wide else normalized)
    return weights


def test_normuon_equals_modded_nanogpt():
    """Four steps on tall, square, wide and stacked matrices match the NorMuon formula."""
    torch.manual_seed(0)
    start = {shape: torch.randn(shape) for shape in (*SHAPES, (24, 24))}
    grads = {shape: [torch.randn(shape) for _ in range(4)] for shape in start}
    params = {shape: torch.nn.Parameter(matrix.clone()) for shape, matrix in start.items()}
    qkv, *others = params.values()
    groups = [{"params": [qkv], "parts": 3}, {"params": others}]
    ours = Muon(groups, lr=0.02, weight_decay=0.0, beta2=0.95)
    for i in range(4):
        for shape, param in params.items():
            param.grad = grads[shape][i].clone()
        ours.step()
    for shape, param in params.items():
        parts = 3 if param is qkv else 1
        expected = []
        for part, matrix in enumerate(start[shape].chunk(parts)):
            part_grads = [grad.chunk(parts)[part] for grad in grads[shape]]
            expected.append(normuon_by_hand(matrix, part_grads, lr=0.02, beta2=0.95))
        torch.testing.assert_close(param.double(), torch.cat(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_a_zero_gradient_changes_nothing(beta2):
    """A matrix that gets no gradient yet, as with zero_residual, stays as it is."""
    param = torch.nn.Parameter(torch.randn(8, 4))
    before, param.grad = param.detach().clone(), torch.zeros(8, 4)
    Muon([{"params": [param]}], lr=0.02, weight_decay=0.0, beta2=beta2).step()
    assert torch.equal(param, before)


class CountOps(TorchDispatchMode):
    """Counts operations that are not views. Inside `count_compiled` calls, it counts only them."""

    def __init__(self):
        super().__init__()
        self.n_ops, self.compiled = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n_ops += not func.is_view
        return func(*args, **(kwargs or {}))

    def count_compiled(self, function, **options):
        """Use this instead of torch.compile: it does not compile, but counts a call as one."""

        def call(*args):
            n_ops = self.n_ops
            result = function(*args)
            self.n_ops = n_ops
            self.compiled.append(function.__name__)
            return result

        return call


def test_compiled_muon_needs_few_launches(monkeypatch):
    """At 124M, a step has four batches. Each calls three compiled functions, for everything that
    passes over gradients, means and weights, and at most 40 other operations.
    """
    counter = CountOps()
    monkeypatch.setattr(torch, "compile", counter.count_compiled)
    with torch.device("meta"):
        blocks = GPT(GPTConfig()).transformer.h
    matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
    groups = [{"params": [p for p in matrices if p.size(0) != 2304]}]
    groups.append({"params": [p for p in matrices if p.size(0) == 2304], "parts": 3})
    muon = Muon(groups, lr=0.02, weight_decay=0.1, beta2=0.95, dtype=torch.bfloat16, compiled=True)
    muon.found_inf = muon.grad_scale = torch.ones((), device="meta")
    for _ in range(2):
        for param in matrices:
            param.grad = torch.empty_like(param)
        counter.n_ops, counter.compiled = 0, []
        with counter:
            muon.step()
    assert counter.compiled == ["look_ahead", "normuon_scales", "change_weights"] * 4
    assert counter.n_ops <= 40 * 4


@pytest.mark.parametrize("beta2", [0.0, 0.95])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_muon_equals_eager(monkeypatch, backend, beta2):
    """Compiled and eager steps are equal, even if gradients are scaled and a step is skipped.
    Another rate or momentum compiles nothing again.
    """
    if backend == "inductor" and shutil.which("gcc") is None:
        pytest.skip("torch.compile on a CPU needs gcc")
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in (*SHAPES, (24, 96))]
    weights, optimizers = [], []
    for compiled in (False, True):
        qkv, *others = params = [torch.nn.Parameter(matrix.clone()) for matrix in start]
        groups = [{"params": [qkv], "parts": 3}, {"params": others}]
        muon = Muon(groups, lr=0.02, weight_decay=0.1, beta2=beta2, compiled=compiled)
        muon.grad_scale = torch.tensor(2.0)
        weights.append(params)
        optimizers.append(muon)
    n_graphs = []
    for s in range(5):
        grads = [torch.randn_like(matrix) * (math.nan if s == 2 else 1.0) for matrix in start]
        for params, muon in zip(weights, optimizers, strict=True):
            muon.found_inf = torch.tensor(float(s == 2))
            for group in muon.param_groups:
                group["lr"], group["momentum"] = 0.02 / (s + 1), 0.85 + 0.01 * s
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            before = [param.detach().clone() for param in params]
            muon.step()
            assert all(map(torch.equal, params, before)) == (s == 2)
        n_graphs.append(counters["stats"]["unique_graphs"])
        for eager, compiled_param in zip(*weights, strict=True):
            torch.testing.assert_close(compiled_param, eager, atol=1e-5, rtol=1e-4)
    n_functions = 3 if beta2 else 2
    assert n_graphs == [len(SHAPES) * n_functions] * 5


def test_muon_divides_gradients_by_their_scale():
    """Like fused AdamW: with 8 times the gradients and a grad_scale of 8, steps are the same."""
    results = []
    for scale in (None, 8.0):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(24, 24))
        muon = Muon([{"params": [param]}], lr=0.02, weight_decay=0.1)
        muon.grad_scale = None if scale is None else torch.tensor(scale)
        for _ in range(3):
            param.grad = torch.randn(24, 24) * (scale or 1.0)
            muon.step()
        results += [param.detach(), muon.state[param]["momentum_buffer"]]
    assert all(map(torch.equal, results[:2], results[2:]))


def test_batching_matrices_does_not_change_muon(monkeypatch, shards):
    """How many matrices Newton-Schulz gets at once changes nothing but the order of sums."""
    losses = []
    for batch_elements in (optim.NS_BATCH_ELEMENTS, 1):
        monkeypatch.setattr(optim, "NS_BATCH_ELEMENTS", batch_elements)
        step = make_step(new_step_model(), shards, optimizer="muon")
        losses.append([step(s)[0].item() for s in range(1, 6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_muon_gets_the_matrices(shards):
    """Muon gets the blocks' matrices (c_attn counts as three). AdamW gets all other parameters."""
    model = new_step_model()
    adamw, muon = make_step(model, shards, optimizer="muon", muon_lr=0.5).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    parts = {names[id(p)]: g["parts"] for g in muon.param_groups for p in g["params"]}
    expected = {
        f"transformer.h.{i}.{n}.weight": 3 if n == "attn.c_attn" else 1
        for i in range(STEP_CONFIG.n_layer)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert parts == expected
    others = [names[id(p)] for g in adamw.param_groups for p in g["params"]]
    assert sorted([*others, *parts]) == sorted(names.values())


def test_betas_are_flags(shards):
    """beta1 and beta2 reach AdamW, both alone and together with Muon."""
    for optimizer in ("adamw", "muon"):
        step = make_step(new_step_model(), shards, optimizer=optimizer, beta1=0.8, beta2=0.99)
        assert {group["betas"] for group in step.optimizers[0].param_groups} == {(0.8, 0.99)}


def test_rates_and_momentum_follow_the_step(shards):
    """The rate of Muon follows the schedule. Its momentum rises from 0.85 to 0.95 in 300 steps."""
    step = make_step(new_step_model(), shards, optimizer="muon", muon_lr=0.02)
    for s in (1, 2, 3, 10):
        step(s)
        adamw, muon = step.optimizers
        assert adamw.param_groups[0]["lr"] == learning_rate(s, step.config)
        assert muon.param_groups[0]["lr"] == pytest.approx(2 * learning_rate(s, step.config))
        assert muon.param_groups[0]["momentum"] == pytest.approx(0.85 + 0.1 * (s - 1) / 300)
    assert optim.muon_momentum(301) == optim.muon_momentum(9999) == 0.95


def test_muon_needs_trainable_matrices(shards):
    """If the matrices are frozen, choosing Muon is an error that says what to do instead."""
    model = new_step_model()
    model.transformer.h.requires_grad_(False)
    with pytest.raises(ValueError, match="use adamw, or train all weights"):
        make_step(model, shards, optimizer="muon")


def test_ranks_share_the_work(tmp_path):
    """With replicated and with sharded parameters, each of two ranks orthogonalizes a share of the
    matrices. The steps match those of one process, even after a skipped step.
    """
    result = run_script("tests/workers/muon_ranks.py", cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
