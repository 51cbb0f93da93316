"""The run folder: save checkpoints atomically, load them, delete old ones.

RUN/config.yaml                    the settings of the run
RUN/metrics.jsonl                  one line per step
RUN/loss.png, report.html          plots of metrics.jsonl
RUN/checkpoints/step_000500/       a Hugging Face model and tokenizer, or a PEFT adapter, plus:
    progress.json                  step, validation loss, hash of the data, facts
    state.pt                       optimizer, gradient scaler and random number generators
    adapter_base                   marks the base of an adapter, so that it is never deleted
RUN/best/step_000520/              the same without state.pt, if the best evaluation of fine-tuning
                                   is not one of the checkpoints
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from engine.adapter import is_adapter, load_adapter, read_adapter_config, save_adapter
from engine.config import read_yaml
from engine.errors import print_notice
from engine.files import fsync_folder, read_json
from engine.lora import lora_linears
from engine.pretrained import find_pretrained, load_pretrained, save_pretrained
from engine.tensors import TORCH_LOAD_ERRORS
from engine.tokenizer import Tokenizer
from model import GPT

BASE_MARK = "adapter_base"


class RunState(NamedTuple):
    """Everything but the weights that is needed to resume a run."""

    progress: dict  # progress.json: step, val_loss, data fingerprint
    tensors: dict  # state.pt: optimizer, scaler, rng; {} to save only the weights, in RUN/best


def list_checkpoints(run: Path | str, after: int = -1, with_best: bool = False) -> list[Path]:
    """Return the run's checkpoints after step `after`, oldest first; `with_best` includes RUN/best.
    All were saved completely, but files in them may have been damaged since.
    """
    folders = ("checkpoints", "best") if with_best else ("checkpoints",)
    paths = [path for name in folders for path in Path(run, name).glob("*")]
    found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in paths]
    steps = sorted((int(match[1]), path) for match, path in found if match)
    return [path for n, path in steps if n > after and path.is_dir() and any(path.iterdir())]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def best_checkpoint(run: Path | str) -> Path | None:
    """Return the checkpoint with the lowest validation loss, or None if none was evaluated. In
    fine-tuning it is the best of all evaluations, in pretraining the best of those that were saved.
    """
    losses: dict[Path, Any] = {}
    for folder in list_checkpoints(run, with_best=True):
        try:
            losses[folder] = read_progress(folder).get("val_loss")
        except (OSError, ValueError) as error:
            print_notice(f"left out when looking for the best checkpoint: {error}")
    evaluated = [folder for folder, loss in losses.items() if loss is not None]
    return min(evaluated, key=lambda folder: losses[folder], default=None)


def choose_checkpoint(name_or_path: str | Path) -> Path:
    """Return the checkpoint that a run stands for: the best one in fine-tuning, if any was
    evaluated, and the latest one in pretraining. Any path but that of a run is returned as it is.
    """
    path, config_file = Path(name_or_path), Path(name_or_path) / "config.yaml"
    is_finetuning = config_file.is_file() and "model_name_or_path" in read_run_config(path)
    best = best_checkpoint(path) if is_finetuning else None
    saved = list_checkpoints(path) or list_checkpoints(path, with_best=True)
    return best or next(reversed(saved), path)


def find_checkpoint(name_or_path: str | Path, quiet: bool = False) -> Path:
    """Return the local path of a model or an adapter. Print which checkpoint of a run it is.
    Download hub names.
    """
    path = choose_checkpoint(name_or_path)
    if path != Path(name_or_path) and not quiet:
        kind = "latest" if path in list_checkpoints(name_or_path)[-1:] else "best"
        print_notice(f"{name_or_path}: using its {kind} checkpoint, {path.parent.name}/{path.name}")
    return path if path.exists() else find_pretrained(path)


def load_model(name_or_path: str | Path, lora_load_path: str | Path | None = None) -> GPT:
    """Load a model from a hub name, a Hugging Face folder, a checkpoint or a run, in eval mode.

    If it is an adapter, load its base model and the adapter on top. Otherwise, if `lora_load_path`
    is given (a hub name, an adapter folder, a run or a lora.pt), load that adapter on top.
    """
    folder = find_checkpoint(name_or_path)
    if is_adapter(folder):
        base = read_adapter_config(folder).base_model
        if lora_load_path is not None or not base:
            raise ValueError(
                f"{name_or_path} is an adapter; pass its base model {base or '(unknown)'} instead, "
                "and the adapter as lora_load_path"
            )
        if Path(base).is_absolute() and not Path(base).exists():
            raise FileNotFoundError(
                f"{base}, the base model of {name_or_path}, no longer exists; pass a copy of it "
                "(its hash is base_sha256 in config.yaml), and the adapter as lora_load_path"
            )
        name_or_path, lora_load_path, folder = base, folder, find_checkpoint(base)
    model = load_pretrained(folder)
    if not Path(name_or_path).exists():
        model.name_or_path = str(name_or_path)  # the hub name, not the folder in the cache
    if lora_load_path is not None:
        load_adapter(model, find_checkpoint(lora_load_path))
    return model.eval()


def mark_base(checkpoint: Path) -> None:
    """Mark a checkpoint as the base of an adapter, so that its run does not delete it."""
    try:
        if (checkpoint / "progress.json").is_file():  # only a run's checkpoints are ever deleted
            (checkpoint / BASE_MARK).touch()
    except OSError as error:
        print(f"{checkpoint} may be deleted by its run, as it cannot be marked: {error}")


def load_latest(
    run: Path | str, base: str | None = None, last_step: int | None = None
) -> tuple[GPT, RunState] | None:
    """Load the latest undamaged checkpoint of a run, no later than `last_step`. Return None if
    there is no checkpoint. Adapters are loaded onto the model `base`. Raises ValueError if all
    checkpoints are damaged.
    """
    found = list_checkpoints(run)
    folders = [f for f in found if last_step is None or checkpoint_step(f) <= last_step]
    for folder in reversed(folders):
        try:
            model = load_model(base, folder) if base else load_model(folder)
            state = RunState(read_progress(folder), read_state(folder))
            _ = state.progress["data"]  # if it is missing: KeyError, caught below
        except (OSError, ValueError, *TORCH_LOAD_ERRORS) as error:
            print(f"{folder} is damaged ({error}); falling back to the one before")
        else:
            return model, state
    if folders:
        raise ValueError(
            f"none of the {len(folders)} checkpoints in {run} can be read; choose another out_dir"
        )
    return None


def save_checkpoint(
    run: Path,
    model: GPT,
    tokenizer: Tokenizer,
    params: dict,
    state: RunState,
    *,
    keep: int,
    kept_step: int = 0,
) -> None:
    """Save a checkpoint. `params` has the weights by name: the model's parameters, or copies of
    them. With LoRA, save the adapter only. A checkpoint without `state.tensors` cannot be resumed
    and goes to RUN/best. Raises OSError if there is no space.

    Then delete old checkpoints, but keep the last `keep`, the best one, the one at `kept_step`, and
    those that adapters were trained on.

    The files are written to a temporary folder. It is renamed once all of them are on the disk, so
    a crash never leaves half a checkpoint.
    """
    step = state.progress["step"]
    folder = run / ("checkpoints" if state.tensors else "best") / f"step_{step:06d}"
    temporary = folder.with_suffix(".tmp")
    try:
        for leftover in folder.parent.glob("step_*.tmp"):  # from interrupted saves
            remove(leftover)
        temporary.mkdir(parents=True)
        if lora_linears(model):
            base_sha256 = read_run_config(run).get("base_sha256", "")
            save_adapter(model, temporary, model.name_or_path, params, base_sha256)
            tokenizer.save(temporary, model.config.block_size)
        else:
            save_pretrained(model, temporary, tokenizer, params)
        if state.tensors:
            torch.save(state.tensors, temporary / "state.pt")
        (temporary / "progress.json").write_text(json.dumps(state.progress) + "\n")
        # Sync the log too: after a power cut it must not end before the checkpoint's step.
        for file in [*temporary.iterdir(), *run.glob("metrics.jsonl")]:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        if (folder / BASE_MARK).exists():  # keep the mark if this checkpoint is overwritten
            shutil.copy(folder / BASE_MARK, temporary)
        fsync_folder(temporary)
        remove(folder)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    # On a full disk torch.save raises RuntimeError, and safetensors raises SafetensorError.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(run)
        raise OSError(
            f"step {step} could not be saved: {error}. Free some space and run the same command "
            f"again; it resumes from {earlier[-1] if earlier else 'the start'}"
        ) from error
    kept = {best_checkpoint(run), *list_checkpoints(run)[-keep:]}
    for old in set(list_checkpoints(run, with_best=True)) - kept:
        if checkpoint_step(old) != kept_step and not (old / BASE_MARK).exists():
            # A kill leaves a .tmp, which the next save removes, but never half a checkpoint.
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))


def remove(path: Path) -> None:
    """Delete a folder or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class BackgroundSave:
    """Runs one save at a time in a thread, while training continues. If the save fails, the next
    call of any method raises its exception.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Wait for the save that is running, if any, and start this one."""
        self.wait()
        self.pending = self.executor.submit(save)

    def check(self) -> None:
        """If the save has ended with an exception, raise it. Does not wait."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()


def read_progress(checkpoint: Path) -> dict:
    file = checkpoint / "progress.json"
    progress = read_json(file, remedy="delete the checkpoint")
    if "step" not in progress:
        raise ValueError(f"{file} is damaged: it has no step; delete the checkpoint")
    return progress


def read_state(checkpoint: Path) -> dict:
    """Load the states of the optimizer, scaler and random number generators to the CPU."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if not (state["optimizer"]["state"] and {"scaler", "rng"} <= state.keys()):
        raise ValueError("state.pt lacks optimizer state, scaler or rng")
    return state


def read_run_config(run: Path | str) -> dict:
    """Read the settings of a run from its config.yaml."""
    try:
        return read_yaml(Path(run) / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{error}; repair the file, or choose another run") from error
