"""What a training run survives: kills at random moments, signals, a full disk, damaged files, NaN.

    python benchmarks/faults.py --kills 30   # 20 minutes, Linux only

For each fault, we train a tiny GPT-2, stop it with a signal, resume it with the fault, and run the
same command again until training ends. The run survives if its losses, gradient norms and samples
equal those of an undisturbed run bit for bit (up to the first NaN). If an exact resume is
impossible, the command must print a one-line error and leave the files of the run unchanged.
"""

import os
import random
import resource
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess, Popen, run
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine.training
import train_gpt2
from benchmarks import harness
from engine.checkpoint import list_checkpoints
from engine.config import flag, run_command
from engine.files import lock_folder
from engine.metrics import read_metrics
from engine.step import TrainingStep

MAX_STEPS, STOP_AT, NAN_AT = 120, 30, 100
FLAGS = (
    f"--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_size 128 "
    f"--max_steps {MAX_STEPS} --warmup_steps 10 --max_lr 1e-2 --min_lr 1e-3 --eval_every 20 "
    "--eval_tokens 256 --sample_every 50 --save_every 4 --device cpu"
)
COMPARED = ("step", "train_loss", "val_loss", "grad_norm", "samples")  # keys of the log's records
EXIT_CODES = {"KILL": -9, "TERM": 143, "INT": 130}  # the exit code of a run that this signal stops
MAX_FILE_BYTES = 8 << 20  # smaller than the optimizer state of a checkpoint


@dataclass(frozen=True)
class FaultsBenchmarkConfig:
    kills: int = flag(30, "times to kill -9 at a random moment")


class Fault(NamedTuple):
    name: str
    exit_code: int  # expected from the command that resumes with the fault
    message: str  # expected in its output
    resume: Callable[[Path], CompletedProcess]  # resumes the stopped run, with the fault
    stop_signal: str = "TERM"  # stops the first command
    n_exact: int = MAX_STEPS + 1  # number of log records that must equal the undisturbed run


def run_training(folder: Path, flags: str = "", train_args: str = "") -> CompletedProcess:
    """Start or resume a run. `train_args` are arguments of `train`, as Python source code."""
    program = f"from benchmarks import faults; faults.train({train_args})"
    paths = ["--data_dir", str(folder.parent / "data"), "--out_dir", str(folder)]
    command = [sys.executable, "-c", program, *paths, *FLAGS.split(), *flags.split()]
    return run(command, cwd=harness.ROOT, capture_output=True, text=True, check=False)


def train(stop_signal: str = "", poisoned: Collection[int] = (), max_bytes: int = -1) -> None:
    """Run train_gpt2.py with a signal at a random moment after STOP_AT, with NaN gradients in the
    `poisoned` steps, or with files of at most `max_bytes`, so that a save fails as on a full disk.
    """

    class FaultyStep(TrainingStep):
        def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if step == STOP_AT and stop_signal:
                kill = f"sleep {random.uniform(0, 0.3)}; kill -{stop_signal} {os.getpid()}"
                Popen(["/bin/sh", "-c", kill])
            factor = torch.nan if step in poisoned else 1.0
            with self.model.transformer.ln_f.bias.register_hook(lambda grad: grad * factor):
                return super().__call__(step)

    if stop_signal or poisoned:
        engine.training.TrainingStep = FaultyStep  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))  # -1: unlimited
    run_command(train_gpt2.main, train_gpt2.PretrainConfig, "")


def change_shard(change: Callable[[bytes], bytes], folder: Path) -> CompletedProcess:
    """Resume with a changed shard, or without it if `change` returns b"". Then restore it."""
    shard = folder.parent / "data" / "data_train_000000.npy"
    content = shard.read_bytes()
    shard.unlink()
    if changed := change(content):
        shard.write_bytes(changed)
    resumed = run_training(folder)
    shard.write_bytes(content)
    return resumed


def cut_file(name: str, folder: Path) -> CompletedProcess:
    """Truncate a file of the latest checkpoint, then resume."""
    file = list_checkpoints(folder)[-1] / name
    file.write_bytes(file.read_bytes()[:1000])
    return run_training(folder)


def resume_locked(folder: Path) -> CompletedProcess:
    """Resume while this process holds the lock of the run."""
    with lock_folder(folder):
        return run_training(folder)


def read_files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_curve(folder: Path) -> list[list]:
    return [[record.get(key) for key in COMPARED] for record in read_metrics(folder)]


def flip_bit(shard: bytes) -> bytes:
    return shard[:-1] + bytes([shard[-1] ^ 1])


RESUMES, FALLS_BACK = "resuming from step", "falling back to the one before"  # messages
full_disk = partial(run_training, train_args=f"max_bytes={MAX_FILE_BYTES}")
one_nan = partial(run_training, train_args=f"poisoned=[{NAN_AT}]")
nans = partial(run_training, train_args=f"poisoned=range({NAN_AT}, {MAX_STEPS})")
KILL = Fault("kill -9", 0, RESUMES, run_training, "KILL")
FAULTS = [
    Fault("SIGTERM", 0, RESUMES, run_training),
    Fault("Ctrl-C", 0, RESUMES, run_training, "INT"),
    Fault("disk full during a save", 2, "could not be saved", full_disk),
    Fault("model.safetensors cut short", 0, FALLS_BACK, partial(cut_file, "model.safetensors")),
    Fault("state.pt cut short", 0, FALLS_BACK, partial(cut_file, "state.pt")),
    Fault("NaN gradients in one step", 0, f"step {NAN_AT} skipped", one_nan, n_exact=NAN_AT),
    Fault("NaN gradients in many steps", 2, "not finite in 5 consecutive", nans, n_exact=NAN_AT),
]
REFUSED = [  # faults that must give a one-line error and leave all files unchanged
    Fault("a second process on the run", 2, "in use by another", resume_locked),
    Fault("shard truncated", 2, "is truncated", partial(change_shard, lambda shard: shard[:-64])),
    Fault("bit of a shard flipped", 2, "has changed since", partial(change_shard, flip_bit)),
    Fault("shard deleted", 2, "No such file", partial(change_shard, lambda _: b"")),
    Fault("settings changed", 2, "was 0.01, is 0.02", partial(run_training, flags="--max_lr 0.02")),
    Fault("model of another shape", 2, "was 2, is 3", partial(run_training, flags="--n_layer 3")),
]


def try_fault(fault: Fault, folder: Path, curve: list) -> Counter:
    """Stop a new run, resume it with the fault, finish it, and compare it with the exact curve."""
    stopped = run_training(folder, train_args=f"stop_signal={fault.stop_signal!r}")
    was_saving = any(folder.glob("checkpoints/*.tmp"))  # left by a save that was interrupted
    before = read_files(folder)
    resumed = fault.resume(folder)
    after, finished = read_files(folder), run_training(folder)
    checks = [
        stopped.returncode == EXIT_CODES[fault.stop_signal],
        resumed.returncode == fault.exit_code,
        fault.message in resumed.stdout + resumed.stderr,
        FALLS_BACK not in finished.stdout,  # the fault left no damaged checkpoint
        read_curve(folder)[: fault.n_exact] == curve[: fault.n_exact],
    ]
    if fault in REFUSED:
        checks += [resumed.stderr.count("\n") == 1, after == before]
    return Counter(tried=1, survived=all(checks), in_save=was_saving)


def main(config: FaultsBenchmarkConfig) -> None:
    rows: dict[str, Counter] = defaultdict(Counter)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = Path(name)
        flags = ["--dataset", "engine/", "--val_tokens", "500", "--out_dir", str(folder / "data")]
        run([sys.executable, "fineweb.py", *flags], cwd=harness.ROOT, check=True)
        run_training(folder / "undisturbed")
        curve = read_curve(folder / "undisturbed")
        for i, fault in enumerate([KILL] * config.kills + FAULTS + REFUSED):
            rows[fault.name] += try_fault(fault, folder / f"run_{i}", curve)
    cells = [[fault, row["tried"], row["survived"], row["in_save"]] for fault, row in rows.items()]
    harness.print_table(["fault", "tried", "survived", "during a save"], cells)
    if any(row["survived"] < row["tried"] for row in rows.values()):
        raise ValueError("some faults were not survived, see the table")


if __name__ == "__main__":
    run_command(main, FaultsBenchmarkConfig, __doc__)
