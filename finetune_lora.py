"""Fine-tune a GPT-2 on instructions, with LoRA or whole: python finetune_lora.py --lora_dim 8"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import cli
from checkpoint import (
    check_same_run,
    check_vocabulary,
    load_model,
    load_newest,
    lock_run,
    newest,
    read_metrics,
    weights_sha256,
)
from data import write_atomically
from instructions import (
    InstructionData,
    default_data,
    held_out_batches,
    read_examples,
    split_examples,
)
from lora import (
    Settings,
    convert_linear_layer_to_lora,
    load_adapter,
    lora_linears,
    merge_lora,
    only_optimize_lora_parameters,
)
from model import GPT
from plot import points
from runtime import Distributed, keep_freed_memory
from tokenizer import save_tokenizer
from training import Prompt, TrainConfig, train

LORA_SETTINGS = ("lora_dim", "lora_alpha", "lora_dropout", "use_rslora")
N_ANSWERS, ANSWER_TOKENS = 3, 64  # shown beside their references


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    out_dir: str = "runs/lora"
    """run folder: config, log, plot and checkpoints"""
    model_name_or_path: str = "gpt2"
    """base model: a hub name, a Hugging Face folder, a checkpoint or a run"""
    data: str | None = None
    """.json or .jsonl of instruction, input, output or of prompt, completion; a hub name; stdlib
    (default: yahma/alpaca-cleaned from the hub, where there is no network stdlib)"""
    use_lora: bool = True
    """false: train all weights"""
    lora_dim: int | None = None
    """rank r (default: 8, or the loaded adapter's)"""
    lora_alpha: float | None = None
    """the term's scaling is lora_alpha / lora_dim (default: twice lora_dim, or the adapter's)"""
    lora_dropout: float | None = None
    """on the inputs of the term; with it the curve depends on batch_size and the number of devices
    (default: 0, or the adapter's)"""
    use_rslora: bool | None = None
    """scaling lora_alpha / sqrt(lora_dim) (default: false, or the adapter's)"""
    lora_module_name: str = "h."
    """linears with one of these in their names get LoRA: h. is all; attn.c_attn,mlp some"""
    lora_load_path: str | None = None
    """adapter to start from: a PEFT folder, a run, or a lora.pt"""
    merge_out: str | None = None
    """folder for the fine-tuned model with the adapter merged, an ordinary checkpoint"""
    base_sha256: str | None = None
    """of the base model's weights; filled in, and compared when the run goes on"""
    batch_size: int = 16
    """examples per device and micro-step"""
    examples_per_step: int = 64
    """examples per optimizer step over all devices"""
    epochs: int = 3
    """times that every example is seen"""
    max_steps: int | None = None  # type: ignore[assignment]  # filled in before training
    """optimizer steps (default: as many as make the epochs)"""
    val_fraction: float = 0.1
    """part of the examples that is held out, drawn by seed"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    max_lr: float | None = None  # type: ignore[assignment]  # filled in before training
    """learning rate after the warm-up (default: 5e-4, with use_lora false a tenth)"""
    min_lr: float = 0.0
    """learning rate at max_steps, reached along a cosine"""
    weight_decay: float = 0.0
    """on tensors of two or more dimensions"""
    eval_every: int = 20
    """steps between evaluations"""
    sample_every: int = 100
    """steps between samples; 0 is never"""
    save_every: int = 100
    """steps between checkpoints"""
    recompute: Literal["none", "light", "block"] = "light"
    """what the backward pass computes again instead of keeping it: light, LayerNorm and GELU;
    block, nearly everything (less memory, slower)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "examples_per_step", "epochs", "lora_dim")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, expected between 0 and 1")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, expected from 0 to below 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha}, expected above 0")
        if not self.use_lora:
            for name in ("lora_load_path", *LORA_SETTINGS):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given, which needs --use_lora true")


def main(config: FinetuneConfig) -> None:
    dist = Distributed.start(config.device)
    keep_freed_memory(dist)
    run = Path(config.out_dir)
    merged = Path(config.merge_out) if config.merge_out else None
    if merged and merged.exists() and not (merged.is_dir() and not any(merged.iterdir())):
        raise ValueError(f"merge_out {merged} is there already; choose another folder")
    with lock_run(run) if dist.is_main else nullcontext():
        with dist.main_first():
            base = load_model(config.model_name_or_path)
            config = replace(config, base_sha256=check_base(base, config))
            config = replace(config, **check_same_run(run, config))
            torch.manual_seed(config.seed)
            name = config.model_name_or_path if config.use_lora else None
            model, resumed = load_newest(run, name) or (add_lora(base, config), None)
            data_name = config.data or default_data()
            examples = read_examples(data_name, base.config.block_size)
        config = replace(resolve(config, model), data=data_name).on(dist.device)
        if config.use_lora:
            only_optimize_lora_parameters(model)
        examples, held_out = split_examples(examples, config.val_fraction, config.seed)
        data = InstructionData(
            examples,
            config.batch_size,
            config.examples_per_step,
            config.seed,
            dist.rank,
            dist.world_size,
        )
        steps = config.max_steps or -(-config.epochs * len(examples) // config.examples_per_step)
        config = replace(config, max_steps=steps)
        if config.warmup_steps >= steps and dist.is_main:
            print(
                f"warmup_steps {config.warmup_steps} is all of max_steps {steps}: the "
                f"learning rate never reaches max_lr {config.max_lr}"
            )
        val = partial(held_out_batches, held_out, config.batch_size, dist.rank, dist.world_size)
        prompts = [Prompt(e.prompt, ANSWER_TOKENS, 1, e.completion) for e in held_out[:N_ANSWERS]]
        if dist.is_main and config.use_lora:
            print(describe_lora(model))
        try:
            train(model, data, val, prompts, config, dist, resumed)
        finally:
            if dist.is_main and (run / "metrics.jsonl").exists():
                write_train_data(run)
        if dist.is_main and config.merge_out:
            # The base as it was loaded: a run's newest checkpoint may be another by now.
            source = base.name_or_path if config.use_lora else None
            tuned = load_model(source, run) if source else load_model(run)
            write_merged(tuned, config.merge_out)
    dist.stop()


def check_base(base: GPT, config: FinetuneConfig) -> str:
    """The weights' sha256; ValueError for a model that cannot be the base of this run."""
    name = config.model_name_or_path
    if lora_linears(base):
        raise ValueError(
            f"model_name_or_path {name} is an adapter; give its base model {base.name_or_path}, "
            "and the adapter as --lora_load_path"
        )
    check_vocabulary(base, name)
    found = weights_sha256(base)
    if config.base_sha256 not in (None, found):
        raise ValueError(f"{name} has weights of sha256 {found}, expected {config.base_sha256}")
    return found


def lora_settings(config: FinetuneConfig) -> Settings:
    """lora_dim, lora_alpha, lora_dropout and use_rslora of a new adapter."""
    lora_dim = config.lora_dim or 8
    lora_alpha = 2.0 * lora_dim if config.lora_alpha is None else config.lora_alpha
    return lora_dim, lora_alpha, config.lora_dropout or 0.0, bool(config.use_rslora)


def add_lora(base: GPT, config: FinetuneConfig) -> GPT:
    """The model to start with: the base, with a new adapter or the one to go on from."""
    if not config.use_lora:
        return base
    if config.lora_load_path is None:
        return convert_linear_layer_to_lora(base, config.lora_module_name, *lora_settings(config))
    return load_adapter(base, newest(config.lora_load_path), lora_settings(config))


def resolve(config: FinetuneConfig, model: GPT) -> FinetuneConfig:
    """`config` with a value for everything that was left to the adapter; ValueError where the two
    contradict each other.
    """
    chosen: dict[str, Any] = (
        {} if config.max_lr is not None else {"max_lr": 5e-4 if config.use_lora else 5e-5}
    )
    for linear in lora_linears(model).values():
        for name in LORA_SETTINGS:
            asked, chosen[name] = getattr(config, name), getattr(linear, name)
            if asked not in (None, chosen[name]):
                raise ValueError(
                    f"{name} is {asked}, but the adapter of {config.lora_load_path} has "
                    f"{chosen[name]}"
                )
    return replace(config, **chosen)


def describe_lora(model: GPT) -> str:
    trained = [p for p in model.parameters() if p.requires_grad]
    n, total = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    return (
        f"LoRA: {len(lora_linears(model))} linears, {len(trained)} trainable tensors with {n:,} "
        f"parameters, {n / total:.2%} of all; adapter {4 * n / 1e6:.2f} MB"
    )


def write_train_data(run: Path) -> None:
    """train_data.json: the losses and their steps, as lists to be plotted."""
    data, records = {}, read_metrics(run)
    for name, key in (("train", "train_loss"), ("eval", "val_loss")):
        data[f"{name}_steps"], data[f"{name}_loss"] = points(records, key, "step")
    write_atomically(run / "train_data.json", (json.dumps(data) + "\n").encode())


def write_merged(model: GPT, folder: str) -> None:
    """Write the model as an ordinary checkpoint, its adapter merged."""
    if lora_linears(model):
        merge_lora(model)
    model.save_pretrained(folder)
    save_tokenizer(Path(folder), model.config.block_size)
    print(f"merged model     {folder}")


if __name__ == "__main__":
    cli.run(main, FinetuneConfig, __doc__)
