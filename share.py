"""Upload a run's checkpoint or adapter, with a model card, to the Hugging Face hub."""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from engine.adapter import ADAPTER_CONFIG_FILE, LORA_STATE_FILE, is_adapter, read_adapter_config
from engine.checkpoint import (
    BASE_MARK,
    best_checkpoint,
    latest_checkpoint,
    read_progress,
    read_run_config,
)
from engine.config import Settings, TrainConfig, fixed_settings, flag, run_command
from engine.curves import plot_runs
from engine.files import naming_file, read_json, write_json
from engine.instructions import TEMPLATE_FILE
from engine.metrics import read_metrics
from engine.shards import count_tokens, read_manifest

# Only this project reads them; lora.pt repeats adapter_model.safetensors.
NOT_UPLOADED = ("state.pt", "progress.json", LORA_STATE_FILE, BASE_MARK)
# Settings of the training commands that do not shape the curve, besides those of TrainConfig.
FREE_SETTINGS = {
    "data",
    "data_dir",
    "model_name_or_path",
    "merge_out",
    "lora_form",
}
LOGGED = {
    "train_loss": "training loss of the last step",
    "val_loss": "validation loss",
    "hellaswag_acc_norm": "HellaSwag acc_norm (lm-eval's)",
}
CARD = """
# {repo_id}

{kind}, validation loss {loss} after step {step:,}.

![Loss over the steps of the run](loss.png)

## Use

```python
{use}
```

## Training

{facts}

The settings that shaped the curve:

```yaml
{settings}```
"""
USE_MODEL = """from transformers import pipeline

generate = pipeline("text-generation", "{repo_id}")
print(generate("Hello, I'm", max_new_tokens=50)[0]["generated_text"])"""
USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{repo_id}")"""


@dataclass(frozen=True)
class ShareConfig(Settings):
    run: str = flag("", "run folder whose checkpoint or adapter is uploaded")
    repo_id: str = flag("", "repository on the hub: NAME or USER/NAME")
    base_model: str | None = flag(None, "an adapter's base on the hub (default: as trained from)")
    best: bool = flag(False, "upload the checkpoint with the lowest validation loss")
    license: str | None = flag(None, "the hub's identifier of a license, such as mit")
    private: bool = flag(False, "make a new repository private")
    dry_run: bool = flag(False, "write RUN/share, the files to upload, and stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise ValueError("run is missing, expected a run folder such as --run runs/demo")
        check_repo_id("repo_id", self.repo_id)


def main(config: ShareConfig) -> None:
    from huggingface_hub import get_token

    if not config.dry_run and get_token() is None:
        raise ValueError(
            "not logged in to the Hugging Face hub; run `hf auth login`, set HF_TOKEN to a token "
            "that can write, or see the files first with --dry_run"
        )
    folder = write_files(config)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:<28}{file.stat().st_size:>15,} bytes")
    if config.dry_run:
        print(f"dry run: {folder} holds what would be uploaded to {config.repo_id}")
    else:
        print(f"uploaded to {upload(config, folder)}")


def check_repo_id(name: str, repo_id: str, remedy: str = "choose another name") -> None:
    """ValueError with the remedy if the hub would refuse the name."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"{name} is {repo_id or 'missing'}, expected NAME or USER/NAME ({error}); {remedy}"
        ) from error


def find_base(checkpoint: Path, base_model: str | None) -> str | None:
    """The hub name of an adapter's base, None for a full model; ValueError for a local base."""
    if is_adapter(checkpoint):
        base = base_model or read_adapter_config(checkpoint).base_model or ""
        remedy = "upload the base first, and name it with --base_model USER/NAME"
        check_repo_id("the adapter's base", base, remedy)
        return base
    if base_model is not None:
        raise ValueError(f"--base_model is for adapters, but {checkpoint} is a full model")
    return None


def write_files(config: ShareConfig) -> Path:
    """Write RUN/share, the folder to upload, anew."""
    run = Path(config.run)
    checkpoint = best_checkpoint(run) if config.best else latest_checkpoint(run)
    if checkpoint is None or checkpoint == run:
        wanted = "checkpoint with a validation loss" if config.best else "checkpoint"
        raise FileNotFoundError(f"{run} holds no {wanted}; expected an --out_dir of training")
    base = find_base(checkpoint, config.base_model)
    card = render_card(config, checkpoint, base)
    folder = run / "share"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in [*checkpoint.iterdir(), *run.glob(TEMPLATE_FILE)]:
        if file.name not in NOT_UPLOADED:
            with naming_file(folder / file.name):
                shutil.copy(file, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    plot_runs([run], folder / "loss.png")
    if base is not None:
        file = folder / ADAPTER_CONFIG_FILE
        write_json(file, read_json(file, "repair it") | {"base_model_name_or_path": base})
    return folder


def render_card(config: ShareConfig, checkpoint: Path, base: str | None) -> str:
    """The README.md of the repository. It starts with the YAML that the hub reads."""
    run, step = Path(config.run), read_progress(checkpoint)["step"]
    settings = read_run_config(run)
    facts = collect_facts(run, settings, step)
    free = {f.name for f in fields(TrainConfig)} - fixed_settings(TrainConfig) | FREE_SETTINGS
    shown = {name: hide_folder(value) for name, value in settings.items() if name not in free}
    library = "peft" if base else "transformers"
    head: dict = {"library_name": library, "base_model": base, "license": config.license}
    head = {key: value for key, value in head.items() if value is not None}
    head |= {"pipeline_tag": "text-generation", "tags": ["gpt2"]}
    text = CARD.format(
        repo_id=config.repo_id,
        kind=f"A LoRA adapter for [{base}](https://huggingface.co/{base})" if base else "A GPT-2",
        loss=facts.get("validation loss", "not measured"),
        step=step,
        use=(USE_ADAPTER if base else USE_MODEL).format(repo_id=config.repo_id, base=base),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        settings=yaml.safe_dump(shown, sort_keys=False),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{text}"


def collect_facts(run: Path, settings: dict, step: int) -> dict[str, str]:
    """Data and results of the run up to the step."""
    log = [record for record in read_metrics(run) if record["step"] <= step]
    tokens = f"{log[-1]['tokens']:,} in {step:,} steps" if log else "none logged"
    facts = {"training data": summarize_data(settings), "tokens": tokens}
    for key, label in LOGGED.items():
        if values := [record[key] for record in log if record.get(key) is not None]:
            facts[label] = f"{values[-1]:.4f}"
    return facts


def summarize_data(settings: dict) -> str:
    """The training data, with its size from the manifest of the shards."""
    folder = settings.get("data_dir")
    if folder is None:
        return f"{hide_folder(settings.get('data')) or 'not noted'} (instructions)"
    manifest = read_manifest(Path(folder))
    name = str(manifest.get("dataset") or hide_folder(folder))
    if not manifest["shards"]:
        print(f"{folder} has no manifest.json; the card omits the number of tokens")
        return name
    train, val = (count_tokens(manifest, split) for split in ("train", "val"))
    return f"{name}, {train:,} tokens, and {val:,} for validation"


def hide_folder(setting: object) -> object:
    """The setting, but of a local path only the last part."""
    return Path(setting).name if isinstance(setting, str) and Path(setting).exists() else setting


def upload(config: ShareConfig, folder: Path) -> str:
    """Upload the folder as one commit, to a new repository if there is none; returns its URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        repo = api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        message = f"Upload {folder.parent.name}"
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message)
    except (HTTPError, OSError) as error:
        raise OSError(
            f"the hub did not accept {config.repo_id}: {error}. {folder} holds the files; run the "
            "same command again with a network and a token that can write (hf auth login)"
        ) from error
    return str(repo)


if __name__ == "__main__":
    run_command(main, ShareConfig, __doc__)
