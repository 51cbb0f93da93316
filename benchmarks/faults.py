"""What a training run survives: kills at random moments, signals, a full disk, damaged files, NaN.

    python benchmarks/faults.py --kills 30   # 12 minutes

A tiny GPT-2 trains in processes of its own, is disturbed, and resumes with the same command. A
fault is survived if the finished run has the losses, norms and samples of an undisturbed run to the
bit; or, where resuming would not be exact, if the command refuses with one line and leaves the run
as it was. Steps lost are computed again; bytes lost are those of complete checkpoints that can no
longer be read. Linux only.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_gpt2
from benchmarks import harness
from engine.checkpoint import list_checkpoints, load_model, read_progress, read_state
from engine.config import flag, run_command
from engine.metrics import read_metrics
from engine.step import TrainingStep

MAX_STEPS, STOP_AT = 120, 30
TINY = f"""
data_dir: data/text
n_layer: 2
n_head: 2
n_embd: 32
block_size: 32
batch_size: 4
total_batch_size: 128
max_steps: {MAX_STEPS}
warmup_steps: 10
max_lr: 1.0e-2
min_lr: 1.0e-3
eval_every: 20
eval_tokens: 256
sample_every: 50
save_every: 4
device: cpu
"""
KEYS = ("step", "train_loss", "val_loss", "grad_norm", "samples")  # equal to the bit
MAX_FILE_BYTES = 8 << 20  # a checkpoint's optimizer state is larger


@dataclass(frozen=True)
class FaultsBenchmarkConfig:
    kills: int = flag(30, "times to kill -9 at a random moment")
    seed: int = flag(0, "of the moments")


@dataclass
class Row:
    tried: int = 0
    survived: int = 0
    steps_lost: int = 0
    bytes_lost: int = 0
    notes: list[str] = field(default_factory=list)


class Lab:
    """A folder with data, an undisturbed run, and runs that are disturbed."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, defaultdict[str, Row](Row)
        (folder / "text.txt").write_text(Path(__file__).read_text() * 4)
        (folder / "tiny.yaml").write_text(TINY)
        command = [sys.executable, str(harness.ROOT / "fineweb.py"), "--dataset", "text.txt"]
        subprocess.run([*command, "--val_tokens", "500"], cwd=folder, check=True)
        code, out, err = self.finish("undisturbed")
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}:\n{out}\n{err}")
        self.curve = self.read_curve("undisturbed")

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str, *args: object, program: str = "") -> subprocess.Popen:
        """Start or resume a run, with train_gpt2.py or a Python program."""
        script = ["-c", program] if program else [str(harness.ROOT / "train_gpt2.py")]
        flags = ["--config", "tiny.yaml", "--out_dir", f"runs/{name}", *map(str, args)]
        return subprocess.Popen(
            [sys.executable, *script, *flags],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, name: str, *args: object, **options: Any) -> tuple[int, str, str]:
        """Run to the end; return the exit code, stdout and stderr."""
        process = self.start(name, *args, **options)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def stop(self, name: str, signum: int, step: int = STOP_AT, delay: float = 0) -> int:
        """Start or resume a run and stop it `delay` seconds after a step; return the exit code."""
        process = self.start(name)
        while self.last_step(name) < step and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signum)
        process.communicate(timeout=60)
        return process.returncode

    def read_curve(self, name: str) -> list[tuple]:
        log = self.run(name) / "metrics.jsonl"
        records = read_metrics(self.run(name)) if log.exists() else []
        return [tuple(record.get(key) for key in KEYS) for record in records]

    def last_step(self, name: str) -> int:
        return max((record[0] for record in self.read_curve(name)), default=0)

    def saved_step(self, name: str) -> int:
        found = list_checkpoints(self.run(name))
        return read_progress(found[-1])["step"] if found else 0

    def is_exact(self, name: str) -> bool:
        """Finish the run, and compare it with the undisturbed one."""
        return self.finish(name)[0] == 0 and self.read_curve(name) == self.curve

    def unreadable_bytes(self, name: str) -> int:
        lost = 0
        for folder in list_checkpoints(self.run(name)):
            try:
                load_model(folder), read_state(folder)
            except (OSError, ValueError, RuntimeError):
                lost += sum(file.stat().st_size for file in folder.iterdir())
        return lost

    def read_files(self, name: str) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in self.run(name).rglob("*") if file.is_file()}

    def report(self, fault: str, survived: bool, *, steps: int = 0, lost: int = 0) -> None:
        row = self.rows[fault]
        row.tried += 1
        row.survived += survived
        row.steps_lost += steps
        row.bytes_lost += lost


def kill(lab: Lab, config: FaultsBenchmarkConfig) -> None:
    """Each time: run a random while beyond the next step, kill, check, and resume."""
    rng, names, in_save, fault = random.Random(config.seed), ["kill0"], 0, "kill -9"
    for _ in range(config.kills):
        name = names[-1]
        lab.stop(name, signal.SIGKILL, lab.last_step(name) + 1, delay=rng.uniform(0, 0.3))
        in_save += any(lab.run(name).glob("checkpoints/*.tmp"))
        last, lost = lab.last_step(name), lab.unreadable_bytes(name)
        is_same = lab.read_curve(name) == lab.curve[: last + 1]
        lab.report(fault, is_same and not lost, steps=last - lab.saved_step(name), lost=lost)
        if last > MAX_STEPS - 50:  # there is little left to disturb
            names.append(f"kill{len(names)}")
    exact = sum(map(lab.is_exact, names))
    lab.rows[fault].notes.append(f"{in_save} during a save; {exact} of {len(names)} runs exact")
    if exact < len(names):
        lab.rows[fault].survived = 0


def stop(lab: Lab, signum: signal.Signals) -> None:
    code = lab.stop(signum.name, signum)
    steps = lab.last_step(signum.name) - lab.saved_step(signum.name)
    lost = lab.unreadable_bytes(signum.name)
    is_survived = code == 128 + signum and lab.is_exact(signum.name)
    lab.report(signum.name, is_survived, steps=steps, lost=lost)


def fill_disk(lab: Lab, name: str = "disk full during a save") -> None:
    """Files may not grow beyond MAX_FILE_BYTES, so a save fails half-way."""
    lab.stop(name, signal.SIGTERM)
    saved, process = lab.saved_step(name), lab.start(name)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    _, err = process.communicate(timeout=120)
    is_reported = process.returncode == 2 and "could not be saved" in err
    is_reported &= "Traceback" not in err and lab.saved_step(name) == saved
    steps, lost = lab.last_step(name) - saved, lab.unreadable_bytes(name)
    lab.report(name, is_reported and lab.is_exact(name), steps=steps, lost=lost)


def refuse(
    lab: Lab, fault: str, expected: str, *args: object, damage: Callable[[], object] | None = None
) -> None:
    """The command refuses with one line that contains `expected`, and changes nothing. When the
    data is repaired, the run resumes exactly.
    """
    lab.stop(fault, signal.SIGTERM)
    before, shard = lab.read_files(fault), lab.folder / "data/text/text_train_000000.npy"
    content = shard.read_bytes()
    if damage:
        damage()
    code, _, err = lab.finish(fault, *args)
    shard.write_bytes(content)
    is_refused = code == 2 and expected in err and err.count("\n") == 1
    if not is_refused:
        lab.rows[fault].notes.append(f"printed {err.strip()!r}")
    is_untouched = before == lab.read_files(fault)
    lab.report(fault, is_refused and is_untouched and lab.is_exact(fault))


def damage_data(lab: Lab) -> None:
    shard = lab.folder / "data/text/text_train_000000.npy"
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[5000] ^= 1
    truncate = partial(shard.write_bytes, content[:-64])
    refuse(lab, "shard truncated", "is truncated", damage=truncate)
    flip = partial(shard.write_bytes, flipped)
    refuse(lab, "bit flipped in a shard", "has changed since", damage=flip)
    refuse(lab, "shard deleted", "is missing, manifest.json lists it", damage=shard.unlink)


def corrupt_checkpoint(lab: Lab, file: str, fault: str = "latest checkpoint corrupt") -> None:
    name = f"corrupt {file}"
    lab.stop(name, signal.SIGTERM)
    *_, earlier, latest = list_checkpoints(lab.run(name))
    (latest / file).write_bytes((latest / file).read_bytes()[:1000])
    steps = read_progress(latest)["step"] - read_progress(earlier)["step"]
    _, out, _ = lab.finish(name)
    lab.report(fault, "falling back to the one before" in out and lab.is_exact(name), steps=steps)


def poison(lab: Lab, fault: str, last: int, code: int) -> None:
    """A step with NaN in its gradients is skipped; five in a row end the run."""
    program = f"from benchmarks import faults; faults.train_poisoned({STOP_AT}, {last})"
    found, _, _ = lab.finish(fault, program=program)
    skipped = [r["step"] for r in read_metrics(lab.run(fault)) if r.get("grad_norm", 0) is None]
    expected = list(range(STOP_AT, min(last, STOP_AT + 5)))
    lost = lab.unreadable_bytes(fault)
    lab.report(fault, found == code and skipped == expected, lost=lost)
    lab.rows[fault].notes.append(f"{len(skipped)} steps skipped")


def train_poisoned(first: int, last: int) -> None:
    """train_gpt2.py with NaN in the gradients of steps `first` to `last` - 1."""

    class PoisonedStep(TrainingStep):
        def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            if not first <= step < last:
                return super().__call__(step)
            bias = self.model.transformer.ln_f.bias
            hook = bias.register_hook(lambda grad: grad * torch.nan)
            result = super().__call__(step)
            hook.remove()
            return result

    import engine.training

    engine.training.TrainingStep = PoisonedStep  # type: ignore[misc]
    run_command(train_gpt2.main, train_gpt2.PretrainConfig, "")


def compete(lab: Lab, name: str = "a second process on the run") -> None:
    process = lab.start(name)
    while lab.last_step(name) < 10:
        time.sleep(0.002)
    code, _, err = lab.finish(name)
    process.communicate(timeout=600)
    lab.report(name, code == 2 and "in use by another" in err and lab.is_exact(name))


def main(config: FaultsBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        lab = Lab(Path(folder))
        kill(lab, config)
        stop(lab, signal.SIGTERM)
        stop(lab, signal.SIGINT)
        fill_disk(lab)
        damage_data(lab)
        refuse(lab, "settings changed", "max_lr was 0.01, is 0.02", "--max_lr", 0.02)
        refuse(lab, "checkpoint of another shape", "n_layer was 2, is 3", "--n_layer", 3)
        for file in ("model.safetensors", "state.pt"):
            corrupt_checkpoint(lab, file)
        poison(lab, "NaN in one gradient", STOP_AT + 1, code=0)
        poison(lab, "NaN in all gradients", MAX_STEPS, code=2)
        compete(lab)
    columns = "tried", "survived", "steps computed again", "bytes lost", "notes"
    harness.print_header("fault", *columns)
    for fault, row in lab.rows.items():
        counts = row.tried, row.survived, row.steps_lost, row.bytes_lost
        harness.print_row(fault, *counts, "; ".join(row.notes))
    if any(row.survived < row.tried or row.bytes_lost for row in lab.rows.values()):
        raise ValueError("not every fault was survived")


if __name__ == "__main__":
    run_command(main, FaultsBenchmarkConfig, __doc__)
