"""Several processes under torchrun, on loopback with gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_commands import ROOT, fails, run

from checkpoint import checkpoints, load_state, read_metrics
from model import GPT

TINY = """
data_dir: data/text
n_layer: 2
n_head: 2
n_embd: 32
block_size: 32
batch_size: 1
total_batch_size: 384
max_steps: 20
warmup_steps: 4
max_lr: 1.0e-2
min_lr: 1.0e-3
eval_every: 10
eval_tokens: 500
sample_every: 10
save_every: 10
device: cpu
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(Path(__file__).read_text() * 4)
    (folder / "tiny.yaml").write_text(TINY)
    result = run("fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def training(name: str, *args: object) -> list[str]:
    script = [str(ROOT / "train_gpt2.py"), "--config", "tiny.yaml", "--out_dir", f"runs/{name}"]
    return [*script, *map(str, args)]


def ranks(workplace: Path, n: int, name: str, *args: object) -> Path:
    """Train on n ranks, from the start or from where the run is."""
    command = [*TORCHRUN, "--standalone", f"--nproc_per_node={n}", *training(name, *args)]
    result = subprocess.run(
        command, cwd=workplace, capture_output=True, text=True, timeout=120, env=ENV
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return workplace / "runs" / name


@pytest.fixture(scope="module")
def single(workplace) -> Path:
    result = run("train_gpt2.py", *training("single", "--batch_size", 12)[1:], cwd=workplace)
    assert result.returncode == 0, result.stderr
    return workplace / "runs" / "single"


def losses(folder: Path, key: str = "train_loss") -> list[float]:
    return [r[key] for r in read_metrics(folder) if key in r]


def assert_same_curve(folder: Path, single: Path) -> None:
    records = read_metrics(folder)
    assert [r["step"] for r in records] == list(range(21))
    for key in ("train_loss", "val_loss"):
        assert losses(folder, key) == pytest.approx(losses(single, key), rel=1e-4)
    assert losses(folder, "samples") == losses(single, "samples")


@pytest.mark.parametrize(
    ("n", "args"),
    [
        (2, ["--batch_size", 3]),
        (2, ["--parallel", "fsdp", "--recompute", "block"]),
        pytest.param(3, [], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(3, ["--parallel", "fsdp"], marks=pytest.mark.slow),
    ],
)
def test_the_curve_does_not_depend_on_ranks(workplace, single, n, args):
    """Training loss, validation loss and samples of 20 steps are those of one process, on 2, 3 and
    4 ranks, with whole models (DDP) and sharded ones (FSDP2), recomputation included.
    """
    folder = ranks(workplace, n, f"ranks{n}{''.join(map(str, args))}".replace("--", "_"), *args)
    assert_same_curve(folder, single)
    weights = GPT.from_pretrained(checkpoints(folder)[-1]).state_dict()
    expected = GPT.from_pretrained(checkpoints(single)[-1]).state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_a_run_moves_between_layouts(workplace, single):
    """Stopped at step 10 on 2 sharded ranks, a run goes on on one process, and on 4 ranks, along
    the same curve; the optimizer's state is whole and by name.
    """
    source = ranks(workplace, 2, "moving", "--parallel", "fsdp", "--keep", 9)
    shutil.rmtree(source / "checkpoints" / "step_000020")
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (source / "metrics.jsonl").write_text("".join(lines[:11]))
    state = load_state(source / "checkpoints" / "step_000010")["optimizer"]["state"]
    assert state["transformer.wte.weight"]["exp_avg"].shape == (50304, 32)
    shutil.copytree(source, workplace / "runs" / "moved")
    assert_same_curve(ranks(workplace, 4, "moving"), single)
    args = training("moved", "--batch_size", 6)
    result = run("train_gpt2.py", *args[1:], cwd=workplace)
    assert "going on from step 10" in result.stdout
    assert_same_curve(workplace / "runs" / "moved", single)


def test_sizes_that_do_not_divide(workplace):
    """The error on several ranks names the nearest total_batch_size."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *training("odd", "--batch_size", 5)]
    result = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=ENV)
    assert result.returncode != 0
    assert "x 2 ranks = 320; the nearest are 320 or 640" in result.stderr


def test_a_barrier_says_who_is_missing(tmp_path):
    """A rank that does not come to the barrier is named after the time-out."""
    (tmp_path / "missing.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import time; from datetime import timedelta\n"
        "from runtime import Distributed\n"
        "dist = Distributed.start('cpu')\n"
        "time.sleep(8) if dist.rank == 2 else dist.barrier(timedelta(seconds=2))\n"
    )
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=3", "missing.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert result.returncode != 0
    assert "Ranks 2 failed to pass monitoredBarrier" in result.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_snapshot_stays_as_it_was(workplace, parallel):
    """What a save in the background writes is not what the steps after it make of the state, with
    Muon and AdamW, on whole models and on sharded ones.
    """
    (workplace / "snapshot.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import copy, torch\n"
        "from data import PretrainingData, TokenShards\n"
        "from model import GPT, GPTConfig\n"
        "from runtime import Distributed\n"
        "from step import TrainingStep\n"
        "from train_gpt2 import PretrainConfig\n"
        "dist = Distributed.start('cpu')\n"
        "model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16))\n"
        "how = {'optimizer': 'muon', 'precision': 'fp32', 'compile': False}\n"
        "config = PretrainConfig(parallel=sys.argv[1], **how)\n"
        "shards = TokenShards('data/text', 'train')\n"
        "data = PretrainingData(shards, 32, 1, 64, 0, dist.rank, dist.world_size)\n"
        "step = TrainingStep(model, data, config, dist)\n"
        "step(1)\n"
        "params, state = step.snapshot()\n"
        "held = params, state['optimizer'].get('state', {})\n"
        "was = copy.deepcopy(held)\n"
        "step(2)\n"
        "if dist.is_main:\n"
        "    assert len(params) == len(was[1]) == 16, (len(params), len(was[1]))\n"
        "    torch.testing.assert_close(held, was, rtol=0, atol=0)\n"
        "dist.barrier()\n"
        "dist.stop()\n"
    )
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "snapshot.py", parallel]
    result = subprocess.run(
        command, cwd=workplace, capture_output=True, text=True, env=ENV, timeout=120
    )
    assert result.returncode == 0, result.stderr


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = folder / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") > steps:
            return
        time.sleep(0.01)
    pytest.fail(f"{folder} did not get to step {steps}")


def workers(agent: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_comes_back_by_itself(workplace, single):
    """Two agents as on two nodes: a worker killed by kill -9 in mid-run is started again by
    torchrun --max_restarts, from the last checkpoint, along the same curve.
    """
    agents = [
        subprocess.Popen(
            [
                *(*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}"),
                *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29517", "--rdzv_id=test"),
                *("--max_restarts=3", *training("nodes", "--save_every", 2)),
            ],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENV,
        )
        for node in range(2)
    ]
    folder = workplace / "runs" / "nodes"
    try:
        wait_for_steps(folder, 5)
        os.kill(workers(agents[1])[0], signal.SIGKILL)
        outs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert any("going on from step" in out for out in outs), outs
    records = read_metrics(folder)
    assert [r["step"] for r in records] == list(range(21))
    assert losses(folder) == pytest.approx(losses(single), rel=1e-4)


def test_sigterm_to_all_ranks_saves(workplace, single):
    """SIGTERM to torchrun, as a cluster sends it, ends all ranks after the step with a checkpoint,
    and the run goes on to the same curve.
    """
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *training("sigterm")]
    agent = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, text=True, env=ENV)
    folder = workplace / "runs" / "sigterm"
    wait_for_steps(folder, 3)
    agent.send_signal(signal.SIGTERM)
    out = agent.communicate(timeout=60)[0]
    assert "saved; the same command goes on" in out
    assert checkpoints(folder)[-1].name == f"step_{read_metrics(folder)[-1]['step']:06d}"
    assert_same_curve(ranks(workplace, 2, "sigterm"), single)


def test_two_processes_on_one_run_folder(workplace, single):
    """While a process holds the run folder a second one is refused, with the remedy."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from checkpoint import lock_run\n"
        "with lock_run(Path('runs/single')):\n  print('held', flush=True); input()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=workplace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    args = training("single", "--batch_size", 12)[1:]
    assert "is in use by another process" in fails("train_gpt2.py", *args, cwd=workplace)
    holder.kill()
    holder.wait()
    assert run("train_gpt2.py", *args, cwd=workplace).returncode == 0
    assert json.loads((single / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
