"""Tokenize text from the Hugging Face Hub, your own files or the Python documentation into shards.
Use the GPT-2 tokenizer, another one, or train one on the text.
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
    SUFFIXES,
    Piece,
    Source,
    TextFormat,
    open_source,
)
from engine.files import lock_folder, sha256_file
from engine.hub import reporting_hub_errors
from engine.rows import list_suffixes
from engine.shards import (
    ShardWriter,
    load_data_tokenizer,
    open_shard,
    read_manifest,
    write_manifest,
)
from engine.tokenizer import GPT2, BatchEncoder, Tokenizer, find_tokenizer

# Shards of 100M tokens on the hub, from modded-nanogpt (data/cached_*.py): repository, prefix of
# the file names, number of training shards. Each repository also has one validation shard.
HUB_SHARDS = {
    "fineweb10B-gpt2": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B-gpt2": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B-gpt2": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
DATASET_HELP = (
    f"{', '.join(HUB_TEXT)}; stdlib (the Python documentation); files, folders and globs of "
    f"{list_suffixes(SUFFIXES)}; or ready-made shards (only --max_tokens and --out_dir apply): "
    f"{', '.join(HUB_SHARDS)}"
)
BATCH_CHARS = 1 << 22  # characters encoded at once
MAX_IDS = 1 << 16  # shards hold uint16
# To train a tokenizer, we read text until there are TRAINING_BYTES of text or WORD_BYTES of
# distinct words. Training takes about 90 times as much memory as the distinct words.
TRAINING_BYTES, WORD_BYTES = 1_000_000_000, 60_000_000
MIN_TOKENS = 2  # in a split: one to predict, one to predict it from
TokenizedPiece = tuple[Piece, np.ndarray]


@dataclass(frozen=True)
class PrepareConfig(Settings):
    dataset: list[str] = flag(["fineweb-edu"], DATASET_HELP)
    tokenizer: str = flag(GPT2, "folder of a tokenizer, model or dataset, or a hub name")
    train_tokenizer: int | None = flag(
        None, "train a BPE tokenizer of N tokens on the text", at_least=257, at_most=MAX_IDS
    )
    out_dir: str = flag("", "folder for the shards (default: data/ and the dataset's name)")
    max_tokens: int | None = flag(
        None, "tokens to write; for ready-made shards, training tokens (default: all)", at_least=4
    )
    shard_size: int = flag(100_000_000, "tokens in a shard")
    val_tokens: int | None = flag(
        None,
        "validation tokens (default: 10,485,760 for hub datasets, else 5% of the text, but at most "
        "10,485,760). For your own files this is approximate, and at most half the text",
        at_least=2,
    )
    text_field: str = flag("text", "key or column of the text in rows")
    encoding: str = flag("utf-8", "encoding of files without a byte order mark, such as latin-1")
    decode_errors: Literal["strict", "replace"] = flag(
        "strict", "undecodable bytes are an error (strict) or become U+FFFD (replace)"
    )
    skip_bad_files: bool = flag(False, "leave out files that cannot be decoded")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise ValueError(f"{error}; expected a Python encoding, such as latin-1") from error
        names = ("tokenizer", "train_tokenizer")
        chosen = [name for name in names if getattr(self, name) not in (GPT2, None)]
        if len(chosen) > 1:
            raise ValueError("give tokenizer or train_tokenizer, not both")
        if chosen and self.dataset[0] in HUB_SHARDS:
            raise ValueError(f"{self.dataset[0]} is ready-made; omit {chosen[0]}")


def main(config: PrepareConfig) -> None:
    name = re.sub(r"[^\w-]+", "", Path(config.dataset[0]).name.split(".")[0]) or "text"
    out_dir = Path(config.out_dir or f"data/{name}")
    if config.dataset[0] in HUB_SHARDS:
        with lock_folder(out_dir):
            download_shards(config.dataset[0], out_dir, config.max_tokens)
        return
    text_format = TextFormat(**{name: getattr(config, name) for name in TextFormat._fields})
    source = open_source(config.dataset, text_format, config.val_tokens, config.max_tokens)
    tokenizer = None if config.train_tokenizer else open_tokenizer(config.tokenizer)
    with lock_folder(out_dir):
        manifest = open_manifest(source, out_dir, collect_options(source, config, tokenizer))
        if manifest["complete"]:
            print(f"{out_dir} is complete: {summarize_manifest(manifest)}")
            return
        if config.train_tokenizer and not manifest["shards"]:
            tokenizer = train_tokenizer(source, config.train_tokenizer, out_dir.name)
        # If we resume a run that trained a tokenizer, load the one that it saved in out_dir.
        prepare(source, tokenizer or load_data_tokenizer(out_dir), out_dir, manifest)


def open_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by folder or hub name. Raises ValueError if it has too many ids for uint16,
    or if the folder has no tokenizer.
    """
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ValueError(f"no tokenizer files in {name}; pass a folder or model that has some")
    if tokenizer.vocab_size > MAX_IDS:
        raise ValueError(f"tokenizer {tokenizer} is too large, expected at most {MAX_IDS:,} tokens")
    return tokenizer


def train_tokenizer(source: Source, vocab_size: int, name: str) -> Tokenizer:
    """Train a tokenizer on the text of a source. Leaves out the validation sections of your own
    files. For other sources, validation text is included.
    """

    def read() -> Iterator[list[str]]:
        n_bytes, words = 0, set[bytes]()
        batches = batch_pieces(source.pieces(0, None))
        for batch in tqdm(batches, "text for the tokenizer", unit=" batches", disable=None):
            texts = [piece.text for piece in batch if not piece.is_val]
            yield texts
            encoded = [text.encode() for text in texts]
            n_bytes += sum(map(len, encoded))
            words.update(*map(bytes.split, encoded))
            if n_bytes >= TRAINING_BYTES or sum(map(len, words)) >= WORD_BYTES:
                return

    tokenizer = Tokenizer.train(read(), vocab_size, name)
    if tokenizer.vocab_size < vocab_size:
        print(f"the text is too short for {vocab_size:,} tokens; got {tokenizer.vocab_size:,}")
    return tokenizer


def collect_options(source: Source, config: PrepareConfig, tokenizer: Tokenizer | None) -> dict:
    """Return the options in the manifest: everything that determines the content of the shards.
    `tokenizer` is None if one will be trained. Raises ValueError if max_tokens leaves nothing for
    training.
    """
    keys = ("text_field", "max_tokens", "shard_size")
    options = {"source": source.identity, **{key: getattr(config, key) for key in keys}}
    # Omit these options if they have their defaults, so that manifests of versions without them
    # still match.
    if (encoding := codecs.lookup(config.encoding).name) != "utf-8":
        options["encoding"] = encoding
    if config.decode_errors != "strict":
        options["decode_errors"] = config.decode_errors
    if tokenizer is None:
        options["train_tokenizer"] = config.train_tokenizer
    elif not tokenizer.is_gpt2:
        options["tokenizer"] = tokenizer.sha256
    needed = (source.split_options["val_tokens"] or 0) + MIN_TOKENS
    has_sections = "section_chars" in source.split_options
    if config.max_tokens and config.max_tokens < needed and not has_sections:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, expected at least {needed}, {MIN_TOKENS} of them "
            "for training; raise it, or lower --val_tokens"
        )
    return options | source.split_options


def open_manifest(source: Source, out_dir: Path, options: dict) -> dict:
    """Return the manifest in the folder if it is complete. Otherwise return an incomplete one, with
    the intact shards of an interrupted run, if there are any. Raises ValueError if the folder holds
    shards made with other options.
    """
    earlier = read_manifest(out_dir)
    shards, old = earlier["shards"], earlier.get("options", {})
    changed = {key for key in {**options, **old} if old.get(key) != options.get(key)}
    # Older versions chose the validation text in other ways. Accept their complete shards.
    is_older = "section_chars" in options and "section_chars" not in old
    ignored = {"val_tokens", "val_fraction", "section_chars"} if is_older else set()
    intact = find_intact_shards(out_dir, shards) if changed <= ignored else []
    if shards and earlier["complete"] and intact == shards and changed <= ignored:
        return earlier
    # If the folder has shards of one split only, the earlier run had barely begun. In that case,
    # start over instead of raising an error.
    if changed and {shard["split"] for shard in shards} == {"train", "val"}:
        changes = [f"{k} was {old.get(k)}, now {options.get(k)}" for k in sorted(changed)]
        raise ValueError(
            f"{out_dir} holds shards made with other options: {', '.join(changes)}; choose another "
            "--out_dir, or delete the folder"
        )
    shards = [] if changed else intact
    if shards:
        print(f"{out_dir}: resuming after {shards[-1]['name']}")
    tokenizer = earlier.get("tokenizer", GPT2) if shards else GPT2
    manifest = {"name": out_dir.name, "dataset": source.name, "tokenizer": tokenizer}
    return {**manifest, "complete": False, "options": options, "shards": shards}


def find_intact_shards(out_dir: Path, shards: list[dict]) -> list[dict]:
    """Return the shards that were finished before any missing or damaged one."""
    files = {out_dir / shard["name"]: shard for shard in shards}
    damaged = [s for f, s in files.items() if not f.exists() or sha256_file(f) != s["sha256"]]
    # Shards with the same cursor were finished together. We can resume only after all of them.
    # Downloaded shards have no cursor, so all are lost if one is.
    damaged_cursors = [shard.get("cursor") for shard in damaged]
    return list(takewhile(lambda shard: shard.get("cursor") not in damaged_cursors, shards))


def prepare(source: Source, tokenizer: Tokenizer, out_dir: Path, manifest: dict) -> None:
    """Write the shards that are not in the manifest yet, and complete the manifest."""
    if not tokenizer.is_gpt2:
        tokenizer.save(out_dir)
        record = {"name": tokenizer.name, "file": "tokenizer.json", "sha256": tokenizer.sha256}
        manifest["tokenizer"] = record | {"end_of_text": tokenizer.end_of_text}
    writer, problems = ShardWriter(out_dir, manifest), Counter[str]()
    expected = manifest["options"]["max_tokens"] or int((source.n_bytes or 0) / BYTES_PER_TOKEN)
    shards, n_earlier, started = manifest["shards"], writer.total, time.perf_counter()
    bar_options = {"initial": n_earlier, "total": expected or None, "unit": " tok"}
    with tqdm(desc=str(out_dir), unit_scale=True, disable=None, **bar_options) as bar:
        for batch in tokenize(source.pieces(writer.cursor["pieces"], problems), tokenizer):
            n_shards = len(shards)
            for piece, tokens in batch:
                problems["special tokens"] += len(tokenizer.special_pattern.findall(piece.text))
                writer.add(tokens, piece.starts_document, piece.is_val)
            bar.update(writer.total - bar.n)
            if len(shards) > n_shards:  # the writer lists a finished shard in the manifest
                speed = (writer.total - n_earlier) / (time.perf_counter() - started)
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
    """Yield the pieces with their tokens, in batches. Encodes a batch while reading the next."""
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
    """Pair each piece with its tokens as uint16. If `is_separated`, the first one is the
    end-of-text token. Blank pieces have no tokens.
    """
    texts = ["" if piece.text.isspace() else piece.text for piece in pieces]
    tokens, lengths = encoder.encode(texts)  # the tokens of all pieces in one array
    has_separator = np.array([piece.is_separated for piece in pieces]) & (lengths > 0)
    starts = np.cumsum(lengths) - lengths
    end_of_text = encoder.tokenizer.end_of_text
    tokens = np.insert(tokens.astype(np.uint16), starts[has_separator], end_of_text)
    ends = np.cumsum(lengths + has_separator).tolist()
    parts = [tokens[start:end] for start, end in pairwise([0, *ends])]
    return list(zip(pieces, parts, strict=True))


def finish_manifest(manifest: dict, out_dir: Path, cursor: dict, problems: Counter) -> None:
    """Mark the manifest as complete and print a summary. Raises ValueError for tiny splits."""
    counts = dict.fromkeys(("val", "train"), 0)
    for shard in manifest["shards"]:
        counts[shard["split"]] += shard["tokens"]
    if min(counts.values()) < MIN_TOKENS:
        raise ValueError(
            f"the text gives {counts['val']} tokens for validation and {counts['train']} for "
            f"training, expected at least {MIN_TOKENS}; lower --val_tokens, raise --max_tokens, or "
            "add text"
        )
    manifest["complete"] = True
    kinds = ("replaced characters", "bad rows", "truncated files", "bad files left out")
    manifest["summary"] = {
        "documents": cursor["documents"],
        **{f"{split} tokens": n for split, n in counts.items()},
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
        raise ValueError(f"{out_dir} holds shards of another dataset; choose another --out_dir")
    manifest = {"name": out_dir.name, "dataset": dataset, "tokenizer": GPT2, "complete": False}
    # Earlier shards stay listed. hf_hub_download does not download existing files again.
    shards: dict[str, dict] = {shard["name"]: shard for shard in earlier["shards"]}
    names = [("val", f"{prefix}_val_000000.bin")]
    names += [("train", f"{prefix}_train_{i:06d}.bin") for i in range(1, n_train + 1)]
    n_train_tokens = 0
    for split, name in tqdm(names, desc=str(out_dir), unit=" shards", disable=None):
        with reporting_hub_errors(f"{name} of {repo}", HUB_REMEDY):
            file = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=out_dir))
        n_tokens, sha256 = len(open_shard(file)), sha256_file(file)
        shards[name] = {"name": name, "tokens": n_tokens, "sha256": sha256, "split": split}
        write_manifest(out_dir, {**manifest, "shards": list(shards.values())})
        n_train_tokens += n_tokens if split == "train" else 0
        if max_tokens is not None and n_train_tokens >= max_tokens:
            break
    write_manifest(out_dir, {**manifest, "complete": True, "shards": list(shards.values())})
    print(f"{out_dir}: {n_train_tokens:,} tokens for training, and a validation shard")


if __name__ == "__main__":
    run_command(main, PrepareConfig, __doc__)
