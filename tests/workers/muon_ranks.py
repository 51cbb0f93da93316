"""On two ranks, check Muon and NorMuon on replicated and sharded parameters. After three
steps, one of them skipped, parameters equal one process's; no rank orthogonalizes all matrices.
"""

import itertools
from collections.abc import Callable

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine import optim

# The first is three matrices, like c_attn. The second has a row more on one rank.
SHAPES = (72, 24), (25, 24), (24, 96)
SKIPPED = (0.0, 1.0, 0.0)  # found_inf of each step


def train_steps(beta2: float, wrap: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Take three steps with random gradients. Return the parameters."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(wrap(torch.randn(shape))) for shape in SHAPES]
    groups = [{"params": params[:1], "parts": 3}, {"params": params[1:]}]
    optimizer = optim.Muon(groups, lr=0.1, weight_decay=0.1, beta2=beta2)
    for found_inf in SKIPPED:
        optimizer.found_inf = torch.tensor(found_inf)
        for param in params:
            param.grad = wrap(torch.randn(param.shape))
        optimizer.step()
    return [optim.full_tensor(param.detach()) for param in params]


if __name__ == "__main__":
    newton_schulz, counts = optim.newton_schulz, []

    def count_matrices(matrices: torch.Tensor) -> torch.Tensor:
        counts.append(len(matrices))
        return newton_schulz(matrices)

    def shard(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    optim.newton_schulz = count_matrices
    expected = {beta2: train_steps(beta2, torch.clone) for beta2 in (0.0, 0.95)}
    n_alone = sum(counts) // len(expected)
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for beta2, wrap in itertools.product(expected, (torch.clone, shard)):
        counts.clear()
        for param, reference in zip(train_steps(beta2, wrap), expected[beta2], strict=True):
            torch.testing.assert_close(param, reference, atol=1e-5, rtol=1e-4)
        if sum(counts) >= n_alone:
            raise ValueError(f"{sum(counts)} matrices on this rank, {n_alone} in one process")
    torch.distributed.destroy_process_group()
