"""LoRA (Hu et al., 2021): a small trained term beside frozen linears, saved as a PEFT adapter."""

import json
import math
import re
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model import Linear
from pretrained import copy_tensors, read_tensors

PEFT_PREFIX = "base_model.model."  # of a tensor's name in PEFT's files
CONFIG_FILE, WEIGHTS_FILE, PLAIN_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "lora.pt",
)
# Options of adapter_config.json that are read here, and those that change nothing of what is
# computed. Any other has to be empty.
READ = {"peft_type", "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
EMPTY: tuple = (None, False, "none", [], {})

Model = TypeVar("Model", bound=nn.Module)
Settings = tuple[int, float, float, bool]  # lora_dim, lora_alpha, lora_dropout, use_rslora


class LoRALinear(Linear):
    """A linear y = x W' + b with W + scaling · B A for its weight W: lora_A (r, in) and lora_B
    (out, r) are to be trained, W and b keep their names. It takes the place of an `nn.Linear`, or
    of transformers' Conv1D, whose weight is (in, out).
    """

    def __init__(
        self,
        linear: nn.Module,
        lora_dim: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
    ):
        nn.Module.__init__(self)  # the weight is there already
        self.is_conv1d = type(linear).__name__ == "Conv1D"
        self.weight, self.bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        out_in = self.weight.shape[::-1] if self.is_conv1d else self.weight.shape
        self.out_features, self.in_features = out_in
        self.lora_dim, self.lora_alpha, self.use_rslora = lora_dim, lora_alpha, use_rslora
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / (math.sqrt(lora_dim) if use_rslora else lora_dim)
        self.lora_A = nn.Parameter(self.weight.new_empty(lora_dim, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, lora_dim))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT, and as nn.Linear itself
        self.unmerged: tuple[torch.Tensor, nn.Parameter, nn.Parameter] | None = None
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.unmerged is not None:
            return self._base(x)
        if not torch.is_grad_enabled():
            low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A)
            return self._base(x) + self.scaling * F.linear(low, self.lora_B)
        shape, device_type = x.shape[:-1], x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        x = x.flatten(0, -2)
        # The thin products first, the thick one added in place: a single pass over the output. It
        # comes last so that recomputation can stop before it.
        low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A)
        # As a row-major matrix, which the products of its gradients run several times faster with.
        up = self.lora_B.t().contiguous()
        y = torch.addmm(self.bias, low, up, alpha=self.scaling)
        weight = self.weight if self.is_conv1d else self.weight.t()
        return y.addmm_(x, weight.to(x.dtype)).view(*shape, self.out_features)

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t(), self.bias) if self.is_conv1d else super().forward(x)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the term to the weight, in fp32. lora_A and lora_B are no parameters from here on."""
        self.unmerged = self.weight.detach().clone(), self.lora_A, self.lora_B
        delta = self.scaling * self.lora_B.float() @ self.lora_A.float()
        self.weight.copy_(self.weight.float() + (delta.t() if self.is_conv1d else delta))
        del self.lora_A, self.lora_B

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged is None:
            raise ValueError("this LoRA is not merged")
        weight, self.lora_A, self.lora_B = self.unmerged
        self.weight.copy_(weight)
        self.to(self.weight)  # the model may have moved in between
        self.unmerged = None


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear without LoRA; Conv1D by name, as importing transformers is slow."""
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and not isinstance(module, LoRALinear)


def lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def convertible(model: nn.Module) -> list[str]:
    """Names of the linears that can have LoRA: all but the head, whose weight is the embedding."""
    return [n for n, m in model.named_modules() if is_linear(m) and not n.endswith("lm_head")]


def convert_linear_layer_to_lora(
    model: Model,
    part_module_name: str = "h.",
    lora_dim: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> Model:
    """Give LoRA to all linears whose name contains `part_module_name`, or one of several parts
    separated by commas ("attn.c_attn,mlp"), in place. Scaling is alpha / r, with `use_rslora`
    alpha / sqrt(r). ValueError for a part that is in no name, and for a rank above a linear's own.
    """
    names = convertible(model)
    parts = [part.strip() for part in part_module_name.split(",")]
    for part in parts:
        if not part or not any(part in name for name in names):
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
            raise ValueError(
                f"no linear has {part!r} in its name; those without LoRA are "
                f"{', '.join(kinds) or 'none'}"
            )
    chosen = [name for name in names if any(part in name for part in parts)]
    for name in chosen:
        if lora_dim > (least := min(model.get_parameter(f"{name}.weight").shape)):
            raise ValueError(f"lora_dim is {lora_dim}, expected up to {least}, the rank of {name}")
    _convert(model, chosen, (lora_dim, lora_alpha, lora_dropout, use_rslora))
    return model


def _convert(model: nn.Module, names: list[str], settings: Settings) -> None:
    if settings[0] < 1:
        raise ValueError(f"lora_dim is {settings[0]}, expected at least 1")
    for name in names:
        if model.get_submodule(name).bias is None:
            raise ValueError(f"{name} has no bias, which LoRALinear counts on; GPT-2's all have")
        parent, _, child = name.rpartition(".")
        linear = LoRALinear(model.get_submodule(name), *settings)
        setattr(model.get_submodule(parent), child, linear)


def _lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    linears = lora_linears(model)
    if not linears:
        raise ValueError("the model has no LoRA; call convert_linear_layer_to_lora first")
    if merged := [name for name, linear in linears.items() if linear.unmerged is not None]:
        raise ValueError(
            f"the LoRA of {merged[0]} is merged into its weight, so there is no adapter; call "
            "unmerge_lora first"
        )
    return {
        f"{name}.{ab}": getattr(linear, ab)
        for name, linear in linears.items()
        for ab in ("lora_A", "lora_B")
    }


def only_optimize_lora_parameters(model: Model) -> Model:
    """Freeze everything but lora_A and lora_B."""
    lora = {id(param) for param in _lora_parameters(model).values()}
    for param in model.parameters():
        param.requires_grad_(id(param) in lora)
    return model


def get_lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of all linears by their names in the model, as `lora.pt` holds them."""
    return {name: param.detach() for name, param in _lora_parameters(model).items()}


def load_lora(model: nn.Module, tensors: dict[str, torch.Tensor], source: str = "lora") -> None:
    """Copy what `get_lora_state_dict` gave into a model with LoRA in the same places; ValueError
    names the tensors of the `source` that are missing, unexpected or misshapen.
    """
    copy_tensors(tensors, get_lora_state_dict(model), source)


def merge_lora(model: Model) -> Model:
    """Add every LoRA term to its weight: the model is an ordinary one then, to be saved with
    `save_pretrained`. The weights from before are kept for `unmerge_lora`.
    """
    _lora_parameters(model)  # an error if there is nothing to merge, or if it is merged already
    for linear in lora_linears(model).values():
        linear.merge()
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, to the bit."""
    linears = lora_linears(model).values()
    if not any(linear.unmerged for linear in linears):
        raise ValueError("the model has no merged LoRA")
    for linear in linears:
        linear.unmerge()
    return model


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    base_model: str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter as PEFT does, and as `lora.pt`. `base_model` is the name or folder of the
    model it belongs to; `tensors` are what `get_lora_state_dict` gives, or copies of it.
    """
    folder = Path(folder)
    tensors = {n: t.cpu().contiguous() for n, t in (tensors or get_lora_state_dict(model)).items()}
    linears = lora_linears(model)
    linear = next(iter(linears.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": _short_names(list(linears), convertible(model)),
        "r": linear.lora_dim,
        "lora_alpha": linear.lora_alpha,
        "lora_dropout": linear.lora_dropout,
        "use_rslora": linear.use_rslora,
        "fan_in_fan_out": True,  # the stock model has Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    named = {f"{PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    torch.save(tensors, folder / PLAIN_FILE)


def _short_names(chosen: list[str], others: list[str]) -> list[str]:
    """Endings like "attn.c_proj" that pick just the chosen linears, or else their whole names."""
    endings = sorted({re.sub(r".*\.\d+\.", "", name) for name in chosen})
    if any(other.endswith(f".{ending}") for other in others for ending in endings):
        return chosen
    return endings


def read_adapter_config(folder: Path | str) -> dict:
    """adapter_config.json; ValueError for an option that this LoRA does not have."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no adapter: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or "
            f"a {PLAIN_FILE}"
        )
    try:
        config = dict(json.loads(file.read_text()))
        r, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
        dropout, use_rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
        base = config.get("base_model_name_or_path")
        if isinstance(targets, str):
            re.compile(targets)
        for name, value, fits in (
            ("r", r, type(r) is int and r > 0),
            ("lora_alpha", alpha, type(alpha) in (int, float) and 0 < alpha < math.inf),
            ("lora_dropout", dropout, type(dropout) in (int, float) and 0 <= dropout < 1),
            ("use_rslora", use_rslora, type(use_rslora) is bool),
            ("base_model_name_or_path", base, base is None or isinstance(base, str)),
            ("target_modules", targets, isinstance(targets, str | list) and targets),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}")
    except (ValueError, TypeError, KeyError, re.error) as error:
        raise ValueError(f"{file} is damaged: {error!r}; save the adapter again") from error
    initialised = config.pop("init_lora_weights", True)
    if initialised not in (True, False, "gaussian", "eva"):  # others change the base's weights
        raise ValueError(f"{file}: init_lora_weights {initialised!r} is not supported")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file}: peft_type is {config['peft_type']}, expected LORA")
    for option in sorted(config.keys() - READ - HARMLESS):
        if config[option] not in EMPTY:
            raise ValueError(f"{file}: {option} {config[option]!r} is not supported")
    return {**config, "settings": (r, alpha, dropout, use_rslora)}


def _targets(names: list[str], target_modules: str | list[str]) -> list[str]:
    """The linears that PEFT means: by endings of their names, by a pattern, or all."""
    if target_modules == "all-linear":
        return names
    if isinstance(target_modules, str):
        return [name for name in names if re.fullmatch(target_modules, name)]
    return [n for n in names if any(f".{n}".endswith(f".{t}") for t in target_modules)]


def load_adapter(model: Model, path: Path | str, settings: Settings | None = None) -> Model:
    """Convert a model without LoRA as the adapter asks for, and load it: a folder in PEFT's format,
    or a `lora.pt`. The latter holds tensors only, so `settings` (lora_dim, lora_alpha,
    lora_dropout, use_rslora) go with it where no adapter_config.json lies beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, expected an adapter's folder or {PLAIN_FILE}"
        )
    folder = path if path.is_dir() else path.parent
    described = path.is_dir() or (folder / CONFIG_FILE).is_file()
    config = read_adapter_config(folder) if described else {}
    settings = config.get("settings", settings)
    if settings is None:
        raise ValueError(
            f"{path} holds no lora_alpha, and no {CONFIG_FILE} lies beside it; give an adapter's "
            "folder, or lora_dim and lora_alpha where they can be given"
        )
    tensors = _read_tensors(folder / WEIGHTS_FILE if path.is_dir() else path)
    names = convertible(model)
    if described:
        chosen = _targets(names, config["target_modules"])
    else:
        chosen = [name for name in names if f"{name}.lora_A" in tensors]
    if not chosen:
        raise ValueError(f"{path} has LoRA for none of the model's linears")
    _convert(model, chosen, settings)
    load_lora(model, tensors, str(path))
    return model


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of either file by their names in the model."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; expected an adapter, or a run that has one")
    tensors = read_tensors(file)
    return {n.removeprefix(PEFT_PREFIX).removesuffix(".weight"): t for n, t in tensors.items()}
