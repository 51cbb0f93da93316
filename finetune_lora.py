"""Fine-tune GPT-2 on instructions, conversations or text, with LoRA or all weights."""

import json
import os
import shutil
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from engine.adapter import load_adapter
from engine.chat import ChatTemplate, find_chat_template
from engine.checkpoint import find_checkpoint, load_model, mark_base
from engine.config import ADAPTER_HELP, MODEL_HELP, Names, Precision, TrainConfig, flag, run_command
from engine.data import ceil_div
from engine.distributed import Distributed, keep_freed_memory, resolve_device_settings
from engine.evaluation import Prompt, is_last_step, read_val_losses
from engine.files import write_atomically
from engine.instructions import (
    InstructionData,
    RowSettings,
    held_out_batches,
    read_examples,
    set_chat_template,
    split_examples,
)
from engine.lora import (
    LoRAConfig,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    lora_linears,
    merge_lora,
    only_optimize_lora_parameters,
)
from engine.metrics import read_metrics
from engine.plots import curve_points
from engine.pretrained import hash_weights, load_tokenizer, read_dtype, save_pretrained
from engine.resume import open_run
from engine.rows import find_row_files
from engine.tensors import DTYPES
from engine.tokenizer import Tokenizer
from engine.training import train
from model import GPT

LORA_SETTINGS = tuple(f.name for f in fields(LoRAConfig))
# Settings that `lora_form: summed` needs. It builds the weight W + s B A. That weight cannot apply
# dropout to the inputs of A, would lose small updates if W were in bf16, and needs W as a whole.
SUMMED_FORM_NEEDS = {"lora_dropout": 0.0, "base_precision": "fp32", "parallel": "ddp"}
# Defaults. With little data, `resolve_config` limits them to a tenth of the examples and of the
# steps. docs/lora.md compares batch sizes.
EXAMPLES_PER_STEP, WARMUP_STEPS = 16, 10
N_EVALUATIONS = 20  # of a run, by default
N_ANSWERS, ANSWER_TOKENS = 3, 64  # how many answers to sample, and their maximum length


@dataclass(frozen=True)
class FinetuneConfig(RowSettings, TrainConfig):
    # Defaults that differ from pretraining.
    out_dir: str = flag("runs/lora")
    batch_size: int = flag(16)
    max_steps: int = flag(None, "optimizer steps (default: as many as --epochs needs)")
    warmup_steps: int = flag(
        None, "steps of linear warmup (default: 10, at most a tenth of the steps)", at_least=0
    )
    max_lr: float = flag(None, "peak learning rate (default: 5e-4 with LoRA, else 5e-5)", above=0)
    min_lr: float = flag(0.0)
    weight_decay: float = flag(0.0)
    eval_every: int = flag(
        None, "steps between evaluations (default: 20 in all)", group="evaluation", may_change=True
    )
    sample_every: int = flag(400)
    save_every: int = flag(400)
    recompute: Literal["none", "light", "block"] = flag("light")
    save_best: ClassVar[bool] = True

    examples_per_step: int = flag(
        None,
        "examples per optimizer step over all devices (default: 16, at most a tenth of the data)",
    )
    epochs: int = flag(3, "passes over the examples")
    val_data: str | None = flag(None, "validation rows, in the forms of --data")
    val_fraction: float = flag(0.1, "fraction held out without val_data", at_least=0, below=1)

    model_name_or_path: str = flag(
        "gpt2", f"base model: {MODEL_HELP}", group="model", may_change=True
    )  # on resume, base_sha256 is compared
    base_sha256: str | None = flag(None, "expected sha256 of the base model's weights")
    merge_out: str | None = flag(None, "also save the merged model in this folder", may_change=True)
    merge_dtype: Precision = flag(
        None, "precision of the merged weights (default: as in the base)", may_change=True
    )

    use_lora: bool = flag(True, "train an adapter; --no-use_lora trains all weights", group="LoRA")
    lora_dim: int = flag(None, "rank r (default: 8, or the loaded adapter's)")
    lora_alpha: float = flag(
        None, "scaling is lora_alpha / lora_dim (default: 2 lora_dim, or the loaded adapter's)"
    )
    lora_dropout: float = flag(
        None, "dropout; with it, losses depend on batch_size (default: 0, or the loaded adapter's)"
    )
    use_rslora: bool = flag(
        None, "scaling is lora_alpha / sqrt(lora_dim) (default: no, or the loaded adapter's)"
    )
    lora_module_name: Names = flag("h.", "layers to adapt, by parts of names: attn.c_attn mlp")
    lora_load_path: str | None = flag(None, ADAPTER_HELP)

    lora_form: Literal["separate", "summed"] = flag(
        "separate", "summed: build W + s B A once a step, and multiply with it", may_change=True
    )
    base_precision: Literal["fp32", "bf16"] = flag("fp32", "bf16 halves the memory of the base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.val_fraction and not self.val_data:
            raise ValueError("val_fraction is 0, but there is no val_data; set one of them")
        if self.merge_dtype and not self.merge_out:
            raise ValueError(f"merge_dtype is {self.merge_dtype}, but it needs --merge_out")
        if not self.use_lora:
            needing_lora = "lora_load_path", "lora_module_name", "lora_form", "base_precision"
            for name in (*needing_lora, *LORA_SETTINGS):
                default = getattr(FinetuneConfig, name)
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name} is {value}, but it needs --use_lora")
            return
        if self.lora_load_path and self.lora_module_name != FinetuneConfig.lora_module_name:
            raise ValueError("lora_module_name is given, but lora_load_path decides; omit one")
        new_lora_config(self)  # raises for bad values
        for name, needed in SUMMED_FORM_NEEDS.items():
            if self.lora_form == "summed" and getattr(self, name) not in (None, needed):
                raise ValueError(f"lora_form summed needs {name} {needed}")


def main(given: FinetuneConfig) -> None:
    with redirect_stdout(None):  # only to raise before anything slow
        for source in filter(None, (given.data, given.val_data)):
            files = find_row_files(source, given.split)
            has_splits = not files or files[0].suffix == ".arrow"
            if not has_splits and (given.split != "train" or given.dataset_config):
                raise ValueError(f"{source} has no splits or configs; name the files that you want")
    dist = Distributed.start(given.device)
    keep_freed_memory(dist)
    with dist.main_process_first(), nullcontext() if dist.is_main else redirect_stdout(None):
        base = load_model(given.model_name_or_path)
        tokenizer = load_tokenizer(base, given.tokenizer)
        adapter = find_checkpoint(given.lora_load_path) if given.lora_load_path else None
        if adapter:
            tokenizer.chat_template = find_chat_template(adapter, tokenizer)
        read = partial(read_examples, tokenizer=tokenizer, block_size=base.config.block_size)
        examples = read(given.data, settings=given)
        held_out = read(given.val_data, settings=given) if given.val_data else []
    if not held_out:
        examples, held_out = split_examples(examples, given.val_fraction, given.seed)
    set_chat_template(tokenizer, examples)
    given = replace(given, base_sha256=hash_base(base, given))
    base_path = str(base.name_or_path)
    build = partial(add_adapter, base, adapter=adapter)
    resolve = partial(resolve_config, n_examples=len(examples), dist=dist)
    del base  # only `build` has it now
    adapter_base = base_path if given.use_lora else None
    with open_run(given, dist, build, resolve, adapter_base) as (config, model, resumed):
        del build  # frees gigabytes if the run was resumed, so that the base is not `model`
        run = Path(config.out_dir)
        merged = Path(config.merge_out) if config.merge_out else None
        if merged and is_occupied(merged):
            step = resumed.progress["step"] if resumed else 0
            if not is_last_step(step, config, read_val_losses(run, step)):
                raise ValueError(f"merge_out {merged} already exists; choose another folder")
        if config.use_lora:
            freeze_base(model, config, dist)
        sizes = {"batch_size": config.batch_size, "rank": dist.rank, "world_size": dist.world_size}
        per_step = config.examples_per_step
        data = InstructionData(examples, examples_per_step=per_step, seed=config.seed, **sizes)
        val = partial(held_out_batches, held_out, **sizes)
        # CUDA graphs need memory that stays in one place, but DDP and FSDP2 move it.
        if config.compile and dist.device.type == "cuda" and dist.world_size == 1:
            data.limit_lengths()
        prompts = [
            Prompt(e.prompt, ANSWER_TOKENS, 1, e.completion, e.tokens[: e.n_prompt].tolist())
            for e in held_out[:N_ANSWERS]
        ]
        if dist.is_main and config.use_lora:
            mark_base(Path(base_path))
        try:
            train(model, tokenizer, data, val, prompts, config, dist, resumed)
        finally:
            if dist.is_main and (run / "metrics.jsonl").exists():
                write_train_data(run)
        if dist.is_main and merged:
            # base_path is the checkpoint that was loaded above. If the base is a run that is still
            # training, model_name_or_path may stand for another checkpoint by now.
            tuned = load_model(base_path, run) if config.use_lora else load_model(run)
            dtype = DTYPES.get(config.merge_dtype) or read_dtype(base_path)
            save_merged(tuned, tokenizer, merged, dtype)
    dist.stop()


def is_occupied(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def hash_base(base: GPT, config: FinetuneConfig) -> str:
    """Return the sha256 of the weights of the base. Raises ValueError if the base is an adapter, or
    if the hash differs from base_sha256.
    """
    name = config.model_name_or_path
    if lora_linears(base):
        raise ValueError(
            f"model_name_or_path {name} is an adapter; pass its base model {base.name_or_path}, "
            "and the adapter as --lora_load_path"
        )
    found = hash_weights(base)
    if config.base_sha256 not in (None, found):
        raise ValueError(
            f"the weights of {name} have sha256 {found}, expected {config.base_sha256}"
        )
    return found


def new_lora_config(config: FinetuneConfig) -> LoRAConfig:
    """Return the settings of a new adapter."""
    lora_dim = 8 if config.lora_dim is None else config.lora_dim
    lora_alpha = 2.0 * lora_dim if config.lora_alpha is None else config.lora_alpha
    return LoRAConfig(lora_dim, lora_alpha, config.lora_dropout or 0.0, bool(config.use_rslora))


def add_adapter(base: GPT, config: FinetuneConfig, adapter: Path | None = None) -> GPT:
    """Add a new adapter to the base, or load `adapter`. Without use_lora, change nothing."""
    torch.manual_seed(config.seed)
    if not config.use_lora:
        return base
    lora_config = new_lora_config(config)
    if adapter is None:
        return convert_linear_layer_to_lora(base, config.lora_module_name, lora_config)
    has_scaling = config.lora_alpha is not None  # a lora.pt alone does not contain it
    return load_adapter(base, adapter, lora_config if has_scaling else None)


def resolve_config(
    config: FinetuneConfig, model: GPT, n_examples: int, dist: Distributed
) -> FinetuneConfig:
    """Fill in the settings that depend on the adapter, the data or the device. Raises ValueError if
    a setting differs from the adapter that was loaded.
    """
    # A tenth, rounded down to a power of two, because it has to be a multiple of the batch size.
    most = 2 ** (max(1, n_examples // 10).bit_length() - 1)
    per_step = config.examples_per_step or min(EXAMPLES_PER_STEP, most)
    max_steps = config.max_steps or ceil_div(config.epochs * n_examples, per_step)
    resolved: dict[str, Any] = {"examples_per_step": per_step, "max_steps": max_steps}
    resolved["eval_every"] = config.eval_every or ceil_div(max_steps, N_EVALUATIONS)
    resolved["batch_size"] = min(config.batch_size, max(1, per_step // dist.world_size))
    if config.warmup_steps is None:
        resolved["warmup_steps"] = min(WARMUP_STEPS, max_steps // 10)
    if config.max_lr is None:
        resolved["max_lr"] = 5e-4 if config.use_lora else 5e-5
    adapter = [asdict(linear.config) for linear in lora_linears(model).values()]
    for name in LORA_SETTINGS if adapter else ():
        found = [settings[name] for settings in adapter]  # in PEFT, layers may differ
        if (value := getattr(config, name)) not in (None, *found):
            path = config.lora_load_path
            raise ValueError(f"{name} is {value}, but the adapter of {path} has {found[0]}")
        resolved[name] = found[0]
    return resolve_device_settings(replace(config, **resolved), dist)


def freeze_base(model: GPT, config: FinetuneConfig, dist: Distributed) -> None:
    """Freeze all but the adapter; apply lora_form and base_precision."""
    only_optimize_lora_parameters(model)
    linears = lora_linears(model).values()
    for linear in linears:
        linear.use_summed_form = config.lora_form == "summed"
    if config.base_precision == "bf16":
        cast_frozen_weights(model, torch.bfloat16)
    if dist.is_main:
        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        n, total = sum(sizes), sum(p.numel() for p in model.parameters())
        print(
            f"LoRA: {len(linears)} layers, {len(sizes)} trainable tensors with {n:,} parameters, "
            f"{n / total:.2%} of all; adapter {4 * n / 1e6:.2f} MB"
        )


def write_train_data(run: Path) -> None:
    """Write train_data.json: the losses and their steps, as lists to plot."""
    data, records = {}, read_metrics(run)
    for name, key in (("train", "train_loss"), ("eval", "val_loss")):
        points = curve_points(records, key, "step").values()
        data[f"{name}_steps"], data[f"{name}_loss"] = [x for x, _ in points], [y for _, y in points]
    write_atomically(run / "train_data.json", (json.dumps(data) + "\n").encode())


def save_merged(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Save the model in `dtype`, with its adapter merged, as an ordinary checkpoint with a
    Modelfile. Raises ValueError if the folder holds anything but this model.
    """
    if lora_linears(model):
        merge_lora(model)
    model.to(dtype)
    if is_occupied(folder):
        is_model = (folder / "config.json").is_file() and read_dtype(str(folder)) == dtype
        if not is_model or hash_weights(load_model(folder).to(dtype)) != hash_weights(model):
            raise ValueError(
                f"merge_out {folder} holds something other than this model in this precision; "
                "choose another folder"
            )
        print(f"merged model              {folder}, already saved")
        return
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        save_pretrained(model, temporary, tokenizer)
        if tokenizer.chat_template:
            modelfile = ChatTemplate(tokenizer.chat_template, tokenizer).modelfile()
            (temporary / "Modelfile").write_text(modelfile, encoding="utf-8")
        temporary.rename(folder)
    finally:  # if it failed, free the space
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"merged model              {folder}")


if __name__ == "__main__":
    run_command(main, FinetuneConfig, __doc__)
