"""Hugging Face checkpoints: find, load, save.

A checkpoint is a folder, here or on the hub, with config.json, model.safetensors or
pytorch_model.bin (in one file or several) and tokenizer files.
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.files import read_json, write_json
from engine.hub import download
from engine.tensors import check_tensors, copy_tensors, read_tensors
from engine.tokenizer import GPT2_VOCAB_SIZE, TOKENIZER_FILES, Tokenizer, find_tokenizer
from model import GPT, GPTConfig

Tensors = dict[str, torch.Tensor]  # by name
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference
# Options of config.json that change what a GPT-2 computes: their default in transformers, and the
# values that mean what model.py computes (gelu_pytorch_tanh is another name of gelu_new).
OPTIONS = {
    "model_type": ("gpt2", ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "reorder_and_upcast_attn": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "quantization_config": (None, (None,)),
}
# The fields of GPTConfig and their names in config.json.
CONFIG_KEYS = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "tie_weights": "tie_word_embeddings",
}
REQUIRED_KEYS = ("n_positions", "n_layer", "n_head", "n_embd")
KINDS = {"layer_norm_epsilon": (float, "a number"), "tie_weights": (bool, "true or false")}


def load_pretrained(name_or_path: str | Path) -> GPT:
    """Load a Hugging Face folder or hub name (`gpt2`, `gpt2-xl`, ...) in fp32. ValueError names an
    option that the model does not have, or a tensor that is missing, unexpected or misshapen.
    """
    folder = find_pretrained(name_or_path)
    config = read_config(folder / "config.json")
    tensors = read_weights(folder)
    if config.tie_weights:  # old files repeat the embedding as the head
        head = tensors.pop("lm_head.weight", None)
        wte = tensors.get("transformer.wte.weight")
        if head is not None and wte is not None and not torch.equal(head, wte):
            raise ValueError(
                f"{folder}: lm_head.weight differs from wte, but config.json ties them; "
                "set tie_word_embeddings to false there"
            )
    with torch.device("meta"):  # no memory or random numbers for weights that are replaced
        model = GPT(config)
    check_tensors(tensors, hf_tensors(model), str(folder))
    model.to_empty(device="cpu")
    model.tie_weights()
    model.zero_vocab_padding()
    copy_tensors(tensors, hf_tensors(model), str(folder))
    is_local = Path(name_or_path).exists()
    model.name_or_path = str(Path(name_or_path).resolve() if is_local else name_or_path)
    return model


def find_pretrained(name_or_path: str | Path) -> Path:
    """The local folder of a model: the given one, or the hub's files, downloaded and cached."""
    if (Path(name_or_path) / "config.json").is_file():
        return Path(name_or_path)
    if Path(name_or_path).exists():
        raise FileNotFoundError(
            f"{name_or_path} holds no config.json, expected a model, a checkpoint or a run"
        )
    for weights in WEIGHT_FILES:
        folder = download(str(name_or_path), weights, *TOKENIZER_FILES)
        if any(folder.glob(weights)):
            return folder
    raise FileNotFoundError(f"{name_or_path} on the hub holds none of {', '.join(WEIGHT_FILES)}")


def load_tokenizer(model: GPT, given: str | None = None) -> Tokenizer:
    """The tokenizer of a loaded model: `given`, by folder or hub name, or the one in its own
    folder. Without files, a model with 50,257 tokens gets GPT-2's. ValueError if there is none, or
    it has more tokens than the model.
    """
    name, vocab_size = str(model.name_or_path), model.config.vocab_size
    tokenizer = find_tokenizer(given or name)
    if not tokenizer and not given and vocab_size == GPT2_VOCAB_SIZE:
        print(f"{name} has no tokenizer files; using GPT-2's tokenizer", file=sys.stderr)
        tokenizer = Tokenizer.gpt2()
    if not tokenizer or tokenizer.vocab_size > vocab_size:
        missing = f"no tokenizer files in {given or 'its folder'}"
        found = f"the tokenizer {tokenizer}" if tokenizer else missing
        raise ValueError(
            f"{name} has {vocab_size:,} tokens and {found}; name the tokenizer that it was trained "
            "with, a folder or hub name, as --tokenizer"
        )
    return tokenizer


def read_config(path: Path) -> GPTConfig:
    """The shape in a config.json; ValueError for an option that the model does not have."""
    hf = read_json(path, "save or download it again")
    for option, (default, accepted) in OPTIONS.items():
        if (value := hf.get(option, default)) not in accepted:
            expected = " or ".join(map(repr, accepted))
            raise ValueError(f"{path}: {option} is {value!r}, this model has only {expected}")
    keys = {field: key for field, key in CONFIG_KEYS.items() if key in hf or key in REQUIRED_KEYS}
    shape: dict[str, Any] = {field: hf.get(key) for field, key in keys.items()}
    for field, value in shape.items():
        kind, expected = KINDS.get(field, (int, "an integer"))
        if type(value) is not kind:
            raise ValueError(f"{path}: {CONFIG_KEYS[field]} is {value!r}, expected {expected}")
    if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
        raise ValueError(f"{path}: n_inner is {hf['n_inner']}, this model has only 4 * n_embd")
    try:
        return GPTConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder: Path) -> Tensors:
    """All tensors under the names of GPT2LMHeadModel (files of GPT2Model lack the prefix), without
    the attention masks in old files.
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


def hf_tensors(model: GPT, params: Tensors | None = None) -> Tensors:
    """Views of the parameters, or of `params`, copies of them by name, as Hugging Face stores them:
    the linear layers of the blocks transposed (its Conv1D), no vocabulary padding.
    """
    tensors = {}
    for name, param in model.named_parameters():
        if not name.endswith((".weight", ".bias")):
            raise ValueError(
                f"{name} is not a parameter of GPT-2; call merge_lora or save_adapter first"
            )
        tensor = params[name] if params else param.data
        if name in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[: model.config.vocab_size]
        elif name.startswith("transformer.h.") and tensor.dim() == 2:
            tensor = tensor.t()
        tensors[name] = tensor
    return tensors


def save_pretrained(
    model: GPT, folder: Path, tokenizer: Tokenizer | None = None, params: Tensors | None = None
) -> None:
    """Write config.json and model.safetensors, which transformers opens as GPT2LMHeadModel, and the
    files of the tokenizer. If `params` are given, copies of the parameters by name, it writes them.
    """
    config = model.config
    gpt2_end = GPT2_VOCAB_SIZE - 1 if config.vocab_size == GPT2_VOCAB_SIZE else None
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        **{option: default for option, (default, _) in OPTIONS.items() if default is not None},
        **{CONFIG_KEYS[field]: value for field, value in asdict(config).items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # trained without
        "bos_token_id": tokenizer.start_of_text if tokenizer else gpt2_end,
        "eos_token_id": tokenizer.end_of_text if tokenizer else gpt2_end,
        "dtype": "float32",
    }
    tensors = {name: t.cpu().contiguous() for name, t in hf_tensors(model, params).items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / "config.json", hf)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # from 0600
        if tokenizer:
            tokenizer.save(folder, config.block_size)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written, is the disk full? {error}") from error
