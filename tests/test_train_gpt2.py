"""Pretraining as a user runs it, and what all commands share: help, errors, signals, exit codes.

Commands run as `python /path/to/train_gpt2.py` in another current directory, so that nothing in
them depends on being started from the project's root.
"""

import functools
import gzip
import json
import math
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    WORKERS,
    command,
    expect_error,
    run_script,
    small_transformers_gpt2,
    wait_for_steps,
    worker_env,
)
from transformers import AutoModelForCausalLM

from engine.adapter import save_adapter
from engine.checkpoint import list_checkpoints, read_progress
from engine.config import fixed_settings
from engine.lora import LoRAConfig, convert_linear_layer_to_lora
from engine.metrics import read_metrics
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig, build_model, main

N_STEPS = 60
COMMANDS = sorted(file.name for file in ROOT.glob("*.py") if file.name != "model.py")
TRAINING_GROUPS = {"run", "data", "model", "optimization", "evaluation", "logging", "system"}
GROUPS = {
    "train_gpt2.py": TRAINING_GROUPS,
    "finetune_lora.py": {*TRAINING_GROUPS, "LoRA"},
    "plot.py": {"positional arguments"},
}
# Slow to import, or optional; imported inside the functions that need them.
HEAVY_MODULES = (
    *("datasets", "huggingface_hub", "matplotlib", "pyarrow", "tensorboard", "tokenizers"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.utils.tensorboard", "transformers", "wandb"),
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with shards of a small text, made by fineweb.py, and the config of a tiny model."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text.txt").write_text(Path(__file__).read_text() * 2)
    (folder / "tiny.yaml").write_text(TINY)
    result = run_script("fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert " val tokens" in result.stdout
    return folder


def tiny_run(name: str, *args: object) -> tuple:
    """The command of a tiny run in the folder `workplace`."""
    sizes = ("--max_steps", N_STEPS, "--eval_every", 20, "--save_every", 20)
    paths = ("--config", "tiny.yaml", "--data_dir", "data/text", "--out_dir", f"runs/{name}")
    return ("train_gpt2.py", *paths, *sizes, *args)


def start_run(workplace: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*tiny_run(name)),
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def uninterrupted(workplace) -> Path:
    """A run from start to end, and what it printed in whole.out."""
    result = run_script(*tiny_run("whole"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    (workplace / "whole.out").write_text(result.stdout)
    return workplace / "runs" / "whole"


def read_curve(run: Path) -> list[tuple]:
    """What a run has logged, without the times."""
    keys = ("step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "samples")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(run)]


def test_a_run_writes_what_is_documented(workplace, uninterrupted):
    """One command prints the resolved config and the sizes, lowers the loss, logs each step once
    with all its keys, and leaves a plot, a report and a checkpoint that transformers opens.
    """
    out = (workplace / "whole.out").read_text()
    assert "max_lr: 0.01" in out
    assert "weight_decay: 0.1" in out
    assert "trainable parameters: " in out
    assert "grad_accum_steps 2" in out
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == list(range(N_STEPS + 1))
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 2
    keys = "step train_loss lr grad_norm tokens tokens_per_s step_ms mfu"
    assert all(set(keys.split()) <= r.keys() for r in records[1:])
    assert [r["step"] for r in records if "val_loss" in r] == [0, 20, 40, 60]
    names = [checkpoint.name for checkpoint in list_checkpoints(uninterrupted)]
    assert names == ["step_000040", "step_000060"]
    assert (uninterrupted / "loss.png").stat().st_size > 10_000
    assert "<dt>data</dt><dd>files in text</dd>" in (uninterrupted / "report.html").read_text()
    progress = read_progress(list_checkpoints(uninterrupted)[-1])
    assert progress["facts"]["training data"].endswith(" tokens")
    assert progress["fixed_settings"] == sorted(fixed_settings(PretrainConfig))
    line = out.splitlines()[-1]
    assert line.startswith("in transformers")
    folder = line.split("'")[1]
    model = AutoModelForCausalLM.from_pretrained(workplace / folder)
    assert model.config.vocab_size == 50257


def test_a_finished_run_prints_its_results_again(workplace, uninterrupted):
    """The same command on a finished run trains nothing and prints its summary."""
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    result = run_script(*tiny_run("whole"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "already finished" in result.stdout
    summary = (workplace / "whole.out").read_text().split("validation loss")[1]
    assert result.stdout.split("validation loss")[1] == summary
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_killed_run_resumes_to_the_bit(workplace, uninterrupted):
    """After kill -9 between two checkpoints, twice, the same command logs the losses, gradient
    norms, validation losses and samples of the uninterrupted run bit for bit, each step once.
    """
    run = workplace / "runs" / "killed"
    for steps in (27, 49):
        process = start_run(workplace, "killed")
        wait_for_steps(run, steps, process)
        process.kill()
        process.wait()
    assert len(read_curve(run)) < N_STEPS + 1
    result = run_script(*tiny_run("killed"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stdout
    assert read_curve(run) == read_curve(uninterrupted)
    for name in ("model.safetensors", "config.json"):
        files = [list_checkpoints(folder)[-1] / name for folder in (run, uninterrupted)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_saves_and_resumes(workplace, uninterrupted, signum):
    """Ctrl-C and SIGTERM end a run after its step with a checkpoint, a line and the shell's exit
    code; the same command resumes it along the same curve.
    """
    run = workplace / "runs" / signum.name
    process = start_run(workplace, signum.name)
    wait_for_steps(run, 9, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    assert "saved; the same command resumes" in out
    assert list_checkpoints(run)[-1].name == f"step_{read_metrics(run)[-1]['step']:06d}"
    assert run_script(*tiny_run(signum.name), cwd=workplace).returncode == 0
    assert read_curve(run) == read_curve(uninterrupted)


@pytest.mark.parametrize(
    ("disposition", "max_steps", "code"),
    [("SIG_DFL", 10**5, 128 + signal.SIGHUP), ("SIG_IGN", 40, 0)],
)
def test_a_lost_connection_saves(workplace, disposition, max_steps, code):
    """If the terminal goes away, as a dropped ssh does, the run saves and ends with the exit code
    of SIGHUP, although it can no longer print. With nohup, which ignores SIGHUP, it runs on.
    """
    ours, theirs = pty.openpty()
    # In a session of its own the process makes the terminal its own, and starts the run.
    start = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        f"signal.signal(signal.SIGHUP, signal.{disposition}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    sizes = ("--max_steps", max_steps, "--save_every", 1000)
    process = subprocess.Popen(
        [sys.executable, "-c", start, *command(*tiny_run(disposition, *sizes))[1:]],
        cwd=workplace,
        start_new_session=True,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    run = workplace / "runs" / disposition
    deadline = time.monotonic() + 60
    log = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([ours], [], [], 0.005)[0]:  # what it prints
            os.read(ours, 4096)
        if log.exists() and log.read_bytes().count(b"\n") > 9:
            break
    os.close(ours)
    assert process.wait(60) == code
    assert list_checkpoints(run)[-1].name == f"step_{read_metrics(run)[-1]['step']:06d}"


def test_an_adapter_is_no_model_to_start_from(tmp_path):
    """--init_from an adapter, whose checkpoints nobody could read, is refused with the remedy."""
    base = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))
    base.save_pretrained(tmp_path / "base")
    tuned = convert_linear_layer_to_lora(base, "h.", LoRAConfig(2, 4.0))
    save_adapter(tuned, tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"is an adapter, expected a full model.*merge_out"):
        build_model(PretrainConfig(init_from=str(tmp_path / "adapter")))


def test_settings_that_learn_nothing_are_named(workplace):
    """A warmup as long as the run, and steps of most of the data, are said in a line each; and
    after the second step how long the run will take.
    """
    flags = ("--max_steps", 3, "--warmup_steps", 5, "--total_batch_size", 4096, "--sample_every", 0)
    out = run_script(*tiny_run("warm", *flags), cwd=workplace).stdout
    assert "warmup_steps is 5 and max_steps 3, so the learning rate never reaches max_lr" in out
    assert re.search(r"an epoch has only 3.\d steps", out)
    assert re.search(r"estimate: \S+ s for a step, \S+ s for the 1 left, without evaluations", out)


def test_compiling_without_a_compiler_ends_in_one_line(workplace, tmp_path):
    """Without a C++ compiler, --compile ends with the flag that turns it off, and leaves no run."""
    flags = ("--compile", "--max_steps", 1)
    environment = {"PATH": "", "CC": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    error = expect_error(*tiny_run("uncompiled", *flags), cwd=workplace, **environment)
    assert "install a C++ compiler" in error
    assert "turn compile off" in error
    result = run_script(*tiny_run("uncompiled", "--max_steps", 1), cwd=workplace)
    assert result.returncode == 0, result.stderr


def test_sampling_from_a_run_a_folder_and_the_hub_cache(workplace, uninterrupted, tmp_path):
    """sample.py takes a run, a checkpoint's folder, and a hub name from the local cache; the same
    seed gives the same text.
    """
    options = ("--num_return_sequences", 3, "--max_new_tokens", 8, "--device", "cpu")
    outs = [
        run_script(
            "sample.py", "--model", model, "--prompt", "import", *options, cwd=workplace
        ).stdout
        for model in (uninterrupted, list_checkpoints(uninterrupted)[-1])
    ]
    assert outs[0] == outs[1]
    assert outs[0].count("> import") == 3
    # The hub's cache: a snapshot in a folder named by its revision, and refs to revisions.
    repo, revision = tmp_path / "models--gpt2", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    small = small_transformers_gpt2(vocab_size=50257, n_positions=64)
    small.save_pretrained(repo / "snapshots" / revision)
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run_script("sample.py", "--prompt", "Hello", *options, cwd=workplace, **offline)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> Hello") == 3


def test_starting_from_other_weights(workplace, uninterrupted):
    """--init_from a run starts from its model, if wanted with a shorter block_size."""
    args = tiny_run("more", "--init_from", "runs/whole", "--block_size", 16)
    result = run_script(*args, "--max_steps", 4, "--max_lr", "1e-3", cwd=workplace)
    assert result.returncode == 0, result.stderr
    first, last = read_metrics(workplace / "runs" / "more")[0], read_metrics(uninterrupted)[-1]
    assert abs(first["val_loss"] - last["val_loss"]) < 1.5  # other windows, the same weights


def test_plot_compares_runs(workplace, uninterrupted):
    """plot.py draws several runs into one image, and names a folder that is not a run."""
    result = run_script("plot.py", "runs/whole", "runs/whole", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert (workplace / "loss.png").stat().st_size > 10_000
    assert "no_run" in expect_error("plot.py", "no_run", cwd=workplace)


def test_missing_data_name_the_commands_that_make_some(tmp_path):
    """train_gpt2.py in an empty folder names two commands that prepare data, and writes nothing."""
    error = expect_error("train_gpt2.py", cwd=tmp_path)
    assert error.count("python fineweb.py --dataset") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", COMMANDS)
def test_help_lists_groups_and_imports_nothing_heavy(tmp_path, script):
    """-h of every command exits with 0, shows its groups of flags, and imports none of the packages
    that only some calls need; fineweb.py does not even import torch.
    """
    argv = [sys.executable, "-X", "importtime", *command(script, "-h")[1:]]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    titles = set(re.findall(r"^(\w[\w ]*):$", result.stdout, re.MULTILINE))
    assert titles == {*GROUPS.get(script, ()), "options"}
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert ("torch" in imported) == (script != "fineweb.py")
    assert not imported & {*HEAVY_MODULES}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_wrong_flag_is_one_line(monkeypatch, capsys, script):
    """Every command refuses an unknown flag with one line and exit code 2."""
    monkeypatch.setattr(sys, "argv", [script, "--no_such_flag", "3"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, error = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert re.fullmatch(r"error: .+ \(-h lists the flags\)\n", error)


def test_a_wrong_flag_of_a_process(workplace):
    """The same as a user sees it: the flag, the one it resembles, and no traceback."""
    error = expect_error(*tiny_run("bad", "--max_stepz", 3), cwd=workplace)
    assert error.count("\n") == 1
    assert "--max_stepz, did you mean --max_steps?" in error


WRONG_SETTINGS = [
    ({"device": "cuda:99"}, "cuda:99"),
    ({"device": "tpu"}, "device tpu is not available: Expected one of cpu"),
    ({"total_batch_size": 1000}, "= 128; 1024 is one"),
    ({"init_from": "nowhere"}, "hub did not provide nowhere"),
    ({"n_head": 3}, "n_embd 32 is not a multiple of n_head 3"),
    ({"block_size": 0}, "block_size is 0"),
    ({"block_size": 10**6}, "x 1000000 x 1 ranks = 4000000; 4000000 is one"),
]


@pytest.mark.parametrize(("settings", "expected"), WRONG_SETTINGS, ids=str)
def test_settings_that_do_not_fit_are_named(workplace, monkeypatch, settings, expected):
    """Settings that the device, the data or the model do not allow are an error with the value, and
    no run begins.
    """
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}
    if "init_from" in settings:
        sizes = {}
    paths = {"data_dir": "data/text", "out_dir": "runs/bad"}
    defaults = {"total_batch_size": 256, "device": "cpu", **sizes, **paths}
    with pytest.raises((ValueError, OSError), match=re.escape(expected)):
        main(PretrainConfig(**{**defaults, **settings}))
    assert not list(Path("runs").glob("bad/metrics.jsonl"))


def test_truncated_shards_and_changed_settings_harm_nothing(workplace, uninterrupted):
    """A truncated shard, settings that would change the curve, and other data are refused by name;
    the run stays as it was.
    """
    before = {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()}
    shutil.copytree(workplace / "data" / "text", workplace / "data" / "torn")
    shard = next((workplace / "data" / "torn").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    args = tiny_run("whole")
    error = expect_error(*args, "--data_dir", "data/torn", cwd=workplace)
    assert f"{shard.name} is truncated" in error
    error = expect_error(*args, "--max_lr", "2e-2", cwd=workplace)
    assert "max_lr was 0.01, is 0.02" in error
    shutil.copytree(workplace / "data" / "text", workplace / "data" / "other")
    (workplace / "data" / "other" / "manifest.json").unlink()
    np.save(workplace / "data" / "other" / shard.name, np.arange(5000, dtype=np.uint16))
    error = expect_error(*args, "--data_dir", "data/other", cwd=workplace)
    assert "was trained on different data" in error
    assert {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()} == before


def test_profiling_does_not_change_the_run(workplace, uninterrupted):
    """--profile 2 writes a trace of two steps and prints the slowest operators; the curve is the
    same bit for bit.
    """
    result = run_script(*tiny_run("profiled", "--profile", 2), cwd=workplace)
    assert result.returncode == 0, result.stderr
    with gzip.open(workplace / "runs" / "profiled" / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert len(re.findall(r"^ *\S*aten::\S+|^ *\w+Backward\d", result.stdout, re.MULTILINE)) >= 5
    assert "open runs/profiled/profile.json.gz" in result.stdout
    assert read_curve(workplace / "runs" / "profiled") == read_curve(uninterrupted)


def test_an_unwritable_run_folder_is_named(workplace):
    """A run folder that cannot be made is an error with its path."""
    (workplace / "file").write_text("not a folder")
    error = expect_error(*tiny_run("x", "--out_dir", "file/run"), cwd=workplace)
    assert "file/run" in error


def test_debug_shows_the_traceback(tmp_path):
    """--debug turns the line into Python's traceback."""
    result = run_script("train_gpt2.py", "--debug", cwd=tmp_path)
    assert "Traceback" in result.stderr


def test_importing_does_nothing(tmp_path):
    """Importing any module prints nothing, writes nothing and starts no process group."""
    names = [f.stem for f in ROOT.glob("*.py")]
    names += [f"engine.{f.stem}" for f in ROOT.glob("engine/*.py") if f.stem != "__init__"]
    assert len(names) > 20
    result = subprocess.run(
        [sys.executable, str(WORKERS / "import_modules.py"), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=worker_env(),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
    assert not list(tmp_path.iterdir())


def test_zero_residual_blocks_add_nothing():
    """With zero_residual a new model's blocks are the identity; all other weights are unchanged."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    make = functools.partial(PretrainConfig, **sizes)
    zeroed, plain = (build_model(make(zero_residual=flag)) for flag in (True, False))
    x = torch.randn(1, 16, 32)
    for block in zeroed.transformer.h:
        assert torch.equal(block(x), x)
    for (name, a), b in zip(zeroed.named_parameters(), plain.parameters(), strict=True):
        assert name.endswith("c_proj.weight") or torch.equal(a, b)
    with pytest.raises(ValueError, match="does not work with init_from gpt2"):
        make(zero_residual=True, init_from="gpt2")


def test_sinusoidal_positions():
    """With sinusoidal_wpe, wpe holds the paper's sines and cosines with the given root mean square,
    also where the width is odd; all other weights are unchanged.
    """
    make = functools.partial(PretrainConfig, n_layer=1, n_head=1, n_embd=15, block_size=8)
    waves, plain = (build_model(make(sinusoidal_wpe=rms)) for rms in (0.1, 0.0))
    for name, param in plain.named_parameters():
        if name != "transformer.wpe.weight":
            assert torch.equal(waves.get_parameter(name), param)
    wpe = waves.transformer.wpe.weight / (0.1 * math.sqrt(2))
    for position, i in ((0, 0), (1, 0), (5, 3), (7, 6)):
        angle = position / 10_000 ** (2 * i / 15)
        assert wpe[position, i].item() == pytest.approx(math.sin(angle), rel=1e-5)
        assert wpe[position, 8 + i].item() == pytest.approx(math.cos(angle), rel=1e-5)
    wide = build_model(make(sinusoidal_wpe=0.1, n_embd=16)).transformer.wpe.weight
    assert wide.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)
