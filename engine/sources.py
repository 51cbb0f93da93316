"""Documents and rows: from files, from the hub, from Python itself."""

import ast
import codecs
import glob
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from engine.files import DAMAGED_GZIP, open_binary, read_lines, sha256_file, sha256_text

# Text on the hub: repository and configuration.
HUB_TEXT = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "slimpajama": ("DKYoon/SlimPajama-6B", "default"),
}
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt
PIECE_CHARS = 1 << 20  # longer documents are tokenized in pieces
MAX_PIECE_CHARS = 1 << 24  # a text without spaces is cut here
HUB_REMEDY = "The same command resumes; without a network, use --dataset stdlib or your own files"

Piece = tuple[str, bool]  # text of about PIECE_CHARS at most, and whether a document starts here


@dataclass(frozen=True)
class Source:
    """Where documents come from. `identity` changes when they do; `pieces(n, problems)` yields them
    from piece n on and counts what is wrong. Bytes that are not UTF-8 become lone surrogates.
    """

    name: str
    identity: str
    pieces: Callable[[int, Counter], Iterator[Piece]]
    n_bytes: int | None  # approximate


def open_source(dataset: list[str], text_field: str) -> Source:
    """The source for "stdlib", a key of HUB_TEXT, or files, folders and globs."""
    if len(dataset) > 1 and (known := {"stdlib", *HUB_TEXT} & set(dataset)):
        raise ValueError(f"{' and '.join(known)} cannot be combined; prepare each dataset alone")
    if dataset == ["stdlib"]:
        documents = stdlib_documents()
        return Source(
            name="stdlib",
            identity=sha256_text("\0".join(documents)),
            pieces=lambda skip, _: iter([(text, True) for text in documents[skip:]]),
            n_bytes=sum(map(len, documents)),
        )
    if dataset[0] in HUB_TEXT:
        repo, name = HUB_TEXT[dataset[0]]
        return Source(dataset[0], f"{repo} {name}", partial(stream_hub_text, repo, name), None)
    files = find_files(dataset)
    # Like "replace", whose U+FFFD may also be in valid text.
    codecs.register_error("lone_surrogate", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

    def pieces(skip: int, problems: Counter) -> Iterator[Piece]:
        read = partial(read_documents, text_field=text_field, problems=problems)
        return islice((p for f in files for p in read(f, errors="lone_surrogate")), skip, None)

    n_bytes = sum(f.stat().st_size for f in files)
    sha256 = sha256_text(" ".join(map(sha256_file, files)))
    return Source("files", f"{len(files)} files, {n_bytes} bytes, {sha256}", pieces, n_bytes)


def find_files(paths: list[str]) -> list[Path]:
    """The text files named by paths, folders (searched recursively) and globs, each sorted."""
    files = []
    for path in paths:
        if Path(path).is_file():
            inside = [Path(path)]
        elif path and Path(path).is_dir():
            inside = list(Path(path).rglob("*"))
        else:
            inside = [Path(p) for p in glob.glob(path, recursive=True)]  # noqa: PTH207 (any root)
        found = sorted(f for f in inside if f.is_file() and f.name.endswith(SUFFIXES))
        if not found:
            raise FileNotFoundError(
                f"{path} is neither a dataset (-h lists them) nor a file, folder or glob with "
                f"any of the suffixes {', '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_documents(
    file: Path, text_field: str, problems: Counter, errors: str = "replace"
) -> Iterator[Piece]:
    """The documents of a file in pieces. Bad rows and truncated files are skipped, reported and
    counted in `problems`. `errors` is the decoding error handler for bytes that are not UTF-8.
    """
    if file.suffix == ".parquet":
        documents = read_parquet(file, text_field)
    elif ".jsonl" in file.suffixes:
        documents = read_jsonl(file, text_field, problems, errors)
    else:
        with open_binary(file) as stream:
            blocks = iter(partial(stream.read1, PIECE_CHARS), b"")  # type: ignore[attr-defined]
            blocks = stop_at_damage(blocks, file, problems)
            decoded = codecs.iterdecode(blocks, "utf-8-sig", errors=errors)
            yield from cut_into_pieces(decoded, SEPARATOR)
        return
    for text in documents:
        starts = range(0, len(text), PIECE_CHARS)
        yield from cut_into_pieces(text[i : i + PIECE_CHARS] for i in starts)


def read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = parquet.schema_arrow.names
        if text_field not in columns:
            raise ValueError(
                f"{file} has no column {text_field!r}; --text_field may be {' or '.join(columns)}"
            )
        for batch in parquet.iter_batches(batch_size=1000, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                text = value or ""
                if not isinstance(text, str):
                    raise ValueError(
                        f"{file}: column {text_field!r} holds {type(text).__name__}, expected "
                        "text; choose another with --text_field"
                    )
                yield text
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or not parquet: {error}; download it again") from error


def read_jsonl(file: Path, text_field: str, problems: Counter, errors: str) -> Iterator[str]:
    for number, line in stop_at_damage(read_lines(file), file, problems):
        try:
            text = json.loads(line.decode(errors=errors).lstrip("\ufeff"))[text_field]
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} instead of a string")
        except (ValueError, KeyError, TypeError) as error:
            if not problems["bad rows"]:
                print(f"{file} line {number}: no text under {text_field!r} ({error!r}); skipped")
            problems["bad rows"] += 1
        else:
            yield text


def stop_at_damage(parts: Iterable[Any], file: Path, problems: Counter) -> Iterator[Any]:
    """The lines or blocks of a file, up to where its compression is damaged."""
    try:
        yield from parts
    except (ValueError, *DAMAGED_GZIP):
        problems["truncated files"] += 1
        print(f"{file} is truncated or damaged; only the text before the damage is used")


def cut_into_pieces(blocks: Iterable[str], separator: str | None = None) -> Iterator[Piece]:
    """Cut text into documents, and long documents where that does not change their tokens."""
    text, starts = "", True
    for block in blocks:
        text += block
        if separator:
            *documents, text = text.split(separator)
            for document in documents:
                yield document, starts
                starts = True
        while end := find_cut(text):
            yield text[:end], starts
            text, starts = text[end:], False
    if text or starts:
        yield text, starts


def find_cut(text: str) -> int:
    """Where to cut a piece off a long text, or 0 if more must be read first: before a space or
    newline after a non-space, because no token of GPT-2's pattern crosses there. The place depends
    on the text alone, not on how much of it has been read.
    """
    if len(text) <= PIECE_CHARS:
        return 0
    if cut := re.match(r"(?s).*(?<=\S)(?=[ \n])", text[: PIECE_CHARS + 1]):
        return cut.end()
    if cut := re.search(r"\S(?=[ \n])", text[PIECE_CHARS : MAX_PIECE_CHARS + 1]):
        return PIECE_CHARS + cut.end()
    return MAX_PIECE_CHARS if len(text) > MAX_PIECE_CHARS else 0


@contextmanager
def reporting_hub_errors(what: str, remedy: str = HUB_REMEDY) -> Iterator[None]:
    """Turn any failure to get `what` from the hub into a ConnectionError with the remedy."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConnectionError(
            f"the Hugging Face hub did not provide {what}: {reason}. {remedy}"
        ) from error


def load_hub_rows(
    repo: str,
    name: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    remedy: str,
) -> Any:
    """A split of a hub dataset as an iterable of dicts; ConnectionError if that fails."""
    with reporting_hub_errors(repo, remedy):
        from datasets import load_dataset

        return load_dataset(repo, name=name, split=split, streaming=streaming)


def stream_hub_text(repo: str, name: str, skip: int, _: Counter) -> Iterator[Piece]:
    """The texts of a hub dataset from row `skip` on."""
    rows = load_hub_rows(repo, name, streaming=True, remedy=HUB_REMEDY)
    with reporting_hub_errors(repo):
        for row in rows.select_columns(["text"]).skip(skip):
            yield row["text"], True


def stdlib_documents() -> list[str]:
    """Python's language reference by topic and the docstrings of its standard library. Each once,
    ordered by hash, so that any part is a random sample.
    """
    import pydoc_data.topics

    documents = set(pydoc_data.topics.topics.values())
    documents |= {docstring.strip() for _, docstring in stdlib_definitions()}
    documents.discard("")
    return sorted(documents, key=sha256_text)


def stdlib_definitions() -> Iterator[tuple[ast.AST, str]]:
    """The standard library's modules, classes and functions with their docstrings, as parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, ast.get_docstring(node) or ""
