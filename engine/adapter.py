"""Save and load PEFT adapters: an adapter_config.json and the LoRA tensors of all layers."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from engine.config import convert_setting
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
EXPECTED_FILES = f"a folder with {ADAPTER_CONFIG_FILE} and its weights, or a {LORA_STATE_FILE}"
PEFT_PREFIX = "base_model.model."  # of every tensor name in PEFT's files
# Options of adapter_config.json.
#   - READ_OPTIONS are used, and METADATA only describes the adapter.
#   - INERT options have no effect here. fan_in_fan_out is about the layout of the base weights.
#   - Any other option must have one of its SUPPORTED_VALUES or, if it is not listed there, be OFF.
READ_OPTIONS = {"target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
METADATA = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"}
INERT = {"fan_in_fan_out", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config"}
SUPPORTED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base weights
}
OFF: tuple = (None, False, "none", [], {})


class AdapterConfig(NamedTuple):
    """The contents of an adapter_config.json."""

    base_model: str | None
    target_modules: str | list[str]  # a list of name endings, a pattern, or "all-linear"
    lora: LoRAConfig


def is_adapter(folder: Path | str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_FILE).is_file()


def save_adapter(
    model: nn.Module, folder: Path, base_model: str | None = None, tensors: Tensors | None = None
) -> None:
    """Save the adapter in PEFT's format and as `lora.pt`. `base_model` is the name or folder of the
    base model. If `tensors` is given, save those instead of `get_lora_state_dict(model)`.
    """
    tensors = {n: t.cpu().contiguous() for n, t in (tensors or get_lora_state_dict(model)).items()}
    linears = lora_linears(model)
    lora = next(iter(linears.values())).config  # the same in all layers
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": choose_target_modules(list(linears), convertible_linears(model)),
        "r": lora.lora_dim,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "fan_in_fan_out": True,  # the layers of GPT2LMHeadModel are Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ADAPTER_CONFIG_FILE, config)
    named = {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors makes the file private (mode 0600). Give it the usual permissions.
    shutil.copymode(folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_WEIGHTS_FILE)
    torch.save(tensors, folder / LORA_STATE_FILE)


def choose_target_modules(with_lora: list[str], without_lora: list[str]) -> list[str]:
    """Shorten the names of the layers with LoRA to endings, such as "attn.c_proj". Return the full
    names if an ending would also match a layer without LoRA.
    """
    endings = sorted({re.sub(r".*\.\d+\.", "", name) for name in with_lora})
    if any(name.endswith(f".{ending}") for name in without_lora for ending in endings):
        return with_lora
    return endings


def read_adapter_config(folder: Path | str) -> AdapterConfig:
    """Read adapter_config.json. Raises ValueError if LoRALinear does not support an option."""
    path = Path(folder) / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter; expected {EXPECTED_FILES}")
    options = read_json(path, remedy="save the adapter again")
    for option in sorted(options.keys() - READ_OPTIONS - METADATA - INERT):
        if (value := options[option]) not in SUPPORTED_VALUES.get(option, OFF):
            raise ValueError(
                f"{path}: {option} {value!r} is not supported; use PEFT to merge the adapter"
            )
    # r and lora_alpha are required: if one is missing, convert_setting() refuses the None.
    values = {"lora_dim": options.get("r"), "lora_alpha": options.get("lora_alpha")}
    values |= {key: options[key] for key in ("lora_dropout", "use_rslora") if key in options}
    try:
        lora = LoRAConfig(**{k: convert_setting(v, LoRAConfig, k) for k, v in values.items()})
        if not isinstance(targets := options.get("target_modules"), str | list):
            raise ValueError(f"target_modules is {targets!r}, expected names or a pattern")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save the adapter again") from error
    return AdapterConfig(options.get("base_model_name_or_path"), targets, lora)


def match_targets(names: list[str], targets: str | list[str]) -> list[str]:
    """Return the names that PEFT would select by `targets`. See AdapterConfig.target_modules."""
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return [name for name in names if targets == "all-linear" or re.fullmatch(targets, name)]


def load_adapter(model: Model, path: Path | str, config: LoRAConfig | None = None) -> Model:
    """Add LoRA to a model and load an adapter into it. `path` is a folder in PEFT's format or a
    `lora.pt`. `config` is needed for a `lora.pt` that has no adapter_config.json in its folder, and
    otherwise ignored. Raises ValueError if the adapter does not fit the model.
    """
    path = Path(path)
    file = path / ADAPTER_WEIGHTS_FILE if path.is_dir() else path
    # A folder must have an adapter_config.json. A lora.pt may have one in its folder.
    needs_config = path.is_dir() or is_adapter(file.parent)
    adapter = read_adapter_config(file.parent) if needs_config else None
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected {EXPECTED_FILES}")
    config = adapter.lora if adapter else config
    if config is None:
        raise ValueError(
            f"{path} does not contain lora_alpha and has no {ADAPTER_CONFIG_FILE} beside it; pass "
            "an adapter's folder, or lora_dim and lora_alpha"
        )
    tensors = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in read_tensors(file).items()
    }
    # Without adapter_config.json, the names of the lora_A tensors say which layers have LoRA. (The
    # list also has the names of the lora_B tensors, but they match no layer.)
    targets = adapter.target_modules if adapter else [n.removesuffix(".lora_A") for n in tensors]
    chosen = match_targets(convertible_linears(model), targets)
    if not chosen:
        raise ValueError(f"{path} has LoRA for none of the model's linear layers")
    replace_linears(model, chosen, config)
    copy_tensors(tensors, get_lora_state_dict(model), str(path))
    return model
