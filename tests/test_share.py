"""share.py: what it would upload opens in transformers and peft, and the card describes it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import peft
import pytest
import torch
import yaml
from conftest import run_script, talkative_model
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

import share
from engine.checkpoint import RunState, list_checkpoints, load_model, save_checkpoint
from engine.config import fixed_settings, to_yaml
from engine.files import JSONLinesLog
from engine.lora import LoRAConfig, convert_linear_layer_to_lora, get_lora_state_dict
from finetune_lora import FinetuneConfig
from model import GPT
from share import ShareConfig
from train_gpt2 import PretrainConfig


def save_run(run: Path, model: GPT, params: dict, config: dict) -> Path:
    """A run folder of two checkpoints, the first with the lower validation loss."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    log = JSONLinesLog(run / "metrics.jsonl", "step")
    for step, loss in ((1, 3.25), (2, 4.75)):
        log.append({"step": step, "tokens": 1000 * step, "train_loss": 5.0, "val_loss": loss})
        state = RunState({"step": step, "val_loss": loss}, {"moment": torch.zeros(3)})
        save_checkpoint(run, model, params, state, keep=2)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run of a full model on shards with a manifest."""
    folder = tmp_path_factory.mktemp("share")
    model = talkative_model(block_size=128)
    (folder / "data").mkdir()
    shards = [
        {"name": "a_val_0.npy", "tokens": 600, "split": "val"},
        {"name": "a_train_0.npy", "tokens": 7000, "split": "train"},
        {"name": "a_train_1.npy", "tokens": 5345, "split": "train"},
    ]
    for shard in shards:
        shard["sha256"] = "0" * 64
    manifest = {"dataset": "poems", "shards": shards}
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    config = {"max_lr": 0.125, "data_dir": str(folder / "data"), "out_dir": "secret/place"}
    return save_run(folder / "run", model, dict(model.named_parameters()), config)


@pytest.fixture(scope="module")
def adapter(run) -> Path:
    """The run of an adapter on that model, whose product of A and B is not zero."""
    model = convert_linear_layer_to_lora(load_model(run), "h.", LoRAConfig(lora_dim=4))
    for name, tensor in get_lora_state_dict(model).items():
        tensor.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    rows = run.parent / "mine.json"
    rows.write_text("[]")
    return save_run(run.parent / "adapter", model, get_lora_state_dict(model), {"data": str(rows)})


def front_matter(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_shared_model_is_complete_and_described(run, capsys):
    """The dry run's folder opens in transformers with the model's logits, holds no optimizer state,
    and states data, tokens, losses and settings of the checkpoint it holds.
    """
    config = ShareConfig(str(run), "me/my-gpt2", dry_run=True, license="mit")
    share.main(config)
    folder = run / "share"
    listed = capsys.readouterr().out
    expected = {"README.md", "config.json", "loss.png", "merges.txt", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "vocab.json"}
    assert {file.name for file in folder.iterdir()} == expected
    assert all(name in listed for name in expected)
    idx = torch.arange(100)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        torch.testing.assert_close(theirs, load_model(run)(idx), atol=1e-3, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"] == [15496, 995]
    head = front_matter(folder)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["gpt2"]
    assert head["license"] == "mit"
    text = (folder / "README.md").read_text()
    for fact in ("poems, 12,345 tokens, and 600 ", "2,000 in 2 steps", "4.7500", "max_lr: 0.125"):
        assert fact in text
    assert "secret" not in text
    share.main(replace(config, best=True, license=None))
    text = (folder / "README.md").read_text()
    assert "1,000 in 1 steps" in text
    assert "3.2500" in text
    assert "4.7500" not in text
    assert "license" not in front_matter(folder)


def test_shared_adapter_names_its_base_on_the_hub(run, adapter):
    """The dry run's folder opens in peft with the adapter's logits. A base that is a local folder
    is refused with the remedy, and the card shows no local path.
    """
    with pytest.raises(ValueError, match=r"expected NAME or USER/NAME.*--base_model USER/NAME"):
        share.main(ShareConfig(str(adapter), "me/lora", dry_run=True))
    assert not (adapter / "share").exists()
    config = ShareConfig(str(adapter), "me/lora", base_model="me/my-gpt2", dry_run=True)
    (adapter / "prompt_template.json").write_text('{"without_input": "{instruction}"}')
    share.main(config)
    folder = adapter / "share"
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"}
    expected |= {"prompt_template.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"vocab.json", "merges.txt"}
    assert {file.name for file in folder.iterdir()} == expected
    stock = AutoModelForCausalLM.from_pretrained(list_checkpoints(run)[-1])
    idx = torch.arange(100)[None]
    with torch.no_grad():
        bare = stock(idx).logits
        theirs = peft.PeftModel.from_pretrained(stock, folder)(idx).logits
        torch.testing.assert_close(theirs, load_model(adapter)(idx), atol=1e-2, rtol=1e-3)
    assert (theirs - bare).abs().max() > 1
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "me/my-gpt2"
    )
    head = front_matter(folder)
    assert (head["library_name"], head["base_model"]) == ("peft", "me/my-gpt2")
    card = (folder / "README.md").read_text()
    assert "mine.json" in card
    assert str(run.parent) not in card
    with pytest.raises(ValueError, match="--base_model is for adapters"):
        share.main(replace(config, run=str(run)))


@pytest.mark.parametrize("config", [PretrainConfig(), FinetuneConfig()])
def test_card_shows_the_settings_that_shape_the_curve(run, tmp_path, config):
    """The card shows exactly the settings that a resumed run must not change."""
    model = talkative_model(block_size=128)
    saved = save_run(tmp_path / "run", model, dict(model.named_parameters()), {})
    (saved / "config.yaml").write_text(to_yaml(config))
    share.main(ShareConfig(str(saved), "me/x", dry_run=True))
    card = (saved / "share" / "README.md").read_text()
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown.keys() == fixed_settings(type(config))
    assert all(shown[f.name] == getattr(config, f.name) for f in fields(config) if f.name in shown)


class FakeHub:
    """Stands in for HfApi: records the calls, or fails as without a network."""

    calls: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))
        return type("Url", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_upload_sends_what_the_dry_run_shows(run, monkeypatch, capsys):
    """Without dry_run the repository is created (private if asked) and gets those files. Without a
    login or a network, the error names the remedy.
    """
    config = ShareConfig(str(run), "me/my-gpt2", private=True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"not logged in.*hf auth login"):
        share.main(config)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    share.main(config)
    (repo_id, options), (_, names) = FakeHub.calls
    assert (repo_id, options) == ("me/my-gpt2", {"private": True, "exist_ok": True})
    assert names == sorted(file.name for file in (run / "share").iterdir())
    assert "uploaded to https://hub/me/my-gpt2" in capsys.readouterr().out
    for error in (HTTPError("no route\nto host"), OSError("offline mode")):
        monkeypatch.setattr(FakeHub, "error", error)
        with pytest.raises(OSError, match=r"(?s)did not accept me/my-gpt2: .*with a network"):
            share.main(config)


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "me/my gpt", "-a", "", "x.git"])
def test_malformed_repo_ids_are_refused(name):
    """A name that the hub would refuse is an error with its value, before anything is written."""
    with pytest.raises(ValueError, match=f"repo_id is {name or 'missing'}, expected NAME or USER/"):
        ShareConfig("runs/demo", name)


@pytest.mark.parametrize(("best", "wanted"), [(False, ""), (True, " with a validation loss")])
def test_run_without_a_checkpoint(tmp_path, best, wanted):
    """A folder without a checkpoint is an error that names it, and nothing is written there."""
    with pytest.raises(FileNotFoundError, match=f"holds no checkpoint{wanted}; expected an --out_"):
        share.main(ShareConfig(str(tmp_path), "me/x", best=best, dry_run=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--dry_run"], ["--dry_run", "true"]])
def test_share_command(run, flags):
    """--dry_run works without a value and with one, and uploads nothing."""
    result = run_script("share.py", "--run", run, "--repo_id", "me/x", *flags, cwd=run)
    assert result.returncode == 0, result.stderr
    assert f"dry run: {run / 'share'} holds what would be uploaded to me/x" in result.stdout
