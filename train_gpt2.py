"""Pretrain a GPT-2. On N devices: torchrun --standalone --nproc_per_node=N train_gpt2.py"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import cli
from checkpoint import check_same_run, load_model, load_newest, lock_run
from data import PretrainingData, TokenShards, evaluation_batches
from model import GPT, GPTConfig
from runtime import Distributed, keep_freed_memory
from step import find_batch_size
from training import Prompt, TrainConfig, train

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, made by fineweb.py"""
    total_batch_size: int = 524_288
    """tokens per optimizer step over all devices"""
    find_batch_size: bool = False
    """on CUDA: before the run, find the largest power of two for batch_size that fits; the curve
    stays the same"""
    eval_tokens: int = 10_485_760
    """validation tokens of an evaluation, always the same first ones"""
    init_from: str = "scratch"
    """scratch, or the model to start from: a hub name, a folder, a checkpoint or a run"""
    zero_residual: bool = False
    """from scratch, start with blocks that add nothing: their c_proj weights are zero"""
    n_layer: int | None = None
    """blocks (default: 12, or what init_from has)"""
    n_head: int | None = None
    """attention heads (default: 12, or what init_from has)"""
    n_embd: int | None = None
    """width (default: 768, or what init_from has)"""
    block_size: int | None = None
    """tokens in a sequence (default: 1024, or what init_from has)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "total_batch_size", "eval_tokens")
        if self.zero_residual and self.init_from != "scratch":
            raise ValueError(f"zero_residual does not go with init_from {self.init_from}")


def main(config: PretrainConfig) -> None:
    dist = Distributed.start(config.device)
    keep_freed_memory(dist)
    train_shards, val_shards = (
        TokenShards(config.data_dir, split, verify=dist.is_main) for split in ("train", "val")
    )
    if (config.block_size or 0) >= len(train_shards):
        raise ValueError(
            f"block_size is {config.block_size}, but {config.data_dir} holds {len(train_shards)} "
            "tokens to train on; lower it, or prepare more"
        )
    run = Path(config.out_dir)
    with lock_run(run) if dist.is_main else nullcontext():
        with dist.main_first():
            config = replace(config, **check_same_run(run, config))
            model, resumed = load_newest(run) or (new_model(config), None)
        shape = {name: getattr(model.config, name) for name in SHAPE}
        given = {name: getattr(config, name) for name in SHAPE}
        shape |= {name: value for name, value in given.items() if value is not None}
        config = replace(config, **shape).on(dist.device)
        ranks = dist.rank, dist.world_size
        if config.find_batch_size:
            smallest = shape["block_size"], 1, config.total_batch_size
            data = PretrainingData(train_shards, *smallest, config.seed, *ranks)
            config = replace(config, batch_size=find_batch_size(model, data, config, dist))
        sizes = shape["block_size"], config.batch_size
        data = PretrainingData(train_shards, *sizes, config.total_batch_size, config.seed, *ranks)
        val = partial(evaluation_batches, val_shards, *sizes, config.eval_tokens, *ranks)
        train(model, data, val, [Prompt()], config, dist, resumed)
    dist.stop()


def new_model(config: PretrainConfig) -> GPT:
    """The model to start with: new, or that of init_from."""
    asked = {name: getattr(config, name) for name in SHAPE if getattr(config, name) is not None}
    if config.init_from == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(**asked))
        if config.zero_residual:
            zero_residual_projections(model)
        return model
    model = load_model(config.init_from)
    for name, value in asked.items():
        found = getattr(model.config, name)
        if value > found or (value != found and name != "block_size"):  # a shorter window is fine
            raise ValueError(f"{name} is {value}, but {config.init_from} has {found}")
    return model


def zero_residual_projections(model: GPT) -> None:
    """Make blocks add nothing at first: what they learn is then not disturbed by random parts."""
    for name, param in model.named_parameters():
        if name.endswith("c_proj.weight"):
            nn.init.zeros_(param)


if __name__ == "__main__":
    cli.run(main, PretrainConfig, __doc__)
