"""Take a snapshot, train one more step, and fail if the snapshot changed. Runs under torchrun in a
folder with data/text. Argument: ddp or fsdp.
"""

import copy
import sys

import torch

from engine.data import PretrainingData
from engine.distributed import Distributed
from engine.shards import TokenShards
from engine.step import TrainingStep
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig

N_TENSORS = 16  # of the model below

if __name__ == "__main__":
    dist = Distributed.start("cpu")
    model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16))
    config = PretrainConfig(
        parallel=sys.argv[1],
        optimizer="muon",
        muon_beta2=0.95,
        precision="fp32",
        compile=False,
        device="cpu",
    )
    data = PretrainingData(
        TokenShards("data/text", "train"),
        block_size=32,
        batch_size=1,
        total_batch_size=64,
        seed=0,
        rank=dist.rank,
        world_size=dist.world_size,
    )
    training_step = TrainingStep(model, data, config, dist)
    training_step(1)
    params, state = training_step.snapshot()
    taken = params, state["optimizer"].get("state", {})
    expected = copy.deepcopy(taken)
    training_step(2)
    if dist.is_main:
        if not len(params) == len(expected[1]) == N_TENSORS:
            raise ValueError(f"{len(params)} parameters and {len(expected[1])} states")
        torch.testing.assert_close(taken, expected, rtol=0, atol=0)
    dist.barrier()
    dist.stop()
