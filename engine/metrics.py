"""Metrics of a run: its steps, metrics.jsonl, TensorBoard, W&B, terminal progress."""

import errno
import math
import re
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.checkpoint import list_checkpoints, read_progress, read_run_config
from engine.config import TrainConfig
from engine.data import TrainingData
from engine.distributed import Distributed
from engine.files import JSONLinesLog, drop_lost_terminal
from engine.hub import FILE_SUFFIXES
from engine.shards import read_manifest
from engine.throughput import flops_per_token, format_seconds, peak_flops, peak_memory
from model import GPT

PROGRESS_SECONDS = 10.0  # between two lines of progress where there is no terminal
ESTIMATE_STEPS = 2  # after which a run says how long it will take; the first step may compile
SUMMARY_COLUMN = 26  # where the values of the summary start
# Lines of the summary: what they show of the values logged under a key.
FIGURES: dict[str, tuple[str, Callable[[list], str]]] = {
    "validation bits per byte": ("val_bpb", lambda bpb: f"{bpb[0]:.4f} to {bpb[-1]:.4f}"),
    "training loss": ("train_loss", lambda losses: f"{losses[-1]:.4f}"),
    "HellaSwag acc_norm": ("hellaswag_acc_norm", lambda acc_norm: f"{acc_norm[-1]:.4f}"),
    "HellaSwag acc": ("hellaswag_acc", lambda acc: f"{acc[-1]:.4f}"),
    "speed, median": ("tokens_per_s", lambda v: f"{statistics.median(v):,.0f} tokens/s"),
    "MFU, median": ("mfu", lambda mfu: f"{statistics.median(mfu):.1%}"),
    "time in training steps": ("step_ms", lambda ms: str(timedelta(seconds=round(sum(ms) / 1e3)))),
    "peak memory": ("peak_memory_gb", lambda gigabytes: f"{max(gigabytes):.2f} GB"),
}


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


class Meter:
    """Turns the results of steps into records for the log. On CUDA the results of a step are read
    after the next one has been launched, so that the device never waits for the CPU.
    """

    def __init__(self, model: GPT, data: TrainingData, dist: Distributed):
        self.data, self.dist = data, dist
        self.flops_per_token = flops_per_token(model, data.block_size)
        self.peak_flops = peak_flops(dist.device)
        self.pending: deque[tuple[dict, float, torch.Tensor, torch.cuda.Event | None]] = deque()
        self.max_pending = int(dist.device.type == "cuda")  # a CPU's step is over when it returns
        self.last_read = -math.inf
        self.skipped_in_a_row = 0  # steps whose gradient was not finite
        self.stop_requested = False  # on any rank

    def add(
        self, record: dict, started: float, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool
    ) -> None:
        """Take the results of a step launched at time `started`: what is known of it (its number
        and learning rate), its loss and norm, and whether this rank should stop after it.
        """
        # Ranks must agree on stopping, and asking together with the loss costs nothing.
        sums = self.dist.all_reduce(torch.stack([loss, torch.full_like(loss, stop)]))
        results, copied = torch.stack([*sums, grad_norm]), None
        if self.dist.device.type == "cuda":
            # Copied now: a copy at the time of reading would wait for the next step as well.
            results = torch.empty(3, pin_memory=True).copy_(results, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending.append((record, started, results, copied))

    def read(self, wait: bool) -> Iterator[dict]:
        """The records of the steps that are done; with `wait` or a stop requested, of all steps."""
        while len(self.pending) > (0 if wait or self.stop_requested else self.max_pending):
            yield self._read_step()

    def _read_step(self) -> dict:
        record, started, results, copied = self.pending.popleft()
        if copied is not None:
            copied.synchronize()
        loss, stops, norm = results.tolist()
        now = time.perf_counter()
        seconds, self.last_read = now - max(started, self.last_read), now
        self.stop_requested |= stops > 0
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        tokens = self.data.tokens_through(record["step"])
        speed = (tokens - self.data.tokens_through(record["step"] - 1)) / seconds
        peak = self.peak_flops  # None if unknown
        return record | {
            "train_loss": finite_or_none(loss),
            "grad_norm": finite_or_none(norm),
            "tokens": tokens,
            "tokens_per_s": round(speed, 1),
            "step_ms": round(seconds * 1e3, 2),
            "mfu": peak and round(self.flops_per_token * speed / peak / self.dist.world_size, 4),
            "peak_memory_gb": round(peak_memory(self.dist.device) / 1e9, 3),
        }


def read_metrics(run: Path | str) -> list[dict]:
    """The run's log, one dict per step."""
    return JSONLinesLog.read(Path(run) / "metrics.jsonl", "step")


class TensorBoardLogger:
    """Event files in RUN/tensorboard. Steps that are only in metrics.jsonl are copied first."""

    def __init__(self, run: Path, earlier: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        is_resumed = bool(earlier) and any(folder.glob("events.*"))
        # A step that is here but did not get into metrics.jsonl will come again.
        purge_step = earlier[-1]["step"] + 1 if is_resumed else None
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        for record in [] if is_resumed else earlier:
            self.write(record)

    def write(self, record: dict) -> None:
        for name, value in select_numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], double_precision=True)
        for i, sample in enumerate(record.get("samples", [])):
            text = "\n".join("    " + line for line in sample.splitlines())  # as Markdown's code
            self.writer.add_text(f"sample_{i + 1}", text, record["step"])
        self.writer.flush()  # so that a killed run loses nothing

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A run of Weights & Biases, continued by a resumed run. Its own environment variables apply
    (WANDB_MODE=offline, WANDB_PROJECT).
    """

    def __init__(self, run: Path, earlier: list[dict]):  # noqa: ARG002  # it has the earlier steps
        import wandb

        id_file = run / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.wandb_run = wandb.init(
            dir=run,
            id=id_file.read_text(),
            name=run.name,
            resume="allow",
            config=read_run_config(run),
            settings=wandb.Settings(console="off"),  # it would capture stdout and the progress bar
        )

    def write(self, record: dict) -> None:
        samples = {f"sample_{i + 1}": text for i, text in enumerate(record.get("samples", []))}
        self.wandb_run.log(select_numbers(record) | samples, step=record["step"])

    def close(self) -> None:
        self.wandb_run.finish()


def select_numbers(record: dict) -> dict[str, float]:
    """What a logger draws over the step."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


Logger = TensorBoardLogger | WandbLogger
LOGGER_CLASSES: dict[str, type[Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


class RunLogger:
    """Logs a run from rank 0: to metrics.jsonl, the other loggers and the terminal, there with a
    progress bar or, in a file, with a line now and then.
    """

    def __init__(self, config: TrainConfig, dist: Distributed, start: int):
        self.run = Path(config.out_dir)
        self.is_main = dist.is_main
        self.start, self.max_steps = start, config.max_steps
        self.started, self.last_line = time.perf_counter(), -math.inf
        hidden = None if dist.is_main else True  # None: unless there is a terminal
        self.bar = tqdm(
            desc=self.run.name, initial=start, total=self.max_steps, unit=" steps", disable=hidden
        )
        if self.is_main:
            self.metrics = JSONLinesLog(self.run / "metrics.jsonl", "step")
            # A resumed run repeats some steps with the same results, which are not logged again.
            self.last_logged = max((r["step"] for r in self.metrics.records), default=-1)
            self.loggers: dict[str, Logger] = {}
            for name in config.loggers:
                self._call_safely(name, self._open, name)

    def _open(self, name: str) -> None:
        self.loggers[name] = LOGGER_CLASSES[name](self.run, self.metrics.records)

    def _call_safely(self, name: str, call: Callable[..., None], *args: object) -> None:
        """Call a logger. Whatever it raises (disk, network, bugs) turns off this logger only."""
        try:
            call(*args)
        except Exception as error:
            self.loggers.pop(name, None)
            self.print(f"logging to {name} is off from here on: {type(error).__name__}: {error}")

    def print(self, text: str) -> None:
        if not self.is_main:
            return
        try:
            self.bar.write(text)
        except OSError as error:  # tqdm itself ignores it where it draws the bar
            if error.errno != errno.EIO:
                raise
            drop_lost_terminal()  # SIGHUP, which then saves, may come later

    def log(self, record: dict) -> None:
        """Log a step. Print a line if it was evaluated, or if the last line is a while ago."""
        if not self.is_main:
            return
        step = record["step"]
        if step > self.last_logged:
            for name, logger in list(self.loggers.items()):
                self._call_safely(name, logger.write, record)
            self.metrics.append(record)
        self.bar.update(step - self.bar.n)
        if record.get("train_loss") is not None:
            speed = f"{record['tokens_per_s']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"loss {record['train_loss']:.4f}, {speed}")
        if step == self.start + ESTIMATE_STEPS and step < self.max_steps:
            seconds, left = record["step_ms"] / 1e3, self.max_steps - step
            self.print(
                f"estimate: {format_seconds(seconds)} for a step, {format_seconds(left * seconds)} "
                f"for the {left:,} left, without evaluations"
            )
        evaluated = {"val_loss", "samples", "hellaswag_acc"} & record.keys()
        is_due = self.bar.disable and time.perf_counter() - self.last_line > PROGRESS_SECONDS
        if evaluated or is_due:
            self._print_step(record)

    def _print_step(self, record: dict) -> None:
        step, self.last_line = record["step"], time.perf_counter()
        parts = [f"step {step}/{self.max_steps}"]
        for key, label, spec in (
            ("train_loss", "loss", ".4f"),
            ("val_loss", "val", ".4f"),
            ("hellaswag_acc_norm", "HellaSwag acc_norm", ".4f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "norm", ".2f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{label} {record[key]:{spec}}")
        if step > self.start:
            seconds_per_step = (self.last_line - self.started) / (step - self.start)
            left = timedelta(seconds=round(seconds_per_step * (self.max_steps - step)))
            parts += [f"{record['tokens_per_s']:,.0f} tokens/s", f"{left} left"]
        self.print(" | ".join(parts))
        for sample in record.get("samples", []):
            self.print("  sample: " + collapse_newlines(sample).replace("\n", "\n  "))

    def finish(self) -> None:
        """Close the loggers and print a summary from the log, the same for a run that was already
        finished.
        """
        self.bar.close()
        if not self.is_main:
            return
        for name, logger in list(self.loggers.items()):
            self._call_safely(name, logger.close)
        checkpoint = list_checkpoints(self.run)[-1]
        samples = [r["samples"][0] for r in read_metrics(self.run) if r.get("samples")]
        samples = [repr(collapse_newlines(s)) for s in samples] or ["none, sample_every is 0"]
        rows = summarize_run(self.run, checkpoint) | {
            "sample before": samples[0],
            "sample after": samples[-1],
            "loss plot": str(self.run / "loss.png"),
            "report": str(self.run / "report.html"),
            "in transformers": f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})",
        }
        print("", *(f"{k:<{SUMMARY_COLUMN}}{v}" for k, v in rows.items()), sep="\n", flush=True)


def collapse_newlines(text: str) -> str:
    """The text without blank lines, which untrained models write a lot of."""
    return re.sub(r"\n\s*\n", "\n", text)


def summarize_run(run: Path, checkpoint: Path) -> dict[str, str]:
    """The main figures of a run up to a checkpoint, by their labels: for the terminal, report.html
    and the model card. Those that were not logged are left out.
    """
    progress = read_progress(checkpoint)
    log = [record for record in read_metrics(run) if record["step"] <= progress["step"]]

    def logged(key: str) -> list:
        return [record[key] for record in log if record.get(key) is not None]

    rows = {}
    if losses := logged("val_loss"):
        best, step = min((r["val_loss"], r["step"]) for r in log if r.get("val_loss") is not None)
        rows["validation loss"] = f"{losses[0]:.4f} to {losses[-1]:.4f}"
        rows["best validation loss"] = f"{best:.4f} at step {step:,}"
    rows |= {label: show(v) for label, (key, show) in FIGURES.items() if (v := logged(key))}
    rows["steps"] = f"{progress['step']:,} of {read_run_config(run)['max_steps']:,}"
    rows["tokens trained on"] = f"{max(logged('tokens'), default=0):,}"
    rows["data"] = name_dataset(run)
    return rows | progress.get("facts", {})  # which earlier versions did not save


def read_curve_settings(run: Path, checkpoint: Path) -> dict[str, Any]:
    """The settings that shaped a run's curve, up to a checkpoint. Local paths are hidden."""
    settings = read_run_config(run)
    # Earlier versions did not note which these are.
    names = read_progress(checkpoint).get("fixed_settings", settings)
    return {name: hide_folder(value) for name, value in settings.items() if name in names}


def name_dataset(run: Path) -> str:
    """The name of a run's dataset; for your own files, the file's or the shard folder's name."""
    config = read_run_config(run)
    if "data_dir" not in config:
        return hide_folder(config.get("data", ""))
    folder = Path(config["data_dir"])
    name = read_manifest(folder).get("dataset", "files")
    return f"files in {folder.resolve().name}" if name == "files" else name


def hide_folder(setting: Any) -> Any:
    """The setting; of a local path only the last part."""
    path = Path(str(setting))
    is_local = path.is_absolute() or path.exists() or path.name.endswith(FILE_SUFFIXES)
    return path.name if isinstance(setting, str) and is_local else setting
