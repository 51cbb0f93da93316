"""Train six compiled bf16 steps on a GPU with deterministic kernels: once without a stop, and once
with a new model restored from a snapshot after step 3. Print one line of losses for each.
"""

import torch

from benchmarks.harness import BenchmarkConfig, RandomBatches, Size, random_training_step
from engine.data import Batch
from engine.step import TrainingStep
from model import GPT

SIZE = Size(n_layer=2, n_embd=128, batch_size=8, T=128)
CONFIG = BenchmarkConfig(device="cuda", precision="bf16")


def batch_of_step(_batches: RandomBatches, step: int, _micro_step: int) -> Batch:
    """Return tokens that depend on the step alone, as in training."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(50257, (SIZE.batch_size, SIZE.T), generator=generator)
    return Batch(ids, ids)


def new_step() -> TrainingStep:
    torch.manual_seed(0)
    settings = {"compile": True, "warmup_steps": 2, "max_lr": 1e-2}
    return random_training_step(GPT(SIZE.gpt_config()), SIZE, CONFIG, **settings)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    RandomBatches.micro_batch = batch_of_step
    step = new_step()
    losses = [step(s)[0].item() for s in (1, 2, 3)]
    params, state = step.snapshot()
    params = {name: tensor.clone() for name, tensor in params.items()}
    print(*losses, *(step(s)[0].item() for s in (4, 5, 6)))
    step = new_step()
    step.model.load_state_dict(params, strict=False)  # a tied head has two names
    step.restore(state)
    print(*losses, *(step(s)[0].item() for s in (4, 5, 6)))
