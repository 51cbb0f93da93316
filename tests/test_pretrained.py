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
    """The folder of a small GPT-2 as transformers saves it."""
    small_transformers_gpt2().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def has_expected_logits(folder) -> bool:
    idx = random_ids(2, 12)
    difference = GPT.from_pretrained(folder)(idx) - small_transformers_gpt2()(idx).logits
    return difference.abs().max().item() < 1e-4


def test_old_bin_files_load(folder):
    """An old .bin loads: its names have no prefix, and it also has masks and a tied head."""
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    file.unlink()
    assert has_expected_logits(folder)


def test_several_files_load(folder):
    """A checkpoint loads from several safetensors files, with the same logits."""
    small_transformers_gpt2().save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert has_expected_logits(folder)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"score": torch.ones(1)}, "unexpected tensors, such as transformer.score"),
        ({"lm_head.weight": torch.ones(1000, 64)}, "lm_head.weight differs from wte"),
    ],
)
def test_wrong_tensors_are_refused(folder, tensors, expected):
    """An unexpected tensor, or an lm_head that differs from the tied wte, is an error."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)
    with pytest.raises(ValueError, match=expected):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "llama"}, "json: model_type is 'llama', but model.py supports only 'gpt2'"),
        ({"activation_function": "gelu"}, "json: activation_function is 'gelu', but model.py"),
        ({"scale_attn_weights": False}, "json: scale_attn_weights is False, but model.py"),
        ({"scale_attn_by_inverse_layer_idx": True}, "json: .*_layer_idx is True, but model.py"),
        ({"reorder_and_upcast_attn": True}, "json: .*_upcast_attn is True, but model.py"),
        ({"add_cross_attention": True}, "json: add_cross_attention is True, but model.py"),
        ({"quantization_config": "awq"}, "json: quantization_config is 'awq', but model.py"),
        ({"n_inner": 100}, "json: n_inner is 100, but model.py supports only 4"),
        ({"n_layer": "two"}, "json: n_layer is 'two', expected an integer"),
        ({"n_head": None}, "json: n_head is None, expected an integer"),  # it is missing
        ({"n_head": 3}, "json: n_embd 64 is not a multiple of n_head 3"),
        ({"layer_norm_epsilon": "x"}, "json: layer_norm_epsilon is 'x', expected a number"),
        ({"tie_word_embeddings": 1}, "json: tie_word_embeddings is 1, expected true or false"),
        ({"n_layer": 3}, "missing tensors, such as transformer.h.2.attn.c_attn.bias"),
        ({"n_positions": 10**12}, r"wpe.weight \(48, 64\), expected \(1000000000000, 64\)"),
    ],
)
def test_wrong_options_are_refused(folder, options, expected):
    """An option that this model does not support, or that contradicts its tensors, is an error that
    names the file and the value.
    """
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | options
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    with pytest.raises(ValueError, match=expected):
        GPT.from_pretrained(folder)


def test_damaged_and_missing_files(folder):
    """A damaged or missing file, or a folder without a model, is an error that names it."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        GPT.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has none of"):
        GPT.from_pretrained(folder)
    config.write_text("[1")
    with pytest.raises(ValueError, match="json is damaged"):
        GPT.from_pretrained(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        GPT.from_pretrained(folder)


def test_unknown_name_without_a_network(monkeypatch):
    """A name that is neither a folder nor cached gives a one-line error that says what to pass."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"hub did not provide nowhere: .* There is no local folder.* config.json"
    with pytest.raises(ConnectionError, match=message) as raised:
        GPT.from_pretrained("nowhere")
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"there is no runs/x/checkpoints; expected a hub"):
        GPT.from_pretrained("runs/x/checkpoints")


def test_saving_copies_does_not_read_the_parameters(tiny_model, tmp_path, monkeypatch):
    """A snapshot is saved without the model's parameters, which FSDP replaces during training."""
    params = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    tiny_model.bfloat16()
    monkeypatch.setattr(tiny_model, "named_parameters", pytest.fail)
    save_pretrained(tiny_model, tmp_path, params=params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["transformer.wpe.weight"], params["transformer.wpe.weight"])


def test_copies_of_the_parameters_are_saved(tiny_model, tmp_path):
    """save_pretrained writes the copies it is given. hf_tensors are views of the parameters."""
    copies = {name: param.detach() + 1 for name, param in tiny_model.named_parameters()}
    save_pretrained(tiny_model, tmp_path, params=copies)
    for name, tensor in hf_tensors(tiny_model).items():
        tensor.add_(1)  # now the parameter equals its copy, if `tensor` is a view
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], tensor), name
    for name, param in GPT.from_pretrained(tmp_path).named_parameters():
        rows = 1000 if name == "transformer.wte.weight" else None  # without padding
        assert torch.equal(param[:rows], tiny_model.get_parameter(name)[:rows]), name
