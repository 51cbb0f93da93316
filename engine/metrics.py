"""Measure and log a run: metrics.jsonl, TensorBoard, W&B, and progress in the terminal."""

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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import (
    best_checkpoint,
    choose_checkpoint,
    list_checkpoints,
    read_progress,
    read_run_config,
)
from engine.config import TrainConfig
from engine.data import TrainingData
from engine.distributed import Distributed
from engine.files import JSONLinesLog, drop_lost_terminal
from engine.hub import FILE_SUFFIXES
from engine.shards import read_manifest
from engine.throughput import flops_per_token, format_seconds, peak_flops, peak_memory
from model import GPT

PROGRESS_SECONDS = 10.0  # between two lines of progress if there is no terminal
RECENT_STEPS = 100  # the time left assumes that later steps take as long as these
SUMMARY_COLUMN = 26  # where the values of the summary start
# Lines of the summary: label -> key in the log, and a function that shows its logged values.
SUMMARY_METRICS: dict[str, tuple[str, Callable[[list], str]]] = {
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


Time = float | torch.cuda.Event


def clock(device: torch.device) -> Time:
    """Return the time; on CUDA, an event that completes when all work launched so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


class PendingStep(NamedTuple):
    """A step that was launched, and whose results have not been read yet."""

    record: dict  # its number and learning rate
    begin: Time
    end: Time  # when `results` have reached the CPU
    results: Tensor  # its loss, the number of ranks that want to stop, its gradient norm


class Meter:
    """Turns the results of steps into records for the log. On CUDA it reads the results of a step
    after the next one was launched, so that the GPU always has work:

        GPU   |--- step 1 ---|--- step 2 ---|--- step 3 ---|
        CPU   launch 1, launch 2 |read 1, launch 3 |read 2, launch 4

    Times of steps come from the GPU, because the CPU may run ahead of it or behind it.
    """

    def __init__(self, model: GPT, data: TrainingData, dist: Distributed):
        self.data, self.dist = data, dist
        self.flops_per_token = flops_per_token(model, data.block_size)
        self.peak_flops = peak_flops(dist.device)
        self.pending: deque[PendingStep] = deque()
        self.max_pending = int(dist.device.type == "cuda")  # a step on a CPU is not asynchronous
        self.skipped_in_a_row = 0  # steps whose gradient was not finite
        self.stop_requested = False  # by any rank

    def begin_step(self) -> Time:
        """Return when the next step begins: at the end of the previous one, or now if that one has
        been read, because an evaluation or a save may have come in between.
        """
        return self.pending[-1].end if self.pending else clock(self.dist.device)

    def add(self, record: dict, begin: Time, loss: Tensor, grad_norm: Tensor, stop: bool) -> None:
        """Queue a step that was launched after `begin_step`. `record` has its number and learning
        rate, `loss` is this rank's share of the mean loss, and `stop` says whether this rank wants
        to stop after it.
        """
        # A signal may reach one rank only, but all must stop after the same step. So they add up
        # their requests, in the all-reduce that the loss needs anyway.
        shared = torch.stack([loss, torch.full_like(loss, stop)])
        mean_loss, n_stopping = self.dist.all_reduce(shared)
        results = torch.stack([mean_loss, n_stopping, grad_norm])
        # Start the copy to the CPU now. Later it would queue behind the next step.
        is_cuda = self.dist.device.type == "cuda"
        results = torch.empty(3, pin_memory=is_cuda).copy_(results, non_blocking=is_cuda)
        self.pending.append(PendingStep(record, begin, clock(self.dist.device), results))

    def read(self, wait: bool) -> Iterator[dict]:
        """Yield the records of all queued steps. On CUDA, leave the latest in the queue, unless
        `wait` is true or a rank wants to stop.
        """
        while len(self.pending) > (0 if wait or self.stop_requested else self.max_pending):
            yield self._read_step()

    def _read_step(self) -> dict:
        record, begin, end, results = self.pending.popleft()
        if isinstance(begin, float) or isinstance(end, float):
            seconds = end - begin  # type: ignore[operator]  # both are floats, or both are events
        else:
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        loss, n_stopping, norm = results.tolist()
        self.stop_requested |= n_stopping > 0
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
    """Read the log of a run, one dict per step."""
    return JSONLinesLog.read(Path(run) / "metrics.jsonl", "step")


class TensorBoardLogger:
    """Logs to RUN/tensorboard. If it has no events yet, earlier steps are written first."""

    def __init__(self, run: Path, earlier: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        has_events = bool(earlier) and any(folder.glob("events.*"))
        # Hide steps that are here but not in metrics.jsonl: the resumed run repeats them.
        purge_step = earlier[-1]["step"] + 1 if has_events else None
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        if not has_events:
            for record in earlier:
                self.write(record)

    def write(self, record: dict) -> None:
        for name, value in select_numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], double_precision=True)
        for i, sample in enumerate(record.get("samples", [])):
            # Indented, the text is a code block in Markdown.
            text = "\n".join("    " + line for line in sample.splitlines())
            self.writer.add_text(f"sample_{i + 1}", text, record["step"])
        self.writer.flush()  # so that a killed run loses nothing

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Logs to Weights & Biases. A resumed run continues its W&B run. The environment variables of
    W&B work as usual (WANDB_MODE=offline, WANDB_PROJECT).
    """

    def __init__(self, run: Path, earlier: list[dict]):
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
            settings=wandb.Settings(console="off"),  # do not capture stdout and the progress bar
        )
        for record in earlier:
            self.write(record)

    def write(self, record: dict) -> None:
        # starting_step is the first step that W&B lacks. After a kill, it may be before the step
        # from which the run resumes; offline, it is 0. W&B keeps the record of a step it has.
        if record["step"] < self.wandb_run.starting_step:
            return
        samples = {f"sample_{i + 1}": text for i, text in enumerate(record.get("samples", []))}
        self.wandb_run.log(select_numbers(record) | samples, step=record["step"])

    def close(self) -> None:
        self.wandb_run.finish()


def select_numbers(record: dict) -> dict[str, float]:
    """Return the values that can be plotted against the step."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


Logger = TensorBoardLogger | WandbLogger
LOGGER_CLASSES: dict[str, type[Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


class RunLogger:
    """Logs a run from rank 0: to metrics.jsonl, the other loggers, and the terminal (a progress
    bar on stderr, or a line on stdout now and then).
    """

    def __init__(self, config: TrainConfig, dist: Distributed, start: int):
        self.run, self.is_main = Path(config.out_dir), dist.is_main
        self.start_step, self.config, self.last_print = start, config, -math.inf
        self.step_times: deque[float] = deque(maxlen=RECENT_STEPS)  # in ms
        self.eval_times: list[float] = []
        hidden = None if dist.is_main else True  # None: tqdm shows the bar only in a terminal
        self.bar = tqdm(
            desc=self.run.name, initial=start, total=config.max_steps, unit=" steps", disable=hidden
        )
        if self.is_main:
            self.metrics = JSONLinesLog(self.run / "metrics.jsonl", "step")
            # A resumed run repeats the steps after its checkpoint, so their records go.
            self.metrics.drop_after(start or -1)
            self.loggers: dict[str, Logger] = {}
            for name in config.loggers:
                self._call_safely(name, self._open, name)

    def _open(self, name: str) -> None:
        self.loggers[name] = LOGGER_CLASSES[name](self.run, self.metrics.records)

    def _call_safely(self, name: str, call: Callable[..., None], *args: object) -> None:
        """Call a logger. If it raises anything (disk, network, bugs), only this logger is lost."""
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
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal is gone. The SIGHUP that stops the run may come later.
            drop_lost_terminal()

    def log(self, record: dict) -> None:
        """Log a step. Print a line if it was evaluated, or if the last line was a while ago."""
        if not self.is_main:
            return
        step = record["step"]
        for name, logger in list(self.loggers.items()):
            self._call_safely(name, logger.write, record)
        self.metrics.append(record)
        self.bar.update(step - self.bar.n)
        if record.get("train_loss") is not None:
            speed = f"{record['tokens_per_s']:,.0f} tokens/s"
            self.bar.set_postfix_str(f"loss {record['train_loss']:.4f}, {speed}")
        if step > self.start_step + 1:  # the first step may compile
            self.step_times.append(record["step_ms"])
        self.eval_times += [record["eval_ms"]] if "eval_ms" in record else []
        is_due = self.bar.disable and time.perf_counter() - self.last_print > PROGRESS_SECONDS
        if "eval_ms" in record or is_due:
            self._print_step(record)

    def _print_step(self, record: dict) -> None:
        step, self.last_print = record["step"], time.perf_counter()
        parts = [f"step {step}/{self.config.max_steps}"]
        for key, label, spec in (
            ("train_loss", "loss", ".4f"),
            ("val_loss", "val", ".4f"),
            ("hellaswag_acc_norm", "HellaSwag acc_norm", ".4f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "norm", ".2f"),
            ("tokens_per_s", "tokens/s", ",.0f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{label} {record[key]:{spec}}")
        if self.step_times:
            parts.append(f"{format_seconds(self.estimate_seconds_left(step))} left")
        self.print(" | ".join(parts))
        for sample in record.get("samples", []):
            self.print("  sample: " + collapse_newlines(sample).replace("\n", "\n  "))

    def estimate_seconds_left(self, step: int) -> float:
        """Return the time of the steps and evaluations after `step`, without saves. Compiling does
        not count: the median ignores the few steps that compile a new length, and we drop the first
        evaluation if there are others.
        """
        steps = range(step + 1, self.config.max_steps + 1)
        step_ms = statistics.median(self.step_times) * len(steps)
        eval_ms = statistics.mean(self.eval_times[1:] or self.eval_times or [0.0])
        return (step_ms + eval_ms * sum(map(self.config.is_any_evaluation_due, steps))) / 1e3

    def finish(self) -> None:
        """Close the loggers and print a summary. It is built from the files of the run, so starting
        a finished run again prints the same one.
        """
        self.bar.close()
        if not self.is_main:
            return
        for name, logger in list(self.loggers.items()):
            self._call_safely(name, logger.close)
        latest, best = list_checkpoints(self.run)[-1], best_checkpoint(self.run)
        checkpoint = choose_checkpoint(self.run)
        samples = [r["samples"][0] for r in read_metrics(self.run) if r.get("samples")]
        samples = [repr(collapse_newlines(s)) for s in samples] or ["none, sample_every is 0"]
        rows = summarize_run(self.run, latest) | {
            "last checkpoint": describe_checkpoint(latest),
            "best saved checkpoint": describe_checkpoint(best) if best else "none was evaluated",
            "sample before": samples[0],
            "sample after": samples[-1],
            "loss plot": str(self.run / "loss.png"),
            "report": str(self.run / "report.html"),
            "in transformers": f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})",
        }
        print("", *(f"{k:<{SUMMARY_COLUMN}}{v}" for k, v in rows.items()), sep="\n", flush=True)


def describe_checkpoint(checkpoint: Path) -> str:
    loss = read_progress(checkpoint).get("val_loss")
    result = "not evaluated" if loss is None else f"validation loss {loss:.4f}"
    return f"{checkpoint}, {result}"


def collapse_newlines(text: str) -> str:
    """Remove blank lines. Untrained models write many."""
    return re.sub(r"\n\s*\n", "\n", text)


def summarize_run(run: Path, checkpoint: Path) -> dict[str, str]:
    """Summarize a run up to a checkpoint as {label: text}, for the terminal, report.html and the
    model card. Metrics that were not logged are left out.
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
    for label, (key, show) in SUMMARY_METRICS.items():
        if values := logged(key):
            rows[label] = show(values)
    rows["steps"] = f"{progress['step']:,} of {read_run_config(run)['max_steps']:,}"
    rows["tokens trained on"] = f"{max(logged('tokens'), default=0):,}"
    rows["data"] = name_dataset(run)
    return rows | progress.get("facts", {})  # from `collect_facts`; earlier versions had none


def read_fixed_settings(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the settings that the loss curve of a run depends on, without local paths."""
    settings = read_run_config(run)
    # Checkpoints of earlier versions do not list them; then all settings are shown.
    names = read_progress(checkpoint).get("fixed_settings", settings)
    return {name: hide_folder(value) for name, value in settings.items() if name in names}


def name_dataset(run: Path) -> str:
    """Return the name of the dataset of a run: for your own text "files in FOLDER", with the shard
    folder; in fine-tuning the name of the file or dataset.
    """
    config = read_run_config(run)
    if "data_dir" not in config:  # a run of finetune_lora.py
        return hide_folder(config.get("data", ""))
    folder = Path(config["data_dir"])
    name = read_manifest(folder).get("dataset", "files")
    return f"files in {folder.resolve().name}" if name == "files" else name


def hide_folder(setting: Any) -> Any:
    """Return the setting, without the folder if it is a local path."""
    path = Path(str(setting))
    is_local = path.is_absolute() or path.exists() or path.name.endswith(FILE_SUFFIXES)
    return path.name if isinstance(setting, str) and is_local else setting
