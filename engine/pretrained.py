"""Hugging Face checkpoints: find, load and save them.

A checkpoint is a folder, local or on the hub, with config.json, tokenizer files, and the weights in
model.safetensors or pytorch_model.bin, which may be split into several files.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.errors import print_notice
from engine.files import read_json, write_json
from engine.hub import download_model_files
from engine.tensors import DTYPES, Tensors, check_tensors, copy_tensors, read_tensors, save_tensors
from engine.tokenizer import GPT2_VOCAB_SIZE, TOKENIZER_FILES, Tokenizer, find_tokenizer
from model import GPT, GPTConfig

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Options of config.json that affect what a GPT-2 computes, as option: (default in transformers,
# values that model.py supports). gelu_pytorch_tanh is another name for gelu_new.
OPTIONS = {
    "model_type": ("gpt2", ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "reorder_and_upcast_attn": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "quantization_config": (None, (None,)),
}
# The key in config.json for each field of GPTConfig.
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
# The type of the fields that are not integers, and its name for error messages.
FIELD_TYPES = {"layer_norm_epsilon": (float, "a number"), "tie_weights": (bool, "true or false")}


def load_pretrained(name_or_path: str | Path) -> GPT:
    """Load a model in fp32 from a Hugging Face folder or hub name (`gpt2`, `gpt2-xl`, ...). Raises
    ValueError if model.py does not support an option, or if a tensor is missing, unexpected or of
    the wrong shape.
    """
    folder = find_pretrained(name_or_path)
    config = read_config(folder / "config.json")
    tensors = read_weights(folder)
    if config.tie_weights:  # old files may have a second copy of the embedding as the head
        head = tensors.pop("lm_head.weight", None)
        wte = tensors.get("transformer.wte.weight")
        if head is not None and wte is not None and not torch.equal(head, wte):
            raise ValueError(
                f"{folder}: lm_head.weight differs from wte, but config.json ties them; "
                "set tie_word_embeddings to false there"
            )
    with torch.device("meta"):  # allocates and initializes nothing; the weights are copied below
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
    """Return the folder of a model. If there is no local folder of that name, download a model or
    an adapter from the hub to the cache. Raises FileNotFoundError if it is neither.
    """
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        problem = "is a file" if path.is_file() else "has no config.json"
        raise FileNotFoundError(
            f"{path} {problem}; expected the folder of a model, checkpoint or run"
        )
    for files in zip(WEIGHT_FILES, ADAPTER_WEIGHT_FILES, strict=True):
        folder = download_model_files(path.as_posix(), *files, *TOKENIZER_FILES)
        if any(found for file in files for found in folder.glob(file)):
            return folder
    expected = ", ".join(WEIGHT_FILES + ADAPTER_WEIGHT_FILES)
    raise FileNotFoundError(f"{name_or_path} on the hub has none of {expected}")


def load_tokenizer(model: GPT, name_or_path: str | None = None) -> Tokenizer:
    """Load the tokenizer for a model: from the folder or hub name `name_or_path` if given, else
    from the model's own folder. If its own folder has no tokenizer files, a model with 50,257
    tokens gets GPT-2's tokenizer. Raises ValueError if there is no tokenizer, or if it has more
    tokens than the model.
    """
    model_name, vocab_size = str(model.name_or_path), model.config.vocab_size
    tokenizer = find_tokenizer(name_or_path or model_name)
    if not tokenizer and not name_or_path and vocab_size == GPT2_VOCAB_SIZE:
        print_notice(f"{model_name} has no tokenizer files; using GPT-2's tokenizer")
        tokenizer = Tokenizer.gpt2()
    remedy = "set --tokenizer to the folder or hub name of the tokenizer it was trained with"
    if not tokenizer:
        problem = f"no tokenizer files in {name_or_path or 'its folder'}"
        raise ValueError(f"{model_name} has {vocab_size:,} tokens and {problem}; {remedy}")
    if tokenizer.vocab_size > vocab_size:
        problem = f"the tokenizer {tokenizer} has more"
        raise ValueError(f"{model_name} has {vocab_size:,} tokens, but {problem}; {remedy}")
    return tokenizer


def read_config(path: Path) -> GPTConfig:
    """Read a config.json. Raises ValueError if model.py does not support an option."""
    hf = read_json(path, remedy="save or download it again")
    for option, (default, accepted) in OPTIONS.items():
        if (value := hf.get(option, default)) not in accepted:
            allowed = " or ".join(map(repr, accepted))
            raise ValueError(f"{path}: {option} is {value!r}, but model.py supports only {allowed}")
    keys = {field: key for field, key in CONFIG_KEYS.items() if key in hf or key in REQUIRED_KEYS}
    values: dict[str, Any] = {field: hf.get(key) for field, key in keys.items()}
    for field, value in values.items():
        kind, expected = FIELD_TYPES.get(field, (int, "an integer"))
        if type(value) is not kind:
            raise ValueError(f"{path}: {CONFIG_KEYS[field]} is {value!r}, expected {expected}")
    if (n_inner := hf.get("n_inner")) not in (None, 4 * hf["n_embd"]):
        raise ValueError(f"{path}: n_inner is {n_inner}, but model.py supports only 4 * n_embd")
    try:
        return GPTConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_dtype(name_or_path: str) -> torch.dtype:
    """Return the dtype of a model's weights according to its config.json, or fp32."""
    config_file = find_pretrained(name_or_path) / "config.json"
    hf = read_json(config_file, remedy="save or download it again")
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return {str(dtype): dtype for dtype in DTYPES.values()}.get(f"torch.{name}", torch.float32)


def hash_weights(model: GPT) -> str:
    """Return the sha256 of the model's config and all weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, param in model.named_parameters():
        digest.update(name.encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(folder: Path) -> Tensors:
    """Read all tensors of a checkpoint, by their names in GPT2LMHeadModel. Files saved from a
    GPT2Model lack the prefix "transformer.", so it is added. The attention masks in old files are
    dropped.
    """
    found = (sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    files = next((files for files in found if files), None)
    if files is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(WEIGHT_FILES)}")
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def hf_tensors(model: GPT, params: Tensors | None = None) -> Tensors:
    """Return views of the model's parameters, by name, in Hugging Face's layout: the linear layers
    in the blocks are transposed (Conv1D), and the vocabulary is not padded. If `params` is given,
    a dict of other tensors by name, return views of these instead, and do not look at the model's:
    in another thread, FSDP may be replacing them.
    """
    tensors = {}
    for name, tensor in (params or {n: p.data for n, p in model.named_parameters()}).items():
        if not name.endswith((".weight", ".bias")):
            raise ValueError(
                f"{name} is not a parameter of GPT-2; call merge_lora first, or use save_adapter"
            )
        if name in ("transformer.wte.weight", "lm_head.weight"):
            tensors[name] = tensor[: model.config.vocab_size]
        elif name.startswith("transformer.h.") and tensor.dim() == 2:
            tensors[name] = tensor.t()
        else:
            tensors[name] = tensor
    return tensors


def save_pretrained(
    model: GPT, folder: Path, tokenizer: Tokenizer | None = None, params: Tensors | None = None
) -> None:
    """Save a model and its tokenizer in a folder that transformers opens as GPT2LMHeadModel. If
    `params` is given, save those tensors (by name) instead of the model's parameters. Raises
    OSError if the folder cannot be written.
    """
    config, tensors = model.config, hf_tensors(model, params)
    gpt2_end = GPT2_VOCAB_SIZE - 1 if config.vocab_size == GPT2_VOCAB_SIZE else None
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        **{option: default for option, (default, _) in OPTIONS.items() if default is not None},
        **{CONFIG_KEYS[field]: value for field, value in asdict(config).items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        # Our models have no dropout.
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        "bos_token_id": tokenizer.start_of_text if tokenizer else gpt2_end,
        "eos_token_id": tokenizer.end_of_text if tokenizer else gpt2_end,
        "dtype": str(tensors["transformer.wte.weight"].dtype).removeprefix("torch."),
    }
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / "config.json", hf)
        save_tensors(tensors, folder / "model.safetensors")
        if tokenizer:
            tokenizer.save(folder, config.block_size)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written: {error} (is the disk full?)") from error
