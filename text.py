"""A file of its own because `fineweb.py` makes shards of any text: where the text comes from.

Documents come from the hub, from files, or from Python itself, as pieces of bounded size.
"""

import ast
import codecs
import glob
import gzip
import hashlib
import io
import json
import pydoc_data.topics
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet

from data import sha256_of

# Text on the hub: repository and configuration.
HUB_TEXT = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "slimpajama": ("DKYoon/SlimPajama-6B", "default"),
}
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
SEPARATOR = "<|endoftext|>"  # in a .txt it ends a document
PIECE_CHARS = 1 << 20  # longer documents are tokenised in pieces
MAX_PIECE_CHARS = 1 << 24  # a text without any space is cut here all the same

Piece = tuple[str, bool]  # a text of at most PIECE_CHARS or so, and whether a document starts here


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    name: str
    identity: str  # changes when the documents do
    pieces: Callable[[int, Counter], Iterator[Piece]]  # from piece n on, counting what is wrong
    n_bytes: int | None  # of text, about


def open_source(dataset: list[str], text_field: str) -> Source:
    if len(dataset) > 1 and (known := {"stdlib", *HUB_TEXT} & set(dataset)):
        raise ValueError(f"{' and '.join(known)} cannot go together with other text; prepare each")
    if dataset == ["stdlib"]:
        documents = stdlib_documents()
        return Source(
            "stdlib",
            sha256("\0".join(documents)),
            lambda skip, _: islice(((text, True) for text in documents), skip, None),
            sum(map(len, documents)),
        )
    if dataset[0] in HUB_TEXT:
        repo, name = HUB_TEXT[dataset[0]]
        return Source(dataset[0], f"{repo} {name}", partial(hub_pieces, repo, name), None)
    files = find_files(dataset)

    def pieces(skip: int, problems: Counter) -> Iterator[Piece]:
        return islice((p for f in files for p in read_file(f, text_field, problems)), skip, None)

    n_bytes = sum(f.stat().st_size for f in files)
    identity = f"{len(files)} files, {n_bytes} bytes, {sha256(' '.join(map(sha256_of, files)))}"
    return Source("files", identity, pieces, n_bytes)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_files(paths: list[str]) -> list[Path]:
    """The text files among paths, folders (searched to the bottom) and globs, in sorted order."""
    files = []
    for path in paths:
        if Path(path).is_file():
            if not path.endswith(SUFFIXES):
                raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
            files.append(Path(path))
            continue
        if path and Path(path).is_dir():
            inside = list(Path(path).rglob("*"))
        else:
            inside = [Path(p) for p in glob.glob(path, recursive=True)]  # noqa: PTH207 (any root)
        found = sorted(f for f in inside if f.is_file() and f.name.endswith(SUFFIXES))
        if not found:
            raise FileNotFoundError(
                f"{path} is neither a data set (-h lists them) nor a file, a folder or a glob "
                f"that holds any of {', '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_file(file: Path, text_field: str, problems: Counter) -> Iterator[Piece]:
    if file.suffix == ".parquet":
        documents = read_parquet(file, text_field)
    elif ".jsonl" in file.suffixes:
        documents = read_jsonl(file, text_field, problems)
    else:  # one document, or several with <|endoftext|> between them
        with open_binary(file) as stream:
            blocks = until_truncation(iter(partial(stream.read1, PIECE_CHARS), b""), file, problems)
            decoded = codecs.iterdecode(blocks, "utf-8-sig", errors="replace")
            yield from in_pieces(decoded, SEPARATOR)
        return
    for text in documents:
        yield from in_pieces(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def open_binary(file: Path) -> io.BufferedIOBase:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} is damaged or no parquet file: {error}") from error
    if text_field not in parquet.schema_arrow.names:
        raise ValueError(
            f"{file} has no column {text_field!r}; --text_field may be one of "
            f"{', '.join(parquet.schema_arrow.names)}"
        )
    batches = parquet.iter_batches(batch_size=1000, columns=[text_field])
    while True:
        try:
            batch = next(batches, None)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file} is damaged: {error}; get it again") from error
        if batch is None:
            return
        for value in batch.column(0):
            text = value.as_py() or ""
            if not isinstance(text, str):
                raise ValueError(
                    f"{file}: {text_field!r} holds {type(text).__name__}, no text; name another "
                    "column with --text_field"
                )
            yield text


def read_jsonl(file: Path, text_field: str, problems: Counter) -> Iterator[str]:
    with open_binary(file) as stream:
        for number, line in enumerate(until_truncation(stream, file, problems), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode(errors="replace").lstrip("\ufeff"))[text_field]
                if not isinstance(text, str):
                    raise TypeError(f"{type(text).__name__} instead of a string")
            except (ValueError, KeyError, TypeError) as error:
                if not problems["bad rows"]:
                    print(
                        f"{file} line {number}: no text under {text_field!r} ({error!r}); skipped"
                    )
                problems["bad rows"] += 1
            else:
                yield text


def until_truncation(blocks: Iterable[bytes], file: Path, problems: Counter) -> Iterator[bytes]:
    try:
        yield from blocks
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problems["truncated files"] += 1
        print(f"{file} is truncated or damaged ({error}); going on with what came before")


def in_pieces(blocks: Iterable[str], separator: str | None = None) -> Iterator[Piece]:
    """Documents from blocks of text, the long ones in pieces whose tokens add up to the whole's."""
    text, starts = "", True
    for block in blocks:
        text += block
        if separator:
            *documents, text = text.split(separator)
            for document in documents:
                yield document, starts
                starts = True
        while end := cut_position(text):
            yield text[:end], starts
            text, starts = text[end:], False
    if text or starts:
        yield text, starts


def cut_position(text: str) -> int:
    """Where to cut a piece off a long text so that its tokens stay as they are, or 0 for not yet:
    before a space or newline that follows something else, since no token of GPT-2's pattern goes
    on into white space. It depends on the text alone, not on how much of it has been read.
    """
    if len(text) <= PIECE_CHARS:
        return 0
    if cut := re.match(r"(?s).*(?<=\S)(?=[ \n])", text[: PIECE_CHARS + 1]):
        return cut.end()
    if cut := re.search(r"\S(?=[ \n])", text[PIECE_CHARS : MAX_PIECE_CHARS + 1]):
        return PIECE_CHARS + cut.end()
    return MAX_PIECE_CHARS if len(text) > MAX_PIECE_CHARS else 0


def hub_pieces(repo: str, name: str, skip: int, _: Counter) -> Iterator[Piece]:
    """The rows of a hub data set from row `skip` on, as they stream in."""
    from datasets import load_dataset  # takes a second to import and is needed only here

    try:
        rows = load_dataset(repo, name=name, split="train", streaming=True)
        for row in rows.select_columns(["text"]).skip(skip):
            yield row["text"], True
    except OSError as error:
        raise ConnectionError(
            f"the Hugging Face hub does not give {repo}: {error}. The same command goes on after "
            "the last complete shard; without a network, use --dataset stdlib or your own files"
        ) from error


def stdlib_documents() -> list[str]:
    """The English that every CPython carries: its language reference by topic and the docstrings
    of the standard library, each once, in the order of their hashes, so that any part is a fair
    sample.
    """
    documents = set(pydoc_data.topics.topics.values())
    documents |= {docstring.strip() for _, docstring in stdlib_definitions()}
    documents.discard("")
    return sorted(documents, key=sha256)


def stdlib_definitions() -> Iterator[tuple[ast.AST, str]]:
    """Modules, classes and functions of the standard library with their docstrings, read from the
    sources; nothing is imported.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, ast.get_docstring(node) or ""
