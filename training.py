"""The only training loop, and what it is made of: schedule, optimizer, the step, evaluation."""

import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import (
    MetricsLog,
    checkpoints,
    load_progress,
    load_state,
    read_metrics,
    save_checkpoint,
)
from data import IGNORE_INDEX, Batch, PretrainingData, TokenShards, evaluation_batches
from model import GPT
from plot import plot_runs
from runtime import Distributed, Interrupt, autocast_dtype, peak_flops, to_device
from tokenizer import get_tokenizer

BETAS, EPS = (0.9, 0.95), 1e-8  # GPT-3 paper, appendix B
MAX_SKIPPED_IN_A_ROW = 5  # steps with a gradient that is not finite
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TOP_K = "Hello, I'm a language model,", 32, 50  # build-nanogpt
PROGRESS_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know, whatever is trained. The defaults are GPT-3's for 124M, as
    build-nanogpt uses them.
    """

    out_dir: str = "runs/gpt2_124m"
    """run folder: config, log, plot and checkpoints"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run in out_dir where there is one"""
    batch_size: int = 64
    """sequences per device and micro-step"""
    total_batch_size: int = 524_288
    """tokens per optimizer step over all devices"""
    max_steps: int = 19_073
    """optimizer steps; 19,073 of 524,288 tokens are 10 B"""
    warmup_steps: int = 715
    """steps of linear warm-up; 375 M tokens in GPT-3"""
    max_lr: float = 6e-4
    """learning rate after the warm-up"""
    min_lr: float = 6e-5
    """learning rate at max_steps, reached along a cosine"""
    weight_decay: float = 0.1
    """on tensors of two or more dimensions"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 is no limit"""
    eval_every: int = 250
    """steps between evaluations"""
    eval_tokens: int = 10_485_760
    """validation tokens of an evaluation, always the same first ones"""
    sample_every: int = 250
    """steps between samples; 0 is never"""
    save_every: int = 1000
    """steps between checkpoints"""
    keep: int = 2
    """newest checkpoints to keep, beside the best"""
    seed: int = 1337
    """of the initialisation, the order of the data and the samples"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA (fp16 on cards without), fp32 elsewhere"""
    compile: bool | None = None
    """torch.compile the training step (default: on CUDA)"""

    def __post_init__(self):
        at_least = dict.fromkeys(
            ("batch_size", "total_batch_size", "max_steps", "eval_every", "eval_tokens"), 1
        )
        at_least |= dict.fromkeys(("save_every", "keep"), 1)
        at_least |= dict.fromkeys(("warmup_steps", "grad_clip", "sample_every", "weight_decay"), 0)
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(
                f"min_lr {self.min_lr} and max_lr {self.max_lr}: expected 0 <= min <= max"
            )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step counted from 1: linear warm-up, then a cosine down to min_lr. Step s has
    what build-nanogpt computes for its step s - 1, so the first is not wasted on a rate of 0.
    """
    done = step - 1
    if done < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    progress = (done - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (
        config.max_lr - config.min_lr
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What is trainable in two groups: tensors of two or more dimensions, which decay, and others,
    which do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def describe(model: GPT, data: PretrainingData) -> str:
    """The sizes that follow from the config."""
    decayed, others = (group["params"] for group in parameter_groups(model, 1.0))
    return (
        f"parameters: decayed {len(decayed)} tensors with {sum(p.numel() for p in decayed):,}, "
        f"not decayed {len(others)} with {sum(p.numel() for p in others):,}\n"
        f"tokens per step: {data.total_batch_size:,} = {data.batch_size} sequences x "
        f"{data.block_size} tokens x {data.world_size} ranks x grad_accum_steps "
        f"{data.grad_accum_steps}\n"
        f"data: {len(data.shards):,} tokens, an epoch is "
        f"{len(data.shards) / data.total_batch_size:,.1f} steps"
    )


class StepLoss(nn.Module):
    """What the training step calls: the model's summed loss, with the trunk compiled if asked for.
    Compiled code lives here alone; the model that is evaluated, sampled and saved stays raw.
    """

    def __init__(self, model: GPT, compile_trunk: bool):
        super().__init__()
        self.model = model
        self.hidden = torch.compile(model.hidden) if compile_trunk else model.hidden

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model.loss_from_hidden(self.hidden(idx), targets, reduction="sum")


class TrainingStep:
    """One optimizer step: gradients of all micro-steps, averaged over ranks, clipped, applied."""

    def __init__(self, model: GPT, data: PretrainingData, config: TrainConfig, dist: Distributed):
        self.data, self.config, self.dist = data, config, dist
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.max_lr,
            betas=BETAS,
            eps=EPS,
            fused=True,
        )
        self.dtype = autocast_dtype(config.precision, dist.device)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == torch.float16)
        compile_trunk = config.compile if config.compile is not None else dist.device.type == "cuda"
        self.loss: nn.Module = StepLoss(model, compile_trunk)
        if dist.world_size > 1:
            self.loss = DistributedDataParallel(self.loss)
        self.skipped_in_a_row = 0

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.dist.device.type, dtype=self.dtype)

    def _sync(self, last: bool) -> AbstractContextManager:
        """Ranks average gradients once a step, in the backward pass of the last micro-step."""
        return nullcontext() if last or self.dist.world_size == 1 else self.loss.no_sync()

    def __call__(self, step: int) -> tuple[float, float]:
        """Do step `step`; return this rank's share of the mean loss, and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        n_targets = self.data.targets_in_step(step)
        total = torch.zeros((), device=self.dist.device)
        for micro_step in range(1, self.data.grad_accum_steps + 1):
            idx, targets = to_device(self.data.micro_batch(step, micro_step), self.dist.device)
            with self._sync(last=micro_step == self.data.grad_accum_steps):
                with self.autocast():
                    loss = self.loss(idx, targets) / n_targets
                # DDP takes the mean over ranks where the sum is wanted.
                self.scaler.scale(loss * self.dist.world_size).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.params, self.config.grad_clip or math.inf).item()
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
        else:
            self.skipped_in_a_row += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm

    def state(self) -> dict:
        cuda = torch.cuda.get_rng_state() if self.dist.device.type == "cuda" else None
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.dist.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


@torch.no_grad()
def evaluate(model: GPT, batches: Iterator[Batch], dist: Distributed) -> float:
    """Mean loss in nats over all targets that the batches of all ranks predict."""
    loss_sum, n_targets = 0.0, 0
    for batch in batches:
        idx, targets = to_device(batch, dist.device)
        loss_sum += model.loss(idx, targets, reduction="sum").item()
        n_targets += int((batch[1] != IGNORE_INDEX).sum())
    loss_sum, n_targets = dist.sum(loss_sum, n_targets)
    return loss_sum / n_targets


def sample_text(model: GPT, config: TrainConfig, step: int, device: torch.device) -> str:
    tokenizer = get_tokenizer()
    idx = torch.tensor([tokenizer.encode(SAMPLE_PROMPT)], device=device)
    generator = torch.Generator(device).manual_seed(config.seed + step)
    out = model.generate(idx, SAMPLE_TOKENS, top_k=SAMPLE_TOP_K, generator=generator)
    return tokenizer.decode(out[0].tolist())


def flops_per_token(model: GPT, block_size: int) -> int:
    """Of forward and backward, as in PaLM's appendix B: 6 for each parameter in a matrix product,
    and 12 · n_layer · n_embd · T for attention.
    """
    n_params = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * n_params + 12 * model.config.n_layer * model.config.n_embd * block_size


def train(
    model: GPT,
    data: PretrainingData,
    val_shards: TokenShards,
    config: TrainConfig,
    dist: Distributed,
    checkpoint: Path | None,
) -> None:
    """Train `model` to max_steps, from the start or from `checkpoint`, whose weights it has."""
    run = Path(config.out_dir)
    training_step = TrainingStep(model, data, config, dist)
    start = 0
    if checkpoint is not None:
        start = load_progress(checkpoint)["step"]
        training_step.load_state(load_state(checkpoint))
    report = Report(run, config, dist, start)
    step_flops = flops_per_token(model, data.block_size) * data.total_batch_size
    peak = peak_flops(dist.device)

    def validation_loss() -> float:
        batches = evaluation_batches(
            val_shards,
            data.block_size,
            data.batch_size,
            config.eval_tokens,
            dist.rank,
            dist.world_size,
        )
        with training_step.autocast():
            return evaluate(model, batches, dist)

    if start == 0:
        report.step({"step": 0, "tokens": 0, "val_loss": validation_loss()})
    with Interrupt() as interrupt:
        for step in range(start + 1, config.max_steps + 1):
            started = time.perf_counter()
            loss, grad_norm = training_step(step)
            # Ranks have to agree on stopping, and asking together with the loss is free.
            loss, stop = dist.sum(loss, interrupt.signum is not None)
            seconds = time.perf_counter() - started
            record = {
                "step": step,
                "train_loss": finite_or_none(loss),
                "lr": learning_rate(step, config),
                "grad_norm": finite_or_none(grad_norm),
                "tokens": step * data.total_batch_size,
                "tokens_per_s": round(data.total_batch_size / seconds, 1),
                "step_ms": round(seconds * 1e3, 2),
                "mfu": round(step_flops / seconds / peak / dist.world_size, 4) if peak else None,
            }
            last = step == config.max_steps
            if step % config.eval_every == 0 or last:
                record["val_loss"] = validation_loss()
            if config.sample_every and (step % config.sample_every == 0 or last):
                record["sample"] = sample_text(model, config, step, dist.device)
            report.step(record)
            if training_step.skipped_in_a_row:
                report.skipped(step, training_step.skipped_in_a_row)
            if (step % config.save_every == 0 or last or stop) and dist.is_main:
                progress = {"step": step, "val_loss": record.get("val_loss")}
                save_checkpoint(run, model, progress, training_step.state(), config.keep)
                plot_runs([run], run / "loss.png")
            if stop:
                report.line(f"stopped after step {step}, saved; the same command goes on")
                sys.exit(128 + (interrupt.signum or signal.SIGTERM))  # as a shell reports it
    report.finish()


def finite_or_none(value: float) -> float | None:
    """JSON has no word for infinity or not-a-number."""
    return value if math.isfinite(value) else None


class Report:
    """What the main rank tells: metrics.jsonl, a progress bar on a terminal, lines elsewhere."""

    def __init__(self, run: Path, config: TrainConfig, dist: Distributed, start: int):
        self.run, self.max_steps, self.is_main = run, config.max_steps, dist.is_main
        self.start, self.started, self.last_line = start, time.perf_counter(), -math.inf
        self.log = MetricsLog(run) if dist.is_main else None
        self.bar = tqdm(
            desc=run.name,
            initial=start,
            total=config.max_steps,
            unit=" steps",
            disable=None if dist.is_main else True,
        )

    def line(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)

    def step(self, record: dict) -> None:
        """Log a step; tell of it when it was evaluated, or when nothing was told for a while."""
        if not self.is_main:
            return
        self.log.write(record)
        step, now = record["step"], time.perf_counter()
        self.bar.update(step - self.bar.n if step else 0)
        speed = f"{record.get('tokens_per_s', 0):,.0f} tokens/s"
        if record.get("train_loss") is not None:
            self.bar.set_postfix_str(f"loss {record['train_loss']:.4f}, {speed}")
        silent = self.bar.disable and now - self.last_line > PROGRESS_SECONDS
        if not ("val_loss" in record or "sample" in record or silent):
            return
        self.last_line = now
        parts = [f"step {step}/{self.max_steps}"]
        for key, label, form in (
            ("train_loss", "loss", ".4f"),
            ("val_loss", "val", ".4f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "norm", ".2f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{label} {record[key]:{form}}")
        if step > self.start:
            left = (now - self.started) / (step - self.start) * (self.max_steps - step)
            parts += [speed, f"{timedelta(seconds=round(left))} left"]
        self.line(" | ".join(parts))
        if "sample" in record:
            self.line(f"  sample: {record['sample']!r}")

    def skipped(self, step: int, in_a_row: int) -> None:
        self.line(f"step {step} skipped: its gradient is not finite ({in_a_row} in a row)")
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"{in_a_row} steps in a row had a gradient that is not finite; the checkpoints in "
                f"{self.run} are from before. Lower --max_lr, or use --precision fp32"
            )

    def finish(self) -> None:
        """Say what came of the run, from its log: so a finished run says the same again."""
        self.bar.close()
        if not self.is_main:
            return
        records = read_metrics(self.run)
        losses = [r["val_loss"] for r in records if "val_loss" in r]
        speeds = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
        samples = [r["sample"] for r in records if "sample" in r]
        checkpoint = str(checkpoints(self.run)[-1])
        rows = {
            "validation loss": f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end",
            "speed": f"{statistics.median(speeds):,.0f} tokens/s",
            "sample": repr(samples[-1]) if samples else "none, --sample_every is 0",
            "loss plot": str(self.run / "loss.png"),
            "checkpoint": checkpoint,
            "in transformers": f"AutoModelForCausalLM.from_pretrained({checkpoint!r})",
        }
        print("", *(f"{name:<17}{value}" for name, value in rows.items()), sep="\n", flush=True)
