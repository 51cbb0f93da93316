"""What a training run survives: kills at random moments, signals, a full disk, damaged files, NaN.

    python benchmarks/faults.py --kills 30   # 10 minutes, Linux only

A tiny GPT-2 trains in processes of its own, is disturbed, and resumes with the same command. A
fault is survived if the finished run has the losses, norms and samples of an undisturbed run to the
bit; or, where resuming would not be exact, if the command refuses with one line and changes nothing
in the run. Lost steps are computed again; lost bytes are those of complete checkpoints that can no
longer be read.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine.training
import train_gpt2
from benchmarks import harness
from engine.checkpoint import list_checkpoints, load_model, read_progress, read_state
from engine.config import flag, run_command
from engine.metrics import read_metrics
from engine.step import TrainingStep

MAX_STEPS, STOP_AT = 120, 30
FLAGS = (
    f"--data_dir data/text --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 "
    f"--total_batch_size 128 --max_steps {MAX_STEPS} --warmup_steps 10 --max_lr 1e-2 --min_lr 1e-3 "
    "--eval_every 20 --eval_tokens 256 --sample_every 50 --save_every 4 --device cpu"
).split()
KEYS = ("step", "train_loss", "val_loss", "grad_norm", "samples")  # of a log, equal to the bit
MAX_FILE_BYTES = 8 << 20  # less than a checkpoint's optimizer state


@dataclass(frozen=True)
class FaultsBenchmarkConfig:
    kills: int = flag(30, "times to kill -9 at a random moment")
    seed: int = flag(0, "of the moments")


class Lab:
    """A folder with data, an undisturbed run, and runs that are disturbed."""

    def __init__(self, folder: Path):
        self.folder, self.shard = folder, folder / "data/text/text_train_000000.npy"
        self.rows: dict[str, Counter] = defaultdict(Counter)  # figures by fault
        (folder / "text.txt").write_text(Path(engine.training.__file__).read_text() * 4)
        command = [sys.executable, str(harness.ROOT / "fineweb.py"), "--dataset", "text.txt"]
        subprocess.run([*command, "--val_tokens", "500"], cwd=folder, check=True)
        self.finish("undisturbed")
        self.curve = self.read_curve("undisturbed")

    def start(self, name: str, *args: object, program: str = "") -> subprocess.Popen:
        """Start or resume a run, with train_gpt2.py or a Python program."""
        script = ["-c", program] if program else [str(harness.ROOT / "train_gpt2.py")]
        return subprocess.Popen(
            [sys.executable, *script, *FLAGS, "--out_dir", f"runs/{name}", *map(str, args)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, name: str, *args: object, program: str = "") -> tuple[int, str, str]:
        """Start or resume a run; return its exit code, stdout and stderr at the end."""
        process = self.start(name, *args, program=program)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def stop(self, name: str, signum: int = signal.SIGTERM, step: int = STOP_AT) -> int:
        """Start or resume a run, and send it a signal at a step; return its exit code."""
        process = self.start(name)
        self.wait_for(name, step)
        process.send_signal(signum)
        process.communicate(timeout=60)
        return process.returncode

    def wait_for(self, name: str, step: int, delay: float = 0) -> None:
        while self.last_step(name) < step:
            time.sleep(0.002)
        time.sleep(delay)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def read_files(self, name: str) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.run(name).rglob("*") if file.is_file()}

    def read_curve(self, name: str) -> list[tuple]:
        has_log = (self.run(name) / "metrics.jsonl").exists()
        records = read_metrics(self.run(name)) if has_log else []
        return [tuple(record.get(key) for key in KEYS) for record in records]

    def last_step(self, name: str) -> int:
        return max((record[0] for record in self.read_curve(name)), default=0)

    def count_lost(self, name: str) -> Counter:
        """Steps after the latest checkpoint, and bytes of unreadable checkpoints."""
        lost, saved = 0, 0
        for folder in list_checkpoints(self.run(name)):
            saved = read_progress(folder)["step"]
            try:
                load_model(folder), read_state(folder)
            except (OSError, ValueError, RuntimeError):
                lost += sum(file.stat().st_size for file in folder.iterdir())
        return Counter(steps=self.last_step(name) - saved, bytes=lost)

    def report(self, fault: str, name: str, is_handled: bool, lost: Counter | None = None) -> None:
        """Count a fault, and what was `lost`: a disturbed run, which is finished now."""
        self.rows[fault] += self.count_lost(name) if lost is None else lost
        self.finish(name)
        self.rows[fault] += Counter(tried=1, survived=is_handled and self.is_exact(name))

    def is_exact(self, name: str) -> bool:
        return self.read_curve(name) == self.curve


def kill(lab: Lab, config: FaultsBenchmarkConfig, fault: str = "kill -9") -> None:
    """Each time: run for a random while beyond the next step, kill, check, and resume."""
    rng, names, row = random.Random(config.seed), ["kill0"], lab.rows[fault]
    for _ in range(config.kills):
        name = names[-1]
        process = lab.start(name)
        lab.wait_for(name, lab.last_step(name) + 1, delay=rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        row["during a save"] += any(lab.run(name).glob("checkpoints/*.tmp"))
        curve, lost = lab.read_curve(name), lab.count_lost(name)
        is_exact = curve == lab.curve[: len(curve)] and not lost["bytes"]
        row.update(lost + Counter(tried=1, survived=is_exact))
        if lab.last_step(name) > MAX_STEPS - 50:  # there is little left to disturb
            names.append(f"kill{len(names)}")
    for name in names:
        lab.finish(name)
    if not all(map(lab.is_exact, names)):
        row["survived"] = 0


def refuse(
    lab: Lab, fault: str, expected: str, *args: object, damage: Callable[[], Any] | None = None
) -> None:
    """The command refuses with one line that contains `expected` and changes nothing. With the
    shard as it was, the run resumes exactly.
    """
    lab.stop(fault)
    before, content = lab.read_files(fault), lab.shard.read_bytes()
    if damage:
        damage()
    code, _, err = lab.finish(fault, *args)
    lab.shard.write_bytes(content)
    is_refused = code == 2 and expected in err and err.count("\n") == 1
    lab.report(fault, fault, is_refused and before == lab.read_files(fault))


def damage_shard(lab: Lab) -> None:
    content = lab.shard.read_bytes()
    flipped = bytearray(content)
    flipped[5000] ^= 1
    for fault, expected, damage in (
        ("shard truncated", "is truncated", lambda: lab.shard.write_bytes(content[:-64])),
        ("bit of a shard flipped", "has changed since", lambda: lab.shard.write_bytes(flipped)),
        ("shard deleted", "is missing, manifest.json lists it", lab.shard.unlink),
    ):
        refuse(lab, fault, expected, damage=damage)


def fill_disk(lab: Lab, fault: str = "disk full during a save") -> None:
    """Files may not grow beyond MAX_FILE_BYTES, so a save fails half-way."""
    lab.stop(fault)
    before, process = list_checkpoints(lab.run(fault)), lab.start(fault)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    _, err = process.communicate(timeout=120)
    is_reported = process.returncode == 2 and "could not be saved" in err and err.count("\n") == 1
    lab.report(fault, fault, is_reported and before == list_checkpoints(lab.run(fault)))


def corrupt_checkpoint(lab: Lab, file: str) -> None:
    name = f"corrupt {file}"
    lab.stop(name)
    *_, earlier, latest = list_checkpoints(lab.run(name))
    lost = read_progress(latest)["step"] - read_progress(earlier)["step"]
    (latest / file).write_bytes((latest / file).read_bytes()[:1000])
    is_reported = "falling back to the one before" in lab.finish(name)[1]
    lab.report("latest checkpoint corrupt", name, is_reported, Counter(steps=lost))


def poison(lab: Lab, fault: str, last: int, expected_code: int) -> None:
    """A step with NaN in its gradients is skipped; five in a row end the run."""
    program = f"from benchmarks import faults; faults.train_poisoned({STOP_AT}, {last})"
    code, _, _ = lab.finish(fault, program=program)
    skipped = [r["step"] for r in read_metrics(lab.run(fault)) if r.get("grad_norm", 0) is None]
    is_skipped = skipped == list(range(STOP_AT, min(last, STOP_AT + 5)))
    lab.rows[fault] += Counter(tried=1, survived=code == expected_code and is_skipped)
    lab.rows[fault]["bytes"] += lab.count_lost(fault)["bytes"]


def train_poisoned(first: int, last: int) -> None:
    """Run train_gpt2.py with NaN in the gradients of steps `first` to `last` - 1."""

    class PoisonedStep(TrainingStep):
        def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if not first <= step < last:
                return super().__call__(step)
            bias = self.model.transformer.ln_f.bias
            hook = bias.register_hook(lambda grad: grad * torch.nan)
            result = super().__call__(step)
            hook.remove()
            return result

    engine.training.TrainingStep = PoisonedStep  # type: ignore[misc]
    run_command(train_gpt2.main, train_gpt2.PretrainConfig, "")


def compete(lab: Lab, fault: str = "a second process on the run") -> None:
    process = lab.start(fault)
    lab.wait_for(fault, 10)
    code, _, err = lab.finish(fault)
    process.communicate(timeout=600)
    lab.report(fault, fault, code == 2 and "in use by another" in err)


def main(config: FaultsBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        lab = Lab(Path(folder))
        kill(lab, config)
        for signum in (signal.SIGTERM, signal.SIGINT):
            code = lab.stop(signum.name, signum)
            lab.report(signum.name, signum.name, code == 128 + signum)
        fill_disk(lab)
        damage_shard(lab)
        refuse(lab, "settings changed", "max_lr was 0.01, is 0.02", "--max_lr", 0.02)
        refuse(lab, "checkpoint of another shape", "n_layer was 2, is 3", "--n_layer", 3)
        corrupt_checkpoint(lab, "model.safetensors")
        corrupt_checkpoint(lab, "state.pt")
        poison(lab, "NaN in one gradient", STOP_AT + 1, expected_code=0)
        poison(lab, "NaN in all gradients", MAX_STEPS, expected_code=2)
        compete(lab)
    names = "tried", "survived", "steps", "bytes", "during a save"
    harness.print_header(
        "fault", "tried", "survived", "steps computed again", "bytes lost", names[4]
    )
    for fault, row in lab.rows.items():
        harness.print_row(fault, *(row[name] for name in names))
    if any(row["survived"] < row["tried"] or row["bytes"] for row in lab.rows.values()):
        raise ValueError("not every fault was survived")


if __name__ == "__main__":
    run_command(main, FaultsBenchmarkConfig, __doc__)
