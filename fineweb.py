"""Tokenize text into shards: from the hub, from files, or Python's own documentation."""

import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.config import flag, run_command
from engine.files import sha256_file
from engine.shards import ShardFile, count_tokens, open_shard, read_manifest, write_manifest
from engine.sources import HUB_TEXT, SUFFIXES, Piece, Source, open_source, reporting_hub_errors
from engine.tokenizer import END_OF_TEXT_ID, BatchEncoder

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
MAX_TOKENS, MAX_SHARD_SIZE = 10**15, 10**9
BATCH_CHARS = 1 << 22  # encoded at once
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

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is empty, expected a name, a file, a folder or a glob")
        for name in ("shard_size", "val_tokens", "max_tokens"):
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


class TokenizedPieces(NamedTuple):
    tokens: np.ndarray  # uint16, of all pieces one after another
    ends: np.ndarray  # where each piece ends in `tokens`
    counts: np.ndarray  # (pieces, 3): starts a document, is empty, is undecodable


def tokenize_pieces(encoder: BatchEncoder, pieces: list[Piece]) -> TokenizedPieces:
    """The tokens of each piece, after <|endoftext|> where a document starts. A blank document has
    none; a lone surrogate becomes U+FFFD.
    """
    texts, counts = [], []
    for text, starts in pieces:
        valid = replace_surrogates(text)
        texts.append("" if starts and not text.strip() else valid)
        counts.append((starts, not texts[-1], valid != text))
    tokens, lengths = encoder.encode(texts)
    starts, is_empty, _ = np.array(counts).T
    has_separator = starts & ~is_empty
    begins = np.cumsum(lengths) - lengths
    tokens = np.insert(tokens, begins[has_separator], END_OF_TEXT_ID)
    return TokenizedPieces(tokens, np.cumsum(lengths + has_separator), np.array(counts))


def replace_surrogates(text: str) -> str:
    try:
        text.encode()  # faster than a regular expression
    except UnicodeEncodeError:
        return SURROGATES.sub("\ufffd", text)
    return text


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


def tokenize(pieces: Iterator[Piece]) -> Iterator[TokenizedPieces]:
    """The pieces in batches with their tokens. The next batch is read while one is encoded."""
    encode = partial(tokenize_pieces, BatchEncoder())
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future] = deque()
        for batch in batch_pieces(pieces):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 1:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


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
    """Cuts a stream of tokens into shards, those of the validation split first."""

    def __init__(self, out_dir: Path, manifest: dict, max_tokens: int | None):
        self.out_dir, self.manifest = out_dir, manifest
        self.limit = MAX_TOKENS if max_tokens is None else max_tokens
        shards = manifest["shards"]
        self.total = sum(shard["tokens"] for shard in shards)
        self.cursor = Cursor(**shards[-1]["cursor"]) if shards else Cursor()
        self.shard: ShardFile | None = None

    @property
    def is_full(self) -> bool:
        return self.total == self.limit

    def add(self, pieces: TokenizedPieces) -> None:
        """Write the pieces that begin at the cursor, as far as the limit allows."""
        tokens, ends, counts = pieces
        position = self.cursor.tokens  # where an earlier call stopped within the first piece
        start = replace(self.cursor, tokens=0)
        while position < len(tokens) and not self.is_full:
            shard = self.shard = self.shard or self._start_shard()
            n = min(self.size - shard.tokens, len(tokens) - position)
            shard.write(tokens[position : position + n])
            self.total += n
            position += n
            if shard.tokens == self.size:
                last = int(np.searchsorted(ends, position))  # the piece of the last token
                used = position - (int(ends[last - 1]) if last else 0)
                self.cursor = start.after(counts[:last], used)
                self.finish_shard()
        n_pieces = int(np.searchsorted(ends, position)) + 1 if self.is_full else len(counts)
        self.cursor = start.after(counts[:n_pieces])

    def _start_shard(self) -> ShardFile:
        options, shards = self.manifest["options"], self.manifest["shards"]
        val_left = options["val_tokens"] - self.total
        self.split, split_left = ("val", val_left) if val_left > 0 else ("train", MAX_TOKENS)
        self.size = min(options["shard_size"], split_left, self.limit - self.total)
        index = sum(shard["split"] == self.split for shard in shards)
        name = f"{self.manifest['name']}_{self.split}_{index:06d}.npy"
        return ShardFile(self.out_dir / name)

    def finish_shard(self) -> None:
        """Finish the current shard, if there is one, and list it in the manifest."""
        if self.shard is None:
            return
        entry = {**self.shard.finish(), "split": self.split, "cursor": asdict(self.cursor)}
        self.manifest["shards"].append(entry)
        write_manifest(self.out_dir, self.manifest)
        self.shard = None


def prepare(source: Source, out_dir: Path, config: PrepareConfig) -> None:
    """Write the shards of `source`, after the intact ones of an earlier call."""
    manifest = start_manifest(source, out_dir, config)
    if manifest["complete"]:
        print(f"{out_dir} is complete: {summarize_manifest(manifest)}")
        return
    writer = ShardWriter(out_dir, manifest, config.max_tokens)
    shards, first, start = manifest["shards"], writer.total, time.perf_counter()
    problems: Counter = Counter()
    expected = config.max_tokens or (source.n_bytes and int(source.n_bytes / BYTES_PER_TOKEN))
    with tqdm(
        desc=str(out_dir), initial=first, total=expected, unit=" tok", unit_scale=True, disable=None
    ) as bar:
        for pieces in tokenize(source.pieces(writer.cursor.pieces, problems)):
            n_shards = len(shards)
            writer.add(pieces)
            bar.update(writer.total - bar.n)
            if len(shards) > n_shards:
                speed = (writer.total - first) / (time.perf_counter() - start)
                minutes = max(0, (expected or 0) - writer.total) / speed / 60
                left = f", about {minutes:.0f} min left" if expected else ""
                bar.write(f"{shards[-1]['name']}: {speed:,.0f} tokens/s{left}")
            if writer.is_full:
                break
    writer.finish_shard()
    finish_manifest(manifest, out_dir, writer.cursor, problems)


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
