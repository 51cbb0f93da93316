"""A file of its own so that the loop stays readable: one optimizer step, on one device or many."""

from __future__ import annotations

import bisect
import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from data import PretrainingData, TrainingData
from model import GPT, Block
from muon import Muon, momentum_at, whole
from runtime import Distributed, Prefetch, autocast_dtype, check_compiler, shard

if TYPE_CHECKING:
    from training import TrainConfig

# Frozen parameters never change, so they are not saved.
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
MEMORY_TO_SPARE = 0.05  # of a card, for fragments and what ranks exchange
BETAS, EPS = (0.9, 0.95), 1e-8  # GPT-3 paper, appendix B


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step counted from 1: linear warm-up, then a cosine down to min_lr, or a plateau
    and a line that would be 0 at the step after the last. Step s has what build-nanogpt computes
    for its step s - 1, so the first is not wasted on a rate of 0.
    """
    done = step - 1
    if done < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    if config.schedule == "wsd":
        decay_steps = max(1.0, config.decay_fraction * config.max_steps)
        return config.max_lr * min(1.0, (config.max_steps - done) / decay_steps)
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


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all that is trained; or Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: dict[int, list[nn.Parameter]] = {1: [], 3: []}  # by the matrices that each holds
    if config.optimizer == "muon":
        for name, param in model.transformer.h.named_parameters():
            if param.requires_grad and name.endswith(".weight") and param.dim() == 2:
                matrices[3 if name.endswith("c_attn.weight") else 1].append(param)
        if not any(matrices.values()):
            raise ValueError(
                "optimizer muon trains the matrices of the blocks, and here they are frozen; use "
                "adamw, or train the whole model"
            )
    with_muon = {id(param) for params in matrices.values() for param in params}
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in with_muon]
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=BETAS, eps=EPS, fused=True)
    if not with_muon:
        return [adamw]
    muon_groups = [{"params": p, "parts": n} for n, p in matrices.items() if p]
    return [adamw, Muon(muon_groups, config.muon_lr, config.muon_weight_decay)]


class StepLoss(nn.Module):
    """What the training step calls: the model's summed loss, with the trunk compiled if asked for.
    Compiled code lives here alone; the model that is evaluated, sampled and saved stays raw.
    """

    def __init__(self, model: GPT, compile_trunk: bool):
        super().__init__()
        self.model = model
        # Shapes are static where all batches have one; where lengths vary, dynamic from the second.
        self.hidden = torch.compile(model.hidden) if compile_trunk else model.hidden

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.model.loss_from_hidden(self.hidden(idx), targets, "sum", rows)


class TrainingStep:
    """One optimizer step: gradients of all micro-steps, averaged over ranks, clipped, applied."""

    def __init__(self, model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed):
        self.model, self.data, self.config, self.dist = model, data, config, dist
        if config.compile:
            check_compiler()
        self.dtype = autocast_dtype(config.precision, dist.device)
        if self.dtype is not None and dist.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == torch.float16)
        self.batches = Prefetch(data, dist.device)
        self.host: dict | None = None  # the last snapshot's memory
        self.loss: Callable[..., torch.Tensor]
        for module in model.train().modules():
            if isinstance(module, Block):
                module.recompute = config.recompute
        self.sharded = config.parallel == "fsdp" and dist.world_size > 1
        if self.sharded:
            if self.scaler.is_enabled():
                raise ValueError(
                    "precision fp16 does not go with --parallel fsdp; use bf16 or fp32"
                )
            shard(model, dist, self.dtype, bool(config.compile))
            self.loss = lambda idx, targets, *rows: model.loss(idx, targets, "sum", *rows)
        else:
            self.loss = StepLoss(model, bool(config.compile))
            if dist.world_size > 1:
                self.loss = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
        self.optimizers = make_optimizers(model, config)

    def autocast(self) -> AbstractContextManager:
        enabled = self.dtype is not None
        return torch.autocast(self.dist.device.type, self.dtype, enabled=enabled)

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Evaluation and samples: in the training's precision, nothing compiled, no dropout."""
        self.model.eval()
        with torch.compiler.set_stance("force_eager"), self.autocast():
            yield
        self.model.train()

    def _sync(self, last: bool) -> AbstractContextManager:
        """Ranks average gradients once a step, in the backward pass of the last micro-step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return nullcontext()

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `step`; return this rank's share of the mean loss, and the gradient's norm, on
        the device and not waited for. Where the norm is not finite, nothing is changed.
        """
        rate = learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(optimizer, Muon):
                    group["lr"] = rate * (self.config.muon_lr / self.config.max_lr)
                    group["momentum"] = momentum_at(step)
                else:
                    group["lr"] = rate
        n_targets = self.data.targets_in_step(step)
        total = torch.zeros((), device=self.dist.device)
        for micro_step in range(1, self.data.grad_accum_steps + 1):
            batch = self.batches(step, micro_step)
            # Dropout is drawn anew for each, so that a run can go on wherever it was stopped.
            number = micro_step * self.dist.world_size + self.dist.rank
            torch.manual_seed((self.config.seed + (step << 24) + (number << 8)) % 2**63)
            with self._sync(last=micro_step == self.data.grad_accum_steps):
                with self.autocast():
                    loss = self.loss(*batch) / n_targets
                # The mean over ranks is taken where the sum is wanted.
                self.scaler.scale(loss * self.dist.world_size).backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self._clip()
        not_finite = 1 - norm.isfinite().float()
        for optimizer in self.optimizers:
            # As GradScaler does: where it is 1 no step is taken, and the CPU need not know.
            optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # torch declares none
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return total, norm

    def _clip(self) -> torch.Tensor:
        """Scale the gradient down to grad_clip, and return the norm that it had."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        # Rows first: over a whole table at once fp32 loses four digits on a CPU, and other ones for
        # each number of ranks.
        grads = [p.grad for p in params if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dim=-1) if g.dim() > 1 else g for g in grads]
        norm = nn.utils.get_total_norm(norms)
        nn.utils.clip_grads_with_norm_(params, self.config.grad_clip or math.inf, norm)
        return whole(norm)

    def snapshot(self) -> tuple[dict, dict]:
        """Copies in host memory of what is trained and of what else it takes to go on, both by the
        names of the parameters and whole, so that any number of ranks can read them. All ranks
        call it; on the main one the copies are complete, until the next call overwrites them.
        """
        names = {name for name, param in self.model.named_parameters() if param.requires_grad}
        params = get_model_state_dict(self.model, options=WHOLE_ON_CPU)
        # A tied head is not there a second time.
        params = {name: tensor for name, tensor in params.items() if name in names}
        optimizer = get_optimizer_state_dict(self.model, self.optimizers, options=WHOLE_ON_CPU)
        if self.dist.device.type == "cpu":  # not copies yet, of a sharded model its step counters
            self.host = host = copied({"params": params, "optimizer": optimizer}, self.host)
            params, optimizer = host["params"], host["optimizer"]
        cuda = torch.cuda.get_rng_state() if self.dist.device.type == "cuda" else None
        return params, {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state(self, state: dict) -> None:
        """Take over what `snapshot` gave second, on this or another number of ranks."""
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=options)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.dist.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def find_batch_size(
    model: GPT, data: PretrainingData, config: TrainConfig, dist: Distributed
) -> int:
    """The largest power-of-two batch_size, up to the windows of a step, for which a training step
    fits into the memory of every rank's card with a twentieth to spare. Tried on copies of `model`,
    which stays on the CPU; neither it nor a random number generator is changed.
    """
    if dist.device.type != "cuda" or config.parallel == "fsdp":
        raise ValueError(
            "find_batch_size is for CUDA and --parallel ddp; elsewhere give a --batch_size (the "
            "curve does not depend on it)"
        )
    windows = data.total_batch_size // (data.block_size * dist.world_size)
    alone = Distributed(0, 1, dist.device)  # a rank may run out of memory while others do not

    def attempt(batch_size: int) -> None:
        # The second micro-step runs beside the gradients of the first.
        total = batch_size * data.block_size * min(2, windows // batch_size)
        sizes: dict[str, Any] = {"batch_size": batch_size, "total_batch_size": total}
        trial = replace(data, **sizes, rank=0, world_size=1)
        TrainingStep(copy.deepcopy(model).to(dist.device), trial, config, alone)(1)
        torch.cuda.synchronize(dist.device)

    def fits(batch_size: int) -> bool:
        failed = out_of_memory(partial(attempt, batch_size), dist.device)
        return dist.sum(failed)[0] == 0

    torch.cuda.set_per_process_memory_fraction(1 - MEMORY_TO_SPARE, dist.device)
    with torch.random.fork_rng([dist.device]):
        found = largest_that_fits(fits, windows)
    torch.cuda.set_per_process_memory_fraction(1.0, dist.device)
    return found


def out_of_memory(attempt: Callable[[], None], device: torch.device) -> bool:
    """Whether the attempt runs out of memory; what it has held is free again."""
    try:
        attempt()
        failed = False
    except torch.OutOfMemoryError:
        failed = True
    # Outside of the except clause, since the error holds the attempt's frames and their tensors.
    gc.collect()
    torch.compiler.reset()  # or the run's own shape would be one of several, and not static
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


def largest_that_fits(fits: Callable[[int], bool], windows: int) -> int:
    """The largest power of two that divides `windows` and fits, in as few trials as may be."""
    sizes = [1 << i for i in range(windows.bit_length()) if windows % (1 << i) == 0]
    n_good = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    if not n_good:
        raise ValueError("not even batch_size 1 fits; try --recompute block, or a smaller model")
    return sizes[n_good - 1]


def copied(source: Any, earlier: Any = None) -> Any:
    """A copy of nested dicts with tensors, in the memory of an earlier one where there is one: new
    memory would cost several times the copying.
    """
    if isinstance(source, dict):
        return {key: copied(value, (earlier or {}).get(key)) for key, value in source.items()}
    if isinstance(source, torch.Tensor):
        return source.detach().clone() if earlier is None else earlier.copy_(source.detach())
    return copy.deepcopy(source)
