"""PEFT adapters: an adapter_config.json, and the tensors of all layers with LoRA."""

import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from engine.config import convert
from engine.files import read_json, write_json
from engine.lora import (
    LoRAConfig,
    Model,
    Tensors,
    convertible_linears,
    get_lora_state_dict,
    lora_linears,
    replace_linears,
)
from engine.tensors import copy_tensors, read_tensors

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
LORA_STATE_FILE = "lora.pt"
EXPECTED = f"expected a folder with {ADAPTER_CONFIG_FILE} and its weights, or a {LORA_STATE_FILE}"
PEFT_PREFIX = "base_model.model."  # of tensor names in PEFT's files
# Options of adapter_config.json that are read, and those that do not change what is computed.
READ_OPTIONS = {"target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
METADATA = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
INERT = {"fan_in_fan_out", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config"}
# The supported values of two more; any other option has to be off.
SUPPORTED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base's weights
}
OFF: tuple = (None, False, "none", [], {})


class AdapterConfig(NamedTuple):
    """The contents of an adapter_config.json."""

    base_model: str | None
    target_modules: str | list[str]  # endings of module names, a pattern, or "all-linear"
    lora: LoRAConfig


def is_adapter(folder: Path | str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_FILE).is_file()


def save_adapter(
    model: nn.Module, folder: Path, base_model: str | None = None, tensors: Tensors | None = None
) -> None:
    """Write the adapter in PEFT's format and as `lora.pt`. `base_model` is the name or folder of
    its base model; `tensors` are the result of `get_lora_state_dict`, or copies of it.
    """
    tensors = {n: t.cpu().contiguous() for n, t in (tensors or get_lora_state_dict(model)).items()}
    linears = lora_linears(model)
    lora = next(iter(linears.values())).config  # the same in all
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": target_modules(list(linears), convertible_linears(model)),
        "r": lora.lora_dim,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "fan_in_fan_out": True,  # GPT2LMHeadModel has Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ADAPTER_CONFIG_FILE, config)
    named = {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_WEIGHTS_FILE)  # from 0600
    torch.save(tensors, folder / LORA_STATE_FILE)


def target_modules(names: list[str], others: list[str]) -> list[str]:
    """Endings of names ("attn.c_proj") that match none of the others, or else the full names."""
    endings = sorted({re.sub(r".*\.\d+\.", "", name) for name in names})
    if any(other.endswith(f".{ending}") for other in others for ending in endings):
        return names
    return endings


def read_adapter_config(folder: Path | str) -> AdapterConfig:
    """Read adapter_config.json; ValueError for an option that LoRALinear does not have."""
    path = Path(folder) / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter; {EXPECTED}")
    options = read_json(path, "save the adapter again")
    for option in sorted(options.keys() - READ_OPTIONS - METADATA - INERT):
        if (value := options[option]) not in SUPPORTED_VALUES.get(option, OFF):
            raise ValueError(
                f"{path}: {option} {value!r} is not supported; merge the adapter with PEFT"
            )
    given = {"lora_alpha": None, **options, "lora_dim": options.get("r")}
    names = [f.name for f in fields(LoRAConfig) if f.name in given]
    try:
        lora = LoRAConfig(**{name: convert(given[name], LoRAConfig, name) for name in names})
        if not isinstance(targets := options.get("target_modules"), str | list):
            raise ValueError(f"target_modules is {targets!r}, expected names or a pattern")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save the adapter again") from error
    return AdapterConfig(options.get("base_model_name_or_path"), targets, lora)


def match_targets(names: list[str], targets: str | list[str]) -> list[str]:
    """The layers that PEFT selects: by endings of their names, by a pattern, or all."""
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return [name for name in names if targets == "all-linear" or re.fullmatch(targets, name)]


def load_adapter(model: Model, path: Path | str, config: LoRAConfig | None = None) -> Model:
    """Add LoRA to a model and load an adapter into it: a folder in PEFT's format, or a `lora.pt`,
    which needs `config` where no adapter_config.json is beside it.
    """
    path = Path(path)
    file = path / ADAPTER_WEIGHTS_FILE if path.is_dir() else path
    has_config = path.is_dir() or is_adapter(file.parent)
    adapter = read_adapter_config(file.parent) if has_config else None
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {EXPECTED}")
    config = adapter.lora if adapter else config
    if config is None:
        raise ValueError(
            f"{path} holds no lora_alpha, and no {ADAPTER_CONFIG_FILE} is beside it; give an "
            "adapter's folder, or lora_dim and lora_alpha"
        )
    tensors = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in read_tensors(file).items()
    }
    targets = adapter.target_modules if adapter else [n.removesuffix(".lora_A") for n in tensors]
    chosen = match_targets(convertible_linears(model), targets)
    if not chosen:
        raise ValueError(f"{path} has LoRA for none of the model's linear layers")
    replace_linears(model, chosen, config)
    copy_tensors(tensors, get_lora_state_dict(model), str(path))
    return model
