import contextlib
import json
import math
import signal
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_DIST, GPT2_TOKENIZER, TIKTOKEN, make_data, make_step, new_step_model

from engine import training
from engine.checkpoint import list_checkpoints
from engine.data import IGNORE_INDEX, Batch, PretrainingData, validation_batches
from engine.distributed import Distributed, init_device
from engine.evaluation import (
    Evaluation,
    Prompt,
    evaluate_loss,
    evaluations_since_best,
    generate_samples,
)
from engine.loss import SummedLoss
from engine.metrics import Meter
from engine.step import TrainingStep
from engine.training import announce_run, collect_facts, print_warnings, train
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig


def validation(shards, eval_tokens: int = 100, batch_size: int = 4) -> partial:
    """Return a function that yields the validation batches of the first `eval_tokens` tokens."""
    sizes = {"block_size": 16, "batch_size": batch_size, "eval_tokens": eval_tokens}
    return partial(validation_batches, shards, **sizes)


def train_without_samples(run, shards, model: GPT, **settings) -> None:
    """Train a model in a run folder, without samples and without compiling."""
    sizes = {"batch_size": 4, "total_batch_size": 192, "warmup_steps": 3, "sample_every": 0}
    settings = {**sizes, "precision": "fp32", "compile": False, **settings}
    config = PretrainConfig(out_dir=str(run), **settings)
    data = make_data(shards, 4, config.seed)
    train(model, GPT2_TOKENIZER, data, validation(shards), [], config, CPU_DIST)


def read_log(run) -> list[dict]:
    """Read the log of a run. It must not contain Infinity or NaN, which are not JSON."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_evaluation_is_the_mean_over_tokens(shards):
    """At any batch size, the loss is the mean over all tokens, even with a short last window."""
    model = new_step_model()
    summed_loss = SummedLoss(model)
    tokens = torch.from_numpy(shards.read(0, 501))
    total = 0.0
    with torch.no_grad():
        for start in range(0, 500, 16):
            window = tokens[start : start + 17]
            logits = model(window[None, :-1])[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    for batch_size in (1, 3, 8):
        batches = validation(shards, 500, batch_size)()
        loss, _ = evaluate_loss(summed_loss, batches, GPT2_TOKENIZER.token_bytes, CPU_DIST)
        assert loss == pytest.approx(total / 500, rel=1e-5)


def test_evaluations_since_the_best():
    """A tie goes to the earlier evaluation, and a loss that is not finite is worse than any."""
    for losses, expected in (
        ([], 0),
        ([3.0], 0),
        ([3.0, 2.0], 0),
        ([2.0, 3.0, None], 2),
        ([None, 3.0], 0),
        ([2.0, 3.0, 2.0], 2),
    ):
        assert evaluations_since_best(losses) == expected


def test_bits_per_byte():
    """Bits per byte are the summed loss of all ranks in bits, including that of <|endoftext|>,
    divided by the UTF-8 bytes of the text. Without text they are None.
    """

    class TwoEqualRanks(Distributed):
        """Acts as if a second rank had the same batches."""

        def sum(self, *values):
            return [2 * value for value in values]

    options = {"summed_loss": lambda _: torch.tensor(6.0)}
    options |= {"token_bytes": GPT2_TOKENIZER.token_bytes}
    ids = TIKTOKEN.encode("Hello — 日本語")
    targets = torch.tensor([[*ids, 50256, IGNORE_INDEX]])
    batch = Batch(torch.zeros_like(targets), targets)
    n_bytes = 5 + 1 + 3 + 1 + 3 * 3  # of UTF-8
    for dist in (CPU_DIST, TwoEqualRanks(0, 2, CPU_DIST.device)):
        loss, bpb = evaluate_loss(batches=[batch, batch], dist=dist, **options)
        assert loss == pytest.approx(6 / (len(ids) + 1))
        assert bpb == pytest.approx(6 / math.log(2) / n_bytes)
    end = Batch(targets[:, -2:-1], targets[:, -2:-1])
    assert evaluate_loss(batches=[end], dist=CPU_DIST, **options) == (6.0, None)


@pytest.mark.parametrize("has_fixed_shape", [True, False])
def test_validation_is_compiled_and_samples_are_not(shards, monkeypatch, has_fixed_shape):
    """Validation uses the compiled model of training; samples do not. Attention may use cuDNN if
    training and validation have a single shape, and never for samples.
    """
    monkeypatch.setattr(PretrainingData, "has_fixed_shape", has_fixed_shape)
    step, calls = make_step(new_step_model(), shards, sample_every=1), []

    def spy(name, function):
        """Wrap `function` to note each call, and whether attention may use cuDNN."""

        def call(*args):
            calls.append((name, torch.backends.cuda.cudnn_sdp_enabled()))
            return function(*args)

        return call

    model, trunk = step.model, step.summed_loss.run_trunk
    val = validation(shards)
    expected, bpb = evaluate_loss(SummedLoss(model), val(), GPT2_TOKENIZER.token_bytes, CPU_DIST)
    model.last_hidden = spy("eager", model.last_hidden)
    compiled = torch.compile(trunk, backend=lambda graph, _: spy("compiled", graph))
    step.summed_loss.trunk = step.summed_loss.evaluation_trunk = compiled
    options = {"summed_loss": step.summed_loss, "val": val, "hellaswag": [], "dist": CPU_DIST}
    options |= {"prompts": [Prompt("!", max_new_tokens=3)], "has_fixed_shape": has_fixed_shape}
    options |= {"val_losses": []}
    init_device("cpu", 0)  # turns cuDNN off
    try:
        evaluation = Evaluation(model, GPT2_TOKENIZER, config=step.config, **options)
        record = evaluation.evaluate_step(20)
        step(1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert record["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert record["val_bpb"] == pytest.approx(bpb, rel=1e-6)
    # Two validation batches, the three tokens of the sample, then three micro-steps.
    validation_calls, sample_calls, training_calls = calls[:2], calls[2:5], calls[5:]
    assert validation_calls == [("compiled", has_fixed_shape)] * 2
    assert sample_calls == [("eager", False)] * 3
    assert training_calls == [("compiled", has_fixed_shape)] * 3


class LateMeter(Meter):
    """Reads the results of a step after the next one was launched, as on CUDA."""

    def __init__(self, *args):
        super().__init__(*args)
        self.max_pending = 1


@pytest.mark.parametrize("stop_at", [None, 5])
def test_reading_results_late_changes_nothing(shards, tmp_path, monkeypatch, no_plots, stop_at):
    """If the results of a step are read only after the next one was launched, as on CUDA, the log,
    the evaluations and the checkpoints stay the same, whether a signal stops the run or not.
    """

    class StopAt(contextlib.AbstractContextManager):
        """An Interrupt that requests a stop from `step` on. `train` reads it once a step."""

        def __init__(self, step):
            self.step, self.asked = step, 0

        def __exit__(self, *_):
            pass

        @property
        def signum(self):
            self.asked += 1
            return signal.SIGTERM if self.step and self.asked >= self.step else None

    timed = {"tokens_per_s", "step_ms", "mfu", "peak_memory_gb", "eval_ms"}
    logs, weights = [], []
    # Both runs must stop after step 5. The late one reads the request only a step later, after step
    # 5 was launched, so it gets the request in step 4.
    for name, meter, delay in (("at_once", Meter, 0), ("late", LateMeter, 1)):
        monkeypatch.setattr("engine.training.Meter", meter)
        fake = StopAt(stop_at - delay if stop_at else None)
        monkeypatch.setattr("engine.training.Interrupt", lambda fake=fake: fake)
        run = tmp_path / name
        run.mkdir()
        often = {"max_steps": 9, "eval_every": 3, "save_every": 100}
        with pytest.raises(SystemExit) if stop_at else contextlib.nullcontext():
            train_without_samples(run, shards, new_step_model(), **often)
        logs.append([{k: v for k, v in r.items() if k not in timed} for r in read_log(run)])
        weights.append((list_checkpoints(run)[-1] / "model.safetensors").read_bytes())
    assert logs[0] == logs[1]
    assert [r["step"] for r in logs[0]] == list(range((stop_at or 9) + 1))
    assert weights[0] == weights[1]


class FakeGPU:
    """Runs kernels one after another, while the CPU launches more. It queues up to 15 kernels; if
    it has that many, a launch waits. `now` is the time of the CPU.
    """

    def __init__(self):
        self.now, self.ends = 0.0, [0.0] * 15  # when each kernel ends

    def launch(self, seconds: float) -> None:
        self.now = max(self.now + 0.001, self.ends[-15])
        self.ends.append(max(self.now, self.ends[-1]) + seconds)

    def event(self, device=None) -> "FakeEvent":
        return FakeEvent(self, max(self.now, self.ends[-1]))


class FakeEvent(NamedTuple):
    """What a torch.cuda.Event is: reached once the kernels launched before it have ended."""

    gpu: FakeGPU
    time: float

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.time)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.gpu.now >= end.time, "torch raises an error if an event is not reached yet"
        return (end.time - self.time) * 1e3


def test_each_step_logs_its_own_time_on_the_device(shards, tmp_path, monkeypatch, no_plots):
    """Each step logs how long the device worked on it, although launches wait for room in the
    queue, results are read late, and evaluations and saves come in between.
    """
    gpu = FakeGPU()
    evaluate_step, start_save = Evaluation.evaluate_step, training.start_save
    seconds = {step: 0.1 + 0.05 * (step % 3) for step in range(1, 16)}

    def launch_step(self, step):
        for _ in range(10):
            gpu.launch(seconds[step] / 10)
        return torch.tensor(1.0), torch.tensor(1.0)

    def evaluate_slowly(self, step):
        gpu.now += 0.3
        gpu.launch(3.0)
        gpu.event().synchronize()
        return evaluate_step(self, step)

    def save_slowly(*args):
        gpu.now += 5.0
        start_save(*args)

    monkeypatch.setattr("engine.metrics.clock", gpu.event)
    monkeypatch.setattr("engine.training.Meter", LateMeter)
    monkeypatch.setattr(TrainingStep, "__call__", launch_step)
    monkeypatch.setattr(Evaluation, "evaluate_step", evaluate_slowly)
    monkeypatch.setattr("engine.training.start_save", save_slowly)
    settings = {"max_steps": 15, "eval_every": 5, "save_every": 7}
    train_without_samples(tmp_path, shards, new_step_model(), **settings)
    logged = [record["step_ms"] / 1e3 for record in read_log(tmp_path)[1:]]
    assert logged == pytest.approx([*seconds.values()], abs=0.002)


def test_the_log_has_the_time_of_evaluations(shards, tmp_path, monkeypatch, no_plots):
    """The lines of evaluated steps, and no others, have the time of the evaluation."""

    def evaluate_loss(*args):
        time.sleep(0.3)
        return 1.0, None

    monkeypatch.setattr("engine.evaluation.evaluate_loss", evaluate_loss)
    train_without_samples(tmp_path, shards, new_step_model(), max_steps=6, eval_every=3)
    times = {r["step"]: r["eval_ms"] for r in read_log(tmp_path) if "eval_ms" in r}
    assert [*times] == [0, 3, 6]
    assert min(times.values()) >= 300


def test_training_stops_after_five_steps_that_are_not_finite(shards, tmp_path, no_plots, capsys):
    """Each step without a finite gradient is reported. The fifth in a row ends the run with one
    line. The log stays valid JSON, and the last good checkpoint is untouched.
    """
    model, calls = new_step_model(), []

    def poison(grad):
        calls.append(1)
        return grad * math.nan if len(calls) > 3 * 3 else grad  # three micro-steps to a step

    model.transformer.ln_f.bias.register_hook(poison)
    with pytest.raises(ValueError, match="not finite in 5 consecutive steps"):
        train_without_samples(tmp_path, shards, model, max_steps=20, eval_every=5, save_every=2)
    out = capsys.readouterr().out
    assert out.count("its gradient is not finite") == 5
    assert "step 7 skipped: its gradient is not finite (4 in a row)" in out
    records = read_log(tmp_path)
    assert [r["step"] for r in records if r.get("grad_norm", 0) is None] == [4, 5, 6, 7, 8]
    weights = GPT.from_pretrained(list_checkpoints(tmp_path)[-1]).state_dict()
    assert all(w.isfinite().all() for w in weights.values())


def test_facts_of_a_run(shards):
    """The parameters and FLOPs of a small model with frozen embeddings, worked out by hand."""
    model = new_step_model()
    model.transformer.wte.weight.requires_grad_(False)
    wte, wpe, blocks, ln_f = 1024 * 32, 16 * 32, 2 * (12 * 32**2 + 13 * 32), 2 * 32
    flops_per_token = 6 * (blocks + ln_f) + 4 * wte + 12 * 2 * 32 * 16
    assert collect_facts(model, make_data(shards), step=10) == {
        "parameters": f"{wte + wpe + blocks + ln_f:,}",
        "trainable parameters": f"{wpe + blocks + ln_f:,}",
        "training data": "690 tokens",
        "epochs": "2.73",  # 10 steps of 12 windows; an epoch has 44
        "training FLOPs": f"{flops_per_token * 1920:.2e}",
    }


def test_a_diverged_model_ends_the_run_in_one_line():
    """Sampling with weights that are not finite is a ValueError, so a command prints one line."""
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8))
    model.transformer.wpe.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="weights that are not finite"):
        generate_samples(model, GPT2_TOKENIZER, [Prompt()], seed=0, device=CPU_DIST.device)


def test_settings_and_sizes_are_printed(shards, capsys):
    """A run first prints its settings, its parameters, the sizes of a step, and the device."""
    announce_run(new_step_model(), make_data(shards), PretrainConfig(), CPU_DIST)
    out = capsys.readouterr().out
    for text in ("max_steps: 19073", "trainable parameters: ", "grad_accum_steps 3", "1 x cpu, "):
        assert text in out


def test_settings_that_prevent_learning_get_a_warning(capsys):
    """A model too large for a CPU, a warmup too long to reach max_lr, and an epoch of a few steps
    get a line each. Other settings get none.
    """
    with torch.device("meta"):
        large = GPT(GPTConfig())
    data = SimpleNamespace(block_size=1024, steps_per_epoch=100.0)
    data.tokens_through = lambda step: step * 2**10
    wsd = PretrainConfig(schedule="wsd", max_steps=10, warmup_steps=7)  # 7 = 10 + 1 - 0.4 * 10
    for config in (PretrainConfig(), PretrainConfig(warmup_steps=5, max_steps=5), wsd):
        print_warnings(large, data, config, CPU_DIST)
        assert not capsys.readouterr().out
    print_warnings(large, data, replace(wsd, warmup_steps=8), CPU_DIST)
    assert "peaks at 87.5% of max_lr at step 7; lower warmup_steps" in capsys.readouterr().out
    print_warnings(large, data, replace(wsd, warmup_steps=10), CPU_DIST)  # 7/10, 3/4, 2/4
    assert "peaks at 75.0% of max_lr at step 8" in capsys.readouterr().out
    data.tokens_through, data.steps_per_epoch = lambda step: step * 2**19, 3.25
    print_warnings(large, data, PretrainConfig(warmup_steps=6, max_steps=5), CPU_DIST)
    size, warmup, epoch = capsys.readouterr().out.splitlines()
    assert "configs/demo.yaml and configs/small.yaml" in size
    assert "warmup_steps 6 is too many for max_steps 5 with schedule cosine: " in warmup
    assert "at 83.3% of max_lr at step 5" in warmup
    assert "an epoch has only 3.2 steps" in epoch
