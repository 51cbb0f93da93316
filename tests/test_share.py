"""What share.py uploads opens in transformers and peft, and the card describes it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import peft
import pytest
import torch
import yaml
from conftest import small_gpt2
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

import hellaswag
import sample
import share
from engine.adapter import save_adapter
from engine.checkpoint import RunState, list_checkpoints, load_model, save_checkpoint
from engine.files import JSONLinesLog, write_json
from engine.lora import LoRAConfig, convert_linear_layer_to_lora, get_lora_state_dict
from engine.pretrained import save_pretrained
from engine.tokenizer import Tokenizer
from hellaswag import EvalConfig
from model import GPT, GPTConfig
from sample import SampleConfig
from share import ShareConfig

CHAT_TEMPLATE = "Café: {{ messages[0].content }}\n"


def save_run(
    run: Path, model: GPT, params: dict, config: dict, fixed: list[str] | None = None
) -> Path:
    """Write a run folder with two checkpoints. The first has the lower validation loss."""
    tokenizer = Tokenizer.gpt2()
    tokenizer.chat_template = CHAT_TEMPLATE
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    command = "python /a/train_gpt2.py --out_dir secret/place/ --data-dir=/secret/x --no-compile"
    process = {"command": command}
    write_json(run / "run.json", {"data": "ab", "tokenizer": "cd", "processes": [process]})
    log = JSONLinesLog(run / "metrics.jsonl", "step")
    for step, loss in ((1, 3.25), (2, 4.75)):
        log.append({"step": step, "tokens": 1000 * step, "train_loss": 5.0, "val_loss": loss})
        progress = {"step": step, "val_loss": loss, "facts": {"parameters": "1,234"}}
        progress |= {"fixed_settings": fixed} if fixed else {}
        state = RunState(progress, {"moment": torch.zeros(3)})
        save_checkpoint(run, model, tokenizer, params, state, keep=2)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A pretraining run on shards with a manifest."""
    folder = tmp_path_factory.mktemp("share")
    model = small_gpt2(block_size=128)
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
    config |= {"init_from": str(folder / "data"), "max_steps": 2}
    fixed = ["init_from", "max_lr", "max_steps"]
    return save_run(folder / "run", model, dict(model.named_parameters()), config, fixed)


@pytest.fixture(scope="module")
def adapter(run) -> Path:
    """A LoRA run on the model of `run`. Its product of A and B is not zero."""
    model = convert_linear_layer_to_lora(load_model(run), "h.", LoRAConfig(lora_dim=4))
    for name, tensor in get_lora_state_dict(model).items():
        tensor.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    rows = run.parent / "mine.json"
    rows.write_text("[]")
    config = {"data": str(rows), "max_steps": 2, "out_dir": str(run.parent / "gone")}
    return save_run(run.parent / "adapter", model, get_lora_state_dict(model), config)


def front_matter(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_shared_model_is_complete_and_described(run, capsys):
    """The folder of a dry run opens in transformers with the same logits and chat template, and
    holds no optimizer state. Its card has the summary and the fixed settings of the checkpoint. The
    card and run.json have no local path.
    """
    config = ShareConfig(str(run), "me/my-gpt2", dry_run=True, license="mit")
    share.main(config)
    folder = run / "share"
    listed = capsys.readouterr().out
    expected = {"README.md", "config.json", "loss.png", "merges.txt", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "run.json"}
    assert {file.name for file in folder.iterdir()} == expected
    assert all(name in listed for name in expected)
    idx = torch.arange(100)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        torch.testing.assert_close(theirs, load_model(run)(idx), atol=1e-3, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    head = front_matter(folder)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["gpt2"]
    assert head["license"] == "mit"
    text = (folder / "README.md").read_text()
    for line in ("data: poems", "tokens trained on: 2,000", "validation loss: 3.2500 to 4.7500"):
        assert f"\n- {line}\n" in text
    assert "\n- parameters: 1,234\n" in text
    assert "```yaml\ninit_from: data\nmax_lr: 0.125\nmax_steps: 2\n```" in text
    assert str(run.parent) not in text
    record = json.loads((folder / "run.json").read_text())
    command = "python train_gpt2.py --out_dir place/ --data-dir=x --no-compile"
    assert record == {"data": "ab", "tokenizer": "cd", "processes": [{"command": command}]}
    share.main(replace(config, best=True, license=None))
    text = (folder / "README.md").read_text()
    assert "\n- steps: 1 of 2\n" in text
    assert "\n- validation loss: 3.2500 to 3.2500\n" in text
    assert "4.7500" not in text
    assert "license" not in front_matter(folder)


def test_shared_adapter_names_its_base_on_the_hub(run, adapter):
    """The folder of a dry run opens in peft with the same logits and has the chat template. The
    card shows no local path. If the base is a local folder, the error says to pass its name on the
    hub.
    """
    with pytest.raises(ValueError, match=r"expected NAME or USER/NAME.*--base_model USER/NAME"):
        share.main(ShareConfig(str(adapter), "me/lora", dry_run=True))
    assert not (adapter / "share").exists()
    config = ShareConfig(str(adapter), "me/lora", base_model="me/my-gpt2", dry_run=True)
    share.main(config)
    folder = adapter / "share"
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "run.json"}
    assert {file.name for file in folder.iterdir()} == expected
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
    stock = AutoModelForCausalLM.from_pretrained(list_checkpoints(run)[-1])
    idx = torch.arange(100)[None]
    with torch.no_grad():
        bare = stock(idx).logits
        theirs = peft.PeftModel.from_pretrained(stock, folder)(idx).logits
        torch.testing.assert_close(theirs, load_model(adapter)(idx), atol=1e-2, rtol=1e-3)
    assert (theirs - bare).abs().max() > 1
    adapter_config = json.loads((folder / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == "me/my-gpt2"
    head = front_matter(folder)
    assert (head["library_name"], head["base_model"]) == ("peft", "me/my-gpt2")
    card = (folder / "README.md").read_text()
    assert "\n- data: mine.json\n" in card
    # Runs of earlier versions did not record which settings are fixed, so all are shown.
    assert "data: mine.json\nmax_steps: 2\nout_dir: gone\n```" in card
    assert str(run.parent) not in card
    with pytest.raises(ValueError, match="--base_model is for adapters"):
        share.main(replace(config, run=str(run)))


def put_in_cache(cache: Path, repo_id: str, files: Path, revision: str = "0" * 40) -> None:
    """Put a copy of a folder into a local cache of the hub."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(files, repo / "snapshots" / revision)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(revision)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_shared_adapters_load_by_their_hub_name(run, adapter, cache, tmp_path, capsys):
    """What was uploaded loads by its hub name wherever a model or an adapter is taken: with the
    same logits, with the base at the revision in adapter_config.json, and with the chat template.
    """
    share.main(ShareConfig(str(run), "me/base", dry_run=True))
    put_in_cache(cache, "me/base", run / "share", "1" * 40)
    other = tmp_path / "other"
    shutil.copytree(run / "share", other)
    GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=8)).save_pretrained(other)
    put_in_cache(cache, "me/base", other, "2" * 40)  # now the main revision
    share.main(ShareConfig(str(adapter), "me/lora", base_model="me/base@" + "1" * 40, dry_run=True))
    card = (adapter / "share" / "README.md").read_text()
    assert "[me/base](https://huggingface.co/me/base)" in card
    put_in_cache(cache, "me/lora", adapter / "share")
    config = json.loads((adapter / "share" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "1" * 40)
    idx, expected = torch.arange(100)[None], load_model(run, adapter)
    pinned = "me/base@" + "1" * 40
    with torch.no_grad():
        for names in (("me/lora",), (pinned, "me/lora"), (run, "me/lora"), (pinned, adapter)):
            model = load_model(*names)
            assert torch.equal(model(idx), expected(idx))
        assert model.name_or_path == pinned
        save_adapter(model, tmp_path / "again", model.name_or_path)
        assert torch.equal(load_model(tmp_path / "again")(idx), expected(idx))
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained("me/lora", local_files_only=True)
        torch.testing.assert_close(theirs(idx).logits, expected(idx), atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match="belongs to a different model"):
        load_model("me/base", "me/lora")
    capsys.readouterr()
    options = {"device": "cpu", "max_new_tokens": 5, "temperature": 0.0, "instruction": "Hi"}
    sample.main(SampleConfig(model="me/lora", **options))
    by_name = capsys.readouterr().out
    sample.main(SampleConfig(model=str(run), lora_load_path="me/lora", **options))
    assert capsys.readouterr().out == by_name
    sample.main(SampleConfig(model=str(adapter), **options))
    assert capsys.readouterr().out == by_name
    rows = str(Path(__file__).with_name("hellaswag_rows.jsonl"))
    hellaswag.main(EvalConfig(model="me/lora", data=rows, limit=2, device="cpu"))
    assert "acc_norm" in capsys.readouterr().out


def test_folders_without_a_run_can_be_shared(run, tmp_path):
    """A merged model and a single checkpoint can be shared, too. A merged model has no run, so its
    card has no training section. Sharing it twice gives the same files.
    """
    merged = tmp_path / "merged"
    model = load_model(run)
    save_pretrained(model, merged, Tokenizer.gpt2())
    config = ShareConfig(str(merged), "me/merged", dry_run=True)
    for _ in range(2):
        share.main(config)
        names = {file.name for file in (merged / "share").iterdir()}
        assert names == {file.name for file in merged.iterdir()} - {"share"} | {"README.md"}
    text = (merged / "share" / "README.md").read_text()
    assert "# me/merged\n\nA GPT-2 model.\n\n## Use\n" in text
    assert "## Training" not in text
    assert "loss.png" not in text
    first = list_checkpoints(run)[0]
    share.main(replace(config, run=str(first)))
    assert "\n- steps: 1 of 2\n" in (run / "share" / "README.md").read_text()


class FakeHub:
    """A stand-in for HfApi that records calls, or raises `error`."""

    calls: ClassVar[list] = []
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))
        repo_url = type("RepoUrl", (str,), {"repo_id": repo_id})  # like huggingface_hub's
        return repo_url(f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path):
        self.calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_upload_sends_what_the_dry_run_shows(run, monkeypatch, capsys):
    """An upload sends the files of the dry run. If the hub fails, the error says what to do."""
    config = ShareConfig(str(run), "me/my-gpt2", private=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    share.main(config)
    (repo_id, options), (_, names) = FakeHub.calls
    assert (repo_id, options) == ("me/my-gpt2", {"private": True, "exist_ok": True})
    assert names == sorted(file.name for file in (run / "share").iterdir())
    assert "uploaded to https://hub/me/my-gpt2" in capsys.readouterr().out
    for error in (HTTPError("no route\nto host"), OSError("offline mode")):
        monkeypatch.setattr(FakeHub, "error", error)
        with pytest.raises(OSError, match=r"(?s)did not accept me/my-gpt2: .*log in with a token"):
            share.main(config)


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "me/my gpt", "-a", "", "x.git"])
def test_malformed_repo_ids_are_refused(name):
    """A name that the hub would refuse is an error before anything is written."""
    with pytest.raises(ValueError, match=f"repo_id is {name or 'missing'}, expected NAME or USER/"):
        share.main(ShareConfig("runs/demo", name))


@pytest.mark.parametrize(
    ("best", "wanted"), [(False, " or model"), (True, " with a validation loss")]
)
def test_run_without_a_checkpoint(tmp_path, best, wanted):
    """A folder without a checkpoint is an error that names it, and nothing is written there."""
    message = f"holds no checkpoint{wanted}; expected the folder of one, or a run"
    with pytest.raises(FileNotFoundError, match=message):
        share.main(ShareConfig(str(tmp_path), "me/x", best=best, dry_run=True))
    assert not list(tmp_path.iterdir())
