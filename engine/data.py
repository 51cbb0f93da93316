"""Token shards, and the batches of a training step as a function of the step.

A split is one stream of N tokens that runs through its shards. Window w of T tokens predicts tokens
w*T + 1 to (w + 1)*T from the ones before them. Together the windows predict every token but the
first exactly once.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from engine.files import read_json, sha256_file, write_atomically, write_json
from engine.tokenizer import END_OF_TEXT_ID

# Header of llm.c's and modded-nanogpt's .bin shards (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256
IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy


class Batch(NamedTuple):
    """Token ids and the tokens after them, (B, T) int64. `rows` (n) are the indices into the
    flattened (B*T) targets that are not IGNORE_INDEX, or None if all are targets.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """In pinned memory, from which copies to CUDA run beside the computation."""
        rows = None if self.rows is None else self.rows.pin_memory()
        return Batch(self.idx.pin_memory(), self.targets.pin_memory(), rows)

    def to(self, device: torch.device) -> "Batch":
        idx, targets = (t.to(device, non_blocking=True) for t in (self.idx, self.targets))
        rows = None if self.rows is None else self.rows.to(device, non_blocking=True)
        return Batch(idx, targets, rows)


def make_batch(idx: np.ndarray, targets: np.ndarray) -> Batch:
    """A batch on the CPU. `rows` are found here because on CUDA that would stall the CPU."""
    is_target = targets != IGNORE_INDEX
    rows = None if is_target.all() else torch.from_numpy(np.flatnonzero(is_target))
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), rows)


class TrainingData(Protocol):
    """The data of a training run: batches as a function of the step alone, so that a run can resume
    at any step, on any number of ranks.
    """

    @property
    def block_size(self) -> int:
        """Tokens in the longest row."""

    @property
    def has_one_shape(self) -> bool:
        """Whether all batches have the same shape."""

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the data."""

    @property
    def grad_accum_steps(self) -> int:
        """Micro-steps per step."""

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """This rank's rows of a micro-step. Both arguments count from 1."""

    def targets_in_step(self, step: int) -> int:
        """Predicted tokens of a step over all ranks."""

    def tokens_through(self, step: int) -> int:
        """Tokens of all steps up to and including this one."""

    def summary(self) -> str:
        """The sizes that follow from the config, for the user."""


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write a .npy of uint16; return its name, tokens and sha256 for the manifest."""
    tokens = np.ascontiguousarray(tokens, dtype=np.uint16)
    header = io.BytesIO()  # np.save to the file would not notice a full disk
    fields = np.lib.format.header_data_from_array_1_0(tokens)
    np.lib.format.write_array_header_1_0(header, fields)
    write_atomically(path, header.getvalue(), tokens.data)
    return {"name": path.name, "tokens": len(tokens), "sha256": sha256_file(path)}


def write_manifest(folder: Path, manifest: dict) -> None:
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.json, or {"shards": []} if it has none."""
    file = folder / "manifest.json"
    if not file.exists():
        return {"shards": []}
    remedy = "delete the folder and prepare the data again"
    manifest = read_json(file, remedy)
    try:
        _ = [s[key] for s in manifest["shards"] for key in ("name", "split", "tokens", "sha256")]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {remedy}") from error
    return manifest


def count_tokens(manifest: dict, split: str) -> int:
    return sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == split)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a .npy or .bin shard as a read-only memory map of uint16."""
    remedy = "delete it and prepare the data again"
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is truncated or not .npy ({error}); {remedy}") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected one dimension of "
                f"uint16; {remedy}"
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
    """All tokens of a split ("train" or "val") of a data folder, as one memory-mapped stream.

    `verify` checks the sha256 of each shard, about 1 GB/s. `fingerprint` identifies the data.
    """

    def __init__(self, folder: Path | str, split: str, verify: bool = False):
        folder = Path(folder)
        manifest = read_manifest(folder)
        entries = {entry["name"]: entry for entry in manifest["shards"]}
        if not manifest.get("complete", True):
            raise ValueError(
                f"the preparation of {folder} is incomplete; run the same fineweb.py command to "
                "resume it"
            )
        if entries:
            files = [folder / name for name, entry in entries.items() if entry["split"] == split]
        else:  # from elsewhere: edufineweb_train_000001.npy, tiny_shakespeare_val.bin
            name = re.compile(rf".*_{split}(_\d+)?\.(npy|bin)")
            files = sorted(f for f in folder.glob("*") if name.fullmatch(f.name))
        if not files:
            raise FileNotFoundError(
                f"no {split} shards in {folder}; `python fineweb.py --dataset fineweb-edu "
                f"--out_dir {folder}` gets 10B tokens from the hub; `python fineweb.py "
                "--dataset stdlib` takes seconds and no network, then use --data_dir data/stdlib"
            )
        bar = tqdm(
            files,
            f"checking {split}",
            leave=False,
            unit=" shards",
            disable=None if verify else True,
        )
        self.shards = [load_shard(file, entries.get(file.name, {}), verify) for file in bar]
        self.starts = np.cumsum([0, *map(len, self.shards)])
        identity = [
            (len(shard), entries.get(file.name, {}).get("sha256"))
            for file, shard in zip(files, self.shards, strict=True)
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
        """Tokens [start, stop) as int64, across shard borders."""
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while position < stop:
            offset = position - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
            shard += 1
        return out

    def windows(self, ids: list[int], block_size: int, limit: int) -> Batch:
        """The windows `ids` as a batch, from the first `limit` + 1 tokens. Beyond them idx is 0 and
        targets are IGNORE_INDEX.
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
        return make_batch(idx, targets)


def load_shard(file: Path, entry: dict, verify: bool) -> np.ndarray:
    """The tokens of a shard; ValueError where they are not those of its manifest entry."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing, manifest.json lists it; prepare the data again"
        )
    tokens = open_shard(file)
    if entry.get("tokens", len(tokens)) != len(tokens):
        raise ValueError(
            f"{file} holds {len(tokens)} tokens, manifest.json says {entry['tokens']}; delete it "
            "and prepare the data again"
        )
    if verify and entry and sha256_file(file) != entry["sha256"]:
        raise ValueError(
            f"{file} has changed since it was written: its sha256 differs from manifest.json; "
            "delete it and prepare the data again"
        )
    if verify and (largest := int(tokens.max(initial=0))) > END_OF_TEXT_ID:
        raise ValueError(
            f"{file} holds token {largest}, expected at most {END_OF_TEXT_ID}; prepare the data "
            "with GPT-2's tokenizer"
        )
    return tokens


def epoch_entries(first: int, count: int, n: int, seed: int) -> list[int]:
    """`count` entries from `first` on of an endless sequence of epochs, each of which holds
    0 to n - 1 in a new seeded order.
    """
    ids: list[int] = []
    while len(ids) < count:
        epoch, i = divmod(first + len(ids), n)
        ids.extend(epoch_order(seed, epoch, n)[i : i + count - len(ids)])
    return [int(i) for i in ids]


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


@dataclass(frozen=True)
class PretrainingData:
    """Batches of token windows, as `TrainingData` describes.

    Epochs follow each other without a gap, each with its own seeded order of all windows. Step s is
    the s-th run of total_batch_size / block_size windows of that sequence, dealt out to
    micro-steps, ranks and rows in this order. So a step has the same windows on any machine.
    """

    shards: TokenShards
    _: KW_ONLY
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
            nearest = " or ".join(str(n) for n in (below, below + micro) if n)
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not a multiple of batch_size "
                f"{self.batch_size} x block_size {self.block_size} x {self.world_size} ranks = "
                f"{micro}; the nearest are {nearest}"
            )

    @property
    def has_one_shape(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    @property
    def grad_accum_steps(self) -> int:
        return self.total_batch_size // (self.batch_size * self.block_size * self.world_size)

    @property
    def windows_per_step(self) -> int:
        return self.total_batch_size // self.block_size

    @property
    def n_windows(self) -> int:
        """Windows in an epoch. The last one may be short."""
        return -(-(len(self.shards) - 1) // self.block_size)

    def _window_ids(self, first: int, count: int) -> list[int]:
        return epoch_entries(first, count, self.n_windows, self.seed)

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        position = (micro_step - 1) * self.world_size + self.rank
        first = (step - 1) * self.windows_per_step + position * self.batch_size
        ids = self._window_ids(first, self.batch_size)
        return self.shards.windows(ids, self.block_size, limit=len(self.shards) - 1)

    def targets_in_step(self, step: int) -> int:
        """total_batch_size, less what the last window of an epoch lacks."""
        ids = self._window_ids((step - 1) * self.windows_per_step, self.windows_per_step)
        missing = self.n_windows * self.block_size - (len(self.shards) - 1)
        return self.total_batch_size - missing * ids.count(self.n_windows - 1)

    def tokens_through(self, step: int) -> int:
        return step * self.total_batch_size

    def summary(self) -> str:
        return (
            f"tokens per step: {self.total_batch_size:,} = {self.batch_size} sequences x "
            f"{self.block_size} tokens x {self.world_size} ranks x grad_accum_steps "
            f"{self.grad_accum_steps}\n"
            f"data: {len(self.shards):,} tokens, an epoch is "
            f"{len(self.shards) / self.total_batch_size:,.1f} steps"
        )


def validation_batches(
    shards: TokenShards,
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the windows that predict the first `eval_tokens` tokens, in order. All
    ranks get equally many batches; some may have sequences without targets.
    """
    limit = min(eval_tokens, len(shards) - 1)
    n_windows = -(-limit // block_size)
    for first in range(0, n_windows, batch_size * world_size):
        start = first + rank * batch_size
        yield shards.windows(list(range(start, start + batch_size)), block_size, limit)
