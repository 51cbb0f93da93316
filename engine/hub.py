"""The Hugging Face hub: check names, download models and datasets, and fail fast if it cannot be
reached.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROBE_SECONDS = 4.0
ADAPTER_CONFIG_FILE = "adapter_config.json"
MODEL_REMEDY = (
    "There is no local folder of that name; without a network, pass a folder with the weights and "
    "config.json (or adapter_config.json)"
)
# A name with one of these suffixes is a file, never a name on the hub.
FILE_SUFFIXES: tuple[str, ...] = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
FILE_SUFFIXES += (".gz", ".zst", ".pt", ".bin", ".safetensors")


def check_hub_name(name: str, expected: str) -> None:
    """Check a name for which there is no local path. Raises FileNotFoundError if it cannot be a hub
    name (NAME or USER/NAME) either.
    """
    is_path = name.count("/") > 1 or name.startswith(("/", ".", "~")) or "\\" in name
    if is_path or name.endswith(FILE_SUFFIXES) or not name:
        raise FileNotFoundError(f"there is no {name or repr(name)}; expected {expected}")


@contextmanager
def reporting_hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn any error inside this context into a ConnectionError that names `what` and the remedy.
    If the hub cannot be reached, use only the local cache, because huggingface_hub would retry for
    half a minute.
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
            reason = f"there is no connection ({problem}), and no copy in the local cache"
        raise ConnectionError(
            f"the Hugging Face hub did not provide {what}: {reason}. {remedy}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def download_model_files(name: str, *patterns: str) -> Path:
    """Download the config of a model or an adapter and the files that match `patterns`, or find
    them in the cache. Return their folder. `name` may end in @REVISION: a branch, tag or commit.
    Raises FileNotFoundError if it cannot be a hub name, and ConnectionError if the hub does not
    provide the files.
    """
    repo, _, revision = name.partition("@")
    check_hub_name(repo, "a hub name, a run, a lora.pt, or the folder of a model or an adapter")
    from huggingface_hub import snapshot_download

    with reporting_hub_errors(name, MODEL_REMEDY):
        wanted = ["config.json", ADAPTER_CONFIG_FILE, *patterns]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))


def load_hub_rows(repo: str, name: str | None, split: str, *, streaming: bool, remedy: str) -> Any:
    """Load a split of a hub dataset as an iterable of dicts. Raises ConnectionError on failure."""
    with reporting_hub_errors(repo, remedy):
        from datasets import load_dataset

        return load_dataset(repo, name=name, split=split, streaming=streaming)


def find_network_problem() -> str | None:
    """Send one request to the hub. Return None if it answers within PROBE_SECONDS, else the reason
    why it did not.
    """
    result: dict[str, Any] = {"problem": f"no answer within {PROBE_SECONDS:.0f} s"}

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            result["problem"] = None
        except Exception as error:  # its type depends on huggingface_hub's HTTP library
            result["problem"] = str(error) or type(error).__name__

    # In a thread, because the DNS lookup has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return result["problem"]
