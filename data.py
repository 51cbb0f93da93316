"""Shards of tokens on disk, and the deterministic batches that training and evaluation read.

A split is one stream of N tokens that runs through its shards. Window w of T tokens predicts tokens
w·T + 1 to (w + 1)·T from the ones before them; together the windows predict every token but the
first exactly once.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from tokenizer import END_OF_TEXT_ID, IGNORE_INDEX

# The header of llm.c's and modded-nanogpt's .bin shards (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256

Batch = tuple[np.ndarray, np.ndarray]  # idx and targets, both (B, T) int64


class TrainingData(Protocol):
    """What the training loop asks of its data: batches as a function of the step, and of nothing
    that happened before, so that a run can go on at any step, on any number of ranks.
    """

    @property
    def block_size(self) -> int:
        """Tokens of the longest row."""

    @property
    def fingerprint(self) -> str:
        """Differs for other data."""

    @property
    def grad_accum_steps(self) -> int:
        """Micro-steps of a step."""

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """This rank's rows of a micro-step; both are counted from 1."""

    def targets_in_step(self, step: int) -> int:
        """Predicted tokens of a step over all ranks."""

    def tokens_through(self, step: int) -> int:
        """Tokens of all steps up to this one."""

    def describe(self) -> str:
        """The sizes that follow from the config."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the errors of the system the name of the file, which those of a full disk lack."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Make `path` with this content, whole or not at all, whatever interrupts."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), temporary.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write `tokens` as a .npy of uint16 and return its entry for the manifest."""
    tokens, header = np.ascontiguousarray(tokens, dtype=np.uint16), io.BytesIO()
    # np.save does not notice that the disk is full.
    fields = np.lib.format.header_data_from_array_1_0(tokens)
    np.lib.format.write_array_header_1_0(header, fields)
    write_atomically(path, header.getvalue(), tokens.data)
    return {"name": path.name, "tokens": len(tokens), "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_manifest(folder: Path, manifest: dict) -> None:
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.json; {"shards": []} where there is none."""
    file = folder / "manifest.json"
    if not file.exists():
        return {"shards": []}
    try:
        manifest = json.loads(file.read_text())
        for shard in manifest["shards"]:  # what everything else is about
            _ = shard["name"], shard["split"], shard["tokens"], shard["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); delete the folder and prepare the data again"
        ) from error
    return manifest


def tokens_in(manifest: dict, split: str) -> int:
    return sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == split)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a .npy or .bin shard as a read-only memory map of uint16."""
    remedy = "delete it and prepare the data again"
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is truncated or no .npy file ({error}); {remedy}") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected a row of uint16; "
                f"{remedy}"
            )
        return np.asarray(tokens)
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER_INTS)
    if len(header) < BIN_HEADER_INTS or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
        raise ValueError(
            f"{path} begins with {header[:2].tolist()}, expected magic {BIN_MAGIC} and version "
            f"{BIN_VERSION} of an llm.c shard; {remedy}"
        )
    expected, found = int(header[2]), (path.stat().st_size - BIN_HEADER_INTS * 4) // 2
    if found != expected:
        raise ValueError(f"{path} holds {found} tokens, its header says {expected}; {remedy}")
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER_INTS * 4))


class TokenShards:
    """All tokens of one split ("train" or "val") of a data folder, as one memory-mapped stream.

    With `verify` every byte is checked, about 1 GB a second. `fingerprint` tells data sets apart.
    """

    def __init__(self, folder: Path | str, split: str, verify: bool = False):
        folder = Path(folder)
        manifest = read_manifest(folder)
        listed = {s["name"]: s for s in manifest["shards"]}
        if not manifest.get("complete", True):
            raise ValueError(
                f"the preparation of {folder} has not come to its end; run its fineweb.py command "
                "again, it goes on where it stopped"
            )
        if listed:
            files = [folder / name for name, shard in listed.items() if shard["split"] == split]
        else:  # made by others: edufineweb_train_000001.npy, tiny_shakespeare_val.bin
            name = re.compile(rf".*_{split}(_\d+)?\.(npy|bin)")
            files = sorted(f for f in folder.glob("*") if name.fullmatch(f.name))
        if not files:
            raise FileNotFoundError(
                f"no {split} shards in {folder}; `python fineweb.py --dataset fineweb-edu "
                f"--out_dir {folder}` gets 10 B tokens from the hub, `python fineweb.py "
                "--dataset stdlib` takes seconds and no network, for --data_dir data/stdlib"
            )
        self.shards: list[np.ndarray] = []
        quiet = None if verify else True
        for file in tqdm(files, f"checking {split}", leave=False, unit=" shards", disable=quiet):
            if not file.exists():
                raise FileNotFoundError(
                    f"{file} is missing, manifest.json lists it; prepare the data again"
                )
            self.shards.append(open_shard(file))
            entry = listed.get(file.name, {})
            if entry.get("tokens", len(self.shards[-1])) != len(self.shards[-1]):
                raise ValueError(
                    f"{file} holds {len(self.shards[-1])} tokens, manifest.json says "
                    f"{entry['tokens']}; delete it and prepare the data again"
                )
            if verify and entry and sha256_of(file) != entry["sha256"]:
                raise ValueError(
                    f"{file} has changed since it was written: its sha256 is not that of "
                    "manifest.json; delete it and prepare the data again"
                )
            if verify and (largest := int(self.shards[-1].max(initial=0))) > END_OF_TEXT_ID:
                raise ValueError(
                    f"{file} holds token {largest}, GPT-2's go up to {END_OF_TEXT_ID}; prepare the "
                    "data with GPT-2's tokenizer"
                )
        self.starts = np.cumsum([0, *map(len, self.shards)])
        identity = [
            (len(s), listed.get(f.name, {}).get("sha256"))
            for f, s in zip(files, self.shards, strict=True)
        ]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        if len(self) < 2:
            raise ValueError(
                f"the {split} split of {folder} has {len(self)} tokens, expected at least 2; "
                "prepare more text"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64, across the borders of shards."""
        out = np.empty(stop - start, dtype=np.int64)
        position, shard = start, int(np.searchsorted(self.starts, start, side="right")) - 1
        while position < stop:
            offset = position - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
            shard += 1
        return out

    def windows(self, ids: list[int], block_size: int, limit: int) -> Batch:
        """Windows `ids` of the first `limit` + 1 tokens. Where a window reaches past the end, 0
        stands in idx and -100 in targets.
        """
        idx = np.zeros((len(ids), block_size), dtype=np.int64)
        targets = np.full((len(ids), block_size), IGNORE_INDEX, dtype=np.int64)
        for row, window in enumerate(ids):
            start = window * block_size
            length = min(block_size, limit - start)
            if length > 0:
                tokens = self.read(start, start + length + 1)
                idx[row, :length] = tokens[:-1]
                targets[row, :length] = tokens[1:]
        return idx, targets


def in_epochs(first: int, count: int, n: int, seed: int) -> list[int]:
    """Entries `first` onwards of an endless sequence of epochs, each 0 to n - 1 in a new order."""
    ids: list[int] = []
    while len(ids) < count:
        epoch, i = divmod(first + len(ids), n)
        ids.extend(epoch_order(seed, epoch, n)[i : i + count - len(ids)])
    return [int(i) for i in ids]


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


@dataclass(frozen=True)
class PretrainingData:
    """The batches of pretraining as a function of (step, micro_step), both counted from 1.

    Epochs follow each other without a break, each in its own seeded order of all windows. Step s
    holds the s-th run of total_batch_size / block_size windows of that sequence, dealt out to
    micro-steps, ranks and rows in this order: the same set in the same order on any machine. There
    is no state, so resuming needs nothing but the step.
    """

    shards: TokenShards
    block_size: int
    batch_size: int
    total_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        micro = self.batch_size * self.block_size * self.world_size
        if self.total_batch_size % micro:
            below = self.total_batch_size // micro * micro
            near = " or ".join(f"{n}" for n in (below, below + micro) if n)
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is no multiple of batch_size "
                f"{self.batch_size} x block_size {self.block_size} x {self.world_size} ranks = "
                f"{micro}; the nearest are {near}"
            )

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    @property
    def grad_accum_steps(self) -> int:
        return self.total_batch_size // (self.batch_size * self.block_size * self.world_size)

    @property
    def n_windows(self) -> int:
        """Windows in an epoch."""
        return -(-(len(self.shards) - 1) // self.block_size)

    def _window_ids(self, first: int, count: int) -> list[int]:
        return in_epochs(first, count, self.n_windows, self.seed)

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """This rank's rows of a micro-step."""
        per_step = self.total_batch_size // self.block_size
        micro = (micro_step - 1) * self.world_size + self.rank
        first = (step - 1) * per_step + micro * self.batch_size
        ids = self._window_ids(first, self.batch_size)
        return self.shards.windows(ids, self.block_size, limit=len(self.shards) - 1)

    def tokens_through(self, step: int) -> int:
        return step * self.total_batch_size

    def describe(self) -> str:
        return (
            f"tokens per step: {self.total_batch_size:,} = {self.batch_size} sequences x "
            f"{self.block_size} tokens x {self.world_size} ranks x grad_accum_steps "
            f"{self.grad_accum_steps}\n"
            f"data: {len(self.shards):,} tokens, an epoch is "
            f"{len(self.shards) / self.total_batch_size:,.1f} steps"
        )

    def targets_in_step(self, step: int) -> int:
        """total_batch_size, but that an epoch's last window is seldom full."""
        per_step = self.total_batch_size // self.block_size
        ids = self._window_ids((step - 1) * per_step, per_step)
        missing = self.n_windows * self.block_size - (len(self.shards) - 1)
        return self.total_batch_size - missing * ids.count(self.n_windows - 1)


def evaluation_batches(
    shards: TokenShards,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the windows that predict the first `eval_tokens` tokens, in order. All
    ranks get the same number of batches, if need be with rows that predict nothing.
    """
    limit = min(eval_tokens, len(shards) - 1)
    n_windows = -(-limit // block_size)
    for first in range(0, n_windows, batch_size * world_size):
        start = first + rank * batch_size
        yield shards.windows(list(range(start, start + batch_size)), block_size, limit)
