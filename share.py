"""Upload a checkpoint, an adapter or a merged model, with a model card, to the Hugging Face hub."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.adapter import LORA_STATE_FILE, is_adapter, read_adapter_config, split_revision
from engine.checkpoint import BASE_MARK, best_checkpoint, choose_checkpoint
from engine.config import Settings, flag, run_command
from engine.files import read_json, write_json
from engine.hub import ADAPTER_CONFIG_FILE
from engine.metrics import read_fixed_settings, summarize_run
from engine.plots import plot_runs
from engine.report import RUN_RECORD, read_record, render_template

# Files that only this project reads (lora.pt duplicates adapter_model.safetensors), and earlier
# upload folders.
NOT_UPLOADED = ("state.pt", "progress.json", LORA_STATE_FILE, BASE_MARK, "share")


@dataclass(frozen=True)
class ShareConfig(Settings):
    run: str = flag("", "run, checkpoint or merged model to upload (of fine-tuning, the best one)")
    repo_id: str = flag("", "repository on the hub: NAME or USER/NAME")
    base_model: str | None = flag(None, "hub name of an adapter's base (default: the one it has)")
    best: bool = flag(False, "of a pretraining run, upload the best saved checkpoint")
    license: str | None = flag(None, "license identifier for the model card, such as mit")
    private: bool = flag(False, "make a new repository private")
    dry_run: bool = flag(False, "only write the files to a folder, do not upload them")


def main(config: ShareConfig) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    check_repo_id("repo_id", config.repo_id)
    folder = build_upload_folder(config)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:<28}{file.stat().st_size:>15,} bytes")
    if config.dry_run:
        print(f"dry run: {folder} holds what would be uploaded to {config.repo_id}")
        return
    try:
        # private=None means public, unless an organization's default is private.
        url = HfApi().create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder)  # one commit
    except (HTTPError, OSError) as error:
        raise OSError(
            f"the hub did not accept {config.repo_id}: {error}. {folder} holds the files; log in "
            "with a token that can write (hf auth login), and run the same command again"
        ) from error
    print(f"uploaded to {url}")


def check_repo_id(label: str, repo_id: str, remedy: str = "choose another name") -> None:
    """Raise ValueError if `repo_id` cannot be the name of a repository on the hub."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"{label} is {repo_id or 'missing'}, expected NAME or USER/NAME ({error}); {remedy}"
        ) from error


def find_base(checkpoint: Path, base_model: str | None) -> str | None:
    """Return the hub name of an adapter's base model, or None if `checkpoint` is a full model.
    Raises ValueError if the base model is only a local folder.
    """
    if is_adapter(checkpoint):
        base = base_model or read_adapter_config(checkpoint).base_model or ""
        # A local base is stored as an absolute path, so this check refuses it.
        remedy = "upload the base first, and name it with --base_model USER/NAME"
        check_repo_id("the adapter's base", split_revision(base)[0] or "", remedy)
        return base
    if base_model is not None:
        raise ValueError(f"--base_model is for adapters, but {checkpoint} is a full model")
    return None


def build_upload_folder(config: ShareConfig) -> Path:
    """Make RUN/share, the folder to upload. An earlier one is replaced."""
    given = Path(config.run)
    checkpoint = best_checkpoint(given) if config.best else choose_checkpoint(given)
    if not checkpoint or not (is_adapter(checkpoint) or (checkpoint / "config.json").is_file()):
        wanted = "checkpoint with a validation loss" if config.best else "checkpoint or model"
        raise FileNotFoundError(f"{given} holds no {wanted}; expected the folder of one, or a run")
    base, revision = split_revision(find_base(checkpoint, config.base_model))
    parent = checkpoint.absolute().parent
    # Otherwise it is a merged model, an adapter, or a copy of a checkpoint.
    is_in_run = parent.name in ("checkpoints", "best") and (checkpoint / "progress.json").is_file()
    run = parent.parent if is_in_run and checkpoint == given else given
    card = render_card(config, checkpoint, base, run if is_in_run else None)
    record = read_record(run)
    for process in record.get("processes", []):
        process["command"] = remove_folders(process["command"])
    print(f"to upload, made from {checkpoint}:")
    folder = run / "share"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*NOT_UPLOADED))
    if record:
        write_json(folder / RUN_RECORD, record)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if is_in_run:
        plot_runs([run], folder / "loss.png")
    if base is not None:
        file = folder / ADAPTER_CONFIG_FILE
        base_options = {"base_model_name_or_path": base, "revision": revision}
        write_json(file, read_json(file, remedy="repair it") | base_options)
    return folder


def remove_folders(command: str) -> str:
    """Return a command line in which only the last part of each path and hub name is left."""
    folders = re.compile(r"^(--[\w-]+=)?.*[/\\](?=[^/\\])")
    words = [folders.sub(r"\1", word) for word in shlex.split(command)]
    return shlex.join(words)


def render_card(config: ShareConfig, checkpoint: Path, base: str | None, run: Path | None) -> str:
    """Return the README.md of the repository. It starts with YAML that the hub reads."""
    summary = summarize_run(run, checkpoint) if run else {}
    settings = read_fixed_settings(run, checkpoint) if run else {}
    head = {"library_name": "peft" if base else "transformers"}
    head |= {k: v for k, v in (("base_model", base), ("license", config.license)) if v}
    return render_template(
        "model_card.md",
        head=yaml.safe_dump(head, sort_keys=False),
        repo_id=config.repo_id,
        base=base,
        summary=summary,
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


if __name__ == "__main__":
    run_command(main, ShareConfig, __doc__)
