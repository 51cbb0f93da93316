"""Several processes under torchrun, over the loopback interface with gloo."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    CPU,
    ONE_THREAD,
    ROOT,
    TINY,
    TORCHRUN,
    WORKERS,
    expect_error,
    run_script,
    wait_for_steps,
    worker_env,
)

from engine.checkpoint import list_checkpoints, read_state
from engine.config import TrainConfig
from engine.distributed import Distributed, has_bf16_units, resolve_device_settings
from engine.metrics import read_metrics
from model import GPT

SETTINGS = {
    **yaml.safe_load(TINY),
    "data_dir": "data/text",
    "batch_size": 1,
    "total_batch_size": 384,
    "max_steps": 20,
    "eval_every": 10,
    "eval_tokens": 500,
    "sample_every": 10,
    "save_every": 10,
}
# Else torchrun keeps the store, and a restarted rank may read addresses of killed ones from it:
# https://github.com/pytorch/pytorch/issues/135712
RESTARTABLE = {**ONE_THREAD, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with shards of a small text and the config of a tiny model."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(Path(__file__).read_text() * 4)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    result = run_script("fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def flags(name: str, *args: object) -> list[str]:
    return ["--config", "tiny.yaml", "--out_dir", f"runs/{name}", *map(str, args)]


def torchrun(n: int, script: Path, *args: object) -> list[str]:
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={n}", str(script), *map(str, args)]


def run_ranks(cwd: Path, n: int, script: Path, *args: object) -> subprocess.CompletedProcess:
    """Run a worker, which imports the project, or a command, which needs no PYTHONPATH."""
    return subprocess.run(
        torchrun(n, script, *args),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=worker_env() if script.parent == WORKERS else ONE_THREAD,
    )


def train_on_ranks(workplace: Path, n: int, name: str, *args: object) -> Path:
    """Start or resume a run on n ranks."""
    result = run_ranks(workplace, n, ROOT / "train_gpt2.py", *flags(name, *args))
    assert result.returncode == 0, result.stdout + result.stderr
    return workplace / "runs" / name


@pytest.fixture(scope="module")
def single(workplace) -> Path:
    """The run in one process, in micro-batches of another size."""
    result = run_script("train_gpt2.py", *flags("single", "--batch_size", 12), cwd=workplace)
    assert result.returncode == 0, result.stderr
    return workplace / "runs" / "single"


def read_values(run: Path, key: str = "train_loss") -> list:
    return [record[key] for record in read_metrics(run) if key in record]


def assert_same_curve(run: Path, single: Path) -> None:
    assert read_values(run, "step") == list(range(21))
    for key in ("train_loss", "val_loss", "val_bpb"):
        assert read_values(run, key) == pytest.approx(read_values(single, key), rel=1e-4)
    assert read_values(run, "samples") == read_values(single, "samples")


@pytest.mark.parametrize(
    ("n", "args"),
    [
        (2, ["--batch_size", 3]),
        (2, ["--parallel", "fsdp", "--recompute", "block"]),
        pytest.param(3, [], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(3, ["--parallel", "fsdp"], marks=pytest.mark.slow),
        pytest.param(2, ["--compile"], marks=pytest.mark.slow),
        pytest.param(2, ["--parallel", "fsdp", "--compile"], marks=pytest.mark.slow),
    ],
)
def test_the_curve_does_not_depend_on_ranks(workplace, single, n, args):
    """Training loss, validation loss and samples of 20 steps are those of one process on 2, 3 and
    4 ranks, with DDP and with FSDP2, recomputed or compiled.
    """
    name = f"ranks{n}{''.join(map(str, args))}".replace("--", "_")
    run = train_on_ranks(workplace, n, name, *args)
    assert_same_curve(run, single)
    weights = GPT.from_pretrained(list_checkpoints(run)[-1]).state_dict()
    expected = GPT.from_pretrained(list_checkpoints(single)[-1]).state_dict()
    for tensor_name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[tensor_name], atol=1e-3, rtol=1e-2)


def back_to_step_10(run: Path) -> None:
    """Leave a run as it was at step 10."""
    shutil.rmtree(run / "checkpoints" / "step_000020")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:11]))


@pytest.mark.slow
def test_a_run_moves_between_layouts(workplace, single):
    """A run stopped at step 10 on 2 ranks with FSDP resumes in one process and on 4 ranks along the
    same curve; the optimizer's state in the checkpoint is complete and by name.
    """
    source = train_on_ranks(workplace, 2, "moving", "--parallel", "fsdp", "--keep", 9)
    back_to_step_10(source)
    state = read_state(source / "checkpoints" / "step_000010")["optimizer"]["state"]
    assert state["transformer.wte.weight"]["exp_avg"].shape == (50304, 32)
    shutil.copytree(source, workplace / "runs" / "moved")
    assert_same_curve(train_on_ranks(workplace, 4, "moving"), single)
    result = run_script("train_gpt2.py", *flags("moved", "--batch_size", 6), cwd=workplace)
    assert "resuming from step 10" in result.stdout
    assert_same_curve(workplace / "runs" / "moved", single)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_normuon_resumes_to_the_bit(workplace, parallel):
    """On 2 ranks, a run with NorMuon resumed at step 10 ends with exactly the weights of the run
    that went on: its state is complete in the checkpoint, whether parameters are sharded or not.
    """
    args = ["--optimizer", "muon", "--muon_beta2", 0.95, "--parallel", parallel, "--keep", 9]
    run = train_on_ranks(workplace, 2, f"normuon_{parallel}", *args)
    expected = GPT.from_pretrained(list_checkpoints(run)[-1]).state_dict()
    back_to_step_10(run)
    train_on_ranks(workplace, 2, run.name, *args)
    weights = GPT.from_pretrained(list_checkpoints(run)[-1]).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_sizes_that_do_not_divide(workplace):
    """The error on several ranks names the nearest total_batch_size."""
    script_flags = flags("odd", "--batch_size", 5)
    result = run_ranks(workplace, 2, ROOT / "train_gpt2.py", *script_flags)
    assert result.returncode != 0
    assert "x 2 ranks = 320; batch_size 3 fits" in result.stderr


def test_a_device_name_must_exist():
    """An unknown device is refused with what is expected."""
    with pytest.raises(ValueError, match="device nonsense is not available: Expected one of cpu"):
        Distributed.start("nonsense")


def test_a_barrier_names_the_missing_ranks(tmp_path):
    """A rank that does not reach the barrier is named after the timeout."""
    result = run_ranks(tmp_path, 3, WORKERS / "late_rank.py")
    assert result.returncode != 0
    assert "Ranks 2 failed to pass monitoredBarrier" in result.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_snapshot_keeps_its_values(workplace, parallel):
    """Steps after a snapshot, which a save in the background may still be writing, do not change
    it: with Muon and AdamW, on replicated models and on sharded ones.
    """
    result = run_ranks(workplace, 2, WORKERS / "snapshot.py", parallel)
    assert result.returncode == 0, result.stderr


def find_ranks(agent: subprocess.Popen) -> list[int]:
    """The process ids of the ranks that a torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_is_restarted(workplace, single):
    """With two torchruns, as on two nodes, a rank killed by kill -9 is restarted by --max_restarts
    from the latest checkpoint, along the same curve.
    """
    rendezvous = ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29517", "--rdzv_id=test"]
    script = [str(ROOT / "train_gpt2.py"), *flags("nodes", "--save_every", 2)]
    agents = [
        subprocess.Popen(
            [
                *(*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}"),
                *(*rendezvous, "--max_restarts=3", *script),
            ],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=RESTARTABLE,
        )
        for node in range(2)
    ]
    run = workplace / "runs" / "nodes"
    try:
        wait_for_steps(run, 5)
        os.kill(find_ranks(agents[1])[0], signal.SIGKILL)
        outs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            for pid in find_ranks(agent) if agent.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert any("resuming from step" in out for out in outs), outs
    assert read_values(run, "step") == list(range(21))
    assert read_values(run) == pytest.approx(read_values(single), rel=1e-4)


def test_sigterm_to_all_ranks_saves(workplace, single):
    """SIGTERM to torchrun, as a cluster sends it, ends all ranks after the step with a checkpoint,
    and the same command resumes along the same curve.
    """
    agent = subprocess.Popen(
        torchrun(2, ROOT / "train_gpt2.py", *flags("sigterm")),
        cwd=workplace,
        stdout=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    run = workplace / "runs" / "sigterm"
    wait_for_steps(run, 3)
    agent.send_signal(signal.SIGTERM)
    out = agent.communicate(timeout=60)[0]
    assert "saved; the same command resumes" in out
    assert list_checkpoints(run)[-1].name == f"step_{read_metrics(run)[-1]['step']:06d}"
    assert_same_curve(train_on_ranks(workplace, 2, "sigterm"), single)


def test_two_processes_on_one_run_folder(workplace, single):
    """While one process holds the run folder, a second one is refused with the remedy."""
    holder = subprocess.Popen(
        [sys.executable, str(WORKERS / "hold_folder.py"), "runs/single"],
        cwd=workplace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=worker_env(),
    )
    assert holder.stdout.readline() == "held\n"
    args = flags("single", "--batch_size", 12)
    assert "is in use by another process" in expect_error("train_gpt2.py", *args, cwd=workplace)
    holder.kill()
    holder.wait()
    assert run_script("train_gpt2.py", *args, cwd=workplace).returncode == 0
    assert json.loads((single / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """A large tensor in the place of a freed one costs no page faults, and a line says so."""
    command = [sys.executable, str(WORKERS / "freed_memory.py")]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env=worker_env()
    ).stdout
    line, faults = out.splitlines()
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
    """A CPU trains in bf16 where it has units for it, else in fp32, and a line says so. A precision
    that is given stays.
    """
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
    wrong = flags("wrong", "--batch_size", 5)
    result = run_ranks(workplace, 2, ROOT / "train_gpt2.py", *wrong)
    lines = result.stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "batch_size 3 fits" in error
    assert any(line.strip() == f"traceback : {error}" for line in lines)
    assert not any("train_gpt2.py" in line and line.startswith("  File") for line in lines)
