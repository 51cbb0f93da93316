"""A file of its own because PyTorch's Muon iterates in bf16 on any device and knows no ranks: Muon
for the matrices of the blocks.
"""

from collections.abc import Iterable

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, distribute_tensor

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", as torch.optim.Muon.
NS_STEPS, NS_COEFFICIENTS, NS_EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
# modded-nanogpt: the momentum rises over the first steps, while old gradients mean little.
FIRST_MOMENTUM, MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 0.95, 300
ELEMENTS_AT_ONCE = 2**24  # of a batch of matrices: enough to fill a GPU, 64 MB in fp32

Entry = tuple[dict, torch.Tensor, torch.Tensor]  # a group, a parameter of it, its gradient


def momentum_at(step: int) -> float:
    """The momentum of a step counted from 1."""
    share = min(1.0, (step - 1) / MOMENTUM_WARMUP_STEPS)
    return FIRST_MOMENTUM + share * (MOMENTUM - FIRST_MOMENTUM)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, cols) with singular values near 1 (0.7 to 1.2) in place of theirs, by the
    quintic Newton-Schulz iteration, in the type they come in.
    """
    a, b, c = NS_COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=NS_EPS).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised. A parameter of a group with `parts` n is n matrices
    on top of each other (c_attn is q, k and v). Ranks share the work, each orthogonalising some of
    the matrices; parameters may be whole on every rank or sharded by FSDP2. As with PyTorch's fused
    optimizers, a step whose `found_inf` is 1 changes nothing.
    """

    found_inf: torch.Tensor | None = None  # a scalar on the device, so that no one waits for it

    def __init__(self, groups: Iterable[dict], lr: float, weight_decay: float):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        if closure is not None:
            raise ValueError("Muon takes no closure; call backward before the step")
        by_shape: dict[tuple, list[Entry]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    rows, cols = param.shape
                    shape = group["parts"], rows // group["parts"], cols
                    by_shape.setdefault(shape, []).append((group, param, param.grad))
        for shape, entries in by_shape.items():
            at_once = max(1, ELEMENTS_AT_ONCE // (shape[0] * shape[1] * shape[2]))
            for start in range(0, len(entries), at_once):
                self._update(entries[start : start + at_once], shape)

    def _update(self, entries: list[Entry], shape: tuple) -> None:
        """Do the step of parameters that hold `parts` matrices of `rows` x `cols` each."""
        parts, rows, cols = shape
        directions = torch.cat([whole(self._direction(*entry)).view(shape) for entry in entries])
        updates = orthogonalized_by_all(directions.to(working_dtype(directions.device)))
        for (group, param, _), update in zip(entries, updates.split(parts), strict=True):
            # A tall matrix moves its outputs as far as a square one: Jordan's factor.
            rate = group["lr"] * max(1.0, rows / cols) ** 0.5
            change = like(param, update.reshape(param.shape).to(param.dtype)).mul_(-rate)
            change.sub_(param, alpha=group["lr"] * group["weight_decay"])
            param.add_(change if self.found_inf is None else change * (1 - self.found_inf))

    def _direction(self, group: dict, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Nesterov's look ahead on the running mean of gradients, which it brings up to date."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"]
        if self.found_inf is not None:  # a mean of itself and itself stays as it is
            grad = torch.where(self.found_inf.bool(), mean, grad)
        mean.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(mean, group["momentum"])


def working_dtype(device: torch.device) -> torch.dtype:
    """The iteration bears bf16, which is fast where there are units for it; a CPU without them
    takes hundreds of times as long as in fp32.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(param: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """`full`, which all ranks have, or of it the part that this rank has of `param`."""
    if not isinstance(param, DTensor):
        return full
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def orthogonalized_by_all(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonalized`, where each rank does an equal share and gets the others' results."""
    dist = torch.distributed
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return orthogonalized(matrices)
    share = -(-len(matrices) // ranks)
    start = dist.get_rank() * share
    mine = matrices.new_zeros(share, *matrices.shape[1:])  # the last ranks may have less to do
    todo = matrices[start : start + share]
    if len(todo):
        mine[: len(todo)] = orthogonalized(todo)
    gathered = matrices.new_empty(ranks * share, *matrices.shape[1:])
    dist.all_gather_single(gathered, mine)
    return gathered[: len(matrices)]
