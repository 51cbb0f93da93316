"""Print the losses of six compiled steps in bf16 on a GPU, first of an uninterrupted run, then of
one that a snapshot restored after three. With the argument "deterministic" all kernels are.
"""

import sys

import torch

from benchmarks.harness import BenchmarkConfig, Size, random_training_step
from engine.step import TrainingStep

SIZE = Size(n_layer=2, n_embd=128, batch_size=8, T=128)
CONFIG = BenchmarkConfig(device="cuda", precision="bf16")


def new_step() -> TrainingStep:
    torch.manual_seed(0)
    return random_training_step(SIZE, CONFIG, compile=True, warmup_steps=2, max_lr=1e-2)


if __name__ == "__main__":
    torch.use_deterministic_algorithms("deterministic" in sys.argv)
    step = new_step()
    losses = [step(s)[0].item() for s in (1, 2, 3)]
    params, state = step.snapshot()
    params = {name: tensor.clone() for name, tensor in params.items()}
    print(*losses, *(step(s)[0].item() for s in (4, 5, 6)))
    step = new_step()
    step.model.load_state_dict(params, strict=False)  # a tied head has two names
    step.restore(state)
    print(*losses, *(step(s)[0].item() for s in (4, 5, 6)))
