"""Only here something is sent away: a run's checkpoint or adapter goes to the Hugging Face hub,
with a model card that says what it was made of.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

import cli
from checkpoint import (
    FREE_TO_CHANGE,
    best_checkpoint,
    checkpoints,
    load_progress,
    read_metrics,
    read_run_config,
)
from data import read_manifest, tokens_in
from lora import CONFIG_FILE, PLAIN_FILE, read_adapter_config
from plot import plot_runs

# Of use to this project alone; lora.pt holds what adapter_model.safetensors holds.
LEFT_OUT = ("state.pt", "progress.json", PLAIN_FILE)
CARD = """
# {repo_id}

{kind}, {loss} after step {step}.

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
class ShareConfig:
    run: str = ""
    """run folder whose checkpoint or adapter is shared"""
    repo_id: str = ""
    """where to on the hub: NAME or USER/NAME"""
    base_model: str | None = None
    """an adapter's base on the hub (default: the hub name it was trained from)"""
    best: bool = False
    """the checkpoint with the lowest validation loss instead of the newest"""
    license: str | None = None
    """as the hub abbreviates it, such as mit (default: none is named)"""
    private: bool = False
    """a new repository is seen by you only"""
    dry_run: bool = False
    """stop when RUN/share holds what would be uploaded"""

    def __post_init__(self) -> None:
        for name in ("run", "repo_id"):
            if not getattr(self, name):
                raise ValueError(
                    f"--{name} is missing; for example --run runs/demo --repo_id me/demo"
                )
        for name in ("repo_id", "base_model"):
            if (value := getattr(self, name)) is not None:
                check_repo_id(name, value)


def check_repo_id(what: str, repo_id: str) -> None:
    """ValueError if the hub knows no such names."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"{what} is {repo_id}, expected NAME or USER/NAME as on the hub ({error})"
        ) from error


def base_on_hub(adapter: Path, base_model: str | None) -> str:
    """The hub name of the adapter's base; ValueError if that is a folder of this machine."""
    base = base_model or read_adapter_config(adapter).get("base_model_name_or_path") or ""
    try:
        check_repo_id("the adapter's base", base)
    except ValueError as error:
        raise ValueError(
            f"the adapter's base is {base or 'not named'}, which nobody else has; share that "
            "first, and name it with --base_model USER/NAME"
        ) from error
    return base


def training_facts(run: Path, step: int) -> dict[str, str]:
    """What the log, the config and the data's manifest say of the run up to a step."""
    config = read_run_config(run)
    records = [r for r in read_metrics(run) if r["step"] <= step]
    facts = {}
    if "data_dir" in config:
        manifest = read_manifest(Path(config["data_dir"]))
        facts["training data"] = str(manifest.get("dataset", config["data_dir"]))
        if manifest["shards"]:
            train, val = (tokens_in(manifest, split) for split in ("train", "val"))
            facts["training data"] += f", {train:,} tokens, and {val:,} for validation"
        else:
            print(f"{config['data_dir']} has no manifest.json here; the card does not say its size")
    else:
        facts["training data"] = f"{name_of(config.get('data')) or 'not noted'} (instructions)"
    facts["tokens"] = f"{records[-1]['tokens']:,} in {step:,} steps" if records else "none logged"
    for key, label in (
        ("train_loss", "training loss of the last step"),
        ("val_loss", "validation loss"),
        ("hellaswag_acc_norm", "HellaSwag acc_norm (lm-eval's)"),
    ):
        if values := [r[key] for r in records if r.get(key) is not None]:
            facts[label] = f"{values[-1]:.4f}"
    return facts


def name_of(setting: object) -> object:
    """A setting as others may read it: of a path on this machine only the last part."""
    return Path(setting).name if isinstance(setting, str) and Path(setting).exists() else setting


def card(config: ShareConfig, checkpoint: Path, base: str | None) -> str:
    """The README.md of the repository, with the YAML that the hub reads at its head."""
    run = Path(config.run)
    step = load_progress(checkpoint)["step"]
    facts = training_facts(run, step)
    settings = read_run_config(run)
    settings = {k: name_of(v) for k, v in settings.items() if k not in FREE_TO_CHANGE}
    data = ModelCardData(
        library_name="peft" if base else "transformers",
        base_model=base,
        pipeline_tag="text-generation",
        license=config.license,
        tags=["gpt2"],
    )
    text = CARD.format(
        repo_id=config.repo_id,
        kind=f"A LoRA adapter for [{base}](https://huggingface.co/{base})" if base else "A GPT-2",
        loss=f"validation loss {facts.get('validation loss', 'not measured')}",
        step=f"{step:,}",
        use=(USE_ADAPTER if base else USE_MODEL).format(repo_id=config.repo_id, base=base),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def prepare(config: ShareConfig) -> Path:
    """RUN/share, made anew: the files as they are to be on the hub."""
    run = Path(config.run)
    found = best_checkpoint(run) if config.best else next(reversed(checkpoints(run)), None)
    if found is None:
        measured = " with a validation loss" if config.best else ""
        raise FileNotFoundError(
            f"{run} holds no checkpoint{measured}; expected a run folder, the --out_dir of training"
        )
    is_adapter = (found / CONFIG_FILE).is_file()
    if config.base_model is not None and not is_adapter:
        raise ValueError(f"--base_model is for adapters, and {found} is a whole model")
    base = base_on_hub(found, config.base_model) if is_adapter else None
    readme = card(config, found, base)
    folder = run / "share"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.copytree(found, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    except shutil.Error as error:  # a list of all files
        raise OSError(f"{folder} could not be written: {error.args[0][0][2]}; make room") from error
    (folder / "README.md").write_text(readme, encoding="utf-8")
    plot_runs([run], folder / "loss.png")
    if is_adapter:
        settings = json.loads((folder / CONFIG_FILE).read_text())
        settings["base_model_name_or_path"] = base
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def upload(config: ShareConfig, folder: Path) -> str:
    """Create the repository where it does not exist, and upload the folder as one commit."""
    api = HfApi()
    try:
        repo = api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message=f"Upload {folder.parent.name}"
        )
    except (HTTPError, OSError) as error:
        raise OSError(
            f"the hub did not take {config.repo_id}: {' '.join(str(error).split())}. "
            f"Nothing is lost: {folder} holds what was to be uploaded. Run the same command again "
            "with a network, and a token that may write there (hf auth login)"
        ) from error
    return str(repo)


def main(config: ShareConfig) -> None:
    if not config.dry_run and get_token() is None:
        raise ValueError(
            "not logged in to the Hugging Face hub; run `hf auth login` or set HF_TOKEN to a token "
            "that may write, or look at what would be uploaded with --dry_run true"
        )
    folder = prepare(config)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:<28}{file.stat().st_size:>15,} bytes")
    if config.dry_run:
        print(f"dry run: {folder} holds what would be uploaded to {config.repo_id}")
    else:
        print(f"uploaded to {upload(config, folder)}")


if __name__ == "__main__":
    cli.run(main, ShareConfig, __doc__)
