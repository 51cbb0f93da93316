"""Pretrain a GPT-2. On N devices: torchrun --standalone --nproc_per_node=N train_gpt2.py"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cli
from checkpoint import claim_run, load_model
from data import PretrainingData, TokenShards
from model import GPT, GPTConfig
from runtime import Distributed
from training import TrainConfig, describe, train


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, made by fineweb.py"""
    init_from: str = "scratch"
    """scratch, or the model to start from: a hub name, a folder, a checkpoint or a run"""
    n_layer: int = GPTConfig.n_layer
    """blocks (this and the next two for --init_from scratch)"""
    n_head: int = GPTConfig.n_head
    """attention heads"""
    n_embd: int = GPTConfig.n_embd
    """width"""
    block_size: int = GPTConfig.block_size
    """tokens in a sequence"""


def main(config: PretrainConfig) -> None:
    shards = {split: TokenShards(config.data_dir, split) for split in ("train", "val")}
    dist = Distributed.start(config.device)
    data = PretrainingData(
        shards["train"],
        config.block_size,
        config.batch_size,
        config.total_batch_size,
        config.seed,
        dist.rank,
        dist.world_size,
    )
    checkpoint = dist.from_main(
        lambda: claim_run(Path(config.out_dir), asdict(config), config.resume)
    )
    model = make_model(config, checkpoint).to(dist.device)
    if dist.is_main:
        print(cli.as_yaml(config), describe(model, data), sep="\n", flush=True)
    train(model, data, shards["val"], config, dist, checkpoint)
    dist.stop()


def make_model(config: PretrainConfig, checkpoint: Path | None) -> GPT:
    """The model to train, on the CPU: of the checkpoint, of init_from, or new."""
    torch.manual_seed(config.seed)
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
        return GPT.from_pretrained(checkpoint)
    if config.init_from == "scratch":
        shape = ("block_size", "n_layer", "n_head", "n_embd")
        return GPT(GPTConfig(**{name: getattr(config, name) for name in shape}))
    model = load_model(config.init_from)
    for name in ("n_layer", "n_head", "n_embd"):
        wanted, found = getattr(config, name), getattr(model.config, name)
        if wanted not in (found, getattr(GPTConfig, name)):
            raise ValueError(
                f"{name} is {wanted}, but {config.init_from} has {found}; leave it out"
            )
    if config.block_size > model.config.block_size:
        raise ValueError(
            f"block_size is {config.block_size}, but {config.init_from} has positions for "
            f"{model.config.block_size}"
        )
    return model


if __name__ == "__main__":
    cli.run(main, PretrainConfig, __doc__)
