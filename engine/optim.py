"""Learning-rate schedule, parameter groups, AdamW and Muon."""

import math
from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn

from engine.config import TrainConfig
from engine.distributed import full_tensor, has_bf16_units, shard_like
from model import GPT

EPS = 1e-8  # AdamW's; GPT-3 paper, appendix B
# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", as in torch.optim.Muon.
NS_STEPS, NS_COEFFICIENTS, NS_EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
# modded-nanogpt: the momentum rises over the first steps, when old gradients mean little.
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 0.95, 300
MIN_SECOND_MOMENT = 1e-10  # NorMuon, as in modded-nanogpt
BATCH_ELEMENTS = 2**24  # of matrices orthogonalized at once: enough to fill a GPU, 64 MB in fp32


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of `step`, counted from 1. After a linear warmup, `cosine` decays to
    min_lr; `wsd` stays at max_lr, then decays linearly to 0. Both would get there one step after
    the last, so no step has a rate of 0. The rates are build-nanogpt's, which counts from 0.
    """
    done = step - 1
    if done < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    if config.schedule == "wsd":
        decay_steps = max(1.0, config.decay_fraction * config.max_steps)
        return config.max_lr * min(1.0, (config.max_steps - done) / decay_steps)
    progress = (done - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.max_lr - config.min_lr)


def plateau_end(config: TrainConfig) -> int:
    """The last step of wsd before the decay. Up to it the rates are those of any longer run; 0 for
    a cosine, which depends on max_steps everywhere.
    """
    if config.schedule != "wsd":
        return 0
    decay_steps = max(1.0, config.decay_fraction * config.max_steps)
    last = math.floor(config.max_steps - decay_steps) + 1
    return min(config.max_steps, max(config.warmup_steps, last))


def muon_momentum(step: int) -> float:
    """Muon's momentum at a step counted from 1."""
    warmed_up = min(1.0, (step - 1) / MOMENTUM_WARMUP_STEPS)
    return FIRST_MOMENTUM + warmed_up * (MOMENTUM - FIRST_MOMENTUM)


def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> None:
    """Give the optimizers the learning rates and the momentum of a step."""
    rate = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(optimizer, Muon):
                group["lr"] = rate * (config.muon_lr / config.max_lr)
                group["momentum"] = muon_momentum(step)
            else:
                group["lr"] = rate


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    """The trainable parameters in two groups: tensors of two or more dimensions, with weight decay,
    and all others, without.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters, or Muon for the matrices of the blocks and AdamW for the
    rest.
    """
    single: list[nn.Parameter] = []  # matrices of the blocks
    stacked: list[nn.Parameter] = []  # three on top of each other: c_attn's q, k and v
    if config.optimizer == "muon":
        for name, param in model.transformer.h.named_parameters():
            if param.requires_grad and name.endswith(".weight") and param.dim() == 2:
                (stacked if name.endswith("c_attn.weight") else single).append(param)
        if not single + stacked:
            raise ValueError(
                "optimizer is muon, which trains the matrices of the blocks, but they are frozen; "
                "use adamw, or train all weights"
            )
    in_muon = {id(param) for param in single + stacked}
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in in_muon]
    adamw = torch.optim.AdamW(
        groups, lr=config.max_lr, betas=(config.beta1, config.beta2), eps=EPS, fused=True
    )
    if not in_muon:
        return [adamw]
    dtype = newton_schulz_dtype(model.lm_head.weight.device, config)
    groups = [{"params": single, "parts": 1}, {"params": stacked, "parts": 3}]
    muon = Muon(
        groups, config.muon_lr, config.muon_weight_decay, beta2=config.muon_beta2, dtype=dtype
    )
    return [adamw, muon]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalized.

    A parameter in a group with `parts` n is n matrices stacked on top of each other (c_attn is q, k
    and v). Each rank orthogonalizes a share of the matrices; parameters may be replicated or
    sharded by FSDP2. As with PyTorch's fused optimizers, a step whose `found_inf` is 1 changes
    nothing. With `beta2`, rows or columns are normalized afterwards (NorMuon). PyTorch's own Muon
    iterates in bf16 on any device and does not know ranks.
    """

    found_inf: torch.Tensor | None = None  # a scalar on the device, so that nothing waits for it

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        weight_decay: float,
        *,
        beta2: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        self.beta2 = beta2  # of NorMuon's second moments; 0: plain Muon
        self.dtype = dtype  # of the iteration
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # torch gives None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                at_once = max(1, BATCH_ELEMENTS // shape.numel())
                for start in range(0, len(params), at_once):
                    self._update(group, params[start : start + at_once])

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        """Update parameters of one shape, with few kernels: on a GPU launching them would take
        longer than running them.
        """
        shape, lr = params[0].shape, group["lr"]
        rows, cols = shape[0] // group["parts"], shape[1]
        momenta = [full_tensor(momentum) for momentum in self._update_momenta(group, params)]
        stacked = torch.stack(momenta).view(-1, rows, cols)
        updates = distributed_newton_schulz(stacked.to(self.dtype)).to(stacked.dtype)
        apply = 1.0 if self.found_inf is None else 1 - self.found_inf
        if self.beta2:
            updates = self._normalize(params, updates, apply * (1 - self.beta2))
        # Jordan's factor: a tall matrix changes its outputs as much as a square one.
        updates = updates * (apply * (-lr * max(1.0, rows / cols) ** 0.5))
        torch._foreach_mul_(params, 1 - apply * (lr * group["weight_decay"]))
        changes = zip(params, updates.view(-1, *shape).unbind(), strict=True)
        torch._foreach_add_(params, [shard_like(param, change) for param, change in changes])

    def _normalize(
        self, params: list[torch.Tensor], updates: torch.Tensor, weight: float | torch.Tensor
    ) -> torch.Tensor:
        """NorMuon: divide each row of the updates (n, rows, cols), or each column of wide ones, by
        the running root mean square of its elements, and keep the norm of each matrix. `weight` is
        that of the new squares in their running mean: 0 in a skipped step.
        """
        is_wide = updates.size(1) < updates.size(2)
        squares = updates.square().mean(1 if is_wide else 2, keepdim=True)
        for param in params:
            if "second_moment" not in self.state[param]:
                zeros = squares.new_zeros(squares.numel() // len(params))
                self.state[param]["second_moment"] = zeros
        moments = [self.state[param]["second_moment"] for param in params]
        means = torch.stack(moments).view_as(squares).lerp(squares, weight)
        torch._foreach_copy_(moments, list(means.view(len(params), -1).unbind()))
        scales = means.clamp(min=MIN_SECOND_MOMENT).rsqrt()
        before = squares.sum((1, 2), keepdim=True)
        after = (squares * scales.square()).sum((1, 2), keepdim=True)
        return updates * scales * (before / after.clamp(min=MIN_SECOND_MOMENT)).sqrt()

    def _update_momenta(self, group: dict, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """Update the running means of the gradients; return their Nesterov lookaheads. This may
        overwrite the gradients.
        """
        grads = [param.grad for param in params if param.grad is not None]
        for param, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(grad)
        means = [self.state[param]["momentum_buffer"] for param in params]
        if self.found_inf is not None:  # averaging a mean with itself leaves it as it is
            skip = self.found_inf.bool()
            grads = [torch.where(skip, m, g) for m, g in zip(means, grads, strict=True)]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, means, group["momentum"])
        return grads


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, cols) with their singular values replaced by values near 1, by Jordan's
    quintic Newton-Schulz iteration, in their own dtype. Singular values from 0.002 of the
    Frobenius norm end between 0.7 and 1.2; smaller ones stay smaller.
    """
    a, b, c = NS_COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=NS_EPS).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def distributed_newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """`newton_schulz`, where each rank computes an equal share and gathers the others'."""
    if not torch.distributed.is_initialized():
        return newton_schulz(matrices)
    world_size = torch.distributed.get_world_size()
    share = -(-len(matrices) // world_size)
    start = torch.distributed.get_rank() * share
    result = matrices.new_zeros(share, *matrices.shape[1:])
    mine = matrices[start : start + share]  # the last ranks may have fewer, or none
    if len(mine):
        result[: len(mine)] = newton_schulz(mine)
    gathered = matrices.new_empty(world_size * share, *matrices.shape[1:])
    torch.distributed.all_gather(list(gathered.split(share)), result)
    return gathered[: len(matrices)]


def newton_schulz_dtype(device: torch.device, config: TrainConfig) -> torch.dtype:
    """bf16, which Newton-Schulz tolerates, where the device has units for it; elsewhere it would
    take hundreds of times as long. On a CPU only in bf16 training, so that training in fp32 is the
    same on any CPU.
    """
    may_round = device.type == "cuda" or config.precision == "bf16"
    return torch.bfloat16 if may_round and has_bf16_units(device) else torch.float32
