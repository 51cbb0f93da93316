"""The run folder on disk: checkpoints that are there whole or not at all, and how to load a model.

RUN/config.yaml                    what the run was started with
RUN/metrics.jsonl                  its history
RUN/loss.png, report.html          the same to look at
RUN/checkpoints/step_000500/       a Hugging Face model and tokenizer, or a PEFT adapter, and beside
    progress.json, state.pt        step and losses; optimizer and random number generators
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from data import naming
from lora import CONFIG_FILE, load_adapter, lora_linears, read_adapter_config, save_adapter
from model import GPT
from pretrained import TORCH_LOAD_ERRORS, write_folder
from tokenizer import get_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What may change when a run goes on, because its curve does not depend on it but for the order of
# floating-point sums.
FREE_TO_CHANGE = {
    "out_dir",
    "data_dir",  # the data themselves are compared
    "resume",
    "device",
    "compile",
    "batch_size",
    "find_batch_size",
    "profile",
    "parallel",
    "recompute",
    "keep",
    "merge_out",
    "model_name_or_path",  # its weights are compared
    "eval_every",
    "sample_every",
    "hellaswag_every",
    "hellaswag_data",
    "log",
    "save_every",
}


def checkpoints(run: Path | str) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    named = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in Path(run).glob("checkpoints/*")]
    return [p for _, p in sorted((int(m[1]), p) for m, p in named if m)]


def newest(name_or_path: str | Path) -> Path:
    """A run's newest checkpoint; anything else as it is."""
    return next(reversed(checkpoints(name_or_path)), Path(name_or_path))


def load_model(name_or_path: str | Path, lora_load_path: str | Path | None = None) -> GPT:
    """The model of a hub name, a Hugging Face folder, a checkpoint, or a run, in eval() mode. An
    adapter's checkpoint stands for its base model with LoRA; `lora_load_path`, an adapter's folder,
    run or lora.pt, is loaded on top of a model without.
    """
    path = newest(name_or_path)
    if (path / CONFIG_FILE).is_file():
        base = read_adapter_config(path).get("base_model_name_or_path")
        if lora_load_path is not None or not base:
            raise ValueError(
                f"{name_or_path} is an adapter; give its base model {base or '(unnamed)'}, and "
                "the adapter as --lora_load_path"
            )
        return load_adapter(load_model(base), path).eval()
    model = GPT.from_pretrained(path if path.exists() else name_or_path)
    if lora_load_path is not None:
        load_adapter(model, newest(lora_load_path))
    return model.eval()


def check_vocabulary(model: GPT, name: str) -> None:
    """ValueError if the model called `name` does not know all of the tokenizer's tokens."""
    n_vocab = get_tokenizer().n_vocab
    if model.config.vocab_size < n_vocab:
        raise ValueError(
            f"{name} has {model.config.vocab_size} tokens, GPT-2's tokenizer {n_vocab}; choose a "
            "model of that tokenizer"
        )


def weights_sha256(model: GPT) -> str:
    """A fingerprint of the shape and all weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, param in model.named_parameters():
        digest.update(name.encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_newest(run: Path | str, base: str | None = None) -> tuple[GPT, tuple[dict, dict]] | None:
    """Model, progress and state of the run's newest checkpoint, or of the newest intact one. None
    where the run has no checkpoint. Adapters go onto the model `base`.
    """
    folders = checkpoints(run)
    for folder in reversed(folders):
        try:
            model = load_model(base, folder) if base else load_model(folder)
            loaded = model, (load_progress(folder), load_state(folder))
        except (OSError, ValueError, *TORCH_LOAD_ERRORS) as error:
            print(f"{folder} is damaged ({error}); going back to the one before")
        else:
            return loaded
    if folders:
        raise ValueError(
            f"none of the {len(folders)} checkpoints in {run} can be read; choose another --out_dir"
        )
    return None


def save_checkpoint(
    run: Path, model: GPT, params: dict, progress: dict, state: dict, keep: int
) -> None:
    """Write the checkpoint of progress["step"], then delete all but the newest `keep` and the best.
    `params` are the parameters of `model`, or copies of them; of a model with LoRA only the adapter
    is written.

    The folder takes its name only when all of it is on the disk, so any crash leaves the earlier
    checkpoints and never half a one.
    """
    folder = run / "checkpoints" / f"step_{progress['step']:06d}"
    temporary = folder.with_suffix(".tmp")
    try:
        for leftover in folder.parent.glob("*.tmp"):  # of interrupted saves
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        if lora_linears(model):
            save_adapter(model, temporary, model.name_or_path, params)
        else:
            write_folder(temporary, asdict(model.config), model.hf_tensors(params))
            save_tokenizer(temporary, model.config.block_size)
        torch.save(state, temporary / "state.pt")
        (temporary / "progress.json").write_text(json.dumps(progress) + "\n")
        for file in [*temporary.iterdir(), *run.glob("metrics.jsonl")]:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        _fsync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _fsync_folder(folder.parent)
    # On a full disk torch.save raises a RuntimeError, safetensors an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = checkpoints(run)
        raise OSError(
            f"step {progress['step']} could not be saved: {error}. Make room and run the same "
            f"command again; it goes on from {earlier[-1] if earlier else 'the start'}"
        ) from error
    kept = {best_checkpoint(run), *checkpoints(run)[-keep:]}
    for old in set(checkpoints(run)) - kept:
        shutil.rmtree(old)


class BackgroundSave:
    """Saves while training goes on: one at a time, and an error is raised by the next call."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def start(self, save: Callable[[], object]) -> None:
        self.wait()
        self.pending = self.executor.submit(save)

    def check(self) -> None:
        """Raise what a save that has ended has raised."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()


def _fsync_folder(folder: Path) -> None:
    """Make new names in the folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_progress(checkpoint: Path) -> dict:
    file = checkpoint / "progress.json"
    try:
        progress = dict(json.loads(file.read_text()))
        progress["step"] + 0
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); delete the checkpoint") from error
    return progress


def load_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` got as `state`, on the CPU."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def best_checkpoint(run: Path | str) -> Path | None:
    """The checkpoint with the lowest validation loss, among those with one of their own step."""
    measured = {}
    for folder in checkpoints(run):
        try:
            loss = load_progress(folder)["val_loss"]
        except (OSError, ValueError, KeyError):  # a damaged one, told of when loading
            continue
        if loss is not None:
            measured[folder] = loss
    return min(measured, key=lambda folder: measured[folder], default=None)


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run folder, so that no second process writes into it; the system lets go of it when
    the process ends, however it ends.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / "lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"{run} is in use by another process; wait for its end, or choose another --out_dir"
        ) from error


def read_run_config(run: Path | str) -> dict:
    """The settings of a run, from its config.yaml."""
    file = Path(run) / "config.yaml"
    try:
        with file.open() as stream:  # whose name is in the error
            return dict(yaml.safe_load(stream))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}; mend it, or choose another run") from error


def check_same_run(run: Path, config: "DataclassInstance") -> dict:
    """The settings that a run with this config takes over from the one that `run` holds, if any:
    those it leaves open (None). A run from before there was a setting has had its default.
    ValueError when it would not continue that run exactly.
    """
    if not (run / "metrics.jsonl").exists() and not checkpoints(run):
        return {}
    now = asdict(config)
    if now["resume"] == "never":
        raise ValueError(
            f"{run} holds a run already and --resume is never; choose another --out_dir, or "
            "--resume auto to go on with it"
        )
    earlier = {field.name: field.default for field in fields(config)} | read_run_config(run)
    fixed = sorted(earlier.keys() - FREE_TO_CHANGE)
    left_open = [key for key in fixed if key in now and now[key] is None]
    changed = [
        f"{key} {earlier[key]} then, {now.get(key)} now"
        for key in fixed
        if key not in left_open and now.get(key) != earlier[key]
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings, which cannot go on exactly: "
            f"{'; '.join(changed)}. Choose another --out_dir, or the earlier settings"
        )
    return {key: earlier[key] for key in left_open}


def read_log(file: Path, key: str) -> list[dict]:
    """A log, a JSON object with a number under `key` on every line; a last line that a crash has
    cut short is left out.
    """
    lines = file.read_bytes()
    try:
        records = [dict(json.loads(line)) for line in lines[: lines.rfind(b"\n") + 1].splitlines()]
        [record[key] + 0 for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}), expected a JSON object with its {key} on every line; "
            "mend the line, or choose another folder"
        ) from error
    return records


class Log:
    """A file of JSON objects, one a line: appended to, never rewritten."""

    def __init__(self, file: Path, key: str):
        self.file = file
        self.records: list[dict] = []  # from before
        if file.exists():
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # cut short, so never logged
            self.records = read_log(file, key)

    def append(self, *records: dict) -> None:
        with naming(self.file), self.file.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


class MetricsLog(Log):
    """metrics.jsonl, a line a step. Steps that a resumed run repeats are in it already and come out
    the same, so they are not written again.
    """

    def __init__(self, run: Path):
        super().__init__(run / "metrics.jsonl", "step")
        self.last_step = max((r["step"] for r in self.records), default=-1)

    def write(self, record: dict) -> None:
        if record["step"] > self.last_step:
            self.append(record)


def read_metrics(run: Path | str) -> list[dict]:
    """The run's log, a dict a step."""
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist; expected {run} to be an --out_dir of training"
        )
    return read_log(file, "step")
