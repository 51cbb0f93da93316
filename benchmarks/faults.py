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
KEYS = ("step", "train_loss", "val_loss", "grad_norm", "samples")  # of a log, bit for bit equal
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
        command = [sys.executable, *script, *FLAGS, "--out_dir", f"runs/{name}", *map(str, args)]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True, **options)

    def finish(self, name: str, *args: object, program: str = "") -> tuple[int, str, str]:
        """Start or resume a run; return its exit code, stdout and stderr at the end."""
        process = self.start(name, *args, program=program)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def start_until(self, name: str, step: int = STOP_AT) -> subprocess.Popen:
        """Start or resume a run, and wait until it has done a step."""
        process = self.start(name)
        while len(self.read_curve(name)) <= step:  # it begins with step 0
            if process.poll() is not None:
                raise ValueError(f"{name} ended early: {process.communicate()[1]}")
            time.sleep(0.002)
        return process

    def stop(self, name: str, signum: int = signal.SIGTERM) -> int:
        """Run until STOP_AT, and send a signal; return the exit code."""
        process = self.start_until(name)
        process.send_signal(signum)
        process.communicate(timeout=60)
        return process.returncode

    def checkpoints(self, name: str) -> list[Path]:
        return list_checkpoints(self.folder / "runs" / name)

    def read_curve(self, name: str) -> list[tuple]:
        run = self.folder / "runs" / name
        records = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        return [tuple(record.get(key) for key in KEYS) for record in records]

    def read_files(self, name: str) -> list[tuple[Path, bytes]]:
        files = sorted((self.folder / "runs" / name).rglob("*"))
        return [(file, file.read_bytes()) for file in files if file.is_file()]

    def count_lost(self, name: str) -> Counter:
        """Steps after the latest checkpoint, and bytes of unreadable checkpoints."""
        lost = Counter(steps=len(self.read_curve(name)) - 1)
        for folder in self.checkpoints(name):
            lost["steps"] = len(self.read_curve(name)) - 1 - read_progress(folder)["step"]
            try:
                load_model(folder), read_state(folder)
            except (OSError, ValueError, RuntimeError):
                lost["bytes"] += sum(file.stat().st_size for file in folder.iterdir())
        return lost

    def report(self, fault: str, name: str, is_handled: bool, lost: Counter | None = None) -> None:
        """Count a fault and what it lost; it is survived if the run can be finished exactly."""
        self.rows[fault] += self.count_lost(name) if lost is None else lost
        self.finish(name)
        is_exact = self.read_curve(name) == self.curve
        self.rows[fault] += Counter(tried=1, survived=is_handled and is_exact)

    def refuse(self, fault: str, expected: str, *args: object, shard: bytes | None = None) -> None:
        """With other flags, or with another shard (an empty one is deleted), the command refuses
        with one line that contains `expected` and changes nothing. With the shard as it was, the
        run resumes exactly.
        """
        self.stop(fault)
        before, content = self.read_files(fault), self.shard.read_bytes()
        self.shard.write_bytes(content if shard is None else shard)
        if shard == b"":
            self.shard.unlink()
        code, _, err = self.finish(fault, *args)
        self.shard.write_bytes(content)
        is_refused = code == 2 and expected in err and err.count("\n") == 1
        self.report(fault, fault, is_refused and before == self.read_files(fault))


def kill(lab: Lab, config: FaultsBenchmarkConfig, fault: str = "kill -9") -> None:
    """Each time: run for a random while beyond the next step, kill, check, and resume."""
    rng, names, row = random.Random(config.seed), ["kill0"], lab.rows[fault]
    for _ in range(config.kills):
        name = names[-1]
        process = lab.start_until(name, step=len(lab.read_curve(name)))
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        curve, lost = lab.read_curve(name), lab.count_lost(name)
        is_exact = curve == lab.curve[: len(curve)] and not lost["bytes"]
        is_in_save = any((lab.folder / "runs" / name).glob("checkpoints/*.tmp"))
        row.update(lost + Counter(tried=1, survived=is_exact, in_save=is_in_save))
        if len(curve) > MAX_STEPS - 50:  # there is little left to disturb
            names.append(f"kill{len(names)}")
    for name in names:
        lab.finish(name)
    row["survived"] *= all(lab.read_curve(name) == lab.curve for name in names)


def fill_disk(lab: Lab, fault: str = "disk full during a save") -> None:
    """Files may not grow beyond MAX_FILE_BYTES, so a save fails half-way."""
    lab.stop(fault)
    before, process = lab.checkpoints(fault), lab.start(fault)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    _, err = process.communicate(timeout=120)
    is_reported = process.returncode == 2 and "could not be saved" in err and "Trace" not in err
    lab.report(fault, fault, is_reported and before == lab.checkpoints(fault))


def corrupt_checkpoint(lab: Lab, file: str) -> None:
    name = f"corrupt {file}"
    lab.stop(name)
    *_, earlier, latest = lab.checkpoints(name)
    lost = read_progress(latest)["step"] - read_progress(earlier)["step"]
    (latest / file).write_bytes((latest / file).read_bytes()[:1000])
    is_reported = "falling back to the one before" in lab.finish(name)[1]
    lab.report("latest checkpoint corrupt", name, is_reported, Counter(steps=lost))


def poison(lab: Lab, fault: str, last: int, expected_code: int) -> None:
    """A step with NaN in its gradients is skipped; five in a row end the run."""
    program = f"from benchmarks import faults; faults.train_poisoned({STOP_AT}, {last})"
    code, _, _ = lab.finish(fault, program=program)
    skipped = [step for step, _, _, norm, _ in lab.read_curve(fault) if step and norm is None]
    is_handled = code == expected_code and skipped == list(range(STOP_AT, last))[:5]
    lost = Counter(bytes=lab.count_lost(fault)["bytes"])
    lab.rows[fault] += lost + Counter(tried=1, survived=is_handled)


def train_poisoned(first: int, last: int) -> None:
    """Run train_gpt2.py with NaN in the gradients of steps `first` to `last` - 1."""

    class PoisonedStep(TrainingStep):
        def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            factor = torch.nan if first <= step < last else 1.0
            bias = self.model.transformer.ln_f.bias
            hook = bias.register_hook(lambda grad: grad * factor)
            result = super().__call__(step)
            hook.remove()
            return result

    engine.training.TrainingStep = PoisonedStep  # type: ignore[misc]
    run_command(train_gpt2.main, train_gpt2.PretrainConfig, "")


def compete(lab: Lab, fault: str = "a second process on the run") -> None:
    process = lab.start_until(fault, step=10)
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
        content = lab.shard.read_bytes()
        flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
        lab.refuse("shard truncated", "is truncated", shard=content[:-64])
        lab.refuse("bit of a shard flipped", "has changed since", shard=flipped)
        lab.refuse("shard deleted", "is missing, manifest.json lists it", shard=b"")
        lab.refuse("settings changed", "max_lr was 0.01, is 0.02", "--max_lr", 0.02)
        lab.refuse("checkpoint of another shape", "n_layer was 2, is 3", "--n_layer", 3)
        corrupt_checkpoint(lab, "model.safetensors")
        corrupt_checkpoint(lab, "state.pt")
        poison(lab, "NaN in one gradient", STOP_AT + 1, expected_code=0)
        poison(lab, "NaN in all gradients", MAX_STEPS, expected_code=2)
        compete(lab)
    figures = "tried", "survived", "steps", "bytes", "in_save"
    rows = [[fault, *(int(row[f]) for f in figures)] for fault, row in lab.rows.items()]
    columns = "tried", "survived", "steps computed again", "bytes lost", "in a save"
    harness.print_table(["fault", *columns], rows)
    if any(row["survived"] < row["tried"] or row["bytes"] for row in lab.rows.values()):
        raise ValueError("not every fault was survived")


if __name__ == "__main__":
    run_command(main, FaultsBenchmarkConfig, __doc__)
