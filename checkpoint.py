"""The run folder on disk: checkpoints that are there whole or not at all, and how to load a model.

RUN/config.yaml                    what the run was started with
RUN/metrics.jsonl, loss.png        its history
RUN/checkpoints/step_000500/       a Hugging Face model and tokenizer, and beside them
    progress.json, state.pt        step and losses; optimizer and random number generators
"""

import json
import os
import shutil
from pathlib import Path

import torch
import yaml

from model import GPT
from tokenizer import save_tokenizer

# What may change when a run goes on, because its curve does not depend on it (batch_size only
# moves the order of floating-point sums).
FREE_TO_CHANGE = {
    "out_dir",
    "resume",
    "device",
    "compile",
    "batch_size",
    "keep",
    "eval_every",
    "sample_every",
    "save_every",
}


def checkpoints(run: Path | str) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted(p for p in Path(run).glob("checkpoints/step_*") if p.suffix != ".tmp")


def load_model(name_or_path: str | Path) -> GPT:
    """The model of a hub name, a Hugging Face folder, a checkpoint, or a run (its newest one)."""
    return GPT.from_pretrained((checkpoints(name_or_path) or [name_or_path])[-1])


def save_checkpoint(run: Path, model: GPT, progress: dict, state: dict, keep: int) -> Path:
    """Write the checkpoint of progress["step"], then delete all but the newest `keep` and the best.

    The folder takes its name only when all of it is on the disk, so any crash leaves the earlier
    checkpoints and never half a one.
    """
    folder = run / "checkpoints" / f"step_{progress['step']:06d}"
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted save has left
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    save_tokenizer(temporary)
    torch.save(state, temporary / "state.pt")
    (temporary / "progress.json").write_text(json.dumps(progress) + "\n")
    for file in temporary.iterdir():
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    _fsync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _fsync_folder(folder.parent)
    kept = {best_checkpoint(run), *checkpoints(run)[-keep:]}
    for old in set(checkpoints(run)) - kept:
        shutil.rmtree(old)
    return folder


def _fsync_folder(folder: Path) -> None:
    """Make new names in the folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_progress(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "progress.json").read_text())


def load_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` got as `state`, on the CPU."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def best_checkpoint(run: Path | str) -> Path | None:
    """The checkpoint with the lowest validation loss, among those with one of their own step."""
    losses = {folder: load_progress(folder)["val_loss"] for folder in checkpoints(run)}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(measured, key=measured.get) if measured else None


def claim_run(run: Path, config: dict, resume: str) -> Path | None:
    """Make `run` the folder of a run with this config, and return the checkpoint to go on from.

    ValueError when the folder holds a run that this one would not continue exactly.
    """
    file = run / "config.yaml"
    if file.exists() and (run / "metrics.jsonl").exists():
        if resume == "never":
            raise ValueError(
                f"{run} holds a run already and --resume is never; choose another --out_dir, or "
                "--resume auto to go on with it"
            )
        earlier = yaml.safe_load(file.read_text())
        changed = [
            f"{key} {earlier.get(key)} then, {config.get(key)} now"
            for key in sorted({*earlier, *config} - FREE_TO_CHANGE)
            if earlier.get(key) != config.get(key)
        ]
        if changed:
            raise ValueError(
                f"{run} holds a run with other settings, which cannot go on exactly: "
                f"{'; '.join(changed)}. Choose another --out_dir (--init_from {run} there starts "
                "from its weights), or the settings of then"
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config, sort_keys=False))
    return (checkpoints(run) or [None])[-1]


class MetricsLog:
    """metrics.jsonl: appended to, never rewritten, a line a step. Steps that a resumed run repeats
    are in it already and come out the same, so they are not written again.
    """

    def __init__(self, run: Path):
        self.file = run / "metrics.jsonl"
        self.last_step = -1
        if self.file.exists():
            lines = self.file.read_bytes()
            os.truncate(self.file, lines.rfind(b"\n") + 1)  # a line cut short was never logged
            self.last_step = max((r["step"] for r in read_metrics(run)), default=-1)

    def write(self, record: dict) -> None:
        if record["step"] > self.last_step:
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_metrics(run: Path | str) -> list[dict]:
    """The run's log, a dict a step; a last line that a crash has cut short is left out."""
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist, so {run} is no run folder")
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
