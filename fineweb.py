"""Tokenize text into shards: from the hub, from files, or Python's own documentation."""

import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.config import Settings, flag, run_command
from engine.documents import SUFFIXES
from engine.files import lock_folder, sha256_file
from engine.hub import reporting_hub_errors
from engine.shards import (
    Cursor,
    ShardWriter,
    TokenizedPieces,
    count_tokens,
    open_shard,
    read_manifest,
    write_manifest,
)
from engine.sources import (
    HUB_REMEDY,
    HUB_TEXT,
    Source,
    draw_validation,
    open_source,
)
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
MAX_TOKENS = 10**15
BATCH_CHARS = 1 << 22  # encoded at once
HUB_VAL_TOKENS = 10_485_760  # of FineWeb's validation shard, on which 124M speedruns are compared
BYTES_PER_TOKEN = 4.4  # of English in GPT-2's BPE; for estimates
VAL_FRACTION, MAX_VAL_FRACTION = 0.05, 0.5  # of text that is not from the hub
MIN_TOKENS = {"train": 2, "val": 1}
SplitPiece = tuple[str, bool, bool]  # a piece, and whether it is drawn for validation
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PrepareConfig(Settings):
    dataset: list[str] = flag(["fineweb-edu"], DATASETS)
    out_dir: str = flag("", "folder of the shards (default: data/ and the name of the dataset)")
    max_tokens: int | None = flag(
        None, "tokens to write; of ready-made shards, training tokens to download (default: all)"
    )
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(
        None,
        "tokens for validation: of your own files about this many, at most half, drawn from all of "
        "them; of other text the first (default: 5%, at most 10,485,760)",
    )
    text_field: str = flag("text", "column or key of the text in .parquet and .jsonl")
    skip_bad_files: bool = flag(False, "leave out files that are not UTF-8 instead of stopping")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset:
            raise ValueError("dataset is empty, expected a name, a file, a folder or a glob")


def main(config: PrepareConfig) -> None:
    name = re.sub(r"[^\w-]+", "", Path(config.dataset[0]).name.split(".")[0]) or "text"
    out_dir = Path(config.out_dir or f"data/{name}")
    if config.dataset[0] in HUB_SHARDS:
        with lock_folder(out_dir):
            download_shards(config.dataset[0], out_dir, config.max_tokens)
    else:
        source = open_source(config.dataset, config.text_field, config.skip_bad_files)
        with lock_folder(out_dir):
            prepare(source, out_dir, config)


def split_pieces(
    source: Source, options: dict, skip: int, problems: Counter
) -> Iterator[SplitPiece]:
    """The pieces of `source` from piece `skip` on. Without a val_fraction in the options none is
    drawn for validation, which then is the leading tokens.
    """
    if "val_fraction" not in options:
        return ((*piece, False) for piece in source.pieces(skip, problems))
    drawn = draw_validation(
        source.pieces(0, problems), options["val_fraction"], source.n_bytes or 0
    )
    return islice(drawn, skip, None)


def tokenize_pieces(encoder: BatchEncoder, pieces: list[SplitPiece]) -> TokenizedPieces:
    """The tokens of each piece, after <|endoftext|> where a document starts. A blank document has
    none; a lone surrogate becomes U+FFFD.
    """
    texts, counts = [], []
    for text, starts, _ in pieces:
        valid = replace_surrogates(text)
        texts.append("" if starts and not text.strip() else valid)
        counts.append((starts, not texts[-1], valid != text))
    tokens, lengths = encoder.encode(texts)
    starts, is_empty, _ = np.array(counts).T
    has_separator = starts & ~is_empty
    begins = np.cumsum(lengths) - lengths
    tokens = np.insert(tokens, begins[has_separator], END_OF_TEXT_ID)
    is_val = np.array([piece[2] for piece in pieces])
    return TokenizedPieces(tokens, np.cumsum(lengths + has_separator), np.array(counts), is_val)


def replace_surrogates(text: str) -> str:
    try:
        text.encode()  # faster than a regular expression
    except UnicodeEncodeError:
        return SURROGATES.sub("\ufffd", text)
    return text


def batch_pieces(pieces: Iterable[SplitPiece]) -> Iterator[list[SplitPiece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(pieces: Iterator[SplitPiece]) -> Iterator[TokenizedPieces]:
    """The pieces in batches with their tokens. The next batch is read while one is encoded."""
    encode = partial(tokenize_pieces, BatchEncoder())
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future] = deque()
        for batch in batch_pieces(pieces):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 1:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def prepare(source: Source, out_dir: Path, config: PrepareConfig) -> None:
    """Write the shards of `source`, after the intact ones of an earlier call."""
    manifest = start_manifest(source, out_dir, config)
    if manifest["complete"]:
        print(f"{out_dir} is complete: {summarize_manifest(manifest)}")
        return
    writer = ShardWriter(out_dir, manifest, config.max_tokens or MAX_TOKENS)
    shards, first, start = manifest["shards"], writer.total, time.perf_counter()
    problems: Counter = Counter()
    expected = config.max_tokens or (source.n_bytes and int(source.n_bytes / BYTES_PER_TOKEN))
    with tqdm(
        desc=str(out_dir), initial=first, total=expected, unit=" tok", unit_scale=True, disable=None
    ) as bar:
        options, skip = manifest["options"], writer.cursor.pieces
        for pieces in tokenize(split_pieces(source, options, skip, problems)):
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
    writer.finish_shards()
    finish_manifest(manifest, out_dir, writer.cursor, problems)


def choose_options(source: Source, config: PrepareConfig, old: dict) -> dict:
    """What the content of the shards depends on. A folder whose `old` options are from before
    validation was drawn keeps its leading tokens.
    """
    settings = {key: getattr(config, key) for key in ("text_field", "max_tokens", "shard_size")}
    settings = {"source": source.identity, **settings}
    limit = config.max_tokens or MAX_TOKENS
    expected = None if source.n_bytes is None else max(1, source.n_bytes / BYTES_PER_TOKEN)
    if limit < (fewest := sum(MIN_TOKENS.values())):
        raise ValueError(f"max_tokens is {limit}, expected at least {fewest}")
    if source.is_ordered and expected and "val_tokens" not in old:
        expected = min(expected, limit)
        wanted = config.val_tokens or min(HUB_VAL_TOKENS, expected * VAL_FRACTION)
        return {**settings, "val_fraction": min(MAX_VAL_FRACTION, wanted / expected)}
    val_tokens = config.val_tokens or (old.get("val_tokens") if source.is_ordered else None)
    if val_tokens is None:
        val_tokens = min(HUB_VAL_TOKENS, max(1, int((expected or MAX_TOKENS) * VAL_FRACTION)))
    if limit < val_tokens + 2:
        raise ValueError(
            f"max_tokens is {limit}, expected val_tokens + 2 = {val_tokens + 2} or more"
        )
    return {**settings, "val_tokens": val_tokens}


def start_manifest(source: Source, out_dir: Path, config: PrepareConfig) -> dict:
    """The manifest to continue: the intact shards of an earlier call with the same options."""
    earlier = read_manifest(out_dir)
    old = earlier.get("options", {})
    options = choose_options(source, config, old)
    changed = [key for key in options if old.get(key) != options[key]]
    # With one split the earlier call stopped or failed before it made anything of use.
    if changed and {shard["split"] for shard in earlier["shards"]} == {"train", "val"}:
        before, now = ({key: values.get(key) for key in changed} for values in (old, options))
        raise ValueError(
            f"{out_dir} holds shards made with another {' and '.join(changed)}: {before} before, "
            f"{now} now; choose another --out_dir, or delete the folder"
        )

    def is_intact(shard: dict) -> bool:
        file = out_dir / shard["name"]
        return file.exists() and sha256_file(file) == shard["sha256"]

    shards = list(takewhile(is_intact, earlier["shards"] if old == options else []))
    # Shards with one cursor were finished together, so none is of use without the others.
    lost = [shard["cursor"] for shard in earlier["shards"][len(shards) :]]
    shards = [shard for shard in shards if shard["cursor"] not in lost]
    if shards and len(shards) == len(earlier["shards"]) and earlier["complete"]:
        return earlier
    if shards:
        print(f"{out_dir}: resuming after {shards[-1]['name']}")
    manifest = {"name": out_dir.name, "dataset": source.name, "tokenizer": "gpt2"}
    return {**manifest, "complete": False, "options": options, "shards": shards}


def finish_manifest(manifest: dict, out_dir: Path, cursor: Cursor, problems: Counter) -> None:
    tokens = {split: count_tokens(manifest, split) for split in ("val", "train")}
    for split, remedy in (("train", "lower"), ("val", "raise")):
        if tokens[split] < MIN_TOKENS[split]:
            raise ValueError(
                f"of the {sum(tokens.values())} tokens in {cursor.documents} documents "
                f"{tokens[split]} are for {split}, expected at least {MIN_TOKENS[split]}; {remedy} "
                f"--val_tokens, or add text ({problems['bad rows']} rows had none under "
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
        "bad files left out": problems["bad files"],
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
        with reporting_hub_errors(f"{name} of {repo}", HUB_REMEDY):
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
