"""Tokenize text into shards: from the hub, from files, or Python's own documentation."""

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
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.config import flag, run_command
from engine.data import count_tokens, open_shard, read_manifest, write_manifest, write_shard
from engine.files import sha256_file
from engine.sources import HUB_TEXT, SUFFIXES, Piece, Source, open_source, reporting_hub_errors
from engine.tokenizer import END_OF_TEXT_ID, get_tokenizer

# Shards of 100M tokens on the hub, from modded-nanogpt (data/cached_*.py): repository, prefix of
# the file names, number of training shards. Each has one validation shard besides.
HUB_SHARDS = {
    "fineweb10B-gpt2": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B-gpt2": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B-gpt2": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
DATASETS = (
    f"{', '.join(HUB_TEXT)}; ready-made shards, of which only max_tokens can be chosen: "
    f"{', '.join(HUB_SHARDS)}; stdlib (Python's own documentation); or files, folders and globs of "
    f"{', '.join(SUFFIXES)}"
)
MAX_TOKENS, MAX_SHARD_SIZE = 10**15, 10**9  # a shard is held in memory, two bytes a token
BATCH_CHARS = 1 << 20  # sent to a worker at once
HUB_VAL_TOKENS = 10_485_760  # of FineWeb's validation shard, on which 124M speedruns are compared
BYTES_PER_TOKEN = 4.4  # of English in GPT-2's BPE; for estimates
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PrepareConfig:
    dataset: list[str] = flag(["fineweb-edu"], DATASETS)
    out_dir: str = flag("", "folder of the shards (default: data/ and the name of the dataset)")
    max_tokens: int | None = flag(
        None, "tokens to write; of ready-made shards, training tokens to download (default: all)"
    )
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(
        None, "leading tokens, for validation (default: 10,485,760 from the hub, else about 5%)"
    )
    text_field: str = flag("text", "column or key of the text in .parquet and .jsonl")
    num_proc: int = flag(min(os.cpu_count() or 1, 61), "worker processes; Windows allows 61")

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is empty, expected a name, a file, a folder or a glob")
        for name in ("shard_size", "num_proc", "val_tokens", "max_tokens"):
            value = getattr(self, name)
            most = MAX_SHARD_SIZE if name == "shard_size" else MAX_TOKENS
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} is {value}, expected 1 to {most:,}")


def main(config: PrepareConfig) -> None:
    name = re.sub(r"[^\w-]+", "", Path(config.dataset[0]).name.split(".")[0]) or "text"
    out_dir = Path(config.out_dir or f"data/{name}")
    if config.dataset[0] in HUB_SHARDS:
        download_shards(config.dataset[0], out_dir, config.max_tokens)
    else:
        prepare(open_source(config.dataset, config.text_field), out_dir, config)


def tokenize_pieces(pieces: list[Piece]) -> list[np.ndarray]:
    """The tokens of each piece as uint16, after <|endoftext|> where a document starts. A blank
    document has none; a lone surrogate becomes U+FFFD.
    """
    tokenizer = get_tokenizer()
    start = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    rows: list[np.ndarray] = []
    for text, starts in pieces:
        if starts and not text.strip():
            rows.append(start[:0])
            continue
        try:
            tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            valid = SURROGATES.sub("\ufffd", text)
            tokens = tokenizer.encode_to_numpy(valid, disallowed_special=())
        tokens = tokens.astype(np.uint16)
        rows.append(np.concatenate([start, tokens]) if starts else tokens)
    return rows


def has_surrogates(text: str) -> bool:
    try:
        text.encode()  # faster than a regular expression
    except UnicodeEncodeError:
        return True
    return False


def batch_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
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
    """Each piece with its tokens, in order, from `num_proc` processes that run at most a few
    batches ahead.
    """
    # The workers start before the source opens: a fork after its network threads could hang.
    pool = ProcessPoolExecutor(num_proc, initializer=follow_parent)
    try:
        pool.submit(tokenize_pieces, []).result()
        pending: deque[tuple[list[Piece], Future]] = deque()
        for batch in batch_pieces(open_pieces()):
            pending.append((batch, pool.submit(tokenize_pieces, batch)))
            if len(pending) > 2 * num_proc:
                done, result = pending.popleft()
                yield from zip(done, result.result(), strict=True)
        for done, result in pending:
            yield from zip(done, result.result(), strict=True)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, most likely because memory ran out; the same command "
            "resumes after the last complete shard, a smaller --num_proc needs less memory"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def follow_parent() -> None:
    """Make a worker leave Ctrl-C to its parent and exit with it, even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Cursor:
    """A position in the source, from which an interrupted preparation resumes."""

    pieces: int = 0  # before the position
    tokens: int = 0  # of the current piece, before the position
    documents: int = 0
    empty: int = 0
    undecodable: int = 0  # pieces with bytes that are not UTF-8, or with lone surrogates


class ShardWriter:
    """Cuts a stream of tokens into shards, those of the validation split first."""

    def __init__(self, out_dir: Path, manifest: dict, max_tokens: int | None):
        self.out_dir, self.manifest = out_dir, manifest
        self.limit = MAX_TOKENS if max_tokens is None else max_tokens
        self.total = sum(shard["tokens"] for shard in manifest["shards"])
        self._start_shard()

    def _start_shard(self) -> None:
        options = self.manifest["options"]
        val_left = options["val_tokens"] - self.total
        self.split, split_left = ("val", val_left) if val_left > 0 else ("train", MAX_TOKENS)
        size = min(options["shard_size"], split_left, self.limit - self.total)
        self.buffer = np.empty(size, dtype=np.uint16)
        self.filled = 0

    def add(self, tokens: np.ndarray, cursor: Cursor) -> None:
        """Add the tokens of the piece that begins at `cursor`."""
        used = cursor.tokens
        while used < len(tokens) and self.total < self.limit:
            n = min(len(self.buffer) - self.filled, len(tokens) - used)
            self.buffer[self.filled : self.filled + n] = tokens[used : used + n]
            self.filled += n
            self.total += n
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
        self._start_shard()


def prepare(source: Source, out_dir: Path, config: PrepareConfig) -> None:
    """Write the shards of `source`, after the intact ones of an earlier call."""
    manifest = start_manifest(source, out_dir, config)
    if manifest["complete"]:
        print(f"{out_dir} is complete: {summarize_manifest(manifest)}")
        return
    shards = manifest["shards"]
    cursor = Cursor(**shards[-1]["cursor"]) if shards else Cursor()
    writer = ShardWriter(out_dir, manifest, config.max_tokens)
    problems: Counter = Counter()
    open_pieces = partial(source.pieces, cursor.pieces, problems)
    expected = config.max_tokens or (source.n_bytes and int(source.n_bytes / BYTES_PER_TOKEN))
    start, first = time.perf_counter(), writer.total
    with tqdm(
        desc=str(out_dir), initial=first, total=expected, unit=" tok", unit_scale=True, disable=None
    ) as bar:
        for (text, starts), tokens in tokenize(open_pieces, config.num_proc):
            n_shards = len(shards)
            writer.add(tokens, cursor)
            cursor = Cursor(
                pieces=cursor.pieces + 1,
                documents=cursor.documents + starts,
                empty=cursor.empty + (len(tokens) == 0),
                undecodable=cursor.undecodable + has_surrogates(text),
            )
            bar.update(writer.total - bar.n)
            if len(shards) > n_shards:
                speed = (writer.total - first) / (time.perf_counter() - start)
                minutes = max(0, (expected or 0) - writer.total) / speed / 60
                left = f", about {minutes:.0f} min left" if expected else ""
                bar.write(f"{shards[-1]['name']}: {speed:,.0f} tokens/s{left}")
            if writer.total == writer.limit:
                break
    if writer.filled:
        writer.finish_shard(cursor)
    finish_manifest(manifest, out_dir, cursor, problems)


def choose_options(source: Source, config: PrepareConfig) -> dict:
    """What the content of the shards depends on."""
    val_tokens = config.val_tokens
    if val_tokens is None:
        val_tokens = HUB_VAL_TOKENS
        if source.n_bytes is not None:
            val_tokens = max(1, min(val_tokens, int(source.n_bytes / BYTES_PER_TOKEN / 20)))
    if config.max_tokens is not None and config.max_tokens < val_tokens + 2:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, expected val_tokens + 2 = {val_tokens + 2} or more"
        )
    settings = {key: getattr(config, key) for key in ("text_field", "max_tokens", "shard_size")}
    return {"source": source.identity, **settings, "val_tokens": val_tokens}


def start_manifest(source: Source, out_dir: Path, config: PrepareConfig) -> dict:
    """The manifest to continue: the intact shards of an earlier call with the same options."""
    options = choose_options(source, config)
    earlier = read_manifest(out_dir)
    old = earlier.get("options", {})
    changed = [key for key in options if old.get(key) != options[key]]
    if changed and any(shard["split"] == "train" for shard in earlier["shards"]):
        before, now = ({key: values.get(key) for key in changed} for values in (old, options))
        raise ValueError(
            f"{out_dir} holds shards made with another {' and '.join(changed)}: {before} before, "
            f"{now} now; choose another --out_dir, or delete the folder"
        )
    out_dir.mkdir(parents=True, exist_ok=True)

    def is_intact(shard: dict) -> bool:
        file = out_dir / shard["name"]
        return file.exists() and sha256_file(file) == shard["sha256"]

    shards = list(takewhile(is_intact, earlier["shards"] if old == options else []))
    if shards and len(shards) == len(earlier["shards"]) and earlier["complete"]:
        return earlier
    if shards:
        print(f"{out_dir}: resuming after {shards[-1]['name']}")
    manifest = {"name": out_dir.name, "dataset": source.name, "tokenizer": "gpt2"}
    return {**manifest, "complete": False, "options": options, "shards": shards}


def finish_manifest(manifest: dict, out_dir: Path, cursor: Cursor, problems: Counter) -> None:
    tokens = {split: count_tokens(manifest, split) for split in ("val", "train")}
    if tokens["train"] < 2:
        options = manifest["options"]
        raise ValueError(
            f"{cursor.documents} documents have {sum(tokens.values())} tokens and val_tokens is "
            f"{options['val_tokens']}, which leaves none for training; lower --val_tokens or add "
            f"text ({problems['bad rows']} rows had none under --text_field "
            f"{options['text_field']})"
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
    print(f"{out_dir}: {summarize_manifest(manifest)}")


def summarize_manifest(manifest: dict) -> str:
    counts = [f"{n:,} {what}" for what, n in manifest["summary"].items()]
    return ", ".join([*counts, f"{len(manifest['shards'])} shards"])


def download_shards(dataset: str, out_dir: Path, max_tokens: int | None) -> None:
    """Download ready-made shards, validation first, until there are `max_tokens` for training."""
    from huggingface_hub import hf_hub_download

    repo, prefix, n_train = HUB_SHARDS[dataset]
    earlier = read_manifest(out_dir)
    if earlier["shards"] and earlier.get("dataset") != dataset:
        raise ValueError(f"{out_dir} holds shards of other text; choose another --out_dir")
    manifest = {"name": out_dir.name, "dataset": dataset, "tokenizer": "gpt2", "complete": False}
    # Shards from before stay listed until they are checked again, which needs no download.
    shards: dict[str, dict] = {shard["name"]: shard for shard in earlier["shards"]}
    names = [("val", f"{prefix}_val_000000.bin")]
    names += [("train", f"{prefix}_train_{i:06d}.bin") for i in range(1, n_train + 1)]
    trained = 0
    for split, name in tqdm(names, desc=str(out_dir), unit=" shards", disable=None):
        with reporting_hub_errors(f"{name} of {repo}"):
            file = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=out_dir))
        tokens = len(open_shard(file))
        shards[name] = {"name": name, "tokens": tokens, "sha256": sha256_file(file), "split": split}
        write_manifest(out_dir, {**manifest, "shards": list(shards.values())})
        trained += tokens if split == "train" else 0
        if max_tokens is not None and trained >= max_tokens:
            break
    write_manifest(out_dir, {**manifest, "complete": True, "shards": list(shards.values())})
    print(f"{out_dir}: {trained:,} tokens for training, and a validation shard")


if __name__ == "__main__":
    run_command(main, PrepareConfig, __doc__)
