import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import hugging_face, random_ids

from model import GPT


@pytest.fixture
def folder(tmp_path):
    """A small GPT-2 as transformers saves it."""
    hugging_face().save_pretrained(tmp_path)
    return tmp_path


def same_logits(folder) -> bool:
    idx = random_ids(2, 12)
    with torch.no_grad():
        difference = GPT.from_pretrained(folder)(idx) - hugging_face()(idx).logits
    return difference.abs().max().item() < 1e-4


def test_reads_old_bin_files(folder):
    """GPT2Model's pytorch_model.bin, without prefix, with masks and a tied head, as on the hub."""
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    file.unlink()
    assert same_logits(folder)


def test_reads_several_files(folder):
    """A checkpoint that is split over several safetensors files."""
    hugging_face().save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same_logits(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.bias"), "missing tensors: .*h.1.attn.c_attn"),
        (lambda t: t.update(score=torch.ones(1)), "unexpected tensors: transformer.score"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 64)}),
            r"transformer.wpe.weight is \(9, 64\), the model has \(48, 64\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(1000, 64)}),
            "lm_head.weight differs from wte",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    """A missing, unexpected or misshapen tensor is an error that names it."""
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
def test_options_the_model_lacks_are_refused(folder, option, value):
    """An option that would change what the model computes is refused, not ignored."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=f"{option} is .*{value}"):
        GPT.from_pretrained(folder)


def test_damaged_and_missing_files(folder):
    """A damaged file, and a folder that is no model, are named."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        GPT.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        GPT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        GPT.from_pretrained(folder)
