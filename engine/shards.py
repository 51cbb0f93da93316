"""Token shards on disk: how they are written, listed in a manifest, checked and read."""

import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.files import naming_file, read_json, sha256_file, write_json
from engine.tokenizer import END_OF_TEXT_ID

# Header of llm.c's and modded-nanogpt's .bin shards (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256


class ShardFile:
    """A .npy of uint16 that is written part by part, so that no shard is held in memory. It has a
    temporary name until it is finished.
    """

    def __init__(self, path: Path):
        self.path, self.tokens = path, 0
        self.temporary = path.with_name(path.name + ".tmp")
        with naming_file(path):
            self.file = self.temporary.open("wb")
            self._write_header()

    def _write_header(self) -> None:
        header = io.BytesIO()  # np.save to the file would not notice a full disk
        fields = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(header, fields)  # equally long for any shape
        self.file.write(header.getvalue())

    def write(self, tokens: np.ndarray) -> None:
        with naming_file(self.path):
            self.file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        self.tokens += len(tokens)

    def finish(self) -> dict:
        """The entry of the manifest: name, tokens and sha256."""
        with naming_file(self.path):
            self.file.seek(0)
            self._write_header()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        sha256 = sha256_file(self.temporary)
        self.temporary.replace(self.path)
        return {"name": self.path.name, "tokens": self.tokens, "sha256": sha256}


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write a whole shard; return its entry of the manifest."""
    file = ShardFile(path)
    file.write(tokens)
    return file.finish()


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
