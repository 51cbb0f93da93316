"""Pretrain a GPT-2. On N devices: torchrun --standalone --nproc_per_node=N train_gpt2.py"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import cli
from checkpoint import check_same_run, load_model, load_newest, lock_run
from data import PretrainingData, TokenShards, evaluation_batches
from model import GPT, GPTConfig
from runtime import Distributed, keep_freed_memory
from training import Prompt, TrainConfig, train

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, made by fineweb.py"""
    total_batch_size: int = 524_288
    """tokens per optimizer step over all devices"""
    eval_tokens: int = 10_485_760
    """validation tokens of an evaluation, always the same first ones"""
    init_from: str = "scratch"
    """scratch, or the model to start from: a hub name, a folder, a checkpoint or a run"""
    n_layer: int | None = None
    """blocks (default: 12, or what init_from has)"""
    n_head: int | None = None
    """attention heads (default: 12, or what init_from has)"""
    n_embd: int | None = None
    """width (default: 768, or what init_from has)"""
    block_size: int | None = None
    """tokens in a sequence (default: 1024, or what init_from has)"""

    def __post_init__(self):
        super().__post_init__()
        self._check_least(1, "total_batch_size", "eval_tokens")


def main(config: PretrainConfig) -> None:
    dist = Distributed.start(config.device)
    keep_freed_memory(dist)
    train_shards, val_shards = (
        TokenShards(config.data_dir, split, verify=dist.is_main) for split in ("train", "val")
    )
    run = Path(config.out_dir)
    with lock_run(run) if dist.is_main else nullcontext():
        with dist.main_first():
            config = replace(config, **check_same_run(run, asdict(config), config.resume))
            model, *resumed = load_newest(run) or [new_model(config)]
        shape = {name: getattr(model.config, name) for name in SHAPE}
        given = {name: getattr(config, name) for name in SHAPE}
        shape |= {name: value for name, value in given.items() if value is not None}
        config = replace(config, **shape).on(dist.device)
        ranks = dist.rank, dist.world_size
        sizes = config.block_size, config.batch_size
        data = PretrainingData(train_shards, *sizes, config.total_batch_size, config.seed, *ranks)
        val = partial(evaluation_batches, val_shards, *sizes, config.eval_tokens, *ranks)
        train(model, data, val, [Prompt()], config, dist, resumed or None)
    dist.stop()


def new_model(config: PretrainConfig) -> GPT:
    """The model to start with: new, or that of init_from."""
    asked = {name: getattr(config, name) for name in SHAPE if getattr(config, name) is not None}
    if config.init_from == "scratch":
        torch.manual_seed(config.seed)
        return GPT(GPTConfig(**asked))
    model = load_model(config.init_from)
    for name, value in asked.items():
        found = getattr(model.config, name)
        if value > found or (value != found and name != "block_size"):  # a shorter window is fine
            raise ValueError(f"{name} is {value}, but {config.init_from} has {found}")
    return model


if __name__ == "__main__":
    cli.run(main, PretrainConfig, __doc__)
