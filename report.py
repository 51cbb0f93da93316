"""A file of its own so that `training.py` only trains: what a run tells, on screen and on disk."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import MetricsLog, checkpoints, read_metrics
from data import TrainingData
from loggers import LOGGERS, Logger, logger_names
from lora import CONFIG_FILE as ADAPTER_CONFIG
from model import GPT
from runtime import Distributed, peak_flops, peak_memory

PROGRESS_SECONDS = 10.0  # between two lines where there is no terminal


def describe(groups: list[dict], data: TrainingData) -> str:
    """The sizes that follow from the config, with the parameters as the optimizer groups them."""
    decayed, others = (group["params"] for group in groups)
    return (
        f"parameters: decayed {len(decayed)} tensors with {sum(p.numel() for p in decayed):,}, "
        f"not decayed {len(others)} with {sum(p.numel() for p in others):,}\n{data.describe()}"
    )


def flops_per_token(model: GPT, block_size: int) -> int:
    """Of forward and backward, as in PaLM's appendix B: 6 for each parameter in a matrix product (4
    where it is frozen), and 12 · n_layer · n_embd · T for attention.
    """
    table = model.transformer.wpe.weight  # looked up, not multiplied
    params = [p for p in model.parameters() if p is not table]
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in params)
    return products + 12 * model.config.n_layer * model.config.n_embd * block_size


def finite_or_none(value: float) -> float | None:
    """JSON has no word for infinity or not-a-number."""
    return value if math.isfinite(value) else None


class Meter:
    """Turns what steps return into records for the log. On CUDA a step is read when the next one
    has been launched, so that the device never waits for the CPU.
    """

    def __init__(self, model: GPT, data: TrainingData, dist: Distributed):
        peak = peak_flops(dist.device)
        self.data, self.flops_per_token = data, flops_per_token(model, data.block_size)
        self.peak, self.dist = peak and peak * dist.world_size, dist
        self.in_flight: deque[tuple[int, float, torch.Tensor, torch.Tensor]] = deque()
        self.ahead = int(dist.device.type == "cuda")  # a CPU's step is over when it returns
        self.last_read = -math.inf
        self.skipped_in_a_row = 0  # steps with a gradient that was not finite

    def launched(
        self, step: int, started: float, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool
    ) -> None:
        """Take what a step that was started then has returned, and whether this rank is to stop."""
        # Ranks have to agree on stopping, and asking together with the loss is free.
        sums = self.dist.summed(torch.stack([loss, torch.full_like(loss, stop)]))
        self.in_flight.append((step, started, sums, grad_norm))

    def read(self, wait: bool) -> tuple[dict, bool] | None:
        """The record of the earliest step that has not been read, and whether any rank is to stop.
        None when all have been, and unless told to wait, when the device should go on undisturbed.
        """
        if len(self.in_flight) <= (0 if wait else self.ahead):
            return None
        step, started, sums, grad_norm = self.in_flight.popleft()
        (loss, stops), norm = sums.tolist(), grad_norm.item()
        now = time.perf_counter()
        seconds, self.last_read = now - max(started, self.last_read), now
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        total = self.data.tokens_through(step)
        speed = (total - self.data.tokens_through(step - 1)) / seconds
        record = {
            "step": step,
            "train_loss": finite_or_none(loss),
            "grad_norm": finite_or_none(norm),
            "tokens": total,
            "tokens_per_s": round(speed, 1),
            "step_ms": round(seconds * 1e3, 2),
            "mfu": round(self.flops_per_token * speed / self.peak, 4) if self.peak else None,
            "peak_memory_gb": round(peak_memory(self.dist.device) / 1e9, 3),
        }
        return record, stops > 0


class Report:
    """What the main rank tells: metrics.jsonl, the loggers of `log`, a progress bar on a terminal,
    lines elsewhere.
    """

    def __init__(self, run: Path, max_steps: int, dist: Distributed, start: int, log: str = ""):
        self.run, self.max_steps, self.is_main = run, max_steps, dist.is_main
        self.start, self.started, self.last_line = start, time.perf_counter(), -math.inf
        self.log = MetricsLog(run) if dist.is_main else None
        self.bar = tqdm(
            desc=run.name,
            initial=start,
            total=max_steps,
            unit=" steps",
            disable=None if dist.is_main else True,
        )
        self.loggers: dict[str, Logger] = {}
        for name in logger_names(log) if dist.is_main else []:
            self.guard(name, self._open, name)

    def _open(self, name: str) -> None:
        self.loggers[name] = LOGGERS[name](self.run)

    def guard(self, name: str, call: Callable[..., None], *args: object) -> None:
        """Call a logger; whatever it raises (disk, network, its own code) ends the logger only."""
        try:
            call(*args)
        except Exception as error:
            self.loggers.pop(name, None)
            self.line(f"logging to {name} is off from here on: {type(error).__name__}: {error}")

    def line(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)

    def step(self, record: dict) -> None:
        """Log a step; tell of it when it was evaluated, or when nothing was told for a while."""
        if self.log is None:
            return
        if record["step"] > self.log.last_step:
            for name, logger in list(self.loggers.items()):
                self.guard(name, logger.write, record)
        self.log.write(record)
        step, now = record["step"], time.perf_counter()
        self.bar.update(step - self.bar.n if step else 0)
        speed = f"{record.get('tokens_per_s', 0):,.0f} tokens/s"
        if record.get("train_loss") is not None:
            self.bar.set_postfix_str(f"loss {record['train_loss']:.4f}, {speed}")
        silent = self.bar.disable and now - self.last_line > PROGRESS_SECONDS
        if not ({"val_loss", "samples", "hellaswag_acc"} & record.keys() or silent):
            return
        self.last_line = now
        parts = [f"step {step}/{self.max_steps}"]
        for key, label, form in (
            ("train_loss", "loss", ".4f"),
            ("val_loss", "val", ".4f"),
            ("hellaswag_acc_norm", "HellaSwag acc_norm", ".4f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "norm", ".2f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{label} {record[key]:{form}}")
        if step > self.start:
            left = (now - self.started) / (step - self.start) * (self.max_steps - step)
            parts += [speed, f"{timedelta(seconds=round(left))} left"]
        self.line(" | ".join(parts))
        for sample in record.get("samples", []):
            self.line("  sample: " + sample.replace("\n", "\n  "))

    def finish(self) -> None:
        """Say what came of the run, from its log: so a finished run says the same again."""
        self.bar.close()
        if not self.is_main:
            return
        for name, logger in list(self.loggers.items()):
            self.guard(name, logger.close)
        records = read_metrics(self.run)
        losses = [f"{r['val_loss']:.4f}" for r in records if r.get("val_loss") is not None] or ["-"]
        speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
        peak = max((r["peak_memory_gb"] for r in records if "peak_memory_gb" in r), default=None)
        samples = [r["samples"][0] for r in records if r.get("samples")]
        checkpoint = str(checkpoints(self.run)[-1])
        is_adapter = Path(checkpoint, ADAPTER_CONFIG).exists()
        rows = {
            "validation loss": f"{losses[0]} at the start, {losses[-1]} at the end",
            "speed": f"{statistics.median(speeds):,.0f} tokens/s",
            "peak memory": f"{peak} GB" if peak else "not logged",
            "sample before": repr(samples[0]) if samples else "none, --sample_every is 0",
            "sample after": repr(samples[-1]) if samples else "none, --sample_every is 0",
            "loss plot": str(self.run / "loss.png"),
            "report": str(self.run / "report.html"),
            "checkpoint": checkpoint,
        }
        if is_adapter:
            rows["in peft"] = f"AutoPeftModelForCausalLM.from_pretrained({checkpoint!r})"
        else:
            rows["in transformers"] = f"AutoModelForCausalLM.from_pretrained({checkpoint!r})"
        print("", *(f"{name:<17}{value}" for name, value in rows.items()), sep="\n", flush=True)
