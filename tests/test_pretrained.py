import json

import pytest
import torch
from conftest import random_ids, small_transformers_gpt2
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from engine.pretrained import hf_tensors, save_pretrained
from model import GPT


@pytest.fixture
def folder(tmp_path):
    """A small GPT-2 as transformers saves it."""
    small_transformers_gpt2().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def has_expected_logits(folder) -> bool:
    idx = random_ids(2, 12)
    difference = GPT.from_pretrained(folder)(idx) - small_transformers_gpt2()(idx).logits
    return difference.abs().max().item() < 1e-4


def test_old_bin_files_load(folder):
    """GPT2Model's pytorch_model.bin loads: names without prefix, attention masks, the tied head."""
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    file.unlink()
    assert has_expected_logits(folder)


def test_several_files_load(folder):
    """A checkpoint that is split over several safetensors files has the same logits."""
    small_transformers_gpt2().save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert has_expected_logits(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.h.1.attn.c_attn.bias"),
            "missing tensors, .*h.1.attn.c_attn",
        ),
        (lambda t: t.update(score=torch.ones(1)), "unexpected tensors, such as transformer.score"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 64)}),
            r"misshapen tensors, such as transformer.wpe.weight \(9, 64\), expected \(48, 64\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(1000, 64)}),
            "lm_head.weight differs from wte",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    """A missing, unexpected or misshapen tensor is an error with its name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("n_inner", 100),
        ("model_type", "llama"),
    ],
)
def test_unsupported_options_are_refused(folder, option, value):
    """An option that would change what the model computes is refused, not ignored."""
    change_config(folder, {option: value})
    with pytest.raises(ValueError, match=f"{option} is .*{value}"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("n_layer", "two", "config.json: n_layer is 'two', expected an integer"),
        ("n_positions", 0, "config.json: block_size is 0, expected at least 1"),
        ("n_head", 3, "config.json: n_embd 64 is not a multiple of n_head 3"),
        ("n_layer", 3, "missing tensors, such as transformer.h.2.attn.c_attn.bias"),
        ("n_embd", 10**6, r"28 misshapen tensors, such as transformer.h.0.attn"),
        ("n_positions", 10**12, r"wpe.weight \(48, 64\), expected \(1000000000000, 64\)"),
        ("layer_norm_epsilon", "x", "config.json: layer_norm_epsilon is 'x', expected a number"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1, expected true or false"),
    ],
)
def test_wrong_values_are_named(folder, option, value, message):
    """A value of the wrong type, or one that no GPT-2 can have, is an error with file and value."""
    change_config(folder, {option: value})
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


def change_config(folder, options: dict) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def test_damaged_and_missing_files(folder):
    """A damaged or missing file, and a folder that is not a model, are errors with its name."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        GPT.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        GPT.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["n_head"]
    for content, message in (
        (json.dumps(config), "n_head is None, expected an integer"),
        ("[1", "json is damaged"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        GPT.from_pretrained(folder)


def test_unknown_name_without_a_network(monkeypatch):
    """A name that is neither a folder nor in the cache ends in one line that says what to give."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"hub did not provide nowhere: .* It is no local folder either; .* config.json"
    with pytest.raises(ConnectionError, match=message) as raised:
        GPT.from_pretrained("nowhere")
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"there is no runs/x/checkpoints; expected a hub"):
        GPT.from_pretrained("runs/x/checkpoints")


def test_copies_of_the_parameters_are_saved(tiny_model, tmp_path):
    """Copies of the parameters can be saved instead of those in the model, as a background save
    does; hf_tensors are views, so that writing to them loads a model.
    """
    copies = {name: param.detach() + 1 for name, param in tiny_model.named_parameters()}
    save_pretrained(tiny_model, tmp_path, copies)
    for name, tensor in hf_tensors(tiny_model).items():
        tensor.add_(1)
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], tensor), name
    for name, param in GPT.from_pretrained(tmp_path).named_parameters():
        rows = 1000 if name == "transformer.wte.weight" else None  # without padding
        assert torch.equal(param[:rows], tiny_model.get_parameter(name)[:rows]), name
