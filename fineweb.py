"""Text from the hub, from files or from Python itself, into shards of tokens."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from tqdm import tqdm

import cli
from data import open_shard, read_manifest, sha256_of, tokens_in, write_manifest, write_shard
from text import HUB_TEXT, SUFFIXES, Piece, Source, open_source
from tokenizer import END_OF_TEXT_ID, get_tokenizer

# Shards of 100 M tokens on the hub, made for modded-nanogpt (its data/cached_*.py): repository,
# file name prefix, training shards beside the one for validation.
HUB_SHARDS = {
    "fineweb10B-gpt2": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B-gpt2": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B-gpt2": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
MAX_TOKENS, MAX_SHARD_SIZE = 10**15, 10**9  # a shard is held in memory, two bytes a token
BATCH_CHARS = 1 << 20  # handed to a worker at once
# The first tokens of FineWeb's validation shard on which the 124M speedruns compare their loss.
HUB_VAL_TOKENS = 10_485_760
BYTES_PER_TOKEN = 4.4  # of English under GPT-2's BPE, to guess how much there is to do


@dataclass(frozen=True)
class PrepareConfig:
    dataset: list[str] = field(
        default_factory=lambda: ["fineweb-edu"],
        metadata={
            "help": f"{', '.join([*HUB_TEXT, *HUB_SHARDS])}, stdlib (Python's own documentation), "
            f"or files, folders and globs of {', '.join(SUFFIXES)}"
        },
    )
    out_dir: str = ""
    """folder of the shards (default: data/ and the name of the dataset)"""
    max_tokens: int | None = None
    """stop after so many tokens, those for validation included (default: all); of ready-made
    shards, as many as it takes for training"""
    shard_size: int = 100_000_000
    """tokens in a shard"""
    val_tokens: int | None = None
    """the first tokens, kept for validation (default: 10,485,760 of a hub set, else about 5 %)"""
    text_field: str = "text"
    """the column or key of the text in .parquet and .jsonl (this and the sizes above: not for
    ready-made shards)"""
    num_proc: int = min(os.cpu_count() or 1, 61)
    """worker processes (Windows bears 61)"""

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, list) or not all(isinstance(d, str) for d in self.dataset):
            raise ValueError(f"dataset is {self.dataset!r}, expected a list of names or paths")
        for name in ("shard_size", "num_proc", "val_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_TOKENS:
                raise ValueError(f"{name} is {value}, expected 1 up to {MAX_TOKENS:,}")
        if self.shard_size > MAX_SHARD_SIZE:
            raise ValueError(f"shard_size is {self.shard_size}, expected up to {MAX_SHARD_SIZE:,}")


def main(config: PrepareConfig) -> None:
    out_dir = Path(config.out_dir or f"data/{default_name(config.dataset[0])}")
    if config.dataset[0] in HUB_SHARDS:
        download_shards(config.dataset[0], out_dir, config.max_tokens)
    else:
        prepare(open_source(config.dataset, config.text_field), out_dir, config)


def default_name(dataset: str) -> str:
    return re.sub(r"[^\w-]+", "", Path(dataset).name.split(".")[0]) or "text"


def encode(texts: list[tuple[str, bool]]) -> list[np.ndarray]:
    """The tokens of each piece as uint16, <|endoftext|> first where a document starts; a blank
    document has none.
    """
    tokenizer = get_tokenizer()
    start = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    rows: list[np.ndarray] = []
    for text, starts in texts:
        if starts and not text.strip():
            rows.append(np.empty(0, dtype=np.uint16))
            continue
        try:
            tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, from an escape in JSON; becomes U+FFFD
            mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = tokenizer.encode_to_numpy(mended, disallowed_special=())
        tokens = tokens.astype(np.uint16)
        rows.append(np.concatenate([start, tokens]) if starts else tokens)
    return rows


def in_batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(
    open_pieces: Callable[[], Iterator[Piece]], num_proc: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its tokens, in order, made by `num_proc` processes of which none runs more
    than a few batches ahead.
    """
    # The workers start before the source opens: a fork after its network threads could hang.
    pool = ProcessPoolExecutor(num_proc, initializer=follow_parent)
    try:
        pool.submit(encode, []).result()
        pending: deque[tuple[list[Piece], Future]] = deque()
        for batch in in_batches(open_pieces()):
            pending.append((batch, pool.submit(encode, batch)))
            if len(pending) > 2 * num_proc:
                done, result = pending.popleft()
                yield from zip(done, result.result(), strict=True)
        for done, result in pending:
            yield from zip(done, result.result(), strict=True)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, maybe for want of memory; the same command goes on after "
            "the last complete shard, with a smaller --num_proc in less memory"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def follow_parent() -> None:
    """A worker leaves it to its parent what Ctrl-C means, and ends when the parent does, even by
    kill -9.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Cursor:
    """A place in the source, so that an interrupted preparation goes on there."""

    pieces: int = 0  # before it
    tokens: int = 0  # of the piece it stands in, before it
    documents: int = 0
    empty: int = 0
    undecodable: int = 0  # pieces with U+FFFD, which stands for bytes that are no UTF-8


class ShardWriter:
    """Cuts the stream of tokens into shards: first those of validation, then those of training."""

    def __init__(self, out_dir: Path, manifest: dict, max_tokens: int | None):
        self.out_dir = out_dir
        self.manifest = manifest
        self.max_tokens = max_tokens
        self.written = sum(shard["tokens"] for shard in manifest["shards"])
        self._start_shard()

    @property
    def total(self) -> int:
        return self.written + self.filled

    @property
    def done(self) -> bool:
        return self.max_tokens is not None and self.total >= self.max_tokens

    def _start_shard(self) -> None:
        size = self.manifest["options"]["shard_size"]
        val_left = self.manifest["options"]["val_tokens"] - self.written
        self.split = "val" if val_left > 0 else "train"
        if val_left > 0:
            size = min(size, val_left)
        if self.max_tokens is not None:
            size = min(size, self.max_tokens - self.written)
        self.buffer = np.empty(size, dtype=np.uint16)
        self.filled = 0

    def add(self, tokens: np.ndarray, cursor: Cursor) -> None:
        """Add the tokens of a piece; `cursor` is where the piece begins."""
        used = cursor.tokens
        while used < len(tokens) and not self.done:
            n = min(len(self.buffer) - self.filled, len(tokens) - used)
            self.buffer[self.filled : self.filled + n] = tokens[used : used + n]
            self.filled += n
            used += n
            if self.filled == len(self.buffer):
                self.finish_shard(replace(cursor, tokens=used))

    def finish_shard(self, cursor: Cursor) -> None:
        shards = self.manifest["shards"]
        index = sum(shard["split"] == self.split for shard in shards)
        path = self.out_dir / f"{self.manifest['name']}_{self.split}_{index:06d}.npy"
        entry = write_shard(path, self.buffer[: self.filled])
        shards.append({**entry, "split": self.split, "cursor": asdict(cursor)})
        write_manifest(self.out_dir, self.manifest)
        self.written += self.filled
        self._start_shard()


def prepare(source: Source, out_dir: Path, config: PrepareConfig) -> None:
    """Write the shards of `source`, going on after the intact ones that an earlier call left."""
    manifest = start_manifest(source, out_dir, config)
    if manifest["complete"]:
        print(f"{out_dir} is complete: {describe(manifest)}")
        return
    cursor = Cursor(**manifest["shards"][-1]["cursor"]) if manifest["shards"] else Cursor()
    writer = ShardWriter(out_dir, manifest, config.max_tokens)
    problems: Counter = Counter()
    expected = config.max_tokens or (source.n_bytes and int(source.n_bytes / BYTES_PER_TOKEN))
    with tqdm(
        desc=str(out_dir),
        initial=writer.total,
        total=expected,
        unit=" tokens",
        unit_scale=True,
        disable=None,
    ) as bar:
        start, first = time.perf_counter(), writer.total
        open_pieces = partial(source.pieces, cursor.pieces, problems)
        for (text, starts), tokens in tokenize(open_pieces, config.num_proc):
            before, n_shards = writer.total, len(manifest["shards"])
            writer.add(tokens, cursor)
            cursor = Cursor(
                pieces=cursor.pieces + 1,
                documents=cursor.documents + starts,
                empty=cursor.empty + (len(tokens) == 0),
                undecodable=cursor.undecodable + ("\ufffd" in text),
            )
            bar.update(writer.total - before)
            if len(manifest["shards"]) > n_shards:
                speed = (writer.total - first) / (time.perf_counter() - start)
                left = (
                    f", about {max(0, expected - writer.total) / speed / 60:.0f} min left"
                    if expected
                    else ""
                )
                bar.write(f"{manifest['shards'][-1]['name']}: {speed:,.0f} tokens/s{left}")
            if writer.done:
                break
    if writer.filled:
        writer.finish_shard(cursor)
    finish_manifest(manifest, out_dir, cursor, problems)


def start_manifest(source: Source, out_dir: Path, config: PrepareConfig) -> dict:
    """The manifest to go on with: the intact shards of an earlier call with the same options."""
    val_tokens = config.val_tokens
    if val_tokens is None:
        val_tokens = HUB_VAL_TOKENS
        if source.n_bytes is not None:
            val_tokens = max(1, min(val_tokens, int(source.n_bytes / BYTES_PER_TOKEN / 20)))
    options = {
        "source": source.identity,
        "text_field": config.text_field,
        "max_tokens": config.max_tokens,
        "shard_size": config.shard_size,
        "val_tokens": val_tokens,
    }
    if config.max_tokens is not None and config.max_tokens < val_tokens + 2:
        raise ValueError(
            f"max_tokens {config.max_tokens} leaves none beside val_tokens {val_tokens}"
        )
    earlier = read_manifest(out_dir)
    if any(shard["split"] == "train" for shard in earlier["shards"]):
        changed = [key for key in options if earlier.get("options", {}).get(key) != options[key]]
        if changed:
            raise ValueError(
                f"{out_dir} holds shards made with another {' and '.join(changed)}: "
                f"{ {key: earlier.get('options', {}).get(key) for key in changed} } then, "
                f"{ {key: options[key] for key in changed} } now. Take another --out_dir, or "
                "delete the folder"
            )
    out_dir.mkdir(parents=True, exist_ok=True)

    def intact(shard: dict) -> bool:
        file = out_dir / shard["name"]
        return file.exists() and sha256_of(file) == shard["sha256"]

    resumable = earlier["shards"] if earlier.get("options") == options else []
    shards = list(takewhile(intact, resumable))
    if shards and len(shards) == len(earlier["shards"]) and earlier["complete"]:
        return earlier
    if shards:
        print(f"{out_dir}: going on after {shards[-1]['name']}")
    return {
        "name": out_dir.name,
        "dataset": source.name,
        "tokenizer": "gpt2",
        "complete": False,
        "options": options,
        "shards": shards,
    }


def finish_manifest(manifest: dict, out_dir: Path, cursor: Cursor, problems: Counter) -> None:
    tokens = {split: tokens_in(manifest, split) for split in ("val", "train")}
    if tokens["train"] < 2:
        raise ValueError(
            f"the text has {sum(tokens.values())} tokens in {cursor.documents} documents and "
            f"val_tokens is {manifest['options']['val_tokens']}, which leaves none for training; "
            f"lower --val_tokens or add text ({problems['bad rows']} rows had none under "
            f"--text_field {manifest['options']['text_field']})"
        )
    manifest["complete"] = True
    manifest["summary"] = {
        "documents": cursor.documents,
        **{f"{split} tokens": n for split, n in tokens.items()},
        "empty documents": cursor.empty,
        "pieces with undecodable bytes": cursor.undecodable,
        "bad rows": problems["bad rows"],
        "truncated files": problems["truncated files"],
    }
    write_manifest(out_dir, manifest)
    print(f"{out_dir}: {describe(manifest)}")


def describe(manifest: dict) -> str:
    counts = [f"{n:,} {what}" for what, n in manifest["summary"].items()]
    return ", ".join([*counts, f"{len(manifest['shards'])} shards"])


def download_shards(dataset: str, out_dir: Path, max_tokens: int | None) -> None:
    """Fetch ready-made shards, validation first, until `max_tokens` for training are there."""
    repo, prefix, n_train = HUB_SHARDS[dataset]
    earlier = read_manifest(out_dir)
    if earlier["shards"] and earlier.get("dataset") != dataset:
        raise ValueError(f"{out_dir} holds shards of other text; take another --out_dir")
    # Shards that are here stay listed until their turn comes again, which takes no download.
    manifest = {"name": out_dir.name, "dataset": dataset, "tokenizer": "gpt2", "complete": False}
    shards: dict[str, dict] = {shard["name"]: shard for shard in earlier["shards"]}
    names = [("val", f"{prefix}_val_000000.bin")]
    names += [("train", f"{prefix}_train_{i:06d}.bin") for i in range(1, n_train + 1)]
    trained = 0
    for split, name in tqdm(names, desc=str(out_dir), unit=" shards", disable=None):
        try:
            file = hf_hub_download(repo, name, repo_type="dataset", local_dir=out_dir)
        except OSError as error:
            raise ConnectionError(
                f"the Hugging Face hub does not give {name} of {repo}: {error}. The same command "
                "goes on where it stopped; without a network, use --dataset stdlib or own files"
            ) from error
        tokens = len(open_shard(Path(file)))
        entry = {"name": name, "tokens": tokens, "sha256": sha256_of(Path(file)), "split": split}
        shards[name] = entry
        write_manifest(out_dir, {**manifest, "shards": list(shards.values())})
        trained += tokens if split == "train" else 0
        if max_tokens is not None and trained >= max_tokens:
            break
    write_manifest(out_dir, {**manifest, "complete": True, "shards": list(shards.values())})
    print(f"{out_dir}: {trained:,} tokens for training, and a shard for validation")


if __name__ == "__main__":
    cli.run(main, PrepareConfig, __doc__)
