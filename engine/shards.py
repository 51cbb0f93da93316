"""Token shards on disk: how they are written, listed in a manifest, checked and read."""

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.files import naming_file, read_json, sha256_file, sha256_text, write_json
from engine.tokenizer import GPT2, Tokenizer

# Header of llm.c's and modded-nanogpt's .bin shards (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256
BUFFER_BYTES = 1 << 18  # of tokens, because pieces are short
NANOGPT_FILES = ("train.bin", "val.bin")


class ShardFile:
    """A .npy of uint16 that is written part by part, so that no shard is held in memory. It has a
    temporary name until it is finished.
    """

    def __init__(self, path: Path):
        self.path, self.tokens = path, 0
        self.temporary = path.with_name(path.name + ".tmp")
        with naming_file(path):
            self.file = self.temporary.open("wb", buffering=BUFFER_BYTES)
            self._write_header()

    def _write_header(self) -> None:
        header = io.BytesIO()  # np.save to the file would not notice a full disk
        fields = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(header, fields)  # equally long for any shape
        self.file.write(header.getvalue())

    def write(self, tokens: np.ndarray) -> None:
        with naming_file(self.path):
            self.file.write(tokens.data)
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


class ShardWriter:
    """Cuts a stream of tokens into shards. Validation gets the pieces drawn for it or, with
    val_tokens and no section_chars among the options, the first val_tokens tokens.

    When a shard is full, that of the other split is finished as well: the cursor that they share is
    then a place to resume from.
    """

    def __init__(self, out_dir: Path, manifest: dict):
        self.out_dir, self.manifest = out_dir, manifest
        options, shards = manifest["options"], manifest["shards"]
        self.shard_size = options["shard_size"]
        self.max_tokens = options["max_tokens"] or sys.maxsize
        self.val_tokens = 0 if "section_chars" in options else options["val_tokens"]
        self.total = sum(shard["tokens"] for shard in shards)
        # Position in the source: counts of what is done; `tokens` within the current piece.
        start = dict.fromkeys(("pieces", "tokens", "documents", "empty"), 0)
        self.cursor: dict[str, int] = shards[-1]["cursor"] if shards else start
        self.unfinished: dict[str, ShardFile] = {}  # by split

    @property
    def is_full(self) -> bool:
        return self.total == self.max_tokens

    def add(self, tokens: np.ndarray, starts: bool, is_val: bool) -> None:
        """Write the rest of the current piece, from the cursor on, up to max_tokens."""
        cursor = self.cursor = dict(self.cursor)
        while cursor["tokens"] < len(tokens) and not self.is_full:
            is_leading = self.total < self.val_tokens
            shard = self._open_shard("val" if is_val or is_leading else "train")
            end = self.val_tokens if is_leading else self.max_tokens
            room = min(self.shard_size - shard.tokens, end - self.total)
            part = tokens[cursor["tokens"] :][:room]
            shard.write(part)
            self.total += len(part)
            cursor["tokens"] += len(part)
            if shard.tokens == self.shard_size or self.total in (self.val_tokens, self.max_tokens):
                self.finish_shards()
        cursor["pieces"] += 1
        cursor["tokens"] = 0
        cursor["documents"] += starts
        cursor["empty"] += starts and not len(tokens)

    def _open_shard(self, split: str) -> ShardFile:
        if split not in self.unfinished:
            index = sum(shard["split"] == split for shard in self.manifest["shards"])
            name = f"{self.manifest['name']}_{split}_{index:06d}.npy"
            self.unfinished[split] = ShardFile(self.out_dir / name)
        return self.unfinished[split]

    def finish_shards(self) -> None:
        """Finish the shards that were started, and list them in the manifest."""
        for split, shard in sorted(self.unfinished.items(), reverse=True):  # val first
            entry = {**shard.finish(), "split": split, "cursor": dict(self.cursor)}
            self.manifest["shards"].append(entry)
        if self.unfinished:
            write_manifest(self.out_dir, self.manifest)
        self.unfinished.clear()


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write a whole shard; return its entry of the manifest."""
    file = ShardFile(path)
    file.write(tokens.astype("<u2"))
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


def load_data_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer that the manifest of a data folder records, or GPT-2's."""
    recorded = read_manifest(Path(folder)).get("tokenizer", GPT2)
    if recorded == GPT2:
        return Tokenizer.gpt2()
    known = recorded if isinstance(recorded, dict) else {}
    tokenizer = Tokenizer.from_folder(Path(folder), known.get("name"), known.get("end_of_text"))
    if not tokenizer or tokenizer.sha256 != known.get("sha256"):
        raise ValueError(
            f"{folder} has tokens of {known.get('name', recorded)}, but its tokenizer.json is not "
            "there or has changed; restore it, or delete the folder and prepare the data again"
        )
    return tokenizer


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
    header, n_header_bytes = np.fromfile(path, dtype="<i4", count=BIN_HEADER_INTS)[:3], 0
    if path.name not in NANOGPT_FILES or BIN_MAGIC in header[:1]:
        n_header_bytes = 4 * BIN_HEADER_INTS
        expected = [BIN_MAGIC, BIN_VERSION, (path.stat().st_size - n_header_bytes) // 2]
        if header.tolist() != expected:
            raise ValueError(
                f"{path} begins with {header.tolist()}, expected {expected}: magic, version and "
                f"number of tokens of an llm.c shard; {remedy}"
            )
    elif path.with_name("meta.pkl").exists():
        raise ValueError(
            f"{path} has the vocabulary of the meta.pkl beside it, expected GPT-2's tokens; "
            "prepare its text with fineweb.py"
        )
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=n_header_bytes))


class TokenShards:
    """All tokens of a split ("train" or "val") of a data folder, as one memory-mapped stream.

    With `check_with`, check each shard's sha256 (about 1 GB/s), and that its ids are below the
    tokenizer's vocab_size. `fingerprint` identifies the data.
    """

    def __init__(self, folder: Path | str, split: str, check_with: Tokenizer | None = None):
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.get("complete", True):
            raise ValueError(
                f"the preparation of {folder} is incomplete; run the same fineweb.py command to "
                "resume it"
            )
        hashes = {s["name"]: s["sha256"] for s in manifest["shards"] if s["split"] == split}
        listed = [folder / name for name in hashes]
        files = listed if manifest["shards"] else find_shards(folder, split)
        if not files:
            raise FileNotFoundError(
                f"no {split} shards in {folder}, such as X_{split}_000000.npy or X_{split}.bin;"
                f" `python fineweb.py --dataset fineweb-edu --out_dir {folder}` gets 10B tokens, "
                "`python fineweb.py --dataset stdlib` needs no network (--data_dir data/stdlib)"
            )
        hidden = None if check_with else True  # None: if there is no terminal
        bar = tqdm(files, f"checking {split}", leave=False, unit=" shards", disable=hidden)
        self.shards = [load_shard(file, hashes.get(file.name), check_with) for file in bar]
        self.starts = np.cumsum([0, *map(len, self.shards)])
        sha256s = [hashes.get(file.name) for file in files]
        identity = list(zip(map(len, self.shards), sha256s, strict=True))
        self.fingerprint = sha256_text(repr(identity))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64, across shard borders."""
        first, last = np.searchsorted(self.starts, (start, stop - 1), side="right") - 1
        found = [(self.shards[i], int(self.starts[i])) for i in range(first, last + 1)]
        parts = [tokens[max(0, start - offset) : stop - offset] for tokens, offset in found]
        return np.concatenate(parts, dtype=np.int64)


def find_shards(folder: Path, split: str) -> list[Path]:
    """The split's files in a folder without a manifest, as build-nanogpt, llm.c and nanoGPT name
    them: edufineweb_train_000001.npy, tiny_shakespeare_val.bin, train.bin.
    """
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    return sorted(f for f in folder.glob("*") if name.fullmatch(f.name))


def load_shard(file: Path, sha256: str | None, tokenizer: Tokenizer | None) -> np.ndarray:
    """The tokens of a shard. With a tokenizer, ValueError if the sha256 differs, or an id is not
    below its vocab_size.
    """
    tokens = open_shard(file)
    if tokenizer and sha256 and sha256_file(file) != sha256:
        raise ValueError(
            f"{file} has changed since it was written: its sha256 differs from manifest.json; "
            "delete it and prepare the data again"
        )
    if tokenizer and (largest := int(tokens.max(initial=0))) >= tokenizer.vocab_size:
        raise ValueError(
            f"{file} holds token {largest}, expected at most {tokenizer.vocab_size - 1} of the "
            f"tokenizer {tokenizer}; prepare the data again"
        )
    return tokens
