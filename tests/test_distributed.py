"""Several processes over the loopback interface with gloo."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, expect_error, read_values, run_script, tiny_run, write_log
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
# Else torchrun keeps the store, and a restarted rank may read addresses of killed ones from it:
# https://github.com/pytorch/pytorch/issues/135712
TORCHRUN_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(name: str, **settings: object) -> list[str]:
    return tiny_run(f"ranks/{name}", **{**SETTINGS, **settings})


def train(workplace: Path, name: str, ranks: int = 1, **settings: object) -> Path:
    """Start or resume a run on some ranks."""
    result = run_script(*command(name, **settings), cwd=workplace, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return workplace / "ranks" / name


@pytest.fixture(scope="module")
def single(workplace) -> Path:
    """The run in one process, in micro-batches of another size."""
    return train(workplace, "single", batch_size=6)


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
def test_the_curve_does_not_depend_on_ranks(workplace, single, ranks, settings):
    """Losses, samples and weights are those of one process, with DDP as with FSDP2."""
    run = train(workplace, f"{ranks}_{'_'.join(map(str, settings.values()))}", ranks, **settings)
    assert_same_curve(run, single)
    expected = read_weights(single)
    for name, tensor in read_weights(run).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-2)


def rewind_to_step_5(run: Path) -> None:
    """Leave a run as it was at step 5."""
    shutil.rmtree(run / "checkpoints" / "step_000010")
    write_log(run, read_metrics(run)[:6])


@pytest.mark.slow
def test_a_run_moves_between_layouts(workplace, single):
    """A run stopped on 2 ranks with FSDP continues the same curve in one process and on 3 ranks.
    The checkpoint holds the full optimizer state, keyed by parameter name.
    """
    source = train(workplace, "moving", 2, parallel="fsdp")
    rewind_to_step_5(source)
    state = read_state(source / "checkpoints" / "step_000005")["optimizer"]["state"]
    assert state["transformer.wte.weight"]["exp_avg"].shape == (50304, 32)
    shutil.copytree(source, source.with_name("moved"))
    assert_same_curve(train(workplace, "moving", 3), single)
    assert_same_curve(train(workplace, "moved", batch_size=3), single)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_normuon_resumes_bit_for_bit(workplace, parallel):
    """On 2 ranks, a run with NorMuon resumed at step 5 ends with exactly the weights of a run that
    was not stopped: the checkpoint has all of its state, sharded or not.
    """
    settings = {"optimizer": "muon", "muon_beta2": 0.95, "parallel": parallel, "sample_every": 0}
    run = train(workplace, f"normuon_{parallel}", 2, **settings)
    expected = read_weights(run)
    rewind_to_step_5(run)
    weights = read_weights(train(workplace, f"normuon_{parallel}", 2, **settings))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_must_exist(name):
    """An unknown device is refused with what is expected."""
    with pytest.raises(ValueError, match=f"device {name} is not available: .*; device auto picks"):
        Distributed.start(name)


def test_a_barrier_names_the_missing_ranks():
    """A rank that does not reach the barrier is named after the timeout."""
    result = run_script("tests/workers/late_rank.py", ranks=3)
    assert result.returncode != 0
    assert "Ranks 2 failed to pass monitoredBarrier" in result.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_snapshot_keeps_its_values(workplace, parallel):
    """Steps after a snapshot, which a save in the background may still be writing, do not change
    it: with Muon and AdamW, on replicated models and on sharded ones.
    """
    result = run_script("tests/workers/snapshot.py", parallel, cwd=workplace, ranks=2)
    assert result.returncode == 0, result.stderr


def torchrun(workplace: Path, stop: str, *options: str, name: str, **settings) -> subprocess.Popen:
    """Start a tiny run under torchrun and stop it with a signal after it logs step 5."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    worker = str(ROOT / "tests" / "workers" / "stopped_rank.py")
    return subprocess.Popen(
        [*TORCHRUN, *options, worker, stop, *command(name, **settings)[1:]],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**TORCHRUN_ENV, "PYTHONPATH": paths},
    )


@pytest.mark.slow
def test_a_killed_rank_is_restarted(workplace, single):
    """On two nodes, --max_restarts restarts a killed rank from a checkpoint, on the same curve."""
    options = ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29517", "--rdzv_id=test"]
    options += ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3"]
    agents = [
        torchrun(workplace, "kill", *options, f"--node_rank={node}", name="nodes", save_every=2)
        for node in range(2)
    ]
    outs = [agent.communicate(timeout=HANG_SECONDS)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert any("resuming from step" in out for out in outs), outs
    assert_same_curve(workplace / "ranks" / "nodes", single)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on(workplace, single):
    """SIGTERM to torchrun, as a cluster sends it, saves; the same command continues the curve."""
    agent = torchrun(workplace, "term", "--standalone", "--nproc_per_node=2", name="sigterm")
    out = agent.communicate(timeout=HANG_SECONDS)[0]
    assert "saved; the same command resumes" in out, out
    assert_same_curve(train(workplace, "sigterm", 2), single)


def test_a_signal_to_one_rank_stops_all(workplace, single):
    """SIGTERM to one rank ends both after the same step; the same command continues the curve."""
    job = Job(*command("one"), cwd=workplace, ranks=2, signal_at=(3, signal.SIGTERM))
    result = job.wait()
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stdout.count("saved; the same command resumes") == 1
    assert [p.name for p in list_checkpoints(workplace / "ranks" / "one")] == ["step_000004"]
    assert_same_curve(train(workplace, "one", 2), single)


def test_a_run_folder_in_use_is_refused(workplace, single):
    """While another process holds the run folder, the command is refused with the remedy."""
    same = command("single", batch_size=6)
    with lock_folder(single):
        assert "is in use by another process" in expect_error(*same, cwd=workplace)
    assert run_script(*same, cwd=workplace).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """A large tensor in the place of a freed one costs no page faults, and a line says so."""
    result = run_script("tests/workers/freed_memory.py")
    line, faults = result.stdout.splitlines()
    assert "glibc keeps freed memory" in line
    assert int(faults) < 2**24 * 4 / 4096 / 100


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
    """A CPU with bf16 units trains in bf16, and a line says so. An explicit precision is kept."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert resolve_device_settings(TrainConfig(), CPU).precision == expected
    has = "has" if expected == "bf16" else "has no"
    line = f"precision: {expected}, because this CPU {has} bf16 units; set precision to change it\n"
    assert capsys.readouterr().out == line
    for precision in ("fp32", "bf16"):
        config = TrainConfig(precision=precision)
        assert resolve_device_settings(config, CPU).precision == precision
    assert capsys.readouterr().out == ""


def test_bf16_units_are_those_of_the_system():
    """The units that are looked for are those that Linux lists for this CPU."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("/proc/cpuinfo lists them on Linux and x86 only")
    listed = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bf16_units(CPU.device) == bool(listed & {"avx512_bf16", "amx_bf16"})


def test_an_error_of_all_ranks_is_reported_once(workplace):
    """Two ranks with the same wrong setting print one error line, of rank 0; torchrun's report,
    which nothing can prevent, names the error instead of advising how to trace it.
    """
    script, *flags = command("wrong", batch_size=5)
    argv = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / script), *flags]
    lines = subprocess.run(argv, cwd=workplace, capture_output=True, text=True).stderr
    (error,) = [line for line in lines.splitlines() if line.startswith("error: ")]
    assert "x 2 ranks = 320; batch_size 3 fits" in error
    assert f"traceback : {error}\n" in lines
    assert not re.search("^  File .*train_gpt2.py", lines, re.MULTILINE)
