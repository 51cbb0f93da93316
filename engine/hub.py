"""The Hugging Face hub: which names are its own, its datasets, and one try without a network."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROBE_SECONDS = 4.0
MODEL_REMEDY = (
    "It is no local folder either; without a network, name one with config.json and "
    "model.safetensors"
)
FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".txt", ".parquet", ".csv", ".pt", ".safetensors")


def check_hub_name(name: str, expected: str) -> None:
    """FileNotFoundError if `name`, which is no local file or folder, cannot be NAME or USER/NAME
    of the hub.
    """
    is_path = name.count("/") > 1 or name.startswith(("/", ".", "~")) or "\\" in name
    if is_path or name.endswith(FILE_SUFFIXES) or not name:
        raise FileNotFoundError(f"there is no {name or 'file without a name'}; expected {expected}")


@contextmanager
def reporting_hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn any failure to get `what` from the hub into a ConnectionError with the remedy. Without a
    network only the local cache is used, because the hub's libraries would retry for half a minute.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    problem = None if was_offline else find_network_problem()
    try:
        constants.HF_HUB_OFFLINE = was_offline or problem is not None
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if problem:
            reason = f"there is no connection ({problem}), and no copy in its cache"
        raise ConnectionError(
            f"the Hugging Face hub did not provide {what}: {reason}. {remedy}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def download(name: str, *patterns: str) -> Path:
    """Download a model's config.json and its files that match `patterns`; return their folder.
    ConnectionError if that fails.
    """
    check_hub_name(name, "a hub name, a model's folder, a checkpoint or a run")
    from huggingface_hub import snapshot_download

    with reporting_hub_errors(name, MODEL_REMEDY):
        return Path(snapshot_download(name, allow_patterns=["config.json", *patterns]))


def load_hub_rows(repo: str, name: str | None, split: str, *, streaming: bool, remedy: str) -> Any:
    """A split of a hub dataset as an iterable of dicts; ConnectionError if that fails."""
    with reporting_hub_errors(repo, remedy):
        from datasets import load_dataset

        return load_dataset(repo, name=name, split=split, streaming=streaming)


def find_network_problem() -> str | None:
    """Why the hub does not answer a single request within PROBE_SECONDS; None if it does."""
    result: dict[str, Any] = {"problem": f"no answer within {PROBE_SECONDS:.0f} s"}

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            result["problem"] = None
        except Exception as error:  # of whichever HTTP library the hub's uses
            result["problem"] = str(error) or type(error).__name__

    # A thread, because looking up the host's name has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return result["problem"]
