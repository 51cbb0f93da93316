"""A file of its own so that `model.py` is only the model: how Hugging Face stores a GPT-2.

A folder holds config.json and the weights, as model.safetensors or pytorch_model.bin, in one file
or several; the hub holds the same under a name.
"""

import json
import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenizer import END_OF_TEXT_ID

# Options of config.json that change what a GPT-2 computes, each with its default in transformers
# and the values that this project's model stands for (gelu_pytorch_tanh is gelu_new renamed).
OPTIONS = {
    "model_type": ("gpt2", ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "reorder_and_upcast_attn": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "quantization_config": (None, (None,)),
}
# The fields of GPTConfig under their names in config.json.
FIELDS = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "tie_weights": "tie_word_embeddings",
}
KINDS = {"layer_norm_epsilon": (float, "a number"), "tie_weights": (bool, "true or false")}
# What torch.load raises of a damaged file, and what a file of other contents leads to.
TORCH_LOAD_ERRORS = (
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
)
SHOWN = 4  # names in an error
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference


def find_folder(name_or_path: str | Path) -> Path:
    """The local folder of a model: itself, or the hub's files, downloaded once and cached."""
    if (Path(name_or_path) / "config.json").is_file():
        return Path(name_or_path)
    if Path(name_or_path).exists():
        raise FileNotFoundError(
            f"{name_or_path} holds no config.json, expected a model, a checkpoint or a run"
        )
    try:
        for weights in WEIGHT_FILES:
            folder = Path(
                snapshot_download(str(name_or_path), allow_patterns=["config.json", weights])
            )
            if any(folder.glob(weights)):
                return folder
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name_or_path} is no folder here, and the Hugging Face hub did not give it: {reason} "
            "Without a network, name a folder with config.json and model.safetensors"
        ) from error
    raise FileNotFoundError(f"{name_or_path} on the hub holds none of {', '.join(WEIGHT_FILES)}")


def read_config(folder: Path) -> dict:
    """The fields of GPTConfig from config.json; ValueError on an option this project's model
    does not have.
    """
    file = folder / "config.json"
    try:
        hf = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged or no config.json: {error}; save or download it again"
        ) from error
    for option, (default, accepted) in OPTIONS.items():
        if (value := hf.get(option, default)) not in accepted:
            raise ValueError(f"{file}: {option} is {value!r}, this model has only {accepted}")
    fields = {field: hf[key] for field, key in FIELDS.items() if key in hf}
    if missing := [key for key in FIELDS.values() if key.startswith("n_") and key not in hf]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    for field, value in fields.items():
        kind, words = KINDS.get(field, (int, "a whole number from 1 up"))
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{file}: {FIELDS[field]} is {value!r}, expected {words}")
    if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
        raise ValueError(f"{file}: n_inner is {hf['n_inner']}, this model has 4 * n_embd")
    return fields


def write_folder(folder: Path, fields: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write config.json from the fields of GPTConfig, and model.safetensors from the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = END_OF_TEXT_ID if fields["vocab_size"] > END_OF_TEXT_ID else None
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        **{option: default for option, (default, _) in OPTIONS.items() if default is not None},
        **{key: fields[field] for field, key in FIELDS.items()},
        "n_ctx": fields["block_size"],
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # none in training
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} is not written, maybe for want of room: {error}") from error


def read_weights_into(views: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy the folder's tensors into `views`; ValueError unless names and shapes are the same."""
    tensors = _read_weights(folder)
    if "lm_head.weight" not in views:  # tied; old files repeat it, and another one is an error
        head = tensors.pop("lm_head.weight", None)
        wte = tensors.get("transformer.wte.weight")
        if head is not None and wte is not None and not torch.equal(head, wte):
            raise ValueError(f"{folder}: lm_head.weight differs from wte, config.json ties them")
    copy_tensors(tensors, views, str(folder))


def copy_tensors(
    tensors: dict[str, torch.Tensor], views: dict[str, torch.Tensor], source: str
) -> None:
    """Copy each tensor into the view of its name; ValueError names what is missing, unexpected or
    misshapen in the `source`, and nothing is copied then.
    """
    for problem, names in (
        ("missing", views.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - views.keys()),
    ):
        if names:
            few = ", ".join(sorted(names)[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ValueError(
                f"{source}: {problem} tensors: {few}{more}; it was made for another model"
            )
    for name, view in views.items():
        if tensors[name].shape != view.shape:
            raise ValueError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, the model has "
                f"{tuple(view.shape)}; it was made for another model"
            )
    for name, view in views.items():
        view.copy_(tensors[name])


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors under the names of GPT2LMHeadModel (GPT2Model's files lack the prefix), without
    the attention masks that old files carry.
    """
    files = next((f for pattern in WEIGHT_FILES if (f := sorted(folder.glob(pattern)))), None)
    if files is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save made; ValueError if it is
    damaged or holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, weights_only=True, map_location="cpu")
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("it holds something else than tensors")
    except pickle.UnpicklingError as error:  # torch advises to load it unsafely
        raise ValueError(f"{file} is damaged, or holds more than tensors; save it again") from error
    except (SafetensorError, *TORCH_LOAD_ERRORS) as error:
        raise ValueError(f"{file} is damaged: {error}; save or download it again") from error
    return tensors
