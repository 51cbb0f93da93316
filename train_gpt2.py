"""Pretrain a GPT-2. On N devices: torchrun --standalone --nproc_per_node=N train_gpt2.py"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import cli
from checkpoint import check_same_run, load_model, load_newest, lock_run
from data import PretrainingData, TokenShards, write_atomically
from model import GPT, GPTConfig
from report import describe
from runtime import Distributed, default_precision
from step import parameter_groups
from training import TrainConfig, train

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, made by fineweb.py"""
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


def main(config: PretrainConfig) -> None:
    dist = Distributed.start(config.device)
    train_shards, val_shards = (
        TokenShards(config.data_dir, split, verify=dist.is_main) for split in ("train", "val")
    )
    run = Path(config.out_dir)
    with lock_run(run) if dist.is_main else nullcontext():
        with dist.main_first():
            config = replace(config, **check_same_run(run, asdict(config), config.resume))
            model, *resumed = load_newest(run) or [new_model(config)]
        if resumed and resumed[0]["data"] != train_shards.fingerprint:
            raise ValueError(
                f"{run} was trained on other shards than those in data_dir now; it goes on exactly "
                "only with the same ones"
            )
        config = resolve(config, model.config, dist.device)
        data = PretrainingData(
            train_shards,
            config.block_size,
            config.batch_size,
            config.total_batch_size,
            config.seed,
            dist.rank,
            dist.world_size,
        )
        if dist.is_main:
            print(cli.as_yaml(config))
            print(describe(parameter_groups(model), data), flush=True)
            text = cli.as_yaml(config).encode()
            write_atomically(run / "config.yaml", lambda file: file.write(text))
        try:
            train(model.to(dist.device), data, val_shards, config, dist, resumed or None)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{dist.device} has too little memory for batch_size {config.batch_size}; halve it "
                "(the curve stays the same), or add --recompute block"
            ) from error
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


def resolve(config: PretrainConfig, shape: GPTConfig, device: torch.device) -> PretrainConfig:
    """`config` with a value for everything that was left to the model or the machine."""
    chosen = {name: getattr(shape, name) for name in SHAPE if getattr(config, name) is None}
    if config.precision is None:
        chosen["precision"] = default_precision(device)
    if config.compile is None:
        chosen["compile"] = device.type == "cuda"
    return replace(config, **chosen)


if __name__ == "__main__":
    cli.run(main, PretrainConfig, __doc__)
