"""Token shards on disk: write them, list them in a manifest, check and read them."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.files import adding_path_to_errors, read_json, sha256_file, sha256_text, write_json
from engine.tokenizer import GPT2, Tokenizer

# The header of .bin shards of llm.c and modded-nanogpt (llm.c, dev/data/data_common.py).
BIN_MAGIC, BIN_VERSION, BIN_HEADER_INTS = 20240520, 1, 256
BUFFER_BYTES = 1 << 18  # collects the many short writes
NANOGPT_FILES = ("train.bin", "val.bin")
AS_UINT16 = "convert it with .ravel().astype(np.uint16) if all ids are below 65,536"
# If 32- or 64-bit ids are read as uint16, every second number holds high bits: below 8 in
# vocabularies of up to 524,288 tokens. In real uint16 data, some are larger.
SAMPLE_SIZE, MIN_SAMPLE_SIZE, MAX_UPPER_HALF = 4096, 64, 7


class ShardFile:
    """A .npy file of uint16, written part by part so that a shard is never held in memory. It has a
    temporary name until it is finished.
    """

    def __init__(self, path: Path):
        self.path, self.n_tokens = path, 0
        self.temporary = path.with_name(path.name + ".tmp")
        with adding_path_to_errors(path):
            self.file = self.temporary.open("wb", buffering=BUFFER_BYTES)
            self._write_header()

    def _write_header(self) -> None:
        fields = {"descr": "<u2", "fortran_order": False, "shape": (self.n_tokens,)}
        # NumPy pads the header to the same length for any n_tokens, so `finish` can overwrite it.
        np.lib.format.write_array_header_1_0(self.file, fields)

    def write(self, tokens: np.ndarray) -> None:
        with adding_path_to_errors(self.path):
            self.file.write(tokens.data)
        self.n_tokens += len(tokens)

    def finish(self) -> dict:
        """Finish the file. Return its manifest entry: name, tokens and sha256."""
        with adding_path_to_errors(self.path):
            self.file.seek(0)
            self._write_header()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        sha256 = sha256_file(self.temporary)
        self.temporary.replace(self.path)
        return {"name": self.path.name, "tokens": self.n_tokens, "sha256": sha256}


class ShardWriter:
    """Writes a stream of tokenized pieces as shards. A piece is a document or part of one. If the
    text was cut into sections ("section_chars" is in the options of the manifest), `is_val` of
    each piece decides its split. Otherwise the first val_tokens tokens are for validation.

    `cursor` says how much of the source has been written. The manifest stores it with each finished
    shard, so that an interrupted run can resume there. That works only if the shards of both splits
    end at the same place. So when one is full, we finish the other too, even if it is short:

        pieces   aaaa bbb cccccccccc dddd ...
        train    aaaa     cccccc|               full, in the middle of c
        val           bbb       |               finished as well
                                ^ cursor: 2 pieces, and 6 tokens of the next one
    """

    def __init__(self, out_dir: Path, manifest: dict):
        self.out_dir, self.manifest = out_dir, manifest
        options, shards = manifest["options"], manifest["shards"]
        self.shard_size = options["shard_size"]
        self.max_tokens = options["max_tokens"] or sys.maxsize
        self.val_tokens = 0 if "section_chars" in options else options["val_tokens"]
        self.total = sum(shard["tokens"] for shard in shards)
        # pieces: how many are completely written. tokens: how many of the next piece are written.
        # documents, empty: how many documents there were, and how many of them had no tokens.
        start = dict.fromkeys(("pieces", "tokens", "documents", "empty"), 0)
        self.cursor: dict[str, int] = dict(shards[-1]["cursor"]) if shards else start
        self.unfinished: dict[str, ShardFile] = {}  # by split

    @property
    def is_full(self) -> bool:
        return self.total == self.max_tokens

    def add(self, tokens: np.ndarray, starts_document: bool, is_val: bool) -> None:
        """Write a piece, up to max_tokens. Skips the tokens that an interrupted run wrote."""
        cursor = self.cursor
        while cursor["tokens"] < len(tokens) and not self.is_full:
            shard, room = self._current_shard_and_room(is_val)
            part = tokens[cursor["tokens"] :][:room]
            shard.write(part)
            self.total += len(part)
            cursor["tokens"] += len(part)
            if len(part) == room:
                self.finish_shards()
        cursor["pieces"] += 1
        cursor["tokens"] = 0
        cursor["documents"] += starts_document
        cursor["empty"] += starts_document and not len(tokens)

    def _current_shard_and_room(self, is_val: bool) -> tuple[ShardFile, int]:
        """Return the shard to write to next, and how many tokens to write there: until it is full,
        or the stream reaches val_tokens or max_tokens.
        """
        in_val_prefix = self.total < self.val_tokens
        split = "val" if is_val or in_val_prefix else "train"
        if split not in self.unfinished:
            index = sum(shard["split"] == split for shard in self.manifest["shards"])
            name = f"{self.manifest['name']}_{split}_{index:06d}.npy"
            self.unfinished[split] = ShardFile(self.out_dir / name)
        shard = self.unfinished[split]
        end = self.val_tokens if in_val_prefix else self.max_tokens
        return shard, min(self.shard_size - shard.n_tokens, end - self.total)

    def finish_shards(self) -> None:
        """Finish the unfinished shards and list them in the manifest."""
        for split, shard in sorted(self.unfinished.items(), reverse=True):  # val first
            entry = {**shard.finish(), "split": split, "cursor": dict(self.cursor)}
            self.manifest["shards"].append(entry)
        if self.unfinished:
            write_manifest(self.out_dir, self.manifest)
        self.unfinished.clear()


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """Write a complete shard. Return its manifest entry."""
    file = ShardFile(path)
    file.write(tokens.astype("<u2"))
    return file.finish()


def write_manifest(folder: Path, manifest: dict) -> None:
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder: Path) -> dict:
    """Read the manifest.json of a folder. Return {"shards": []} if there is none."""
    file = folder / "manifest.json"
    if not file.exists():
        return {"shards": []}
    remedy = "delete the folder and prepare the data again"
    manifest = read_json(file, remedy)
    try:
        for shard in manifest["shards"]:
            _ = [shard[key] for key in ("name", "split", "tokens", "sha256")]  # KeyError: damaged
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {remedy}") from error
    return manifest


def load_data_tokenizer(folder: Path | str) -> Tokenizer:
    """Load the tokenizer that a data folder was tokenized with: the one in its manifest, by default
    GPT-2. Raises ValueError if the tokenizer.json of another one is missing or has changed.
    """
    entry = read_manifest(Path(folder)).get("tokenizer", GPT2)
    if entry == GPT2:
        return Tokenizer.gpt2()
    # Other programs may write a name instead of a dict. Without a sha256, we refuse it below.
    entry = entry if isinstance(entry, dict) else {"name": entry}
    tokenizer = Tokenizer.from_folder(Path(folder), entry.get("name"), entry.get("end_of_text"))
    if not tokenizer or tokenizer.sha256 != entry.get("sha256"):
        raise ValueError(
            f"{folder} was tokenized with {entry.get('name')}, but its tokenizer.json is missing "
            "or has changed; restore it, or delete the folder and prepare the data again"
        )
    return tokenizer


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard, read-only, as uint16. A shard is a .npy, a .bin with the
    header of llm.c, or nanoGPT's train.bin or val.bin without a header. Raises ValueError if the
    file is damaged, or if nanoGPT did not use the GPT-2 tokenizer.
    """
    remedy = "delete it and prepare the data again"
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is truncated or not .npy ({error}); {remedy}") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected a 1-D array of "
                f"uint16; {AS_UINT16}"
            )
        return np.asarray(tokens)
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER_INTS)[:3].tolist()
    is_nanogpt = path.name in NANOGPT_FILES and header[:1] != [BIN_MAGIC]  # has no header
    n_header_bytes = 0 if is_nanogpt else 4 * BIN_HEADER_INTS
    expected = [BIN_MAGIC, BIN_VERSION, (path.stat().st_size - n_header_bytes) // 2]
    if not is_nanogpt and header != expected:
        raise ValueError(
            f"{path} begins with {header}, expected {expected}: magic, version and number of "
            f"tokens of an llm.c shard; {remedy}"
        )
    if is_nanogpt and path.with_name("meta.pkl").exists():
        raise ValueError(
            f"{path} was tokenized with the vocabulary in meta.pkl, expected GPT-2's; prepare the "
            "original text with fineweb.py"
        )
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=n_header_bytes))
    sample = tokens[:SAMPLE_SIZE]
    if is_nanogpt and len(sample) >= MIN_SAMPLE_SIZE and sample[1::2].max() <= MAX_UPPER_HALF:
        raise ValueError(f"{path} holds integers of 32 or 64 bits, expected uint16; {AS_UINT16}")
    return tokens


class TokenShards:
    """All tokens of a split ("train" or "val") of a data folder, as one memory-mapped stream.
    `fingerprint` identifies the data.

    Given a tokenizer to `check_with`, read all shards (about 1 GB/s). Check their sha256 against
    the manifest, if there is one, and that all ids are below vocab_size.
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
                f"no {split} shards in {folder}, expected X_{split}_000000.npy or X_{split}.bin; "
                f"for 10B tokens, run `python fineweb.py --dataset fineweb-edu --out_dir {folder}`;"
                " offline, run `python fineweb.py --dataset stdlib` and set data_dir to data/stdlib"
            )
        disable = None if check_with else True  # None: tqdm shows the bar only in a terminal
        bar = tqdm(files, f"checking {split}", leave=False, unit=" shards", disable=disable)
        sha256s = [hashes.get(file.name) for file in files]
        with ThreadPoolExecutor() as pool:
            found = pool.map(open_and_check, files, sha256s, [check_with] * len(files))
            self.shards = [shard for shard, _ in zip(found, bar, strict=True)]
        self.starts = np.cumsum([0, *map(len, self.shards)])
        identity = list(zip(map(len, self.shards), sha256s, strict=True))
        self.fingerprint = sha256_text(repr(identity))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64. The range may span several shards."""
        first, last = np.searchsorted(self.starts, (start, stop - 1), side="right") - 1
        found = [(self.shards[i], int(self.starts[i])) for i in range(first, last + 1)]
        parts = [tokens[max(0, start - offset) : stop - offset] for tokens, offset in found]
        return np.concatenate(parts, dtype=np.int64)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Find the shards of a split in a folder without a manifest, by the names that build-nanogpt,
    llm.c and nanoGPT use: edufineweb_train_000001.npy, tiny_shakespeare_val.bin, train.bin.
    """
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    return sorted(f for f in folder.glob("*") if name.fullmatch(f.name))


def open_and_check(file: Path, sha256: str | None, tokenizer: Tokenizer | None) -> np.ndarray:
    """Open a shard. Without a tokenizer, skip the checks. Raises ValueError if the file does not
    have this sha256, or if an id is not below the tokenizer's vocab_size.
    """
    tokens = open_shard(file)
    if tokenizer and sha256 and sha256_file(file) != sha256:
        raise ValueError(
            f"{file} has changed since it was written: its sha256 differs from manifest.json; "
            "delete it and prepare the data again"
        )
    if tokenizer and (largest := int(tokens.max(initial=0))) >= tokenizer.vocab_size:
        raise ValueError(
            f"{file} holds token {largest}, expected at most {tokenizer.vocab_size - 1} with the "
            f"tokenizer {tokenizer}; prepare the data again"
        )
    return tokens
