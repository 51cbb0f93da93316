"""The commands as a user runs them: processes, files, exit codes, signals."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_model import hugging_face
from transformers import AutoModelForCausalLM

import cli
import finetune_lora
import train_gpt2
from checkpoint import checkpoints, read_metrics
from model import GPTConfig

ROOT = Path(__file__).parents[1]
TINY = """
n_layer: 2
n_head: 2
n_embd: 32
block_size: 32
batch_size: 4
total_batch_size: 256
warmup_steps: 4
max_lr: 1.0e-2
min_lr: 1.0e-3
eval_tokens: 512
sample_every: 20
device: cpu
"""


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / str(args[0])), *map(str, args[1:])]


def run(*args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def fails(*args: object, cwd: Path, **env: str) -> str:
    """The error that the command prints: exit code 2, no traceback."""
    result = run(*args, cwd=cwd, **env)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with shards of a small text and the config of a tiny model, made by fineweb.py."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text.txt").write_text(Path(__file__).read_text() * 2)
    (folder / "tiny.yaml").write_text(TINY)
    result = run("fineweb.py", "--dataset", "text.txt", "--val_tokens", "600", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "600 val tokens" in result.stdout
    return folder


def tiny_run(workplace: Path, name: str, *args: object) -> tuple:
    """The arguments of train_gpt2.py for a tiny run."""
    sizes = ("--max_steps", 60, "--eval_every", 20, "--save_every", 20)
    where = ("--config", "tiny.yaml", "--data_dir", "data/text", "--out_dir", f"runs/{name}")
    return ("train_gpt2.py", *where, *sizes, *args)


@pytest.fixture(scope="module")
def uninterrupted(workplace) -> Path:
    result = run(*tiny_run(workplace, "whole"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    (workplace / "whole.out").write_text(result.stdout)
    return workplace / "runs" / "whole"


def curve(run_folder: Path) -> list[tuple]:
    """What a run has logged, without the times."""
    keys = ("step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "samples")
    return [tuple(r.get(key) for key in keys) for r in read_metrics(run_folder)]


def test_pretraining_writes_what_it_promises(workplace, uninterrupted):
    """One command: the resolved config and sizes are told, the loss falls, each step is logged
    once from 1 on with all its keys, the plot is there, the checkpoint opens in transformers.
    """
    out = (workplace / "whole.out").read_text()
    assert "max_lr: 0.01" in out
    assert "weight_decay: 0.1" in out
    assert "decayed 10 tensors" in out
    assert "grad_accum_steps 2" in out
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == list(range(61))
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 2
    keys = "step train_loss lr grad_norm tokens tokens_per_s step_ms mfu"
    assert all(set(keys.split()) <= r.keys() for r in records[1:])
    assert [r["step"] for r in records if "val_loss" in r] == [0, 20, 40, 60]
    assert [c.name for c in checkpoints(uninterrupted)] == ["step_000040", "step_000060"]
    assert (uninterrupted / "loss.png").stat().st_size > 10_000
    line = out.splitlines()[-1]
    assert line.startswith("in transformers")
    folder = line.split("'")[1]
    model = AutoModelForCausalLM.from_pretrained(workplace / folder)
    assert model.config.vocab_size == 50257


def test_finished_run_says_its_results_again(workplace, uninterrupted):
    """The same command on a finished run trains nothing and prints its results."""
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    result = run(*tiny_run(workplace, "whole"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "finished before" in result.stdout
    summary = (workplace / "whole.out").read_text().split("validation loss")[1]
    assert result.stdout.split("validation loss")[1] == summary
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def wait_for_steps(process: subprocess.Popen, run_folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        log = run_folder / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") > steps:
            return
        time.sleep(0.005)
    pytest.fail("the run ended, or did not get that far in a minute")


def start(workplace: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*tiny_run(workplace, name)),
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_between_checkpoints_it_continues_to_the_bit(workplace, uninterrupted):
    """kill -9 between two checkpoints, twice, then the same command: every logged loss, gradient
    norm, validation loss and sample is the uninterrupted run's to the bit, each step once.
    """
    folder = workplace / "runs" / "killed"
    for steps in (27, 49):
        process = start(workplace, "killed")
        wait_for_steps(process, folder, steps)
        process.kill()
        process.wait()
    assert len(curve(folder)) < 61
    result = run(*tiny_run(workplace, "killed"), cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert curve(folder) == curve(uninterrupted)
    for name in ("model.safetensors", "config.json"):
        files = [checkpoints(f)[-1] / name for f in (folder, uninterrupted)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_interrupted_it_saves_and_continues(workplace, uninterrupted, signum):
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint, a line and the shell's exit
    code; the same command goes on to the same curve.
    """
    folder = workplace / "runs" / signum.name
    process = start(workplace, signum.name)
    wait_for_steps(process, folder, 9)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in err
    assert "saved; the same command goes on" in out
    assert checkpoints(folder)[-1].name == f"step_{read_metrics(folder)[-1]['step']:06d}"
    assert run(*tiny_run(workplace, signum.name), cwd=workplace).returncode == 0
    assert curve(folder) == curve(uninterrupted)


def test_sampling_from_a_run_a_folder_and_the_hub_cache(workplace, uninterrupted, tmp_path):
    """sample.py takes a run, a checkpoint folder, and a hub name out of the local hub cache; the
    same seed gives the same text.
    """
    options = ("--num_return_sequences", 3, "--max_new_tokens", 8, "--device", "cpu")
    outs = [
        run("sample.py", "--model", model, "--prompt", "import", *options, cwd=workplace).stdout
        for model in (uninterrupted, checkpoints(uninterrupted)[-1])
    ]
    assert outs[0] == outs[1]
    assert outs[0].count("> import") == 3
    # The layout of the hub's cache: a snapshot under its revision, and a name for the revision.
    repo, revision = tmp_path / "models--gpt2", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    hugging_face(vocab_size=50257, n_positions=64).save_pretrained(repo / "snapshots" / revision)
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run("sample.py", "--prompt", "Hello", *options, cwd=workplace, **offline)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> Hello") == 3


def test_starting_from_other_weights(workplace, uninterrupted):
    """--init_from a run trains its model on, with a window that may be shorter."""
    args = tiny_run(workplace, "more", "--init_from", "runs/whole", "--block_size", 16)
    result = run(*args, "--max_steps", 4, "--max_lr", "1e-3", cwd=workplace)
    assert result.returncode == 0, result.stderr
    first, last = read_metrics(workplace / "runs" / "more")[0], read_metrics(uninterrupted)[-1]
    assert abs(first["val_loss"] - last["val_loss"]) < 1.5  # windows differ, weights are the same


def test_plot_compares_runs(workplace, uninterrupted):
    """plot.py draws several runs into one picture, and names a folder that is no run."""
    result = run("plot.py", "runs/whole", "runs/whole", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert (workplace / "loss.png").stat().st_size > 10_000
    assert "no_run" in fails("plot.py", "no_run", cwd=workplace)


def test_training_without_data_says_how_to_get_some(tmp_path):
    """train_gpt2.py in an empty folder names the two commands that make data."""
    error = fails("train_gpt2.py", cwd=tmp_path)
    assert error.count("python fineweb.py --dataset") == 2
    assert not list(tmp_path.iterdir())


CONFIGS = {
    "train_gpt2.py": (train_gpt2.main, train_gpt2.PretrainConfig),
    "finetune_lora.py": (finetune_lora.main, finetune_lora.FinetuneConfig),
}


def in_process(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, without the seconds that a process takes."""
    monkeypatch.setattr(sys, "argv", list(map(str, args)))
    with pytest.raises(SystemExit) as exit_:
        cli.run(*CONFIGS[args[0]], "")
    return exit_.value.code, *capsys.readouterr()


def test_wrong_flags_and_keys_are_named(workplace, monkeypatch, capsys):
    """An unknown flag, an abbreviation, a misspelt YAML key, a value of the wrong type, a config
    that is not there: one line with the name.
    """
    monkeypatch.chdir(workplace)
    (workplace / "bad.yaml").write_text("max_stepz: 3\n")
    for args, expected in (
        (("--max_stepz", "3"), "--max_stepz"),
        (("--max_step", "3"), "--max_step"),
        (("--config", "bad.yaml"), "max_stepz"),
        (("--max_steps", "many"), "many"),
        (("--max_steps", "0"), "max_steps is 0, expected at least 1"),
        (("--config", "nothing.yaml"), "nothing.yaml"),
        (("--precision", "int8"), "int8"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "tpu"), "device is tpu, expected auto, cpu, cuda or mps"),
        (("--total_batch_size", "1000"), "the nearest are 896 or 1024"),
        (("--init_from", "nowhere"), "nowhere is no folder here"),
        (("--n_head", "3"), "n_embd 32 does not divide into n_head 3"),
        (("--block_size", "0"), "block_size is 0"),
    ):
        code, _, error = in_process(monkeypatch, capsys, *tiny_run(workplace, "bad", *args))
        assert code == 2, args
        assert expected in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert "--max_stepz" in fails(*tiny_run(workplace, "bad", "--max_stepz", 3), cwd=workplace)


def test_truncated_shard_and_changed_settings_harm_nothing(workplace, uninterrupted):
    """A truncated shard, and settings that would break the curve, are named; the run stays."""
    before = {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()}
    shutil.copytree(workplace / "data" / "text", workplace / "data" / "torn")
    shard = next((workplace / "data" / "torn").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    args = tiny_run(workplace, "whole")
    assert f"{shard.name} is truncated" in fails(*args, "--data_dir", "data/torn", cwd=workplace)
    assert "max_lr 0.01 then, 0.02 now" in fails(*args, "--max_lr", "2e-2", cwd=workplace)
    shutil.copytree(workplace / "data" / "text", workplace / "data" / "other")
    (workplace / "data" / "other" / "manifest.json").unlink()
    np.save(workplace / "data" / "other" / shard.name, np.arange(5000, dtype=np.uint16))
    assert "was trained on other data" in fails(*args, "--data_dir", "data/other", cwd=workplace)
    assert {f: f.read_bytes() for f in uninterrupted.rglob("*") if f.is_file()} == before


def test_a_profiled_run_is_the_same_run(workplace, uninterrupted):
    """--profile 2 writes a trace of two steps and prints ten operators; the curve is the same to
    the bit.
    """
    result = run(*tiny_run(workplace, "profiled", "--profile", 2), cwd=workplace)
    assert result.returncode == 0, result.stderr
    with gzip.open(workplace / "runs" / "profiled" / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert len(re.findall(r"^ *\S*aten::\S+|^ *\w+Backward\d", result.stdout, re.MULTILINE)) >= 5
    assert "2 steps are in runs/profiled/profile.json.gz" in result.stdout
    assert curve(workplace / "runs" / "profiled") == curve(uninterrupted)


def test_unwritable_run_folder_is_named(workplace):
    """A run folder that cannot be made ends in a line with its path."""
    (workplace / "file").write_text("not a folder")
    error = fails(*tiny_run(workplace, "x", "--out_dir", "file/run"), cwd=workplace)
    assert "file/run" in error


def test_debug_shows_the_traceback(tmp_path):
    """--debug turns the line into Python's traceback."""
    result = run("train_gpt2.py", "--debug", cwd=tmp_path)
    assert "Traceback" in result.stderr


def test_importing_does_nothing(tmp_path):
    """Importing any room prints nothing, writes nothing and starts no process group."""
    names = [f.stem for f in ROOT.glob("*.py")]
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport {', '.join(names)}\n"
    program += "import torch; assert not torch.distributed.is_initialized()"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == result.stderr == ""
    assert not list(tmp_path.iterdir())


def test_presets_are_complete_and_right(monkeypatch, capsys):
    """Every preset parses, and gpt2_124m is what the defaults are."""
    _, defaults, _ = in_process(monkeypatch, capsys, "train_gpt2.py", "--print_config")
    presets = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(presets) >= 5
    for preset in presets:
        script = "finetune_lora.py" if preset.stem.endswith("_lora") else "train_gpt2.py"
        args = (script, "--config", preset, "--print_config")
        code, out, error = in_process(monkeypatch, capsys, *args)
        assert code == 0, f"{preset}: {error}"
        if preset.stem == "gpt2_124m":
            shape = GPTConfig()
            for name in ("n_layer", "n_head", "n_embd", "block_size"):
                defaults = defaults.replace(f"{name}: null", f"{name}: {getattr(shape, name)}")
            assert out == defaults
