"""Learning-rate schedule, parameter groups, AdamW and Muon."""

import math
from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn

from engine.config import TrainConfig
from engine.data import ceil_div
from engine.distributed import full_tensor, has_bf16_units, shard_like
from model import GPT

ADAMW_EPS = 1e-8  # GPT-3 paper, appendix B
# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", as in torch.optim.Muon.
NS_STEPS, NS_COEFFICIENTS, NS_EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
# modded-nanogpt: momentum rises over the first steps, when old gradients mean little.
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 0.95, 300
MIN_SECOND_MOMENT = 1e-10  # NorMuon, as in modded-nanogpt
NS_BATCH_ELEMENTS = 2**24  # per batched Newton-Schulz: enough to fill a GPU, 64 MB in fp32


def learning_rate(step: int, config: TrainConfig) -> float:
    r"""The learning rate of `step`, counted from 1: a linear warmup, then `cosine` or `wsd`.

        max_lr       ____________                   ___
                    /            \                 /   \__
                   /              \               /       \__
        0         /                \             /           \___ min_lr
                   wsd, decays to 0               cosine

    Both decays reach their final value at step max_steps + 1, so no step of wsd has a rate of 0.
    The cosine is the same as in build-nanogpt, which counts steps from 0.
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
    """Return the last step before the decay of wsd. Up to this step, a run with more steps has the
    same rates, so it can start from this checkpoint. Return 0 for cosine, because all of its rates
    depend on max_steps.
    """
    if config.schedule != "wsd":
        return 0
    decay_steps = max(1.0, config.decay_fraction * config.max_steps)
    # The last step for which max_steps - (step - 1) >= decay_steps, see `learning_rate`. If the
    # warmup ends later, the decay starts there.
    last_at_max = math.floor(config.max_steps - decay_steps) + 1
    return min(config.max_steps, max(config.warmup_steps, last_at_max))


def muon_momentum(step: int) -> float:
    """Muon's momentum at a step counted from 1."""
    warmed_up = min(1.0, (step - 1) / MOMENTUM_WARMUP_STEPS)
    return FIRST_MOMENTUM + warmed_up * (MOMENTUM - FIRST_MOMENTUM)


def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> None:
    """Set the learning rates and the momentum of the optimizers for a step."""
    rate = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
            if isinstance(optimizer, Muon):
                group["lr"] = rate * (config.muon_lr / config.max_lr)
                group["momentum"] = muon_momentum(step)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the trainable parameters in two groups: tensors of two or more dimensions, which get
    weight decay, and all others, which do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def block_matrices(model: GPT) -> dict[str, nn.Parameter]:
    """Return the trainable matrices of the blocks by name. Muon trains them."""
    params = model.transformer.h.named_parameters()
    return {n: p for n, p in params if p.requires_grad and p.dim() == 2 and n.endswith(".weight")}


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters, or Muon for the matrices of the blocks and AdamW for the
    rest.
    """
    single: list[nn.Parameter] = []  # matrices of the blocks
    stacked: list[nn.Parameter] = []  # c_attn: the matrices of q, k and v on top of each other
    if config.optimizer == "muon":
        for name, param in block_matrices(model).items():
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
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=betas, eps=ADAMW_EPS, fused=True)
    if not in_muon:
        return [adamw]
    dtype = newton_schulz_dtype(model.lm_head.weight.device, config)
    groups = [{"params": single, "parts": 1}, {"params": stacked, "parts": 3}]
    muon = Muon(
        groups, config.muon_lr, config.muon_weight_decay, beta2=config.muon_beta2, dtype=dtype
    )
    return [adamw, muon]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalized updates. A step, for a matrix W:

        mean   = lerp(mean, gradient, 1 - momentum)
        update = lerp(gradient, mean, momentum)         Nesterov's look-ahead
        update = newton_schulz(update)                  all singular values near 1
        update = normalize(update)                      only with beta2: NorMuon
        W      = (1 - lr * weight_decay) W - lr * sqrt(max(1, rows / cols)) * update

    If a group sets `parts` to n, each of its parameters is n matrices on top of each other (c_attn:
    q, k and v). Parameters may be replicated or sharded by FSDP2; each rank orthogonalizes a share
    of the matrices. Like PyTorch's fused optimizers, a step changes nothing if `found_inf` is 1.
    We do not use torch.optim.Muon: it always uses bf16, and every rank computes all matrices.
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
        self.beta2 = beta2  # decay rate of NorMuon's second moments; 0 is plain Muon
        self.dtype = dtype  # for Newton-Schulz
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # torch passes None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                at_once = max(1, NS_BATCH_ELEMENTS // shape.numel())
                for start in range(0, len(params), at_once):
                    self._update(group, params[start : start + at_once])

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        """Update parameters of the same shape together. One by one, a GPU would take longer to
        launch the kernels than to run them.
        """
        shape, lr = params[0].shape, group["lr"]
        rows, cols = shape[0] // group["parts"], shape[1]
        # Every change is multiplied by `keep`: 1 keeps it, 0 drops it because the step is skipped.
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        lookaheads = self._update_momenta(group, params)
        stacked = torch.stack([full_tensor(t) for t in lookaheads]).view(-1, rows, cols)
        updates = distributed_newton_schulz(stacked.to(self.dtype)).to(stacked.dtype)
        if self.beta2:
            updates = self._normalize(params, updates, keep * (1 - self.beta2))
        # Jordan's factor, sqrt(max(1, rows / cols)): updates of tall and of square matrices then
        # change the outputs of their layers by as much.
        updates = updates * (keep * (-lr * max(1.0, rows / cols) ** 0.5))
        torch._foreach_mul_(params, 1 - keep * (lr * group["weight_decay"]))
        changes = zip(params, updates.view(-1, *shape).unbind(), strict=True)
        torch._foreach_add_(params, [shard_like(param, change) for param, change in changes])

    def _update_momenta(self, group: dict, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """Update the running means of the gradients. Return their Nesterov look-aheads. This may
        overwrite the gradients.
        """
        grads = [param.grad for param in params if param.grad is not None]
        for param, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(grad)
        means = [self.state[param]["momentum_buffer"] for param in params]
        if self.found_inf is not None:
            # In a skipped step, replace the gradients with the means, so that nothing changes.
            skip = self.found_inf.bool()
            grads = [torch.where(skip, m, g) for m, g in zip(means, grads, strict=True)]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, means, group["momentum"])
        return grads

    def _normalize(
        self, params: list[torch.Tensor], updates: torch.Tensor, new_share: float | torch.Tensor
    ) -> torch.Tensor:
        """NorMuon: divide each row of the updates (n, rows, cols), or each column if they are wide,
        by the running root mean square of its elements. Then scale each matrix back to the norm it
        had. `new_share` is the share of the new squares in the running mean, 0 in a skipped step.
        """
        is_wide = updates.size(1) < updates.size(2)
        # One number per row, or per column if the matrices are wide.
        squares = updates.square().mean(1 if is_wide else 2, keepdim=True)
        for param in params:
            if "second_moment" not in self.state[param]:
                zeros = squares.new_zeros(squares.numel() // len(params))
                self.state[param]["second_moment"] = zeros
        moments = [self.state[param]["second_moment"] for param in params]
        means = torch.stack(moments).view_as(squares).lerp(squares, new_share)
        torch._foreach_copy_(moments, list(means.view(len(params), -1).unbind()))
        scales = means.clamp(min=MIN_SECOND_MOMENT).rsqrt()
        # The squared norm of a matrix before and after, both divided by the length of its rows.
        before = squares.sum((1, 2), keepdim=True)
        after = (squares * scales.square()).sum((1, 2), keepdim=True)
        return updates * scales * (before / after.clamp(min=MIN_SECOND_MOMENT)).sqrt()


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of each matrix (n, rows, cols) with values near 1, using Jordan's
    quintic Newton-Schulz iteration. Singular values of at least 0.002 times the Frobenius norm end
    up between about 0.7 and 1.2; much smaller ones stay smaller. The dtype stays the same.
    """
    a, b, c = NS_COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices  # so that x x' is the smaller of the two products
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=NS_EPS).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b g + c g g
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b g + c g g) x
    return x.mT if is_tall else x


def distributed_newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """`newton_schulz` with the matrices split evenly over the ranks, and the results gathered."""
    if not torch.distributed.is_initialized():
        return newton_schulz(matrices)
    world_size = torch.distributed.get_world_size()
    share = ceil_div(len(matrices), world_size)
    start = torch.distributed.get_rank() * share
    result = matrices.new_zeros(share, *matrices.shape[1:])
    mine = matrices[start : start + share]  # the last ranks may have fewer, or none
    if len(mine):
        result[: len(mine)] = newton_schulz(mine)
    gathered = matrices.new_empty(world_size * share, *matrices.shape[1:])
    torch.distributed.all_gather(list(gathered.split(share)), result)
    return gathered[: len(matrices)]


def newton_schulz_dtype(device: torch.device, config: TrainConfig) -> torch.dtype:
    """bf16 if the device has bf16 units, else fp32: emulated bf16 takes hundreds of times as long.
    Newton-Schulz tolerates bf16. On a CPU we use it only in bf16 training, so that an fp32 run is
    the same on any CPU.
    """
    allow_bf16 = device.type == "cuda" or config.precision == "bf16"
    return torch.bfloat16 if allow_bf16 and has_bf16_units(device) else torch.float32
