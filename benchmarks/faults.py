"""What a run survives: kills at random instants, signals, a full disk, damaged files, NaN, a rival.

    python benchmarks/faults.py [--kills 30]

A tiny GPT-2 trains in processes of its own, is hurt, and goes on with the same command. A fault is
survived when the finished run's losses, norms and samples are those of an undisturbed run to the
bit, or, where going on would not be exact, when the command refuses with a line and leaves the run
as it was. Steps lost are those computed again; bytes lost are those of checkpoints that were
complete and can no longer be read.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cli
from checkpoint import checkpoints, load_progress, load_state, read_metrics
from model import GPT

MAX_STEPS = 120
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
KEYS = ("step", "train_loss", "val_loss", "grad_norm", "samples")
POISON = """
import sys; sys.path.insert(0, {root!r})
import math, cli, train_gpt2
from step import TrainingStep
step = TrainingStep.__call__
def poisoned(self, number):
    if {first} <= number < {last}:
        hook = self.model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.nan)
        result = step(self, number)
        hook.remove()
        return result
    return step(self, number)
TrainingStep.__call__ = poisoned
cli.run(train_gpt2.main, train_gpt2.PretrainConfig, "")
"""


@dataclass(frozen=True)
class FaultsConfig:
    kills: int = 30
    """kill -9 at so many random instants"""
    seed: int = 0
    """of the instants"""


@dataclass
class Row:
    fault: str
    tried: int = 0
    survived: int = 0
    steps_lost: int = 0
    bytes_lost: int = 0
    notes: list[str] = field(default_factory=list)


class Bench:
    """A folder with data, an undisturbed run to compare with, and copies of it to be hurt."""

    def __init__(self, folder: Path, config: FaultsConfig):
        self.folder, self.config, self.rng = folder, config, random.Random(config.seed)
        (folder / "text.txt").write_text(Path(__file__).read_text() * 4)
        (folder / "tiny.yaml").write_text(TINY)
        command = [sys.executable, str(ROOT / "fineweb.py"), "--dataset", "text.txt"]
        subprocess.run([*command, "--val_tokens", "500"], cwd=folder, check=True)
        self.finish("whole")
        self.curve = self.logged("whole")

    def command(self, name: str, *args: object) -> list[str]:
        script = [sys.executable, str(ROOT / "train_gpt2.py"), "--config", "tiny.yaml"]
        return [*script, "--out_dir", f"runs/{name}", *map(str, args)]

    def start(self, name: str, *args: object) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(name, *args),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, name: str, *args: object) -> None:
        process = self.start(name, *args)
        out, err = process.communicate(timeout=600)
        if process.returncode != 0:
            raise RuntimeError(f"{name} did not finish:\n{out}\n{err}")

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def logged(self, name: str) -> list[tuple]:
        return [tuple(r.get(key) for key in KEYS) for r in read_metrics(self.run(name))]

    def exact(self, name: str) -> bool:
        return self.logged(name) == self.curve

    def last_step(self, name: str) -> int:
        try:
            return max((r["step"] for r in read_metrics(self.run(name))), default=0)
        except FileNotFoundError:
            return 0

    def wait_for(self, name: str, step: int) -> None:
        while self.last_step(name) < step:
            time.sleep(0.002)

    def newest_step(self, name: str) -> int:
        found = checkpoints(self.run(name))
        return load_progress(found[-1])["step"] if found else 0

    def unreadable_bytes(self, name: str) -> int:
        lost = 0
        for folder in checkpoints(self.run(name)):
            try:
                GPT.from_pretrained(folder), load_state(folder)
            except (OSError, ValueError, RuntimeError):
                lost += sum(f.stat().st_size for f in folder.iterdir())
        return lost

    def copy_at(self, name: str, step: int) -> Path:
        """A run stopped by SIGTERM near `step`."""
        process = self.start(name)
        self.wait_for(name, step)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        return self.run(name)


def kills(bench: Bench, row: Row) -> None:
    """Each time: run for a random while beyond the next step, kill, look, and go on."""
    in_save, runs = 0, ["killed0"]
    for _ in range(bench.config.kills):
        name = runs[-1]
        process = bench.start(name)
        bench.wait_for(name, bench.last_step(name) + 1)
        time.sleep(bench.rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        in_save += any(bench.run(name).glob("checkpoints/*.tmp"))
        lost = bench.unreadable_bytes(name)
        same = bench.logged(name) == bench.curve[: bench.last_step(name) + 1]
        row.tried += 1
        row.survived += same and not lost
        row.bytes_lost += lost
        row.steps_lost += bench.last_step(name) - bench.newest_step(name)
        if bench.last_step(name) > MAX_STEPS - 50:  # near its end there is little left to hurt
            runs.append(f"killed{len(runs)}")
    for name in runs:
        bench.finish(name)
    exact = sum(map(bench.exact, runs))
    row.notes.append(f"{in_save} inside a save; {exact} of {len(runs)} runs exact in the end")
    row.survived -= row.tried * (exact < len(runs))


def stops(bench: Bench, row: Row, signum: signal.Signals) -> None:
    name = signum.name
    process = bench.start(name)
    bench.wait_for(name, 30)
    process.send_signal(signum)
    process.communicate(timeout=60)
    row.tried += 1
    row.steps_lost += bench.last_step(name) - bench.newest_step(name)
    row.bytes_lost += bench.unreadable_bytes(name)
    bench.finish(name)
    row.survived += process.returncode == 128 + signum and bench.exact(name)


def full_disk(bench: Bench, row: Row) -> None:
    """No file may grow beyond 8 MB, so that the save of the optimizer's 13 MB fails half-way."""
    bench.copy_at("full", 30)
    newest = bench.newest_step("full")
    process = bench.start("full")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
    _, err = process.communicate(timeout=120)
    row.tried += 1
    row.steps_lost += bench.last_step("full") - newest
    row.bytes_lost += bench.unreadable_bytes("full")
    told = process.returncode == 2 and "could not be saved" in err and "Traceback" not in err
    kept = bench.newest_step("full") == newest
    bench.finish("full")
    row.survived += told and kept and bench.exact("full")


def refused(
    bench: Bench,
    row: Row,
    name: str,
    hurt: Callable[[], object],
    mend: Callable[[], object],
    expected: str,
    *args: object,
) -> None:
    """The command refuses with a line that says `expected`; mended, the run goes on exactly."""
    bench.copy_at(name, 30)
    before = {f: f.read_bytes() for f in bench.run(name).rglob("*") if f.is_file()}
    hurt()
    process = bench.start(name, *args)
    _, err = process.communicate(timeout=60)
    mend()
    untouched = before == {f: f.read_bytes() for f in bench.run(name).rglob("*") if f.is_file()}
    row.tried += 1
    told = process.returncode == 2 and expected in err and err.count("\n") == 1
    bench.finish(name)
    row.survived += told and untouched and bench.exact(name)
    if not told:
        row.notes.append(f"said {err.strip()!r}")


def data_faults(bench: Bench, rows: dict[str, Row]) -> None:
    shard = bench.folder / "data" / "text" / "text_train_000000.npy"
    whole = shard.read_bytes()

    def mend() -> None:
        shard.write_bytes(whole)

    flipped = bytearray(whole)
    flipped[5000] ^= 1
    for fault, hurt, expected in (
        ("truncated shard", lambda: shard.write_bytes(whole[:-64]), "is truncated"),
        ("flipped bit in a shard", lambda: shard.write_bytes(flipped), "has changed since"),
        ("shard deleted between runs", shard.unlink, "is missing, manifest.json lists it"),
    ):
        refused(bench, rows[fault], fault.replace(" ", "_"), hurt, mend, expected)


def nothing() -> None:
    """There is nothing to hurt or to mend: the fault is in the arguments."""


def corrupt_checkpoint(bench: Bench, row: Row) -> None:
    for name, file in (("weights", "model.safetensors"), ("optimizer", "state.pt")):
        run = bench.copy_at(f"corrupt_{name}", 30)
        newest = checkpoints(run)[-1]
        (newest / file).write_bytes((newest / file).read_bytes()[:1000])
        row.tried += 1
        row.steps_lost += (
            load_progress(newest)["step"] - load_progress(checkpoints(run)[-2])["step"]
        )
        process = bench.start(f"corrupt_{name}")
        out, _ = process.communicate(timeout=120)
        row.survived += "going back to the one before" in out and bench.exact(f"corrupt_{name}")


def poisoned(bench: Bench, once: Row, often: Row) -> None:
    """NaN in the gradient of one step is skipped; in five in a row it ends the run, and from the
    last checkpoint the run goes on without the poison.
    """
    for row, name, first, last, code in (
        (once, "nan_once", 30, 31, 0),
        (often, "nan_often", 30, 99, 2),
    ):
        program = bench.folder / f"{name}.py"
        program.write_text(POISON.format(root=str(ROOT), first=first, last=last))
        command = [sys.executable, str(program), *bench.command(name)[2:]]
        result = subprocess.run(
            command, cwd=bench.folder, capture_output=True, text=True, check=False
        )
        skipped = [
            r["step"] for r in read_metrics(bench.run(name)) if r.get("grad_norm", 0) is None
        ]
        row.tried += 1
        row.bytes_lost += bench.unreadable_bytes(name)
        expected = list(range(first, min(last, first + 5)))
        row.survived += result.returncode == code and skipped == expected
        row.notes.append(f"steps skipped: {len(skipped)}")


def rival(bench: Bench, row: Row) -> None:
    process = bench.start("rival")
    bench.wait_for("rival", 10)
    second = bench.start("rival")
    _, err = second.communicate(timeout=60)
    process.communicate(timeout=600)
    row.tried += 1
    row.survived += second.returncode == 2 and "in use by another" in err and bench.exact("rival")


def main(config: FaultsConfig) -> None:
    names = (
        "kill -9 at a random instant", "SIGTERM", "Ctrl-C", "disk full during a save",
        "truncated shard", "flipped bit in a shard", "shard deleted between runs",
        "settings changed between runs", "checkpoint of another shape",
        "corrupt newest checkpoint", "NaN in one gradient", "NaN in all gradients",
        "a second process on the run",
    )  # fmt: skip
    rows = {name: Row(name) for name in names}
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    bench = Bench(folder, config)
    kills(bench, rows["kill -9 at a random instant"])
    stops(bench, rows["SIGTERM"], signal.SIGTERM)
    stops(bench, rows["Ctrl-C"], signal.SIGINT)
    full_disk(bench, rows["disk full during a save"])
    data_faults(bench, rows)
    changed = rows["settings changed between runs"]
    refused(bench, changed, "lr", nothing, nothing, "max_lr 0.01 then, 0.02 now", "--max_lr", 0.02)
    shape = rows["checkpoint of another shape"]
    refused(bench, shape, "shape", nothing, nothing, "n_layer 2 then, 3 now", "--n_layer", 3)
    corrupt_checkpoint(bench, rows["corrupt newest checkpoint"])
    poisoned(bench, rows["NaN in one gradient"], rows["NaN in all gradients"])
    rival(bench, rows["a second process on the run"])
    print(f"\n{'fault':<32}{'tried':>6}{'survived':>10}{'steps lost':>12}{'bytes lost':>12}  notes")
    for row in rows.values():
        print(
            f"{row.fault:<32}{row.tried:>6}{row.survived:>10}{row.steps_lost:>12}"
            f"{row.bytes_lost:>12}  {'; '.join(row.notes)}"
        )
    shutil.rmtree(folder)
    if any(row.survived < row.tried or row.bytes_lost for row in rows.values()):
        raise ValueError(f"not everything survived: {json.dumps([vars(r) for r in rows.values()])}")


if __name__ == "__main__":
    cli.run(main, FaultsConfig, __doc__)
