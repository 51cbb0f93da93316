"""One optimizer step: micro-batches, gradient sync, clipping, update; snapshot and restore."""

import copy
import math
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from engine.config import TrainConfig
from engine.data import Batch, TrainingData
from engine.distributed import (
    Distributed,
    autocast,
    autocast_dtype,
    cudnn_attention,
    full_tensor,
    shard_model,
)
from engine.lora import lora_linears, summed_weights
from engine.loss import SummedLoss
from engine.optim import build_optimizers, set_schedule
from model import GPT, Block, KVCache


class TrainingStep:
    """Does optimizer steps: holds the wrapped model, optimizers, gradient scaler and prefetcher."""

    def __init__(self, model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed):
        self.model, self.data, self.config, self.dist = model.train(), data, config, dist
        self.dtype = autocast_dtype(config.precision)
        if self.dtype is not None and dist.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == torch.float16)
        self.batches = Prefetcher(data, dist.device)
        self.is_sharded = config.parallel == "fsdp" and dist.world_size > 1
        self.summed_loss = self._compile_loss()
        self.loss: nn.Module = self.summed_loss
        if dist.world_size > 1 and not self.is_sharded:
            self.loss = DistributedDataParallel(self.summed_loss, gradient_as_bucket_view=True)
        self.optimizers = build_optimizers(model, config)
        linears = lora_linears(model).values()
        self.summed_linears = [linear for linear in linears if linear.sums_weight]

    def _compile_loss(self) -> SummedLoss:
        """The module that computes the loss. Wrapped in PyTorch's order: recomputation, then
        compilation, then FSDP2.
        """
        config, dist = self.config, self.dist
        apply_recompute(self.model, config.recompute)
        if self.is_sharded:
            if self.scaler.is_enabled():
                raise ValueError("precision fp16 does not work with fsdp; use bf16 or fp32")
            shard_model(self.model, dist, self.dtype, compile_blocks=config.compile)
            return SummedLoss(self.model, compile_head=config.compile)
        return SummedLoss(self.model, compile_trunk=config.compile, compile_head=config.compile)

    @property
    def lr(self) -> float:
        """The learning rate of the latest step."""
        return self.optimizers[0].param_groups[0]["lr"]

    def _sync_gradients(self, is_last: bool) -> AbstractContextManager:
        """Average gradients over ranks only in the backward pass of the last micro-step."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # FSDP2's
        elif isinstance(self.loss, DistributedDataParallel) and not is_last:
            return self.loss.no_sync()
        return nullcontext()

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `step`, counted from 1. Return this rank's share of the mean loss and the
        gradient norm, on the device, without waiting for them. If the norm is not finite, nothing
        is updated.
        """
        set_schedule(self.optimizers, step, self.config)
        n_targets = self.data.targets_in_step(step)
        total = torch.zeros((), device=self.dist.device)
        # Around all micro-steps, so that weights are cast and summed once.
        autocasting = autocast(self.dist.device, self.config.precision)
        with autocasting, summed_weights(self.summed_linears, self.dtype):
            for micro_step in range(1, self.data.grad_accum_steps + 1):
                is_last = micro_step == self.data.grad_accum_steps
                with self._sync_gradients(is_last):
                    total += self._micro_step(step, micro_step, n_targets)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self._clip_gradients()
        found_inf = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            # As GradScaler does: the optimizer skips the update on the device, without a sync.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch declares none
            optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        return total, norm

    def _micro_step(self, step: int, micro_step: int, n_targets: int) -> torch.Tensor:
        """Add the gradients of a micro-step; return its share of the mean loss."""
        batch = self.batches(step, micro_step)
        self._seed_dropout(step, micro_step)
        with cudnn_attention(self.data.has_one_shape):
            loss = self.loss(batch) / n_targets
        with torch.autocast(self.dist.device.type, enabled=False):
            # DDP and FSDP average gradients over ranks, but we want the sum.
            self.scaler.scale(loss * self.dist.world_size).backward()
        return loss.detach()

    def _seed_dropout(self, step: int, micro_step: int) -> None:
        """Make dropout a function of seed, step, micro-step and rank: resuming repeats it."""
        stream = micro_step * self.dist.world_size + self.dist.rank
        torch.manual_seed((self.config.seed + (step << 24) + (stream << 8)) % 2**63)

    def _clip_gradients(self) -> torch.Tensor:
        """Scale gradients down to grad_clip; return the norm that they had."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Norms of rows first: a single sum in fp32 over the embedding would lose four digits on a
        # CPU, and different ones for each number of ranks.
        norms = [torch.linalg.vector_norm(g, dim=-1) if g.dim() > 1 else g for g in grads]
        norm = nn.utils.get_total_norm(norms)
        max_norm = self.config.grad_clip or math.inf
        nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return full_tensor(norm)

    def snapshot(self) -> tuple[dict, dict]:
        """Copies on the CPU of the trained parameters by name, and of the rest of the training
        state. Nothing in them is sharded, so any number of ranks can load them. All ranks call
        this; rank 0 gets complete copies.
        """
        from torch.distributed.checkpoint import state_dict as dcp  # slow to import

        options = dcp.StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        names = {name for name, param in self.model.named_parameters() if param.requires_grad}
        params = dcp.get_model_state_dict(self.model, options=options)
        params = {name: t for name, t in params.items() if name in names}  # a tied head only once
        optimizer = dcp.get_optimizer_state_dict(self.model, self.optimizers, options=options)
        if self.dist.device.type == "cpu":  # there cpu_offload copies nothing
            params, optimizer = copy.deepcopy((params, optimizer))
        cuda = torch.cuda.get_rng_state() if self.dist.device.type == "cuda" else None
        return params, {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self, state: dict) -> None:
        """Load the second part of a snapshot, made on this or another number of ranks."""
        from torch.distributed.checkpoint import state_dict as dcp

        model, optimizers, optimizer = self.model, self.optimizers, state["optimizer"]
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(model, optimizers, optimizer, options=options)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.dist.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def apply_recompute(model: GPT, mode: str) -> None:
    """Activation checkpointing: make backward recompute activations instead of storing them.

    none stores all of them; light recomputes the outputs of LayerNorm and GELU, which cost almost
    nothing; block stores only the inputs of attention and MLP.
    """
    forwards = {"light": forward_light, "block": forward_block}
    for block in model.modules():
        if isinstance(block, Block) and mode in forwards:
            # Not a closure: a copy of the block must run its own layers.
            block.forward = partial(forwards[mode], block)  # type: ignore[method-assign]


def forward_light(
    block: Block, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`Block.forward`, which stores neither the outputs of the LayerNorms nor that of GELU."""
    attn, mlp = block.attn, block.mlp
    x = x + attn.attend(recompute(block.ln_1, attn.c_attn, x), cache, mask)
    return x + recompute(mlp.gelu, mlp.c_proj, recompute(block.ln_2, mlp.c_fc, x))


def forward_block(block: Block, x: torch.Tensor, *cache_and_mask: Any) -> torch.Tensor:
    """`Block.forward`, which stores only the inputs of attention and MLP."""
    x = x + recompute(block.ln_1, block.attn, x, *cache_and_mask)
    return x + recompute(block.ln_2, block.mlp, x)


def recompute(first: nn.Module, second: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """second(first(x), *args), which backward recomputes from x. The checkpoint's early stop skips
    the last matrix product of `second`, whose output backward does not need. Compiled checkpoints
    have no early stop; there the product of a single linear layer is stored.
    """

    def run_both(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return second(first(x), *args)

    if not torch.is_grad_enabled():
        return run_both(x, *args)
    if isinstance(second, nn.Linear) and torch.compiler.is_compiling():
        contexts = keep_products_contexts
        return checkpoint(run_both, x, *args, use_reentrant=False, context_fn=contexts)
    return checkpoint(run_both, x, *args, use_reentrant=False)


def keep_products_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `checkpoint`: recompute everything but matrix products."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default])


class Prefetcher:
    """Gives a rank's micro-batches on its device. A thread prepares each during the computation of
    the one before. Batches are a function of the step, so prefetching changes only the timing.
    """

    def __init__(self, data: TrainingData, device: torch.device):
        self.data, self.device = data, device
        # On every rank, a new thread would pin memory for the first GPU.
        set_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", set_device)
        self.ahead: dict[tuple[int, int], Future[Batch]] = {}  # by step and micro-step

    def __call__(self, step: int, micro_step: int) -> Batch:
        """The batch of a micro-step. Raises what preparing it raised."""
        is_last = micro_step == self.data.grad_accum_steps
        for key in ((step, micro_step), (step + 1, 1) if is_last else (step, micro_step + 1)):
            if key not in self.ahead:
                self.ahead[key] = self.thread.submit(self._prepare, *key)
        # On the stream of the computation: copying 1 MB takes 40 us, not worth a stream of its own.
        return self.ahead.pop((step, micro_step)).result().to(self.device)

    def _prepare(self, step: int, micro_step: int) -> Batch:
        batch = self.data.micro_batch(step, micro_step)
        return batch.pin_memory() if self.device.type == "cuda" else batch
