"""The only training loop, with its settings, evaluation and samples."""

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import BackgroundSave, save_checkpoint
from data import IGNORE_INDEX, Batch, PretrainingData, TokenShards, evaluation_batches
from model import GPT
from plot import plot_runs
from report import Meter, Report, finite_or_none
from runtime import Distributed, Interrupt, to_device
from step import TrainingStep, learning_rate
from tokenizer import get_tokenizer

MAX_SKIPPED_IN_A_ROW = 5  # steps with a gradient that is not finite
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TOP_K = "Hello, I'm a language model,", 32, 50  # build-nanogpt


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
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """of matrix products (default: bf16 on CUDA, fp16 on cards without it, fp32 elsewhere)"""
    compile: bool | None = None
    """torch.compile the training step (default: on CUDA)"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """over several devices: a whole model on each (ddp), or a part (fsdp, for the large sizes)"""
    recompute: Literal["none", "light", "block"] = "none"
    """what the backward pass computes again instead of keeping it: light, LayerNorm and GELU (a
    third less memory for nothing); block, nearly everything (a seventh of the memory, slower)"""

    def __post_init__(self):
        positive = "batch_size total_batch_size max_steps eval_every eval_tokens save_every keep"
        not_negative = "warmup_steps grad_clip sample_every weight_decay seed"
        for names, least in ((positive, 1), (not_negative, 0)):
            for name in names.split():
                if getattr(self, name) < least:
                    raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(
                f"min_lr {self.min_lr} and max_lr {self.max_lr}: expected 0 <= min <= max"
            )


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


def validation_loss(training_step: TrainingStep, val_shards: TokenShards) -> float | None:
    """The loss on the first eval_tokens tokens, each rank doing its share; None if not finite."""
    data, dist, config = training_step.data, training_step.dist, training_step.config
    batches = evaluation_batches(
        val_shards, data.block_size, data.batch_size, config.eval_tokens, dist.rank, dist.world_size
    )
    with training_step.raw():
        return finite_or_none(evaluate(training_step.model, batches, dist))


def resume(training_step: TrainingStep, progress: dict, state: dict) -> int:
    """Take over the state of a checkpoint; return its step."""
    training_step.load_state(state)
    state.clear()  # gigabytes that nobody needs any more
    return progress["step"]


def save(training_step: TrainingStep, record: dict, background: BackgroundSave) -> None:
    """Start to write the checkpoint and the plot of the step that `record` is of."""
    background.wait()  # it reads the last snapshot, which the next one overwrites
    params, state = training_step.snapshot()
    if not training_step.dist.is_main:
        return
    run, keep = Path(training_step.config.out_dir), training_step.config.keep
    progress = {
        "step": record["step"],
        "val_loss": record.get("val_loss"),
        "data": training_step.data.shards.fingerprint,
    }

    def write() -> None:
        save_checkpoint(run, training_step.model, params, progress, state, keep)
        plot_runs([run], run / "loss.png")

    background.start(write)


def train(
    model: GPT,
    data: PretrainingData,
    val_shards: TokenShards,
    config: TrainConfig,
    dist: Distributed,
    resumed: tuple[dict, dict] | None = None,
) -> None:
    """Train `model` to max_steps, from the start, or from the progress and state of a checkpoint
    whose weights it has.
    """
    meter = Meter(model, data, dist)
    training_step = TrainingStep(model, data, config, dist)
    start = resume(training_step, *resumed) if resumed else 0
    report = Report(Path(config.out_dir), config.max_steps, dist, start)
    background = BackgroundSave()
    if start:
        report.line(f"going on from step {start}")
    else:
        val_loss = validation_loss(training_step, val_shards)
        report.step({"step": 0, "tokens": 0, "val_loss": val_loss})
    with Interrupt() as interrupt:
        for step in range(start + 1, config.max_steps + 1):
            started = time.perf_counter()
            loss, grad_norm = training_step(step)
            # Ranks have to agree on stopping, and asking together with the loss is free.
            loss, stop = dist.sum(loss, interrupt.signum is not None)
            record = meter.record(step, loss, grad_norm, time.perf_counter() - started)
            record["lr"] = learning_rate(step, config)
            last = step == config.max_steps
            if step % config.eval_every == 0 or last:
                record["val_loss"] = validation_loss(training_step, val_shards)
            if config.sample_every and (step % config.sample_every == 0 or last):
                with training_step.raw():
                    record["sample"] = sample_text(model, config, step, dist.device)
            report.step(record)
            background.check()
            if step % config.save_every == 0 or last or stop:
                save(training_step, record, background)
            if stop or last or training_step.skipped_in_a_row:
                background.wait()
                stop_if_never_finite(training_step, report, step)
            if stop or last:
                dist.barrier()  # a rank that leaves early has torchrun stop the one that saves
            if stop and not last:
                report.line(f"stopped after step {step}, saved; the same command goes on")
                sys.exit(128 + (interrupt.signum or signal.SIGTERM))  # as a shell reports it
    report.finish()


def stop_if_never_finite(training_step: TrainingStep, report: Report, step: int) -> None:
    """Tell of a step that was skipped; ValueError when as many in a row as are too many."""
    in_a_row = training_step.skipped_in_a_row
    if in_a_row:
        report.line(f"step {step} skipped: its gradient is not finite ({in_a_row} in a row)")
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise ValueError(
            f"{in_a_row} steps in a row had a gradient that is not finite; the checkpoints in "
            f"{training_step.config.out_dir} are good. Lower --max_lr, or use --precision fp32"
        )
