"""Pretraining as a user runs it: runs, signals, errors. The current directory is never the
project's root, so nothing depends on being started there.
"""

import gzip
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    GPT2_TOKENIZER,
    TINY_RUN,
    expect_error,
    read_curve,
    run_script,
    small_transformers_gpt2,
    tiny_run,
)
from processes import HANG_SECONDS, ROOT, Job, run_here, start_on_terminal
from transformers import AutoModelForCausalLM

from engine.adapter import save_adapter
from engine.checkpoint import list_checkpoints, read_progress
from engine.config import fixed_settings
from engine.lora import LoRAConfig, convert_linear_layer_to_lora
from engine.metrics import read_metrics
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig, build_model

N_STEPS = TINY_RUN["max_steps"]
COMMANDS = sorted(file.name for file in ROOT.glob("*.py") if file.name != "model.py")


def new_gpt(**settings: object) -> GPT:
    return build_model(GPT2_TOKENIZER, PretrainConfig(**settings))


@pytest.fixture(scope="module")
def uninterrupted(workdir) -> Path:
    """A complete run. What it printed is in whole.out and whole.err."""
    result = run_script(*tiny_run("runs/whole"), "--debug", cwd=workdir)
    assert result.returncode == 0, result.stderr
    (workdir / "whole.out").write_text(result.stdout)
    (workdir / "whole.err").write_text(result.stderr)
    return workdir / "runs" / "whole"


def test_a_run_writes_what_is_documented(workdir, uninterrupted):
    """A run prints its settings and sizes, lowers the loss, logs each step once with all its keys,
    and leaves a plot, a report and a checkpoint that transformers opens.
    """
    out = (workdir / "whole.out").read_text()
    for text in ("max_lr: 0.01", "trainable parameters: ", "grad_accum_steps 2"):
        assert text in out
    assert re.search(r"^step 10/30 \| loss .* \| tokens/s \S+ \| \S+ s left$", out, re.MULTILINE)
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == list(range(N_STEPS + 1))
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 2
    keys = "step train_loss lr grad_norm tokens tokens_per_s step_ms mfu"
    assert all(set(keys.split()) <= r.keys() for r in records[1:])
    assert [r["step"] for r in records if "val_loss" in r] == [0, 10, 20, 30]
    names = [checkpoint.name for checkpoint in list_checkpoints(uninterrupted)]
    assert names == ["step_000020", "step_000030"]
    assert (uninterrupted / "loss.png").stat().st_size > 10_000
    assert "<dt>data</dt><dd>files in text</dd>" in (uninterrupted / "report.html").read_text()
    progress = read_progress(list_checkpoints(uninterrupted)[-1])
    assert progress["facts"]["training data"].endswith(" tokens")
    assert progress["fixed_settings"] == sorted(fixed_settings(PretrainConfig))
    line = out.splitlines()[-1]
    assert line.startswith("in transformers")
    model = AutoModelForCausalLM.from_pretrained(workdir / line.split("'")[1])
    assert model.config.vocab_size == 50257


def test_debug_shows_how_long_the_start_and_the_end_take(workdir, uninterrupted):
    """With --debug, each part of a run is printed to stderr when it is done, with the time."""
    found = re.findall(r"^ *(\d+) ms: (.+)$", (workdir / "whole.err").read_text(), re.MULTILINE)
    times, parts = zip(*((int(ms), part) for ms, part in found), strict=True)
    assert list(times) == sorted(times)
    saves = ["checkpoint saved", "plot and report written"] * 3
    assert list(parts) == ["imports done", "data checked, model built", "step 0 evaluated", *saves]


def test_a_finished_run_prints_its_results_again(workdir, uninterrupted):
    """The same command on a finished run trains nothing and prints its summary."""
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    out = run_script(*tiny_run("runs/whole"), cwd=workdir).stdout
    assert "already finished" in out
    summary = (workdir / "whole.out").read_text().split("validation loss")[1]
    assert out.split("validation loss")[1] == summary
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_stopped_run_resumes_bit_for_bit(workdir, uninterrupted):
    """A run that is stopped twice by kill -9, then by SIGTERM and Ctrl-C, ends with the log and
    weights of an uninterrupted run, bit for bit. SIGTERM and Ctrl-C finish the step, save a
    checkpoint, print a line, and exit with 128 plus the signal. run.json lists the processes.
    """
    run = workdir / "runs" / "stopped"
    kill, stops = signal.SIGKILL, (signal.SIGTERM, signal.SIGINT)
    for step, signum in zip((7, 14, 17, 24), (kill, kill, *stops), strict=True):
        result = Job(*tiny_run("runs/stopped"), cwd=workdir, signal_at=(step, signum)).wait()
        if signum in stops:
            assert result.returncode == 128 + signum
            assert "Traceback" not in result.stderr
            assert "saved it; run the same command to resume" in result.stdout
            assert list_checkpoints(run)[-1].name == f"step_{step + 1:06d}"
        else:
            assert result.returncode == -signum
    out = run_script(*tiny_run("runs/stopped"), cwd=workdir).stdout
    assert "resuming from step 25" in out
    assert read_curve(run) == read_curve(uninterrupted)
    for name in ("model.safetensors", "config.json"):
        files = [list_checkpoints(folder)[-1] / name for folder in (run, uninterrupted)]
        assert files[0].read_bytes() == files[1].read_bytes()
    record, whole = (json.loads((f / "run.json").read_text()) for f in (run, uninterrupted))
    assert len(record["processes"]) == 5
    last = record["processes"][-1]
    assert [last[key] for key in ("first_step", "last_step")] == [26, 30]
    assert last["torch"] == torch.__version__
    assert shlex.split(last["command"])[2:] == [str(w) for w in tiny_run("runs/stopped")[1:]]
    assert record["data"] == whole["data"] == read_progress(list_checkpoints(run)[-1])["data"]
    assert record["tokenizer"] == whole["tokenizer"] == GPT2_TOKENIZER.sha256


@pytest.mark.parametrize(
    ("disposition", "max_steps", "code"),
    [("SIG_DFL", 10**5, 128 + signal.SIGHUP), ("SIG_IGN", N_STEPS, 0)],
)
def test_a_run_saves_if_its_terminal_is_lost(workdir, disposition, max_steps, code):
    """If the terminal goes away, as when ssh disconnects, the run saves and ends with the exit code
    of SIGHUP, although it can no longer print. With nohup, which ignores SIGHUP, it runs on.
    """
    # The process starts a new session and makes the terminal its controlling terminal.
    prelude = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    prelude += f"signal.signal(signal.SIGHUP, signal.{disposition})"
    command = tiny_run(f"runs/{disposition}", max_steps=max_steps, save_every=1000)
    options = {"cwd": workdir, "start_new_session": True}
    process, terminal = start_on_terminal(prelude, *command, **options)
    run = workdir / "runs" / disposition
    log, deadline = run / "metrics.jsonl", time.monotonic() + HANG_SECONDS
    while not (log.exists() and log.read_bytes().count(b"\n") > 9):
        assert process.poll() is None
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 4096)  # discard the output
    os.close(terminal)
    assert process.wait(HANG_SECONDS) == code
    assert list_checkpoints(run)[-1].name == f"step_{read_metrics(run)[-1]['step']:06d}"


def test_training_needs_no_optional_package(workdir, monkeypatch):
    """A machine without a network, datasets, pyarrow, transformers, the hub's library and the
    loggers trains, and writes the report. run.json says what is missing.
    """
    missing = ("datasets", "pyarrow", "transformers", "huggingface_hub", "tensorboard", "wandb")

    def find_distribution(name: str) -> Distribution:
        if name in missing:
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr("importlib.metadata.distribution", find_distribution)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setattr("socket.socket.connect", pytest.fail)
    monkeypatch.chdir(workdir)
    run_here(*tiny_run("runs/bare", max_steps=2, warmup_steps=1))
    process = json.loads(Path("runs/bare/run.json").read_text())["processes"][-1]
    assert (process["last_step"], process["transformers"]) == (2, "not installed")
    assert Path("runs/bare/report.html").is_file()


def test_init_from_refuses_an_adapter(tmp_path):
    """--init_from refuses an adapter and says to merge it first."""
    base = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))
    base.save_pretrained(tmp_path / "base")
    tuned = convert_linear_layer_to_lora(base, "h.", LoRAConfig(2, 4.0))
    save_adapter(tuned, tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"is an adapter, expected a full model.*merge_out"):
        new_gpt(init_from=str(tmp_path / "adapter"))


@pytest.mark.slow
def test_compiling_without_a_compiler_ends_in_one_line(workdir, tmp_path):
    """Without a C++ compiler, --compile is an error that says what to do. It leaves no run."""
    environment = {"PATH": "", "CC": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    compiled = tiny_run("runs/uncompiled", max_steps=1, compile=True)
    error = expect_error(*compiled, cwd=workdir, **environment)
    assert "install a C++ compiler" in error
    assert "turn compile off" in error
    result = run_script(*tiny_run("runs/uncompiled", max_steps=1), cwd=workdir)
    assert result.returncode == 0, result.stderr


def test_sampling_from_a_run_a_folder_and_the_hub_cache(workdir, uninterrupted, tmp_path):
    """sample.py loads a run, the folder of a checkpoint, or a hub name from the local cache."""
    options = ("--num_return_sequences", 3, "--max_new_tokens", 8, "--device", "cpu")
    options = ("sample.py", "--prompt", "import", *options)
    texts = [
        run_script(*options, "--model", model, cwd=workdir).stdout
        for model in (uninterrupted, list_checkpoints(uninterrupted)[-1])
    ]
    assert texts[0] == texts[1]
    assert texts[0].count("> import") == 3
    # The hub's cache: a snapshot in a folder named by its revision, and refs to revisions.
    repo, revision = tmp_path / "models--gpt2", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    small = small_transformers_gpt2(vocab_size=50257, n_positions=64)
    small.save_pretrained(repo / "snapshots" / revision)
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run_script(*options, cwd=workdir, **offline)
    assert result.stdout.count("> import") == 3, result.stderr


def test_starting_from_other_weights(workdir, uninterrupted):
    """--init_from RUN starts from the model of that run, even with a shorter block_size."""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))  # None: as in the run
    options = {"block_size": 16, "max_steps": 2, "warmup_steps": 1, "max_lr": 1e-3}
    flags = tiny_run("runs/more", init_from="runs/whole", **shape, **options)
    result = run_script(*flags, cwd=workdir)
    assert result.returncode == 0, result.stderr
    first, last = read_metrics(workdir / "runs" / "more")[0], read_metrics(uninterrupted)[-1]
    assert abs(first["val_loss"] - last["val_loss"]) < 1.5  # the same weights, shorter windows


@pytest.mark.parametrize("script", COMMANDS)
def test_an_unknown_flag_gives_one_line(capsys, script):
    """Every command refuses an unknown flag with one line and exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        run_here(script, "--no_such_flag", "3")
    out, error = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+ \(-h lists the flags\)\n", error)


def test_a_wrong_flag_on_a_real_command_line(tmp_path):
    """For a misspelled flag, `python train_gpt2.py` suggests the right one, in one line."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "--max_stepz", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown flag --max_stepz, did you mean --max_steps?")
    assert result.stderr.count("\n") == 1


def test_truncated_shards_and_changed_settings_harm_nothing(workdir, uninterrupted):
    """Truncated data, other data and changed settings are errors. They do not touch the run."""
    before = {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()}
    text, torn, other = (workdir / "data" / name for name in ("text", "torn", "other"))
    for folder in (torn, other):
        shutil.copytree(text, folder)
    shard = next(torn.glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (other / "manifest.json").unlink()
    np.save(other / shard.name, np.arange(5000, dtype=np.uint16))
    for changed, expected in (
        ({"data_dir": "data/torn"}, f"{shard.name} is truncated"),
        ({"max_lr": 2e-2}, "max_lr was 0.01, is 0.02"),
        ({"data_dir": "data/other"}, "was trained on different data"),
    ):
        assert expected in expect_error(*tiny_run("runs/whole", **changed), cwd=workdir)
    assert {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()} == before


def test_profiling_does_not_change_the_run(workdir, uninterrupted):
    """--profile 2 writes a trace and prints the slowest operators. It does not change the run."""
    run = workdir / "runs" / "profiled"
    flags = tiny_run("runs/profiled", profile=2)
    out = Job(*flags, cwd=workdir, signal_at=(5, signal.SIGTERM)).wait().stdout
    with gzip.open(run / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert len(re.findall(r"^ *\S*aten::\S+|^ *\w+Backward\d", out, re.MULTILINE)) >= 5
    assert "open runs/profiled/profile.json.gz" in out
    assert read_curve(run) == read_curve(uninterrupted)[:7]


def test_an_unwritable_run_folder_is_an_error(workdir):
    """If the run folder cannot be made, the error names its path."""
    (workdir / "file").write_text("not a folder")
    assert "file/run" in expect_error(*tiny_run("file/run"), cwd=workdir)


def test_debug_shows_the_traceback(tmp_path):
    """With --debug, an error shows the full traceback instead of one line."""
    assert "Traceback" in run_script("train_gpt2.py", "--debug", cwd=tmp_path).stderr


def test_zero_residual_blocks_add_nothing():
    """With zero_residual, new blocks are the identity. All other weights are unchanged."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    zeroed, plain = (new_gpt(**sizes, zero_residual=flag) for flag in (True, False))
    x = torch.randn(1, 16, 32)
    for block in zeroed.transformer.h:
        assert torch.equal(block(x), x)
    for (name, a), b in zip(zeroed.named_parameters(), plain.parameters(), strict=True):
        assert name.endswith("c_proj.weight") or torch.equal(a, b)


def test_sinusoidal_positions():
    """With sinusoidal_wpe, wpe holds the sines and cosines of the Transformer paper with the given
    root mean square, even if the width is odd. All other weights are unchanged.
    """
    sizes = {"n_layer": 1, "n_head": 1, "block_size": 8}
    waves, plain = (new_gpt(**sizes, n_embd=15, sinusoidal_wpe=rms) for rms in (0.1, 0.0))
    for name, param in plain.named_parameters():
        if name != "transformer.wpe.weight":
            assert torch.equal(waves.get_parameter(name), param)
    wpe = waves.transformer.wpe.weight / (0.1 * math.sqrt(2))
    for position, i in ((0, 0), (1, 0), (5, 3), (7, 6)):
        angle = position / 10_000 ** (2 * i / 15)
        assert wpe[position, i].item() == pytest.approx(math.sin(angle), rel=1e-5)
        assert wpe[position, 8 + i].item() == pytest.approx(math.cos(angle), rel=1e-5)
    wide = new_gpt(**sizes, n_embd=16, sinusoidal_wpe=0.1).transformer.wpe.weight
    assert wide.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
