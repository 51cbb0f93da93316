"""Token shards on disk: how they are written, listed in a manifest, checked and read."""

import hashlib
import io
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.files import naming_file, read_json, sha256_file, write_json
from engine.tokenizer import END_OF_TEXT_ID

# Header of llm.c's and modded-nanogpt's .bin shards (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256
NANOGPT_FILES = ("train.bin", "val.bin")


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


class TokenizedPieces(NamedTuple):
    """Pieces of documents as tokens."""

    tokens: np.ndarray  # uint16, of all pieces one after another
    ends: np.ndarray  # where each piece ends in `tokens`
    counts: np.ndarray  # (pieces, 3): starts a document, is empty, is undecodable
    is_val: np.ndarray  # (pieces,): is drawn for validation


@dataclass(frozen=True)
class Cursor:
    """A position in the source, from which an interrupted preparation resumes."""

    pieces: int = 0  # before the position
    tokens: int = 0  # of the current piece, before the position
    documents: int = 0
    empty: int = 0
    undecodable: int = 0  # pieces with bytes that are not UTF-8, or with lone surrogates

    def after(self, counts: np.ndarray, tokens: int = 0) -> "Cursor":
        """The position after the pieces with these counts and `tokens` tokens of the next one."""
        documents, empty, undecodable = (int(n) for n in counts.sum(axis=0))
        return Cursor(
            self.pieces + len(counts),
            tokens,
            self.documents + documents,
            self.empty + empty,
            self.undecodable + undecodable,
        )


class ShardWriter:
    """Cuts a stream of tokens into shards. For validation are the pieces drawn for it, or, where
    the options have val_tokens, so many leading tokens.

    When a shard is full, that of the other split is finished as well: the cursor that they share is
    then a place to resume from.
    """

    def __init__(self, out_dir: Path, manifest: dict, limit: int):
        self.out_dir, self.manifest, self.limit = out_dir, manifest, limit
        self.shard_size = manifest["options"]["shard_size"]
        self.val_tokens: int | None = manifest["options"].get("val_tokens")
        shards = manifest["shards"]
        self.total = sum(shard["tokens"] for shard in shards)
        self.cursor = Cursor(**shards[-1]["cursor"]) if shards else Cursor()
        self.unfinished: dict[str, ShardFile] = {}  # by split

    @property
    def is_full(self) -> bool:
        return self.total == self.limit

    def add(self, pieces: TokenizedPieces) -> None:
        """Write the pieces that begin at the cursor, as far as the limit allows."""
        tokens, ends, counts, _ = pieces
        position = self.cursor.tokens  # where an earlier call stopped within the first piece
        start = replace(self.cursor, tokens=0)
        while position < len(tokens) and not self.is_full:
            split, end = self._find_split(pieces, position)
            shard = self.unfinished.get(split) or self._start_shard(split)
            end = min(end, position + self.shard_size - shard.tokens)
            end = min(end, position + self.limit - self.total)
            shard.write(tokens[position:end])
            self.total += end - position
            position = end
            if shard.tokens == self.shard_size or self.total in (self.val_tokens, self.limit):
                last = int(np.searchsorted(ends, position))  # the piece of the last token
                used = position - (int(ends[last - 1]) if last else 0)
                self.cursor = start.after(counts[:last], used)
                self.finish_shards()
        n_pieces = int(np.searchsorted(ends, position)) + 1 if self.is_full else len(counts)
        self.cursor = start.after(counts[:n_pieces])

    def _find_split(self, pieces: TokenizedPieces, position: int) -> tuple[str, int]:
        """The split of the token at `position`, and the position up to which it is the same."""
        if self.val_tokens is not None:
            val_left = self.val_tokens - self.total
            is_val, end = val_left > 0, position + val_left
            return ("val", end) if is_val else ("train", len(pieces.tokens))
        piece = int(np.searchsorted(pieces.ends, position, side="right"))
        is_val = bool(pieces.is_val[piece])
        others = np.flatnonzero(pieces.is_val[piece:] != is_val)
        last = piece + int(others[0]) - 1 if len(others) else -1
        return "val" if is_val else "train", int(pieces.ends[last])

    def _start_shard(self, split: str) -> ShardFile:
        index = sum(shard["split"] == split for shard in self.manifest["shards"])
        name = f"{self.manifest['name']}_{split}_{index:06d}.npy"
        self.unfinished[split] = ShardFile(self.out_dir / name)
        return self.unfinished[split]

    def finish_shards(self) -> None:
        """Finish the shards that were started, and list them in the manifest."""
        for split, shard in sorted(self.unfinished.items(), reverse=True):  # val first
            entry = {**shard.finish(), "split": split, "cursor": asdict(self.cursor)}
            self.manifest["shards"].append(entry)
        if self.unfinished:
            write_manifest(self.out_dir, self.manifest)
        self.unfinished.clear()


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
    """The tokens of a .npy or .bin shard, or of nanoGPT's train.bin or val.bin, which have no
    header, as a read-only memory map of uint16.
    """
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
    if path.name in NANOGPT_FILES and tuple(header[:1]) != (BIN_MAGIC,):
        if path.with_name("meta.pkl").exists():
            raise ValueError(
                f"{path} has the vocabulary of the meta.pkl beside it, expected GPT-2's tokens; "
                "prepare its text with fineweb.py"
            )
        return np.asarray(np.memmap(path, dtype="<u2", mode="r"))
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
        if (tokenizer := manifest.get("tokenizer", "gpt2")) != "gpt2":
            raise ValueError(
                f"{folder} has tokens of {tokenizer!r}, expected 'gpt2'; prepare the data again"
            )
        if not manifest.get("complete", True):
            raise ValueError(
                f"the preparation of {folder} is incomplete; run the same fineweb.py command to "
                "resume it"
            )
        if entries:
            files = [folder / name for name, entry in entries.items() if entry["split"] == split]
        else:
            files = find_shards(folder, split)
        if not files:
            other = {"train": "val", "val": "train"}[split]
            if entries or find_shards(folder, other):
                raise FileNotFoundError(
                    f"{folder} has {other} shards, but none for {split}; expected files named like "
                    f"NAME_{split}_000000.npy or NAME_{split}.bin"
                )
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


def find_shards(folder: Path, split: str) -> list[Path]:
    """The split's files in a folder without a manifest, as build-nanogpt, llm.c and nanoGPT name
    them: edufineweb_train_000001.npy, tiny_shakespeare_val.bin, train.bin.
    """
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    return sorted(f for f in folder.glob("*") if name.fullmatch(f.name))


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
