"""Tokenize text into shards: from the hub, from files, or Python's own documentation. The tokenizer
is GPT-2's, another, or one trained on the text.
"""

import codecs
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from engine.config import Settings, flag, run_command
from engine.documents import (
    BYTES_PER_TOKEN,
    HUB_REMEDY,
    HUB_TEXT,
    PROBLEMS,
    SUFFIXES,
    Piece,
    Source,
    TextFormat,
    open_source,
)
from engine.files import lock_folder, sha256_file
from engine.hub import reporting_hub_errors
from engine.shards import (
    ShardWriter,
    count_tokens,
    load_data_tokenizer,
    open_shard,
    read_manifest,
    write_manifest,
)
from engine.tokenizer import GPT2, BatchEncoder, Tokenizer, find_tokenizer

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
BATCH_CHARS = 1 << 22  # encoded at once
MAX_IDS = 1 << 16  # of uint16, which shards hold
# A tokenizer is trained until its text reaches TRAINING_BYTES, or its distinct words WORD_BYTES:
# training takes about 90 times the latter in memory.
TRAINING_BYTES, WORD_BYTES = 1_000_000_000, 60_000_000
MIN_TOKENS = 2  # of a split: one to predict from another
TokenizedPiece = tuple[Piece, np.ndarray]


@dataclass(frozen=True)
class PrepareConfig(Settings):
    dataset: list[str] = flag(["fineweb-edu"], DATASETS)
    tokenizer: str = flag(GPT2, "folder of a tokenizer, a model or prepared data, or a hub name")
    train_tokenizer: int | None = flag(
        None, "train one on the text, a BPE of N tokens, and use it", at_least=257, at_most=MAX_IDS
    )
    out_dir: str = flag("", "folder of the shards (default: data/ and the name of the dataset)")
    max_tokens: int | None = flag(
        None, "tokens to write; of ready-made shards, training tokens (default: all)", at_least=4
    )
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(
        None,
        "validation tokens (default: 10,485,760 from the hub, else 5%, at most that); of your own "
        "files about this many, at most half",
        at_least=2,
    )
    text_field: str = flag("text", "column or key of the text in .parquet and .jsonl")
    encoding: str = flag("utf-8", "encoding of files without a byte order mark: latin-1, gbk")
    decode_errors: Literal["strict", "replace"] = flag(
        "strict", "undecodable bytes are an error (strict), or become U+FFFD (replace)"
    )
    skip_bad_files: bool = flag(False, "leave out files that cannot be decoded")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise ValueError(f"{error}; expected a Python encoding, such as latin-1") from error
        given = (self.tokenizer != GPT2) + bool(self.train_tokenizer)
        if given > (self.dataset[0] not in HUB_SHARDS):
            raise ValueError(
                "give tokenizer or train_tokenizer, not both; ready-made shards take neither"
            )


def main(config: PrepareConfig) -> None:
    name = re.sub(r"[^\w-]+", "", Path(config.dataset[0]).name.split(".")[0]) or "text"
    out_dir = Path(config.out_dir or f"data/{name}")
    if config.dataset[0] in HUB_SHARDS:
        with lock_folder(out_dir):
            download_shards(config.dataset[0], out_dir, config.max_tokens)
        return
    text_format = TextFormat(
        config.text_field, config.encoding, config.decode_errors, config.skip_bad_files
    )
    source = open_source(config.dataset, text_format, config.val_tokens, config.max_tokens)
    tokenizer = None if config.train_tokenizer else find_tokenizer(config.tokenizer)
    if not config.train_tokenizer and (not tokenizer or tokenizer.vocab_size > MAX_IDS):
        found = tokenizer or f"no tokenizer.json in {config.tokenizer}"
        raise ValueError(f"tokenizer: {found}, expected one of at most {MAX_IDS:,} tokens")
    with lock_folder(out_dir):
        manifest = open_manifest(source, out_dir, choose_options(source, config, tokenizer))
        if manifest["complete"]:
            print(f"{out_dir} is complete: {summarize_manifest(manifest)}")
            return
        if config.train_tokenizer and not manifest["shards"]:
            tokenizer = train_tokenizer(source, config.train_tokenizer, out_dir.name)
        prepare(source, tokenizer or load_data_tokenizer(out_dir), out_dir, manifest)


def train_tokenizer(source: Source, vocab_size: int, name: str) -> Tokenizer:
    """Train a tokenizer on the text, without the held-out part of your own files."""

    def read() -> Iterator[list[str]]:
        n_bytes, words = 0, set[bytes]()
        batches = batch_pieces(source.pieces(0, Counter(PROBLEMS)))
        for batch in tqdm(batches, "text for the tokenizer", unit=" batches", disable=None):
            texts = [piece.text.encode() for piece in batch if not piece.is_val]
            yield [text.decode() for text in texts]
            n_bytes += sum(map(len, texts))
            words.update(*map(bytes.split, texts))
            if n_bytes >= TRAINING_BYTES or sum(map(len, words)) >= WORD_BYTES:
                return

    tokenizer = Tokenizer.train(read(), vocab_size, name)
    if tokenizer.vocab_size < vocab_size:
        print(f"too little text for {vocab_size:,} tokens; it has {tokenizer.vocab_size:,}")
    return tokenizer


def open_manifest(source: Source, out_dir: Path, options: dict) -> dict:
    """The manifest to continue: the intact shards of an earlier call with the same options."""
    earlier = read_manifest(out_dir)
    old, shards = earlier.get("options", {}), earlier["shards"]
    changed = {key for key in {**options, **old} if old.get(key) != options.get(key)}
    files = {out_dir / shard["name"]: shard for shard in shards}
    damaged = [s for f, s in files.items() if not f.exists() or sha256_file(f) != s["sha256"]]
    if shards and earlier["complete"] and not damaged:
        # Earlier versions cut and split files in other ways. Their folders stay as they are.
        is_earlier = "section_chars" in options and "section_chars" not in old
        if not changed - ({"val_tokens", "val_fraction", "section_chars"} if is_earlier else set()):
            return earlier
    # With one split the earlier call stopped or failed before it made anything of use.
    if changed and {shard["split"] for shard in shards} == {"train", "val"}:
        before, now = ({k: values.get(k) for k in sorted(changed)} for values in (old, options))
        raise ValueError(
            f"{out_dir} holds shards made with another {' and '.join(now)}: {before} before, "
            f"{now} now; choose another --out_dir, or delete the folder"
        )
    # Shards with one cursor were finished together, so none is of use without the others.
    lost = [shard["cursor"] for shard in damaged]
    shards = [] if changed else list(takewhile(lambda s: s["cursor"] not in lost, shards))
    if shards:
        print(f"{out_dir}: resuming after {shards[-1]['name']}")
    tokenizer = earlier.get("tokenizer", GPT2) if shards else GPT2
    manifest = {"name": out_dir.name, "dataset": source.name, "tokenizer": tokenizer}
    return {**manifest, "complete": False, "options": options, "shards": shards}


def choose_options(source: Source, config: PrepareConfig, tokenizer: Tokenizer | None) -> dict:
    """What the content of the shards depends on. No `tokenizer` means that one is trained."""
    keys = ("text_field", "max_tokens", "shard_size")
    options = {"source": source.identity, **{key: getattr(config, key) for key in keys}}
    if (encoding := codecs.lookup(config.encoding).name) != "utf-8":
        options["encoding"] = encoding
    if config.decode_errors != "strict":
        options["decode_errors"] = config.decode_errors
    if tokenizer is None:
        options["train_tokenizer"] = config.train_tokenizer
    elif not tokenizer.is_gpt2:
        options["tokenizer"] = tokenizer.sha256
    fewest = (source.split["val_tokens"] or 0) + MIN_TOKENS
    if config.max_tokens and config.max_tokens < fewest and "section_chars" not in source.split:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, expected at least {fewest}, {MIN_TOKENS} of them "
            "for training; raise it, or lower --val_tokens"
        )
    return options | source.split


def prepare(source: Source, tokenizer: Tokenizer, out_dir: Path, manifest: dict) -> None:
    """Write the shards of `source` that the manifest lacks."""
    if not tokenizer.is_gpt2:
        tokenizer.save(out_dir)
        record = {"name": tokenizer.name, "file": "tokenizer.json", "sha256": tokenizer.sha256}
        manifest["tokenizer"] = record | {"end_of_text": tokenizer.end_of_text}
    writer, problems = ShardWriter(out_dir, manifest), Counter[str]()
    expected = manifest["options"]["max_tokens"] or int((source.n_bytes or 0) / BYTES_PER_TOKEN)
    shards, first, start = manifest["shards"], writer.total, time.perf_counter()
    sizes = {"initial": first, "total": expected or None, "unit": " tok", "unit_scale": True}
    with tqdm(desc=str(out_dir), disable=None, **sizes) as bar:
        for batch in tokenize(source.pieces(writer.cursor["pieces"], problems), tokenizer):
            n_shards = len(shards)
            for piece, tokens in batch:
                problems["special tokens"] += len(tokenizer.special_pattern.findall(piece.text))
                writer.add(tokens, piece.starts, piece.is_val)
            bar.update(writer.total - bar.n)
            if len(shards) > n_shards:
                speed = (writer.total - first) / (time.perf_counter() - start)
                minutes = max(0, expected - writer.total) / speed / 60
                left = f", about {minutes:.0f} min left" if expected else ""
                bar.write(f"{shards[-1]['name']}: {speed:,.0f} tokens/s{left}")
            if writer.is_full:
                break
    writer.finish_shards()
    if n := problems["special tokens"]:
        print(f"{out_dir}: {n:,} special tokens in the documents were encoded as ordinary text")
    finish_manifest(manifest, out_dir, writer.cursor, problems)


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[list[TokenizedPiece]]:
    """The pieces in batches with their tokens. The next batch is read while one is encoded."""
    encoder, future = BatchEncoder(tokenizer), None
    with ThreadPoolExecutor(1) as pool:
        for batch in batch_pieces(pieces):
            previous, future = future, pool.submit(tokenize_pieces, encoder, batch)
            if previous:
                yield previous.result()
        if future:
            yield future.result()


def batch_pieces(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_pieces(encoder: BatchEncoder, pieces: list[Piece]) -> list[TokenizedPiece]:
    """The pieces, each with its tokens as uint16, after the end of text if it is separated. A blank
    document has none.
    """
    texts = ["" if piece.text.isspace() else piece.text for piece in pieces]
    tokens, lengths = encoder.encode(texts)
    has_separator = np.array([piece.is_separated for piece in pieces]) & (lengths > 0)
    begins = np.cumsum(lengths) - lengths
    end_of_text = encoder.tokenizer.end_of_text
    tokens = np.insert(tokens.astype(np.uint16), begins[has_separator], end_of_text)
    ends = np.cumsum(lengths + has_separator).tolist()
    parts = [tokens[start:end] for start, end in pairwise([0, *ends])]
    return list(zip(pieces, parts, strict=True))


def finish_manifest(manifest: dict, out_dir: Path, cursor: dict, problems: Counter) -> None:
    tokens = {split: count_tokens(manifest, split) for split in ("val", "train")}
    if min(tokens.values()) < MIN_TOKENS:
        raise ValueError(
            f"the text gives {tokens['val']} tokens for validation and {tokens['train']} for "
            f"training, expected at least {MIN_TOKENS}; lower --val_tokens, raise --max_tokens, or "
            "add text"
        )
    manifest["complete"] = True
    kinds = ("replaced characters", "bad rows", "truncated files", "bad files left out")
    manifest["summary"] = {
        "documents": cursor["documents"],
        **{f"{split} tokens": n for split, n in tokens.items()},
        "empty documents": cursor["empty"],
        **{kind: problems[kind] for kind in kinds},
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
    manifest = {"name": out_dir.name, "dataset": dataset, "tokenizer": GPT2, "complete": False}
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
