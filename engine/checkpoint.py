"""The run folder: checkpoints that are complete or absent, and how to load and resume them.

RUN/config.yaml                    the settings of the run
RUN/metrics.jsonl                  one line per step
RUN/loss.png, report.html          the same as pictures
RUN/checkpoints/step_000500/       a Hugging Face model and tokenizer, or a PEFT adapter, and
    progress.json, state.pt        step and losses; optimizer and random number generators
    adapter_base                   present: the base of an adapter, never deleted
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError

from engine.adapter import is_adapter, load_adapter, read_adapter_config, save_adapter
from engine.files import fsync_folder, read_json
from engine.lora import lora_linears
from engine.pretrained import load_pretrained, save_pretrained
from engine.tensors import TORCH_LOAD_ERRORS
from engine.tokenizer import Tokenizer
from model import GPT

BASE_MARK = "adapter_base"


class RunState(NamedTuple):
    """What a checkpoint holds besides the weights."""

    progress: dict  # step, val_loss, data fingerprint
    tensors: dict  # optimizer, scaler, rng


def list_checkpoints(run: Path | str, after: int = -1) -> list[Path]:
    """The run's checkpoints after step `after`, oldest first. They are complete, unless a file in
    them was damaged later.
    """
    found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in Path(run).glob("checkpoints/*")]
    steps = sorted((int(match[1]), path) for match, path in found if match)
    return [path for n, path in steps if n > after and path.is_dir() and any(path.iterdir())]


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def latest_checkpoint(name_or_path: str | Path) -> Path:
    """A run's latest checkpoint; any other name or path as it is."""
    return next(reversed(list_checkpoints(name_or_path)), Path(name_or_path))


def best_checkpoint(run: Path | str) -> Path | None:
    """The checkpoint with the lowest validation loss, among those where it was evaluated."""
    losses: dict[Path, Any] = {}
    for folder in list_checkpoints(run):
        with suppress(OSError, ValueError):  # a damaged one is reported when it is loaded
            losses[folder] = read_progress(folder).get("val_loss")
    evaluated = [folder for folder, loss in losses.items() if loss is not None]
    return min(evaluated, key=lambda folder: losses[folder], default=None)


def load_model(name_or_path: str | Path, lora_load_path: str | Path | None = None) -> GPT:
    """The model of a hub name, a Hugging Face folder, a checkpoint or a run, in eval mode. An
    adapter's checkpoint loads its base model with LoRA. `lora_load_path`, an adapter's folder, run
    or lora.pt, is loaded on top of a model without LoRA.
    """
    path = latest_checkpoint(name_or_path)
    if is_adapter(path):
        base = read_adapter_config(path).base_model
        if lora_load_path is not None or not base:
            raise ValueError(
                f"{name_or_path} is an adapter; give its base model {base or '(not named)'}, and "
                "the adapter as lora_load_path"
            )
        if Path(base).is_absolute() and not Path(base).exists():
            raise FileNotFoundError(
                f"{base}, the base model of {name_or_path}, no longer exists; give a copy of it "
                "(config.yaml has its base_sha256), and the adapter as lora_load_path"
            )
        name_or_path, lora_load_path, path = base, path, latest_checkpoint(base)
    model = load_pretrained(path if path.exists() else name_or_path)
    if lora_load_path is not None:
        load_adapter(model, latest_checkpoint(lora_load_path))
    return model.eval()


def mark_base(checkpoint: Path) -> None:
    """Mark a run's checkpoint as the base of an adapter, so that it is not deleted."""
    try:
        if (checkpoint / "progress.json").is_file():  # else no run deletes it
            (checkpoint / BASE_MARK).touch()
    except OSError as error:
        print(f"{checkpoint} may be deleted by its run, as it cannot be marked: {error}")


def hash_weights(model: GPT) -> str:
    """The sha256 of the shape and all weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, param in model.named_parameters():
        digest.update(name.encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_latest(
    run: Path | str, base: str | None = None, last_step: int | None = None
) -> tuple[GPT, RunState] | None:
    """The run's latest intact checkpoint, of `last_step` or earlier, or None if it has no
    checkpoint. Adapters are loaded onto the model `base`.
    """
    found = list_checkpoints(run)
    folders = [f for f in found if last_step is None or checkpoint_step(f) <= last_step]
    for folder in reversed(folders):
        try:
            model = load_model(base, folder) if base else load_model(folder)
            state = RunState(read_progress(folder), read_state(folder))
            _ = state.progress["data"]
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
    """Save a checkpoint of `params`, the parameters of `model` or copies of them; with LoRA only
    the adapter. Then delete all but the latest `keep`, the best, that of `kept_step`, and bases of
    adapters.

    The folder gets its name when all of it is on the disk, so a crash leaves the earlier
    checkpoints and never half of one.
    """
    step = state.progress["step"]
    folder = run / "checkpoints" / f"step_{step:06d}"
    temporary = folder.with_suffix(".tmp")
    try:
        for leftover in folder.parent.glob("step_*.tmp"):  # from interrupted saves
            remove(leftover)
        temporary.mkdir(parents=True)
        if lora_linears(model):
            save_adapter(model, temporary, model.name_or_path, params)
            tokenizer.save(temporary, model.config.block_size)
        else:
            save_pretrained(model, temporary, tokenizer, params)
        torch.save(state.tensors, temporary / "state.pt")
        (temporary / "progress.json").write_text(json.dumps(state.progress) + "\n")
        for file in [*temporary.iterdir(), *run.glob("metrics.jsonl")]:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        if (folder / BASE_MARK).exists():
            shutil.copy(folder / BASE_MARK, temporary)
        fsync_folder(temporary)
        remove(folder)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    # On a full disk torch.save raises a RuntimeError, and safetensors its own error.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(run)
        raise OSError(
            f"step {step} could not be saved: {error}. Free some space and run the same command "
            f"again; it resumes from {earlier[-1] if earlier else 'the start'}"
        ) from error
    checkpoints = list_checkpoints(run)
    for old in set(checkpoints) - {best_checkpoint(run), *checkpoints[-keep:]}:
        if checkpoint_step(old) != kept_step and not (old / BASE_MARK).exists():
            shutil.rmtree(old)


def remove(path: Path) -> None:
    """Delete a folder or a file, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class BackgroundSave:
    """Saves in a thread while training continues, one at a time. The next call raises its error."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def start(self, save: Callable[[], object]) -> None:
        self.wait()
        self.pending = self.executor.submit(save)

    def check(self) -> None:
        """Raise the error of a save that has ended."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()


def read_progress(checkpoint: Path) -> dict:
    file = checkpoint / "progress.json"
    progress = read_json(file, "delete the checkpoint")
    if "step" not in progress:
        raise ValueError(f"{file} is damaged: it has no step; delete the checkpoint")
    return progress


def read_state(checkpoint: Path) -> dict:
    """Optimizer, scaler and random number generators, on the CPU."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if not (state["optimizer"]["state"] and {"scaler", "rng"} <= state.keys()):
        raise ValueError("state.pt lacks optimizer state, scaler or rng")
    return state


def read_run_config(run: Path | str) -> dict:
    """The settings of a run, from its config.yaml."""
    file = Path(run) / "config.yaml"
    try:
        with file.open() as stream:  # an OSError then has the file's name
            return dict(yaml.safe_load(stream))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}; repair it, or choose another run") from error
