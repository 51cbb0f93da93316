"""One optimizer step: micro-batches, gradient sync, schedule, clipping, update; snapshots."""

import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.config import TrainConfig
from engine.data import Batch, Prefetcher, TrainingData
from engine.distributed import Distributed, autocast, cudnn_attention, full_tensor, shard_model
from engine.lora import hold_copies, lora_linears
from engine.loss import SummedLoss
from engine.optim import build_optimizers, set_schedule
from engine.recompute import apply_recompute
from engine.tensors import autocast_dtype
from model import GPT

CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_
GRAPH_RUNS = 3  # of each CUDA graph before training: warm up, record, replay


class TrainingStep:
    """Runs optimizer steps. Holds the wrapped model, optimizers, gradient scaler and prefetcher."""

    def __init__(self, model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed):
        self.model, self.data, self.config, self.dist = model.train(), data, config, dist
        self.dtype = autocast_dtype(config.precision)
        if self.dtype is not None and dist.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.dtype == torch.float16)
        self.batches = Prefetcher(data, dist.device)
        self.is_sharded = config.parallel == "fsdp" and dist.world_size > 1
        self.summed_loss = self._build_loss()
        self.loss: nn.Module = self.summed_loss
        if dist.world_size > 1 and not self.is_sharded:
            self.loss = DistributedDataParallel(self.summed_loss, gradient_as_bucket_view=True)
        self.optimizers = build_optimizers(model, config)
        linears = [*lora_linears(model).values()]
        self.has_dropout = any(linear.config.lora_dropout for linear in linears)
        # FSDP gathers weights one block at a time, so no rank can hold copies of all layers.
        self.copied_linears = [] if self.is_sharded else linears
        self.kept_grads: list[torch.Tensor] = []  # with CUDA graphs, see `_record_graphs`

    def _build_loss(self) -> SummedLoss:
        """Wrap the model in the order PyTorch needs: recomputation, then compile, then FSDP2."""
        config, dist = self.config, self.dist
        apply_recompute(self.model, config.recompute)
        if self.is_sharded:
            if self.scaler.is_enabled():
                raise ValueError("precision fp16 does not work with fsdp; use bf16 or fp32")
            shard_model(self.model, dist, self.dtype, compile_blocks=config.compile)
            return SummedLoss(self.model, compile_head=config.compile)
        mode = "reduce-overhead" if self.data.graph_lengths else "default"
        trunk_mode = mode if config.compile else None
        return SummedLoss(self.model, trunk_mode=trunk_mode, compile_head=config.compile)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `step`, counted from 1. Return this rank's share of the mean loss, and the
        gradient norm before clipping. Both stay on the device, so nothing waits for them. If the
        norm is not finite, nothing is updated.
        """
        # The loss of a step is the mean over its targets on all ranks. The loss of a micro-batch is
        # a sum, so we divide it by the number of targets in the whole step. Then the gradients of
        # all micro-batches add up to those of the mean.
        n_targets = self.data.targets_in_step(step)
        n_micro_steps = self.data.grad_accum_steps
        mean_loss = torch.zeros((), device=self.dist.device)

        # Autocast keeps its 16-bit copies of the weights until the `with` block ends, and so do
        # layers with LoRA. So one block spans all micro-steps.
        autocasting = autocast(self.dist.device, self.config.precision)
        copying = hold_copies(self.copied_linears, self.dtype)
        # cuDNN is fast, but takes a second to plan for every new shape. The backward pass needs the
        # same setting, because what it recomputes must use the kernel of the forward pass.
        with autocasting, copying, cudnn_attention(enabled=self.data.has_fixed_shape):
            if self.data.graph_lengths and not self.kept_grads:
                self._record_graphs()
            for micro_step in range(1, n_micro_steps + 1):
                batch = self.batches(step, micro_step)  # also starts to prepare the next one
                if self.has_dropout:
                    self._seed_dropout(step, micro_step)
                with self._sync_gradients(is_last=micro_step == n_micro_steps):
                    mean_loss += self._add_gradients(batch, n_targets)

        set_schedule(self.optimizers, step, self.config)  # learning rates and Muon's momentum

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = self._clip_gradients()

        # If the norm is not finite, fused AdamW and our Muon skip the step on the device, because
        # they read `found_inf` there. An `if` here, or in scaler.step(), would wait for the device.
        found_inf = (~grad_norm.isfinite()).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # GradScaler sets it too
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.kept_grads)
        self.scaler.update()
        return mean_loss, grad_norm

    @property
    def lr(self) -> float:
        """The learning rate of the latest step."""
        return self.optimizers[0].param_groups[0]["lr"]

    def _seed_dropout(self, step: int, micro_step: int) -> None:
        """Seed dropout so that a resumed run draws the same masks."""
        # Every micro-step of every rank gets another seed: steps are 2**24 apart, and micro-steps
        # and ranks 2**8.
        stream = micro_step * self.dist.world_size + self.dist.rank
        torch.manual_seed((self.config.seed + (step << 24) + (stream << 8)) % 2**63)

    def _sync_gradients(self, is_last: bool) -> AbstractContextManager:
        """Average gradients over ranks only in the backward pass of the last micro-step."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # from FSDP2
        elif isinstance(self.loss, DistributedDataParallel) and not is_last:
            return self.loss.no_sync()
        return nullcontext()

    def _add_gradients(self, batch: Batch, n_targets: int) -> torch.Tensor:
        """Add the gradients of a batch to param.grad. Return this rank's share of the mean loss."""
        if self.kept_grads:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(batch) / n_targets
        # PyTorch recommends running backward outside autocast.
        with torch.autocast(self.dist.device.type, enabled=False):
            # DDP and FSDP average gradients over ranks, but shares of a mean must be summed.
            self.scaler.scale(loss * self.dist.world_size).backward()
        return loss.detach()

    def _record_graphs(self) -> None:
        """Record the CUDA graphs of the forward and the backward pass for each length of a batch.

        The backward pass of a graph returns gradients in memory that its next replay overwrites.
        So we add them to gradients at fixed addresses, and zero those after each update. They are
        allocated in the first step, because `restore` needs param.grad to be None.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for param in trained:
            param.grad = torch.zeros_like(param)
        self.kept_grads = [param.grad for param in trained if param.grad is not None]
        # The graphs share their memory, so it grows least if the longest comes first.
        for length in sorted(self.data.graph_lengths, reverse=True):
            ids = torch.zeros(self.data.batch_size, length, dtype=torch.long)
            batch = Batch(ids, ids).to(self.dist.device)
            for _ in range(GRAPH_RUNS):
                self._add_gradients(batch, n_targets=ids.numel())
        torch._foreach_zero_(self.kept_grads)
        if self.dist.device.type == "cuda":
            n, reserved = len(self.data.graph_lengths), torch.cuda.memory_reserved() / 1e9
            print(f"CUDA graphs: {n} batch lengths, {reserved:.2f} GB reserved", flush=True)

    def _clip_gradients(self) -> torch.Tensor:
        """Tell the optimizers to clip the gradients to a norm of grad_clip. Return their norm."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.dist.device.type == "cpu":
            # Take the norm of the norms of rows, in float64. A single fp32 sum over the embedding
            # would lose four digits, and would differ with the number of ranks.
            rows = [torch.linalg.vector_norm(g, dim=-1) if g.dim() > 1 else g for g in grads]
            grads = [row_norms.double() for row_norms in rows]
        norm = nn.utils.get_total_norm(grads)
        max_norm = self.config.grad_clip or math.inf
        if self.dist.device.type == "mps":  # its AdamW ignores `grad_scale`
            nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
            return norm
        norm = full_tensor(norm).float()
        # Fused AdamW and our Muon divide the gradients by this number when they read them.
        grad_scale = ((norm + CLIP_EPS) / max_norm).clamp(min=1)
        for optimizer in self.optimizers:
            optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]  # GradScaler sets it too
        return norm

    def snapshot(self, weights_only: bool = False) -> tuple[dict, dict]:
        """Return copies on the CPU: the trained parameters by name, and the state of optimizers,
        scaler and random number generators ({} with `weights_only`). Nothing is sharded, so any
        number of ranks can load it. All ranks must call this; only rank 0 gets complete copies.
        """
        from torch.distributed.checkpoint import state_dict as dcp  # slow to import

        options = dcp.StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        names = {name for name, param in self.model.named_parameters() if param.requires_grad}
        params = dcp.get_model_state_dict(self.model, options=options)
        # A tied head has two names. named_parameters() has only one of them.
        params = {name: t for name, t in params.items() if name in names}
        state = {}
        if not weights_only:
            optimizer = dcp.get_optimizer_state_dict(self.model, self.optimizers, options=options)
            cuda = torch.cuda.get_rng_state() if self.dist.device.type == "cuda" else None
            rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
            state = {"optimizer": optimizer, "scaler": self.scaler.state_dict(), "rng": rng}
        # cpu_offload copies nothing that is on the CPU already.
        is_cpu = self.dist.device.type == "cpu"
        return copy.deepcopy((params, state)) if is_cpu else (params, state)

    def restore(self, state: dict) -> None:
        """Load the state that `snapshot` returned, on the same or another number of ranks."""
        from torch.distributed.checkpoint import state_dict as dcp

        saved, options = state["optimizer"], dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(self.model, self.optimizers, saved, options=options)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.dist.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
