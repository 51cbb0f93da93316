"""Learning-rate schedule, parameter groups, AdamW and Muon."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.data import ceil_div
from engine.distributed import full_tensor, has_bf16_units, shard_like
from engine.tensors import batches_alike
from model import GPT

ADAMW_EPS = 1e-8  # GPT-3 paper, appendix B
# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", as in torch.optim.Muon.
NS_STEPS, NS_COEFFICIENTS, NS_EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
# modded-nanogpt: momentum rises over the first steps, when old gradients mean little.
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 0.95, 300
MIN_SECOND_MOMENT = 1e-10  # NorMuon, as in modded-nanogpt
NS_BATCH_ELEMENTS = 2**25  # per batched Newton-Schulz: enough to fill a GPU, 64 MB in bf16

TensorList = Sequence[Tensor]


def learning_rate(step: int, config: TrainConfig) -> float:
    r"""The learning rate of `step`, counted from 1: a linear warmup, then `cosine` or `wsd`.

        max_lr       ____________                   ___
                    /            \                 /   \__
                   /              \               /       \__
        0         /                \             /           \___ min_lr
                   wsd, decays to 0               cosine

    Both decays reach their final value at step max_steps + 1, so no step of wsd has a rate of 0.
    If the warmup of wsd reaches into the decay, each step uses the lower rate.
    The cosine is the same as in build-nanogpt, which counts steps from 0.
    """
    done = step - 1
    if config.schedule == "wsd" and step > plateau_end(config):
        return config.max_lr * ((config.max_steps - done) / decay_steps(config))
    if done < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    if config.schedule == "wsd":
        return config.max_lr
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
    warmup, decay = config.warmup_steps, decay_steps(config)
    # The rate, divided by max_lr, is (max_steps + 1 - step) / decay in the decay. Find where this
    # line falls below 1, and where it falls below the warmup, step / warmup. The second is later
    # if the warmup reaches into the decay.
    last_at_max = math.floor(config.max_steps - decay) + 1
    last_of_warmup = math.floor(warmup * (config.max_steps + 1) / (warmup + decay))
    return max(last_at_max, last_of_warmup)


def decay_steps(config: TrainConfig) -> float:
    """Return the length of the decay of wsd."""
    return max(1.0, config.decay_fraction * config.max_steps)


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
    matrices = block_matrices(model) if config.optimizer == "muon" else {}
    if config.optimizer == "muon" and not matrices:
        raise ValueError(
            "optimizer is muon, which trains the matrices of the blocks, but they are frozen; use "
            "adamw, or train all weights"
        )
    in_muon = {id(param) for param in matrices.values()}
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in in_muon]
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=betas, eps=ADAMW_EPS, fused=True)
    if not in_muon:
        return [adamw]
    dtype = newton_schulz_dtype(model.lm_head.weight.device, config)
    # c_attn has the matrices of q, k and v on top of each other.
    stacked = [param for name, param in matrices.items() if name.endswith("c_attn.weight")]
    single = [param for name, param in matrices.items() if not name.endswith("c_attn.weight")]
    groups = [{"params": single, "parts": 1}, {"params": stacked, "parts": 3}]
    compiled = config.compile and config.parallel != "fsdp"  # sharded tensors: not tried
    lr, decay = config.muon_lr, config.muon_weight_decay
    muon = Muon(groups, lr, decay, beta2=config.muon_beta2, dtype=dtype, compiled=compiled)
    return [adamw, muon]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalized updates. A step, for a matrix W:

        mean   = lerp(mean, gradient, 1 - momentum)
        update = lerp(gradient, mean, momentum)         Nesterov's look-ahead
        update = newton_schulz(update)                  all singular values near 1
        update = update * normuon_scales(update)        only with beta2: NorMuon
        W      = (1 - lr * weight_decay) W - lr * sqrt(max(1, rows / cols)) * update

    If a group sets `parts` to n, each of its parameters is n matrices on top of each other (c_attn:
    q, k and v). Parameters may be replicated or sharded by FSDP2; each rank orthogonalizes a share
    of the matrices. Like PyTorch's fused optimizers, a step divides the gradients by `grad_scale`,
    and changes nothing if `found_inf` is 1. We do not use torch.optim.Muon: it always uses bf16,
    and every rank computes all matrices.
    """

    # Scalars on the device, so that nothing waits for them.
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        weight_decay: float,
        *,
        beta2: float = 0.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        self.beta2 = beta2  # decay rate of NorMuon's second moments; 0 is plain Muon
        self.dtype = dtype  # for Newton-Schulz
        # Everything but Newton-Schulz is limited by memory bandwidth. Compiled, each of these
        # functions reads and writes a tensor once. dynamic=False, because a model has few shapes.
        functions: tuple[Callable, ...] = look_ahead, normuon_scales, change_weights
        self.functions = [torch.compile(f, dynamic=False) if compiled else f for f in functions]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "parts": 1}
        super().__init__(groups, defaults)
        self.defaults["foreach"] = True  # for zero_grad() in one launch

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # torch passes None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for batch in batches_alike(params, lambda param: (param.shape,), NS_BATCH_ELEMENTS):
                self._update(group, batch)

    def _update(self, group: dict, params: TensorList) -> None:
        """Update parameters of the same shape together. One by one, launching the kernels would
        take longer than running them.
        """
        look_ahead, normuon_scales, change_weights = self.functions
        parts, (rows, cols) = group["parts"], params[0].shape
        grads = [param.grad for param in params if param.grad is not None]
        for param, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(grad)
                if self.beta2:  # a number for each row, or for each column if matrices are wide
                    zeros = torch.zeros(max(rows, parts * cols), device=grad.device)
                    self.state[param]["second_moment"] = zeros
        means = [self.state[param]["momentum_buffer"] for param in params]
        # Every change is multiplied by `keep`: 1 keeps it, 0 drops it because the step is skipped.
        # Numbers that differ from step to step are tensors, or torch.compile would recompile.
        inf = torch.zeros((), device=grads[0].device) if self.found_inf is None else self.found_inf
        keep = 1 - inf
        momentum = 1 - keep * (1 - group["momentum"])
        scale = torch.ones_like(inf) if self.grad_scale is None else self.grad_scale
        lookaheads = look_ahead(grads, means, momentum, scale, self.dtype)
        updates = distributed_newton_schulz(full_tensor(lookaheads).view(-1, rows // parts, cols))
        # Jordan's factor, sqrt(max(1, rows / cols)): updates of tall and of square matrices then
        # change the outputs of their layers by as much.
        rate = keep * (-group["lr"] * max(1.0, rows / parts / cols) ** 0.5)
        scales = rate.expand(len(updates), 1, 1)
        if self.beta2:
            moments = [self.state[param]["second_moment"] for param in params]
            stacked = torch.stack(moments)
            scales = scales * normuon_scales(updates, stacked, keep * (1 - self.beta2))
            torch._foreach_copy_(moments, list(stacked.unbind()))
        decay = 1 - keep * (group["lr"] * group["weight_decay"])
        change_weights(params, updates.split(parts), scales.split(parts), decay)


def look_ahead(
    grads: TensorList, means: TensorList, momentum: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Divide the gradients by `scale` and update their running means. Return their Nesterov
    look-aheads, stacked. A momentum of 1 leaves the means as they are, even if a gradient is NaN.
    """
    lookaheads, is_kept, new_share = [], momentum < 1, 1 - momentum
    for grad, mean in zip(grads, means, strict=True):
        new = torch.where(is_kept, grad / scale, mean)
        mean.add_((new - mean) * new_share)
        lookaheads.append((new + (mean - new) * momentum).to(dtype))
    return torch.stack(lookaheads)


def normuon_scales(updates: Tensor, moments: Tensor, new_share: Tensor) -> Tensor:
    """Return the factors (n, rows, 1) by which NorMuon multiplies updates (n, rows, cols). If they
    are wide, read column for row: (n, 1, cols). Each row is divided by the running root mean square
    of its elements; then each matrix is scaled back to the norm it had. Updates `moments`, the
    running mean squares. `new_share` is the share of the new squares in them, 0 in a skipped step.
    """
    dim = 1 if updates.size(1) < updates.size(2) else 2
    norms = torch.linalg.vector_norm(updates, dim=dim, keepdim=True, dtype=torch.float32)
    squares = norms.square() / updates.size(dim)
    scales = moments.view_as(squares).lerp_(squares, new_share).clamp(min=MIN_SECOND_MOMENT).rsqrt()
    # The squared norm of a matrix before and after, both divided by the length of its rows.
    before = squares.sum((1, 2), keepdim=True)
    after = (squares * scales.square()).sum((1, 2), keepdim=True)
    return scales * (before / after.clamp(min=MIN_SECOND_MOMENT)).sqrt()


def change_weights(
    weights: TensorList, updates: TensorList, scales: TensorList, decay: Tensor
) -> None:
    """W = decay * W + scale * update, where W may be several matrices on top of each other."""
    for weight, update, scale in zip(weights, updates, scales, strict=True):
        change = (update * scale).view(weight.shape)
        weight.mul_(decay).add_(shard_like(weight, change))


def newton_schulz(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix (n, rows, cols) with values near 1, using Jordan's
    quintic Newton-Schulz iteration. Singular values of at least 0.002 times the Frobenius norm end
    up between about 0.7 and 1.2; much smaller ones stay smaller. The dtype stays the same.
    """
    a, b, c = NS_COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = matrices / norm.clamp(min=NS_EPS).to(matrices.dtype)
    for _ in range(NS_STEPS):
        # x becomes (a + b g + c g g) x, where g is the smaller of x x' and x' x. To add b g and
        # a x, baddbmm would copy g and x. So we complete the square. With s = b / 2c:
        #     a + b g + c g g = c (g + s)^2 + (a - c s^2)
        # Adding s, or a - c s^2, only changes the diagonal.
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        gram.diagonal(dim1=1, dim2=2).add_(b / (2 * c))
        polynomial = torch.baddbmm(gram, gram, gram, beta=0, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a - b * b / (4 * c))
        x = torch.bmm(x, polynomial) if is_tall else torch.bmm(polynomial, x)
    return x


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
