"""Save and load PEFT adapters: an adapter_config.json and the LoRA tensors of all layers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from engine.config import convert_setting
from engine.files import read_json, write_json
from engine.hub import ADAPTER_CONFIG_FILE
from engine.lora import (
    LoRAConfig,
    Model,
    convertible_linears,
    get_lora_state_dict,
    lora_linears,
    replace_linears,
)
from engine.pretrained import ADAPTER_WEIGHT_FILES, hash_weights
from engine.tensors import Tensors, copy_tensors, read_tensors, save_tensors
from model import GPT

LORA_STATE_FILE = "lora.pt"
EXPECTED_FILES = f"a folder with {ADAPTER_CONFIG_FILE} and weights, or a path to {LORA_STATE_FILE}"
PEFT_PREFIX = "base_model.model."  # of every tensor name in PEFT's files
# Options of adapter_config.json.
#   - READ_OPTIONS are used.
#   - OTHER_OPTIONS describe the adapter, or have no effect here. For example, fan_in_fan_out is the
#     layout of the base weights. layers_pattern names a list of blocks, and GPT-2 has only one.
#   - Any other option must have one of its SUPPORTED_VALUES or, if it is not listed there, be OFF.
READ_OPTIONS = {"base_model_name_or_path", "revision", "r", "rank_pattern", "lora_alpha"}
READ_OPTIONS |= {"alpha_pattern", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}
READ_OPTIONS |= {"layers_to_transform"}
OTHER_OPTIONS = {"auto_mapping", "peft_version", "task_type", "fan_in_fan_out", "inference_mode"}
OTHER_OPTIONS |= {"layers_pattern", "megatron_core", "runtime_config", "qalora_group_size"}
OTHER_OPTIONS |= {"eva_config"}
SUPPORTED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    # Others change the base weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
OFF: tuple = (None, False, "none", [], {})


class AdapterConfig(NamedTuple):
    """The contents of an adapter_config.json."""

    base_model: str | None  # a hub name may end in @REVISION
    lora: LoRAConfig
    options: dict[str, Any]  # all of them, as in PEFT

    def select_layers(self, names: list[str]) -> dict[str, LoRAConfig]:
        """Return the layers that PEFT would put LoRA on, each with its settings."""
        targets, excluded = self.options["target_modules"], self.options.get("exclude_modules")
        blocks = self.options.get("layers_to_transform")
        if blocks not in (None, []):
            numbers = "|".join(map(str, [blocks] if isinstance(blocks, int) else blocks))
            names = [name for name in names if re.search(rf"\.h\.({numbers})\.", name)]
        chosen = [n for n in names if targets == "all-linear" or matches(n, targets)]
        return {n: self.settings_of(n) for n in chosen if not matches(n, excluded or [])}

    def settings_of(self, layer: str) -> LoRAConfig:
        """Return the settings of a layer: rank_pattern and alpha_pattern override r and alpha."""
        values: dict[str, Any] = {}
        for option, name in (("rank_pattern", "lora_dim"), ("alpha_pattern", "lora_alpha")):
            for pattern, value in (self.options.get(option) or {}).items():
                if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                    values.setdefault(name, convert_setting(value, LoRAConfig, name))
        return replace(self.lora, **values)


def matches(name: str, targets: str | list[str]) -> bool:
    """Return whether a name matches a pattern, or ends in one of several names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def is_adapter(folder: Path | str) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_FILE).is_file()


def save_adapter(
    model: nn.Module,
    folder: Path,
    base_model: str | None = None,
    tensors: Tensors | None = None,
    base_sha256: str = "",
) -> None:
    """Save the adapter in PEFT's format and as `lora.pt`. `base_model` is the name or folder of the
    base model, and `base_sha256` is what `hash_weights` returns for it. If `tensors` is given, save
    those instead of `get_lora_state_dict(model)`.
    """
    tensors = {n: t.cpu().contiguous() for n, t in (tensors or get_lora_state_dict(model)).items()}
    configs = {name: linear.config for name, linear in lora_linears(model).items()}
    lora = next(iter(configs.values()))
    base_model, revision = split_revision(base_model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "target_modules": choose_target_modules(list(configs), convertible_linears(model)),
        "r": lora.lora_dim,
        "rank_pattern": {n: c.lora_dim for n, c in configs.items() if c.lora_dim != lora.lora_dim},
        "lora_alpha": lora.lora_alpha,
        "alpha_pattern": {
            n: c.lora_alpha for n, c in configs.items() if c.lora_alpha != lora.lora_alpha
        },
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "fan_in_fan_out": True,  # the layers of GPT2LMHeadModel are Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ADAPTER_CONFIG_FILE, config)
    named = {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_tensors(named, folder / ADAPTER_WEIGHT_FILES[0], base_sha256=base_sha256)
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
    others = options.keys() - READ_OPTIONS - OTHER_OPTIONS
    for option in sorted(others, key=lambda option: (option != "peft_type", option)):
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
    base, revision = options.get("base_model_name_or_path"), options.get("revision")
    is_on_hub = base and revision and not Path(base).exists()
    return AdapterConfig(f"{base}@{revision}" if is_on_hub else base, lora, options)


def split_revision(base_model: str | None) -> tuple[str | None, str | None]:
    """Split a hub name NAME@REVISION. Local folders may have an @ in their name."""
    if base_model is None or Path(base_model).exists():
        return base_model, None
    name, _, revision = base_model.partition("@")
    return name, revision or None


def load_adapter(model: Model, path: Path | str, config: LoRAConfig | None = None) -> Model:
    """Add LoRA to a model and load an adapter into it. `path` is a folder in PEFT's format, or a
    file of tensors such as `lora.pt`. If there is no adapter_config.json beside that file, `config`
    must give the scaling, and the ranks come from the tensors; otherwise `config` is ignored.
    Raises ValueError if the adapter does not fit the model, or was trained on another one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    # A folder must have an adapter_config.json. A lora.pt may have one in its folder.
    adapter = read_adapter_config(folder) if path.is_dir() or is_adapter(folder) else None
    weights = [folder / name for name in ADAPTER_WEIGHT_FILES]
    file = next(filter(Path.is_file, weights), weights[0]) if path.is_dir() else path
    if not file.is_file() or file.suffix not in (".safetensors", ".bin", ".pt"):
        raise FileNotFoundError(f"{file} is not a file of tensors; expected {EXPECTED_FILES}")
    tensors = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
        for name, tensor in read_tensors(file).items()
    }
    for name, tensor in tensors.items():
        if "lora_" not in name or name.startswith(("transformer.w", "lm_head")):  # wte, wpe
            raise ValueError(
                f"{path} has {name} {tuple(tensor.shape)}, but only LoRA on the linear layers of "
                "the blocks is supported. If it is an adapter for which tokens were added, use "
                "PEFT to merge it. If it is a full model, do not pass it as an adapter"
            )
    names = convertible_linears(model)
    if adapter:
        configs = adapter.select_layers(names)
    elif config:
        ranks = {n: len(tensors[f"{n}.lora_A"]) for n in names if f"{n}.lora_A" in tensors}
        configs = {name: replace(config, lora_dim=rank) for name, rank in ranks.items()}
    else:
        raise ValueError(
            f"{path} does not contain lora_alpha and has no {ADAPTER_CONFIG_FILE} beside it; pass "
            "the adapter's folder or, to finetune_lora.py, its --lora_alpha (and --use_rslora)"
        )
    if not configs:
        raise ValueError(f"{path} has LoRA for none of the model's linear layers")
    if file.suffix == ".safetensors" and isinstance(model, GPT):
        # The other formats do not say which model they were trained on.
        check_base(model, file, (adapter and adapter.base_model) or "a model")
    replace_linears(model, configs)
    copy_tensors(tensors, get_lora_state_dict(model), str(path))
    return model


def check_base(model: GPT, file: Path, base: str) -> None:
    """Raise ValueError if the adapter in `file` was trained on a model with other weights."""
    with safe_open(file, "pt") as opened:
        expected = (opened.metadata() or {}).get("base_sha256")
    if expected and hash_weights(model) != expected:
        raise ValueError(
            f"the adapter {file} does not belong to {model.name_or_path}: it was trained on {base} "
            f"with other weights (base_sha256 {expected}); pass that model as it was"
        )
