"""Pretrain GPT-2. On N devices: torchrun --standalone --nproc_per_node=N train_gpt2.py"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.checkpoint import load_model
from engine.config import MODEL_HELP, TrainConfig, flag, run_command
from engine.data import PretrainingData, validation_batches
from engine.distributed import Distributed, keep_freed_memory, resolve_device_settings
from engine.evaluation import Prompt
from engine.lora import lora_linears
from engine.pretrained import load_tokenizer
from engine.resume import open_run
from engine.shards import TokenShards, load_data_tokenizer
from engine.tokenizer import Tokenizer
from engine.training import train
from model import GPT, GPTConfig

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    data_dir: str = flag(
        "data/fineweb-edu", "token shards, made by fineweb.py", group="data", may_change=True
    )  # on resume, the shards are compared
    total_batch_size: int = flag(524_288, "tokens per optimizer step over all devices")
    eval_tokens: int = flag(10_485_760, "validation tokens per evaluation, the first of the split")

    init_from: str = flag("scratch", f"scratch, or a {MODEL_HELP}", group="model")
    zero_residual: bool = flag(False, "scratch only: initialize c_proj weights with zeros")
    sinusoidal_wpe: float = flag(0.0, "scratch only: rms of sinusoids in wpe; 0: random wpe")
    n_layer: int | None = flag(None, "blocks (default: 12, or as in init_from)")
    n_head: int | None = flag(None, "attention heads (default: 12, or as in init_from)")
    n_embd: int | None = flag(None, "width (default: 768, or as in init_from)")
    block_size: int | None = flag(None, "tokens per sequence (default: 1024, or as in init_from)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("zero_residual", "sinusoidal_wpe"):
            if getattr(self, name) and self.init_from != "scratch":
                raise ValueError(f"{name} does not work with init_from {self.init_from}")
        if self.tokenizer and self.init_from == "scratch":
            raise ValueError("tokenizer needs init_from; a new model takes it from the data")


def main(given: PretrainConfig) -> None:
    dist = Distributed.start(given.device)
    keep_freed_memory(dist)
    tokenizer = load_data_tokenizer(given.data_dir)
    check_with = tokenizer if dist.is_main else None  # rank 0 checks the shards for all
    train_shards = TokenShards(given.data_dir, "train", check_with)
    val_shards = TokenShards(given.data_dir, "val", check_with)
    build, resolve = partial(build_model, tokenizer), partial(resolve_config, dist=dist)
    with open_run(given, dist, build, resolve) as (config, model, resumed):
        sizes: dict[str, Any] = {"block_size": config.block_size, "batch_size": config.batch_size}
        sizes |= {"rank": dist.rank, "world_size": dist.world_size}
        per_step, seed = config.total_batch_size, config.seed
        data = PretrainingData(train_shards, total_batch_size=per_step, seed=seed, **sizes)
        batches = partial(validation_batches, val_shards, **sizes)
        val = partial(batches, eval_tokens=config.eval_tokens, full_batches=config.compile)
        # The default prompt is English. With other tokenizers, sample from an empty prompt.
        prompts = [Prompt() if tokenizer.is_gpt2 else Prompt(text="")]
        train(model, tokenizer, data, val, prompts, config, dist, resumed)
    dist.stop()


def resolve_config(config: PretrainConfig, model: GPT, dist: Distributed) -> PretrainConfig:
    """Fill in the shape of the model. But keep a block_size that is shorter than the model's."""
    shape = {name: getattr(model.config, name) for name in SHAPE} | given_shape(config)
    return resolve_device_settings(replace(config, **shape), dist)


def given_shape(config: PretrainConfig) -> dict[str, Any]:
    """Return the shape settings that were given."""
    return {name: getattr(config, name) for name in SHAPE if getattr(config, name) is not None}


def build_model(tokenizer: Tokenizer, config: PretrainConfig) -> GPT:
    """Make a new model for the tokenizer of the data, or load init_from. Raises ValueError if
    init_from has another tokenizer or another shape.
    """
    shape = given_shape(config)
    if config.init_from == "scratch":
        return new_model(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), config)
    model = load_model(config.init_from)
    if lora_linears(model):
        raise ValueError(
            f"init_from {config.init_from} is an adapter, expected a full model; merge it first: "
            "rerun the finetune_lora.py command that trained it, with --merge_out FOLDER"
        )
    model_tokenizer = load_tokenizer(model, config.tokenizer)
    if model_tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{config.data_dir} was tokenized with {tokenizer}, but init_from {config.init_from} "
            f"has the tokenizer {model_tokenizer}; prepare the data with --tokenizer "
            f"{config.tokenizer or model.name_or_path}"
        )
    for name, value in shape.items():
        found = getattr(model.config, name)
        is_shorter = name == "block_size" and value < found  # fine
        if value != found and not is_shorter:
            raise ValueError(f"{name} is {value}, but {config.init_from} has {found}")
    return model


def new_model(model_config: GPTConfig, config: PretrainConfig) -> GPT:
    """Initialize a model to train from scratch."""
    torch.manual_seed(config.seed)
    model = GPT(model_config)
    if config.zero_residual:  # every block starts as the identity
        for name, param in model.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(param)
    if config.sinusoidal_wpe:
        wpe = model.get_parameter("transformer.wpe.weight")
        with torch.no_grad():  # a sinusoid has an rms of 1 / sqrt(2)
            wpe.copy_(config.sinusoidal_wpe * math.sqrt(2) * sinusoids(*wpe.shape))
    return model


def sinusoids(T: int, C: int) -> torch.Tensor:
    """The position embeddings (T, C) of "Attention Is All You Need", with all sines first."""
    angles = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, C, 2) / C)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :C]


if __name__ == "__main__":
    run_command(main, PretrainConfig, __doc__)
