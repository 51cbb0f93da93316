"""The memory of training: what is predicted, what there is, and what happens without enough."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU_DIST, TINY_RUN, make_step, new_step_model, run_script, tiny_run
from processes import ROOT, run_here

from engine import memory
from engine.distributed import Distributed
from engine.lora import convert_linear_layer_to_lora, only_optimize_lora_parameters
from engine.memory import check_memory, memory_limit, predict_memory, predict_peak
from engine.metrics import read_metrics
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig


@pytest.fixture
def set_limit(tmp_path, monkeypatch):
    """A function that sets the memory limit of the container in bytes."""
    file = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_FILES", [str(file)])
    return lambda n_bytes: file.write_text(f"{n_bytes:.0f}\n")


def test_limit_is_the_smaller_of_machine_and_container(tmp_path, monkeypatch):
    """A container may have its limit in either version of cgroups, no limit ("max"), or a limit
    above the memory of the machine.
    """
    files = [tmp_path / "memory.max", tmp_path / "limit_in_bytes"]
    monkeypatch.setattr(memory, "CGROUP_FILES", list(map(str, files)))
    machine = memory_limit(CPU_DIST.device)
    assert 2**28 < machine < 2**50
    for file, text, limit in (
        (files[0], "max\n", machine),
        (files[0], "1000000\n", 1_000_000),
        (files[1], f"{2**63 - 4096}\n", machine),  # what cgroup v1 has instead of "max"
        (files[1], "2000000\n", 2_000_000),
    ):
        file.write_text(text)
        assert memory_limit(CPU_DIST.device) == limit
        file.unlink()


def test_limit_of_other_devices(monkeypatch):
    """A GPU has its total memory, not what is free. An unknown limit is infinite."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 80))
    assert memory_limit(torch.device("cuda")) == 80
    assert memory_limit(torch.device("mps")) == float("inf")


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"lora": True}])
def test_weights_gradients_and_moments_are_those_of_a_step(shards, options):
    """The prediction counts frozen weights without gradients, and one moment for Muon."""
    model = new_step_model()
    if options.pop("lora", False):
        only_optimize_lora_parameters(convert_linear_layer_to_lora(model))
    step = make_step(model, shards, **options)
    step.optimizers[0].zero_grad = lambda **_: None  # keep gradients
    step.optimizers[-1].zero_grad = lambda **_: None
    step(1)
    predicted = predict_memory(model, step.config, CPU_DIST, block_size=16)
    states = [s for o in step.optimizers for state in o.state.values() for s in state.values()]
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(tensor.nbytes for tensor in states if tensor.dim()),
    }
    assert {name: predicted[name] for name in measured} == measured


def test_gradients_before_the_backward_pass():
    """With a single micro-step, gradients do not exist yet, unless DDP keeps its buckets."""
    model = GPT(GPTConfig(n_layer=1, n_embd=64, n_head=1, block_size=64, vocab_size=500))
    config = PretrainConfig(batch_size=64, precision="bf16", compile=True, save_every=10**6)
    cuda, sizes = torch.device("cuda"), {"block_size": 64}
    gradients = predict_memory(model, config, Distributed(0, 1, cuda), **sizes)["gradients"]
    for world_size, saved in ((1, gradients), (2, 0)):
        dist = Distributed(0, world_size, cuda)
        peaks = [predict_peak(model, config, dist, n_micro_steps=n, **sizes) for n in (1, 2)]
        assert peaks[1] - peaks[0] == saved


def test_prediction_matches_a_real_run(workdir):
    """The measured peak of a run on a CPU, which also evaluates and saves, is within 25% of the
    prediction, with and without recomputation.
    """
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128}
    settings = {**TINY_RUN, **shape, "batch_size": 32, "total_batch_size": 8192, "max_steps": 2}
    settings |= {"sample_every": 0, "warmup_steps": 1, "save_every": 10}
    for recompute in ("none", "block"):
        settings["recompute"] = recompute
        command = tiny_run(f"runs/memory_{recompute}", **settings)
        command[0] = str(ROOT / command[0])
        # Start it from a small shell: Linux counts the peak memory of the process that starts a
        # program as that program's own, and pytest may have grown larger than the run.
        line = f"{shlex.join([sys.executable, *command])}; exit $?"
        subprocess.run(["sh", "-c", line], cwd=workdir, check=True, capture_output=True)
        (*_, last) = read_metrics(workdir / "runs" / f"memory_{recompute}")
        measured = last["peak_memory_gb"]
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape))
        predicted = predict_peak(model, PretrainConfig(**settings), CPU_DIST, 128) / 1e9
        assert predicted == pytest.approx(measured, rel=0.25)


def test_too_little_memory_is_refused_before_the_first_step(
    workdir, set_limit, monkeypatch, capsys
):
    """An unfinished run that does not fit ends with exit code 2 and one line. Its folder stays
    as it was. The line names the largest batch size that fits. A finished run can start again.
    """
    sizes = {"total_batch_size": 1024, "max_steps": 2, "warmup_steps": 1, "sample_every": 0}
    sizes |= {"save_every": 1}
    assert run_script(*tiny_run("runs/refused", **sizes), cwd=workdir).returncode == 0
    run = workdir / "runs" / "refused"
    shutil.rmtree(run / "checkpoints" / "step_000002")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    monkeypatch.chdir(workdir)
    set_limit(0.55e9)  # 0.45 GB of it for the process itself

    def refuse(batch_size: int) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_here(*tiny_run("runs/refused", **sizes, batch_size=batch_size))
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    line = refuse(32)
    assert line.startswith("error: batch_size 32 needs about 0.6")
    assert line.count("\n") == 1
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    found = re.search(r"use --batch_size (\d+) --recompute none, which gives the same loss", line)
    n = int(found[1])
    assert 1 < n < 32
    refuse(2 * n)
    run_here(*tiny_run("runs/refused", **sizes, batch_size=n))
    run_here(*tiny_run("runs/refused", **sizes, batch_size=32))
    assert "already finished after step 2" in capsys.readouterr().out


# Training data with a block size of 1024.
DATA = SimpleNamespace(
    rows_per_step=32, batch_sizes=[8, 4, 2, 1], block_size=1024, graph_lengths=()
)
CONFIG = PretrainConfig(batch_size=8, precision="bf16", recompute="light")


@pytest.fixture
def model() -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=256))


def peak(model: GPT, batch_size: int = 8, recompute: str = "light") -> float:
    config = replace(CONFIG, batch_size=batch_size, recompute=recompute)
    return predict_peak(model, config, CPU_DIST, DATA.block_size)


def test_remedies(model, set_limit):
    """A smaller batch size is preferred to recomputation, and that to a smaller model."""
    for limit, remedy in (
        (
            peak(model) - 1e6,
            "use --batch_size 4 --recompute light, which gives the same loss curve",
        ),
        (peak(model, 1, "light"), "use --batch_size 1 --recompute light"),
        (peak(model, 2, "block"), "use --batch_size 2 --recompute block"),
        (peak(model, 1, "block"), "use --batch_size 1 --recompute block"),
        (peak(model, 1, "block") - 1e6, "use a smaller model, or --parallel fsdp on several GPUs"),
    ):
        set_limit(limit + 1)
        with pytest.raises(ValueError, match=remedy):
            check_memory(model, DATA, CONFIG, CPU_DIST)


def test_nearly_full_memory_gets_a_warning(model, set_limit, capsys, monkeypatch):
    """A prediction within 15% of the limit gives a warning, on rank 0. One below gives nothing. The
    ranks of a node share its memory.
    """
    not_main = Distributed(1, 1, CPU_DIST.device)
    for n_ranks, limit, dist, text in (
        ("1", 1.2, CPU_DIST, ""),
        ("1", 1.1, CPU_DIST, "GB; if memory runs out, use a smaller batch_size\n"),
        ("1", 1.1, not_main, ""),
        ("2", 2.4, CPU_DIST, ""),
        ("2", 2.1, CPU_DIST, "use a smaller batch_size\n"),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", n_ranks)
        set_limit(limit * peak(model))
        check_memory(model, DATA, CONFIG, dist)
        printed = capsys.readouterr().out
        assert printed.endswith(text)
        assert bool(printed) == bool(text)
    set_limit(1.9 * peak(model))
    with pytest.raises(ValueError, match="expected at most"):
        check_memory(model, DATA, CONFIG, CPU_DIST)
