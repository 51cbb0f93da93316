"""The only training loop, and what it is made of: schedule, optimizer, the step, evaluation."""

import copy
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    BackgroundSave,
    save_checkpoint,
)
from data import IGNORE_INDEX, Batch, PretrainingData, TokenShards, evaluation_batches
from model import GPT
from plot import plot_runs
from report import Report, finite_or_none, flops_per_token
from runtime import Distributed, Interrupt, peak_flops, shard, to_device
from tokenizer import get_tokenizer

WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
AUTOCAST_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BETAS, EPS = (0.9, 0.95), 1e-8  # GPT-3 paper, appendix B
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
    recompute: Literal["none", "block"] = "none"
    """block: keep only the inputs of blocks for the backward pass, and compute the rest again"""

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


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    """What is trainable in two groups: tensors of two or more dimensions, which decay, and others,
    which do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


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
        self.model, self.data, self.config, self.dist = model, data, config, dist
        self.dtype = AUTOCAST_DTYPE[config.precision]
        if self.dtype is not None and dist.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == torch.float16)
        self.skipped_in_a_row = 0
        self.host: dict | None = None  # the last snapshot's memory
        for block in model.transformer.h:
            block.recompute = config.recompute == "block"
        self.sharded = config.parallel == "fsdp" and dist.world_size > 1
        if self.sharded:
            if self.scaler.is_enabled():
                raise ValueError(
                    "precision fp16 does not go with --parallel fsdp; use bf16 or fp32"
                )
            shard(model, dist, self.dtype, config.compile)
            self.loss = partial(model.loss, reduction="sum")
        else:
            self.loss = StepLoss(model, config.compile)
            if dist.world_size > 1:
                self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.max_lr,
            betas=BETAS,
            eps=EPS,
            fused=True,
        )

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.dist.device.type, dtype=self.dtype)

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Evaluation and samples: in the training's precision, with nothing compiled."""
        with torch.compiler.set_stance("force_eager"), self.autocast():
            yield

    def _sync(self, last: bool) -> AbstractContextManager:
        """Ranks average gradients once a step, in the backward pass of the last micro-step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.dist.world_size > 1 and not last:
            return self.loss.no_sync()
        return nullcontext()

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
                # The mean over ranks is taken where the sum is wanted.
                self.scaler.scale(loss * self.dist.world_size).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
        else:
            self.skipped_in_a_row += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm

    def _clip(self) -> float:
        """Scale the gradient down to grad_clip, and return the norm that it had."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        # Rows first: over a whole table at once fp32 loses four digits on a CPU, and other ones for
        # each number of ranks.
        norms = [
            torch.linalg.vector_norm(p.grad, dim=-1) if p.grad.dim() > 1 else p.grad for p in params
        ]
        norm = nn.utils.get_total_norm(norms)
        nn.utils.clip_grads_with_norm_(params, self.config.grad_clip or math.inf, norm)
        return (norm.full_tensor() if self.sharded else norm).item()

    def snapshot(self) -> tuple[dict, dict]:
        """Copies in host memory of all parameters and of what else it takes to go on, both by the
        names of the parameters and whole, so that any number of ranks can read them. All ranks
        call it; on the main one the copies are complete, until the next call overwrites them.
        """
        params = get_model_state_dict(self.model, options=WHOLE_ON_CPU)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE_ON_CPU)
        if self.dist.device.type == "cpu" and not self.sharded:  # not copies yet
            self.host = copied({"params": params, "optimizer": optimizer}, self.host)
            params, optimizer = self.host["params"], self.host["optimizer"]
        cuda = torch.cuda.get_rng_state() if self.dist.device.type == "cuda" else None
        return params, {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state(self, state: dict) -> None:
        """Take over what `snapshot` gave second, on this or another number of ranks."""
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=whole)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.dist.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def copied(source: object, earlier: object = None) -> object:
    """A copy of nested dicts with tensors, in the memory of an earlier one where there is one: new
    memory would cost several times the copying.
    """
    if isinstance(source, dict):
        return {key: copied(value, (earlier or {}).get(key)) for key, value in source.items()}
    if isinstance(source, torch.Tensor):
        return source.detach().clone() if earlier is None else earlier.copy_(source.detach())
    return copy.deepcopy(source)


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
    run = Path(config.out_dir)
    step_flops = flops_per_token(model, data.block_size) * data.total_batch_size
    peak = peak_flops(dist.device)
    training_step = TrainingStep(model, data, config, dist)
    start = 0
    if resumed is not None:
        start = resumed[0]["step"]
        if resumed[0]["data"] != data.shards.fingerprint:
            raise ValueError(
                f"{run} was trained on other shards than those in data_dir now; it goes on exactly "
                "only with the same ones"
            )
        training_step.load_state(resumed[1])
        resumed[1].clear()  # gigabytes that nobody needs any more
    report = Report(run, config.max_steps, dist, start)
    if start:
        report.line(f"going on from step {start}")
    background = BackgroundSave()

    def validation_loss() -> float:
        batches = evaluation_batches(
            val_shards,
            data.block_size,
            data.batch_size,
            config.eval_tokens,
            dist.rank,
            dist.world_size,
        )
        with training_step.raw():
            return evaluate(model, batches, dist)

    def save(record: dict) -> None:
        background.wait()  # it reads the last snapshot, which the next one overwrites
        params, state = training_step.snapshot()
        if dist.is_main:
            progress = {
                "step": record["step"],
                "val_loss": record.get("val_loss"),
                "data": data.shards.fingerprint,
            }

            def write() -> None:
                save_checkpoint(run, model, params, progress, state, config.keep)
                plot_runs([run], run / "loss.png")

            background.start(write)

    if start == 0:
        val_loss = finite_or_none(validation_loss())
        report.step({"step": 0, "tokens": 0, "val_loss": val_loss})
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
                record["val_loss"] = finite_or_none(validation_loss())
            if config.sample_every and (step % config.sample_every == 0 or last):
                with training_step.raw():
                    record["sample"] = sample_text(model, config, step, dist.device)
            report.step(record)
            if in_a_row := training_step.skipped_in_a_row:
                report.line(
                    f"step {step} skipped: its gradient is not finite ({in_a_row} in a row)"
                )
                if in_a_row == MAX_SKIPPED_IN_A_ROW:
                    background.wait()
                    raise ValueError(
                        f"{in_a_row} steps in a row had a gradient that is not finite; the "
                        f"checkpoints in {run} are good. Lower --max_lr, or use --precision fp32"
                    )
            background.check()
            if step % config.save_every == 0 or last or stop:
                save(record)
            if stop:
                background.wait()
                dist.barrier()  # a rank that leaves early has torchrun stop the one that saves
                report.line(f"stopped after step {step}, saved; the same command goes on")
                sys.exit(128 + (interrupt.signum or signal.SIGTERM))  # as a shell reports it
        background.wait()
        dist.barrier()
    report.finish()
