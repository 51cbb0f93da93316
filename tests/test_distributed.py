"""Training on several ranks: processes on this machine that communicate with gloo."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU_DIST, expect_error, read_values, run_script, tiny_run, write_log
from processes import HANG_SECONDS, ROOT, Job

from engine.checkpoint import list_checkpoints, read_state
from engine.config import TrainConfig
from engine.distributed import Distributed, has_bf16_units, resolve_device_settings
from engine.files import lock_folder
from engine.metrics import read_metrics
from model import GPT

N_STEPS = 10
SETTINGS = {"batch_size": 1, "total_batch_size": 192, "max_steps": N_STEPS}
SETTINGS |= {"eval_every": 5, "save_every": 5}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Without this, torchrun reuses its store, and a restarted rank may find addresses of killed ranks:
# https://github.com/pytorch/pytorch/issues/135712
TORCHRUN_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(name: str, **settings: object) -> list[str]:
    return tiny_run(f"ranks/{name}", **{**SETTINGS, **settings})


def train(workdir: Path, name: str, ranks: int = 1, **settings: object) -> Path:
    """Start or resume a run on `ranks` ranks. Return its folder."""
    result = run_script(*command(name, **settings), cwd=workdir, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir / "ranks" / name


@pytest.fixture(scope="module")
def single(workdir) -> Path:
    """The run in one process, with a batch_size of 6, to which the other runs are compared."""
    return train(workdir, "single", batch_size=6)


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(list_checkpoints(run)[-1]).state_dict()


def assert_same_curve(run: Path, single: Path) -> None:
    assert read_values(run, "step") == list(range(N_STEPS + 1))
    for key in ("train_loss", "val_loss", "val_bpb"):
        assert read_values(run, key) == pytest.approx(read_values(single, key), rel=1e-4)
    assert read_values(run, "samples") == read_values(single, "samples")


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"batch_size": 3}),
        (2, {"parallel": "fsdp", "recompute": "block"}),
        pytest.param(3, {"parallel": "fsdp"}, marks=pytest.mark.slow),
        pytest.param(2, {"compile": True}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": "fsdp", "compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_curve_does_not_depend_on_ranks(workdir, single, ranks, settings):
    """With DDP and with FSDP2, losses, samples and weights equal those of one process."""
    run = train(workdir, f"{ranks}_{'_'.join(map(str, settings.values()))}", ranks, **settings)
    assert_same_curve(run, single)
    expected = read_weights(single)
    for name, tensor in read_weights(run).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-2)


def rewind_to_step_5(run: Path) -> None:
    """Turn a finished run back to its state at step 5."""
    shutil.rmtree(run / "checkpoints" / "step_000010")
    write_log(run, read_metrics(run)[:6])


@pytest.mark.slow
def test_a_run_moves_between_layouts(workdir, single):
    """A run stopped on 2 ranks with FSDP continues the same curve on 3 ranks or in one process."""
    source = train(workdir, "moving", 2, parallel="fsdp")
    rewind_to_step_5(source)
    state = read_state(source / "checkpoints" / "step_000005")["optimizer"]["state"]
    assert state["transformer.wte.weight"]["exp_avg"].shape == (50304, 32)  # not sharded
    shutil.copytree(source, source.with_name("moved"))
    assert_same_curve(train(workdir, "moving", 3), single)
    assert_same_curve(train(workdir, "moved", batch_size=3), single)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_normuon_resumes_bit_for_bit(workdir, parallel):
    """On 2 ranks, a resumed NorMuon run ends with exactly the weights of an uninterrupted run."""
    settings = {"optimizer": "muon", "muon_beta2": 0.95, "parallel": parallel, "sample_every": 0}
    run = train(workdir, f"normuon_{parallel}", 2, **settings)
    expected = read_weights(run)
    rewind_to_step_5(run)
    weights = read_weights(train(workdir, f"normuon_{parallel}", 2, **settings))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_must_exist(name):
    """The error for a device that is unknown or missing says what to use instead."""
    with pytest.raises(ValueError, match=f"device {name} is not available: .*; use auto to pick"):
        Distributed.start(name)


def test_a_barrier_names_the_missing_ranks():
    """If a rank does not reach a barrier in time, the error names that rank."""
    result = run_script("tests/workers/late_rank.py", ranks=3)
    assert result.returncode != 0
    assert "Ranks 2 failed to pass monitoredBarrier" in result.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_snapshot_keeps_its_values(workdir, parallel):
    """More training does not change a snapshot: a background save may still be writing it."""
    result = run_script("tests/workers/snapshot.py", parallel, cwd=workdir, ranks=2)
    assert result.returncode == 0, result.stderr


def torchrun(workdir: Path, stop: str, *options: str, name: str, **settings) -> subprocess.Popen:
    """Start a tiny run under torchrun, with a signal after step 5 (see workers/stopped_rank.py)."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    worker = str(ROOT / "tests" / "workers" / "stopped_rank.py")
    return subprocess.Popen(
        [*TORCHRUN, *options, worker, stop, *command(name, **settings)[1:]],
        cwd=workdir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**TORCHRUN_ENV, "PYTHONPATH": paths},
    )


@pytest.mark.slow
def test_a_killed_rank_is_restarted(workdir, single):
    """On two nodes, --max_restarts restarts a killed rank, and the run continues the same curve."""
    options = ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29517", "--rdzv_id=test"]
    options += ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3"]
    agents = [
        torchrun(workdir, "kill", *options, f"--node_rank={node}", name="nodes", save_every=2)
        for node in range(2)
    ]
    outs = [agent.communicate(timeout=HANG_SECONDS)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert any("resuming from step" in out for out in outs), outs
    assert_same_curve(workdir / "ranks" / "nodes", single)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on(workdir, single):
    """When a cluster sends SIGTERM to torchrun, the run saves. The same command then resumes it."""
    agent = torchrun(workdir, "term", "--standalone", "--nproc_per_node=2", name="sigterm")
    out = agent.communicate(timeout=HANG_SECONDS)[0]
    assert "saved it; run the same command to resume" in out, out
    assert_same_curve(train(workdir, "sigterm", 2), single)


def test_a_signal_to_one_rank_stops_all(workdir, single):
    """If one rank gets SIGTERM, both stop after the same step. The same command then resumes."""
    job = Job(*command("one"), cwd=workdir, ranks=2, signal_at=(3, signal.SIGTERM))
    result = job.wait()
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stdout.count("saved it; run the same command to resume") == 1
    assert [p.name for p in list_checkpoints(workdir / "ranks" / "one")] == ["step_000004"]
    assert_same_curve(train(workdir, "one", 2), single)


def test_a_run_folder_in_use_is_refused(workdir, single):
    """While another process uses the run folder, the command fails. Afterwards it works."""
    same = command("single", batch_size=6)
    with lock_folder(single):
        assert "is in use by another process" in expect_error(*same, cwd=workdir)
    assert run_script(*same, cwd=workdir).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """Reusing freed memory causes almost no page faults. A line says that glibc keeps it."""
    result = run_script("tests/workers/freed_memory.py")
    line, faults = result.stdout.splitlines()
    assert "glibc keeps freed memory" in line
    n_pages = 2**24 * 4 // 4096  # of the tensor: N_FLOATS floats of 4 bytes, pages of 4096 bytes
    assert int(faults) < n_pages / 100


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_a_cpu_with_bf16_units_trains_in_bf16(monkeypatch, capsys, units, expected):
    """By default, a CPU with bf16 units trains in bf16 and others in fp32, and a line says so. If
    bf16 is set on a CPU without units, a line says that it is slow, but only on rank 0.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_device_settings(TrainConfig(), CPU_DIST).precision == expected
    has = "has" if expected == "bf16" else "has no"
    line = f"precision: {expected} (this CPU {has} bf16 units; set precision to change it)\n"
    assert capsys.readouterr().out == line
    slow = "precision: this CPU has no bf16 units, so bf16 is many times slower than fp32\n"
    for precision, line in (("fp32", ""), ("bf16", "" if expected == "bf16" else slow)):
        config = TrainConfig(precision=precision)
        for dist, printed in ((CPU_DIST, line), (replace(CPU_DIST, rank=1), "")):
            assert resolve_device_settings(config, dist).precision == precision
            assert capsys.readouterr().out == printed


def test_bf16_units_are_those_of_the_system():
    """has_bf16_units agrees with the CPU flags that Linux lists."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("/proc/cpuinfo lists them on Linux and x86 only")
    listed = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bf16_units(CPU_DIST.device) == bool(listed & {"avx512_bf16", "amx_bf16"})


def test_an_error_of_all_ranks_is_reported_once(workdir):
    """If all ranks fail with the same error, only rank 0 prints it. torchrun's own report has that
    line, too, instead of advice on how to get a traceback.
    """
    script, *flags = command("wrong", batch_size=5)
    argv = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / script), *flags]
    lines = subprocess.run(argv, cwd=workdir, capture_output=True, text=True).stderr
    (error,) = [line for line in lines.splitlines() if line.startswith("error: ")]
    assert "x 2 ranks = 320; use batch_size 3, which" in error
    assert f"traceback : {error}\n" in lines
    assert not re.search("^  File .*train_gpt2.py", lines, re.MULTILINE)
