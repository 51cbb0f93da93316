import contextlib
import copy
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from checkpoint import checkpoints
from data import PretrainingData, TokenShards, evaluation_batches
from model import GPT, GPTConfig
from plot import gpt2_val_loss
from report import Meter, describe, flops_per_token
from runtime import Distributed, Prefetch, peak_flops
from step import (
    StepLoss,
    TrainingStep,
    find_batch_size,
    largest_that_fits,
    learning_rate,
    out_of_memory,
    parameter_groups,
)
from train_gpt2 import PretrainConfig
from training import evaluate, train

ROOT = Path(__file__).parents[1]
CPU = Distributed(rank=0, world_size=1, device=torch.device("cpu"))
CONFIG = GPTConfig(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32)


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


@pytest.fixture
def shards(make_shards):
    return TokenShards(make_shards(300, 390), "train")


def make_step(model: GPT, shards: TokenShards, batch_size: int = 4, **options) -> TrainingStep:
    options = {"precision": "fp32", "total_batch_size": 192, "max_steps": 20, **options}
    options = {"warmup_steps": 3, "max_lr": 1e-2, "min_lr": 1e-3, **options}
    config = PretrainConfig(batch_size=batch_size, compile=False, **options)
    data = PretrainingData(shards, 16, batch_size, config.total_batch_size, config.seed)
    return TrainingStep(model, data, config, CPU)


def test_schedule_is_build_nanogpts():
    """The rate of step s is what build-nanogpt computes for its step s - 1."""

    def get_lr(it, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073):
        if it < warmup_steps:
            return max_lr * (it + 1) / warmup_steps
        ratio = (it - warmup_steps) / (max_steps - warmup_steps)
        return min_lr + (1.0 + math.cos(math.pi * ratio)) / 2 * (max_lr - min_lr)

    config = PretrainConfig()
    for step in (1, 2, 714, 715, 716, 717, 5000, 10_000, 19_072, 19_073):
        assert learning_rate(step, config) == pytest.approx(get_lr(step - 1), rel=1e-12)
    assert learning_rate(1, PretrainConfig(warmup_steps=0)) == 6e-4


def test_parameter_groups_at_124m():
    """At 124M, 50 tensors with 124,354,560 parameters decay and 98 with 121,344 do not."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    groups = parameter_groups(model, 0.1)
    sizes = [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]
    assert sizes == [(50, 124_354_560), (98, 121_344)]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_flops_at_124m():
    """6 FLOPs a parameter of a matrix product and token, and attention: worked out by hand."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert flops_per_token(model, 1024) == 6 * (124_475_904 - 786_432) + 12 * 12 * 768 * 1024


def test_steps_equal_a_plain_loop_in_transformers(shards, tmp_path):
    """Five steps of 12 micro-batches are five steps of a plain loop that trains transformers' model
    with the whole batch at once, unfused AdamW and hand-written clipping.
    """
    model = new_model()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    step = make_step(model, shards, batch_size=1, grad_clip=0.5)
    whole = PretrainingData(shards, 16, 12, 192, seed=1337)
    for s in range(1, 6):
        idx, targets = (torch.from_numpy(a) for a in whole.micro_batch(s, 1))
        logits = theirs(idx).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step.config)
        optimizer.step()
        optimizer.zero_grad()
        my_loss, my_norm = (figure.item() for figure in step(s))
        assert my_loss == pytest.approx(loss.item(), rel=1e-5)
        assert my_norm == pytest.approx(norm, rel=1e-6)
    model.save_pretrained(tmp_path)
    mine = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: name + m)


def test_micro_batch_size_does_not_change_the_curve(shards):
    """1, 2, 4 and 12 sequences a micro-step give the same losses up to summation order, with
    the short window of an epoch's end among them.
    """
    curves = []
    for batch_size in (1, 2, 4, 12):
        step = make_step(new_model(), shards, batch_size)
        curves.append([step(s)[0].item() for s in range(1, 9)])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_state_continues_to_the_bit(shards):
    """Weights and state after 3 steps, put into a new model, give the same steps 4 to 6 exactly."""
    model = new_model()
    step = make_step(model, shards)
    for s in (1, 2, 3):
        step(s)
    weights, state = step.snapshot()
    expected = [step(s) for s in (4, 5, 6)]
    model = new_model()
    model.load_state_dict(weights, strict=False)  # a tied head has two names
    step = make_step(model, shards)
    step.load_state(state)
    assert [step(s) for s in (4, 5, 6)] == expected


def test_prefetched_batches_are_the_ones_asked_for(shards):
    """In order, out of order and again: a prefetched batch is what the data make, made by another
    thread before it is asked for, and their errors reach the one who asks.
    """
    makers = []

    class Watched(PretrainingData):
        def micro_batch(self, step, micro_step):
            makers.append((step, micro_step, threading.current_thread()))
            if step == 9:
                raise OSError("the disk is gone")
            return super().micro_batch(step, micro_step)

    data = Watched(shards, 16, 4, 192, seed=1)
    batches = Prefetch(data, CPU.device)
    for asked in [(1, 1), (1, 2), (1, 3), (2, 1), (7, 2), (7, 2)]:
        idx, targets, *rows = batches(*asked)
        expected = PretrainingData.micro_batch(data, *asked)
        assert (idx.numpy() == expected[0]).all()
        assert (targets.numpy() == expected[1]).all()
        counted = (expected[1] != -100).ravel()
        assert len(rows) == (not counted.all())
        assert all((found.numpy() == counted.nonzero()[0]).all() for found in rows)
    made = [maker[:2] for maker in makers]
    assert made[:5] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert threading.main_thread() not in [thread for *_, thread in makers]
    with pytest.raises(OSError, match="the disk is gone"):
        batches(9, 1)
    batches(1, 1)


def test_evaluation_is_the_mean_over_tokens(shards):
    """Evaluation is the mean over all predicted tokens, whatever the batch size, the last windows
    shorter than the others included.
    """
    model = new_model()
    tokens = torch.from_numpy(shards.read(0, 501))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 500, 16):
            window = tokens[start : min(start + 17, 501)][None]
            total += model.loss(window[:, :-1], window[:, 1:], "sum").item()
    for batch_size in (1, 3, 8):
        batches = evaluation_batches(shards, 16, batch_size, 500)
        assert evaluate(model, batches, CPU) == pytest.approx(total / 500, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_follows_fp32(shards, precision):
    """Under autocast, fp16 with its scaler included, the curve stays near the one of fp32, and
    the weights stay fp32.
    """
    exact = make_step(new_model(), shards)
    model = new_model()
    rounded = make_step(model, shards, precision=precision)
    for s in range(1, 9):
        assert rounded(s)[0].item() == pytest.approx(exact(s)[0].item(), rel=5e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped(shards, optimizer):
    """NaN in a gradient leaves weights and optimizer to the bit as they were, weight decay and step
    counters included.
    """
    model = new_model()
    step = make_step(model, shards, optimizer=optimizer, muon_weight_decay=0.1)
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


@pytest.mark.parametrize("stop_at", [None, 5])
def test_a_log_read_late_is_the_same_log(shards, tmp_path, monkeypatch, stop_at):
    """Reading a step's figures only after the next has been launched, as on CUDA, changes nothing
    in the log, the evaluations and the checkpoints, stopped by a signal or not.
    """

    class StopAt:
        """Asked once a step, it wants to stop from a step on."""

        def __init__(self, step):
            self.step, self.asked = step, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        @property
        def signum(self):
            self.asked += 1
            return signal.SIGTERM if self.step and self.asked >= self.step else None

    class Late(Meter):
        def __init__(self, *args):
            super().__init__(*args)
            self.ahead = 1

    sizes = {"batch_size": 4, "total_batch_size": 192, "max_steps": 9, "warmup_steps": 3}
    often = {"eval_tokens": 100, "eval_every": 3, "sample_every": 0, "save_every": 100}
    logs, weights = [], []
    for name, meter in (("at_once", Meter), ("late", Late)):
        monkeypatch.setattr("training.Meter", meter)
        run, model = tmp_path / name, new_model()
        run.mkdir()
        config = PretrainConfig(out_dir=str(run), precision="fp32", compile=False, **sizes, **often)
        data = PretrainingData(shards, 16, 4, 192, config.seed)
        # The wish of step 4 is read with step 5 in flight.
        fake = StopAt(stop_at - (meter is Late) if stop_at else None)
        monkeypatch.setattr("training.Interrupt", lambda fake=fake: fake)
        val = partial(evaluation_batches, shards, 16, 4, 100)
        with pytest.raises(SystemExit) if stop_at else contextlib.nullcontext():
            train(model, data, val, [], config, CPU)
        timed = {"tokens_per_s", "step_ms", "mfu", "peak_memory_gb"}
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        logs.append([{k: v for k, v in r.items() if k not in timed} for r in records])
        weights.append((checkpoints(run)[-1] / "model.safetensors").read_bytes())
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[0]] == list(range((stop_at or 9) + 1))
    assert weights[0] == weights[1]


def test_training_stops_when_nothing_is_finite_any_more(shards, tmp_path, capsys):
    """Five steps in a row that are not finite end the run with a line, the log stays valid JSON and
    the last good checkpoint stays as it is.
    """
    model = new_model()
    sizes = {"batch_size": 4, "total_batch_size": 192, "max_steps": 20, "warmup_steps": 3}
    often = {"eval_tokens": 100, "eval_every": 5, "sample_every": 0, "save_every": 2}
    raw = {"precision": "fp32", "compile": False}
    config = PretrainConfig(out_dir=str(tmp_path), **sizes, **often, **raw)
    (tmp_path / "config.yaml").write_text("{}")
    data = PretrainingData(shards, 16, 4, 192, config.seed)
    val = partial(evaluation_batches, shards, 16, 4, 100)
    calls = []

    def poison(grad):
        calls.append(1)
        return grad * math.nan if len(calls) > 3 * data.grad_accum_steps else grad

    model.transformer.ln_f.bias.register_hook(poison)
    with pytest.raises(ValueError, match="5 steps in a row"):
        train(model, data, val, [], config, CPU)
    assert capsys.readouterr().out.count("its gradient is not finite") == 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [r["step"] for r in records if r.get("grad_norm", 0) is None] == [4, 5, 6, 7, 8]
    weights = GPT.from_pretrained(checkpoints(tmp_path)[-1]).state_dict()
    assert all(w.isfinite().all() for w in weights.values())


def test_plot_has_gpt2s_line_where_it_applies(tmp_path):
    """GPT-2's own loss is drawn for a run on FineWeb or FineWeb-Edu, each with its own, and for no
    other data.
    """
    for dataset, loss in (("fineweb", 3.4250), ("fineweb-edu", 3.2924), ("stdlib", None)):
        (tmp_path / "manifest.json").write_text(json.dumps({"dataset": dataset, "shards": []}))
        (tmp_path / "config.yaml").write_text(f"data_dir: {tmp_path}\n")
        assert gpt2_val_loss(tmp_path) == loss


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile on a CPU needs gcc")
def test_compiled_step_equals_the_raw_one(shards):
    """The compiled training step has the raw one's loss and gradients, and the model keeps the
    names of its parameters.
    """
    raw, compiled = new_model(), new_model()
    idx, targets = (
        torch.from_numpy(a) for a in PretrainingData(shards, 16, 12, 192, 0).micro_batch(1, 1)
    )
    losses = []
    for model, flag in ((raw, False), (compiled, True)):
        loss = StepLoss(model, flag)(idx, targets, None)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, a), b in zip(compiled.named_parameters(), raw.parameters(), strict=True):
        assert "_orig_mod" not in name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_derived_numbers_are_told(shards):
    """The sizes printed at the start: parameters by group, tokens per step, grad_accum_steps."""
    text = describe(parameter_groups(new_model()), PretrainingData(shards, 16, 4, 192, 0))
    assert "grad_accum_steps 3" in text
    assert "decayed 10 tensors" in text


def test_the_largest_batch_size_that_fits():
    """Whatever fits, the found size is the largest power of two below it that divides the windows;
    running out of memory is an answer, other errors are not; where nothing fits, it is told.
    """

    def other():
        raise RuntimeError("other")

    for limit in (1, 3, 8, 100):

        def attempt(size, limit=limit):
            if size > limit:
                raise torch.OutOfMemoryError(f"no memory for {size}")

        def fits(size, attempt=attempt):
            return not out_of_memory(partial(attempt, size), CPU.device)

        expected = max(n for n in (1, 2, 4, 8, 16) if n <= limit)
        assert largest_that_fits(fits, 48) == expected
    with pytest.raises(ValueError, match="not even batch_size 1 fits"):
        largest_that_fits(lambda _: False, 48)
    with pytest.raises(RuntimeError, match="other"):
        out_of_memory(other, CPU.device)


def test_finding_a_batch_size_leaves_no_trace(shards, monkeypatch):
    """The trials change no weight, no flag and no random number, and see the asked sizes; without
    a card the error says what to do instead.
    """
    model, config = new_model(), make_step(new_model(), shards).config
    data = PretrainingData(shards, 16, 1, 192, config.seed)
    with pytest.raises(ValueError, match="find_batch_size is for CUDA"):
        find_batch_size(model, data, config, CPU)
    sizes = []

    class Card:  # stands for a CPU that says it is a card, with memory for two rows
        type = "cuda"

    class Step(TrainingStep):
        def __init__(self, copy, trial, config, dist):
            sizes.append(trial.batch_size)
            if trial.batch_size > 2:
                raise torch.OutOfMemoryError
            super().__init__(copy, trial, config, CPU)

    monkeypatch.setattr("step.TrainingStep", Step)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    monkeypatch.setattr("torch.random.fork_rng", lambda _, fork=torch.random.fork_rng: fork([]))
    for name in ("synchronize", "empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    assert find_batch_size(model, data, config, Distributed(0, 1, Card())) == 2
    assert {2, 4} <= set(sizes)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_compiling_without_a_compiler_is_told(shards, monkeypatch):
    """Where there is no C compiler, --compile true ends in a line that says how to go without."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    config = replace(make_step(new_model(), shards).config, compile=True)
    data = PretrainingData(shards, 16, 4, 192, seed=1)
    with pytest.raises(ValueError, match=r"--compile needs a C compiler.*--compile false"):
        TrainingStep(new_model(), data, config, CPU)


def test_peak_is_the_cards_own(monkeypatch):
    """Names as drivers give them find their own card's figure, not that of a similar one."""
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_config_errors_name_the_value():
    """A number that cannot be is refused with its value."""
    with pytest.raises(ValueError, match="max_steps is 0, expected at least 1"):
        PretrainConfig(max_steps=0)
    with pytest.raises(ValueError, match=r"min_lr 0.1 and max_lr 0.01"):
        PretrainConfig(min_lr=0.1, max_lr=0.01)
    with pytest.raises(ValueError, match="device is nonsense, expected auto, cpu, cuda or mps"):
        Distributed.start("nonsense")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept():
    """A large tensor in the place of a freed one costs no page faults, and a line says why."""
    code = """
import resource, torch
from runtime import Distributed, keep_freed_memory
keep_freed_memory(Distributed(0, 1, torch.device("cpu")))
for _ in range(3):  # a first hole may be too small by what else was allocated in it
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    line, faults = out.splitlines()
    assert "glibc keeps freed memory" in line
    assert int(faults) < 2**24 * 4 / 4096 / 100
