"""What the project writes, opened with other people's tools, and what it shares with them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import lm_eval
import peft
import pytest
import torch
import yaml
from conftest import talkative_model
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hellaswag
import share
from checkpoint import MetricsLog, checkpoints, load_model, save_checkpoint
from lora import convert_linear_layer_to_lora, get_lora_state_dict
from model import GPT
from sample import SampleConfig, write
from share import ShareConfig

ROWS = Path(__file__).parent / "hellaswag_rows.jsonl"


def save_run(run: Path, model: GPT, params: dict, config: dict) -> Path:
    """A run folder of two checkpoints, of which the first has the lower validation loss."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    log = MetricsLog(run)
    for step, loss in ((1, 3.25), (2, 4.75)):
        log.write({"step": step, "tokens": 1000 * step, "train_loss": 5.0, "val_loss": loss})
        progress, state = {"step": step, "val_loss": loss}, {"moment": torch.zeros(3)}
        save_checkpoint(run, model, params, progress, state, keep=2)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
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
    """A run of an adapter for it, whose product is not zero."""
    model = convert_linear_layer_to_lora(load_model(run), "h.", 4)
    for name, tensor in get_lora_state_dict(model).items():
        tensor.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    rows = run.parent / "mine.json"
    rows.write_text("[]")
    return save_run(run.parent / "adapter", model, get_lora_state_dict(model), {"data": str(rows)})


def test_transformers_pipeline_writes_the_same_text(run, capsys):
    """pipeline("text-generation") on a checkpoint's folder continues greedily as sample.py does."""
    prompt = "Caf\u00e9 \u2014 once upon a time"
    config = SampleConfig(temperature=0, max_new_tokens=40)
    write(load_model(run), prompt, config, torch.Generator())
    generate = pipeline("text-generation", str(checkpoints(run)[-1]), device="cpu")
    theirs = generate(prompt, max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert capsys.readouterr().out == f"{theirs}\n"
    assert len(theirs) > len(prompt) + 40


def test_files_that_converters_read_are_there(run):
    """llama.cpp and litgpt take GPT-2's vocabulary from these files, whatever transformers does."""
    folder = checkpoints(run)[-1]
    vocab = json.loads((folder / "vocab.json").read_text())
    whole = json.loads((folder / "tokenizer.json").read_text())
    assert len(vocab) == 50257
    assert whole["model"]["vocab"] == vocab
    assert len((folder / "merges.txt").read_text().splitlines()) == 50001  # a version line first
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["vocab_size"] == 50257


@pytest.mark.slow
def test_lm_evals_command_gives_the_same_accuracies(run, tmp_path, capsys):
    """`lm_eval --model hf --model_args pretrained=FOLDER`, with its own HellaSwag on local rows,
    prints the accuracies that hellaswag.py prints.
    """
    source = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    task = (source / "hellaswag.yaml").read_text()
    task = task.replace("task: hellaswag", "task: local_hellaswag")
    task = task.replace("Rowan/hellaswag", "json").replace("training_split: train\n", "")
    files = {"data_files": {"validation": str(ROWS)}, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text((source / "utils.py").read_text())
    (tmp_path / "tasks" / "local_hellaswag.yaml").write_text(
        f"{task}\ndataset_kwargs: {json.dumps(files)}\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={checkpoints(run)[-1]}", "--batch_size", "1"]
    command += ["--tasks", "local_hellaswag", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out.json")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = tmp_path.glob("out*.json")
    theirs = json.loads(file.read_text())["results"]["local_hellaswag"]
    hellaswag.main(
        hellaswag.EvalConfig(str(run), data=str(ROWS), device="cpu", out_dir=str(tmp_path / "ours"))
    )
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert ours["rows"] == len(ROWS.read_text().splitlines())
    for name in ("acc", "acc_norm"):
        assert ours[name]["value"] == pytest.approx(theirs[f"{name},none"])


def front_matter(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_a_shared_model_is_whole_and_described(run, capsys):
    """The dry run's folder opens in transformers with the model's logits, holds nothing of the
    optimizer, and says data, tokens, losses and settings of the checkpoint it holds.
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


def test_a_shared_adapter_names_its_base_on_the_hub(run, adapter):
    """The dry run's folder opens in peft, with the logits that the adapter has here; its base is
    one that others have, or the command says what to do; its card tells no path of this machine.
    """
    with pytest.raises(ValueError, match=r"which nobody else has.*--base_model USER/NAME"):
        share.main(ShareConfig(str(adapter), "me/lora", dry_run=True))
    assert not (adapter / "share").exists()
    config = ShareConfig(str(adapter), "me/lora", base_model="me/my-gpt2", dry_run=True)
    share.main(config)
    folder = adapter / "share"
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"}
    assert {file.name for file in folder.iterdir()} == expected
    stock = AutoModelForCausalLM.from_pretrained(checkpoints(run)[-1])
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


class Hub:
    """Stands in for HfApi: notes what it is asked for, or fails as without a network."""

    calls: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))
        return type("Url", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_what_is_uploaded_is_what_the_dry_run_shows(run, monkeypatch, capsys):
    """Without dry_run the repository is made (private where asked for) and gets those files; what
    the network or the login lacks is said in a line that says what to do.
    """
    config = ShareConfig(str(run), "me/my-gpt2", private=True)
    monkeypatch.setattr(share, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"not logged in.*hf auth login"):
        share.main(config)
    monkeypatch.setattr(share, "get_token", lambda: "token")
    monkeypatch.setattr(share, "HfApi", Hub)
    share.main(config)
    (repo_id, options), (_, names) = Hub.calls
    assert (repo_id, options) == ("me/my-gpt2", {"private": True, "exist_ok": True})
    assert names == sorted(file.name for file in (run / "share").iterdir())
    assert "uploaded to https://hub/me/my-gpt2" in capsys.readouterr().out
    for error in (HTTPError("no route\nto host"), OSError("offline mode")):
        monkeypatch.setattr(Hub, "error", error)
        with pytest.raises(OSError, match=r"did not take me/my-gpt2: .*again with a network"):
            share.main(config)


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "me/my gpt", "-a", "", "x.git"])
def test_names_that_the_hub_does_not_have(name):
    """A malformed name is refused before anything is done, with the value."""
    with pytest.raises(ValueError, match=f"repo_id is {name}" if name else "--repo_id is missing"):
        ShareConfig("runs/demo", name)


def test_a_run_without_a_checkpoint(tmp_path):
    """A folder that holds no checkpoint is named, and gets nothing written into it."""
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; expected a run folder"):
        share.main(ShareConfig(str(tmp_path), "me/x", dry_run=True))
    assert not list(tmp_path.iterdir())
