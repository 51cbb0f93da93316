"""Documents of text files: find the files, check their encoding, and read them in pieces."""

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import parse
from engine.files import DAMAGED_GZIP, open_binary, read_lines

SUFFIXES = (".txt", ".txt.gz", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
SEPARATOR = "<|endoftext|>"  # between the documents of a text file
# Encodings that a file's first bytes tell. UTF-32 comes first, as its mark begins with UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHECKED_BYTES = 1 << 24  # of each file, to see whether it is UTF-8
MAX_UNDECODABLE, MAX_NUL = 0.001, 0.1  # shares of bytes; text in Latin-1 or UTF-16 has more
PIECE_CHARS = 1 << 20  # longer documents are tokenized in pieces
MAX_PIECE_CHARS = 1 << 24  # a text without spaces is cut here

Piece = tuple[str, bool]  # text of about PIECE_CHARS at most, and whether a document starts here


def find_files(paths: list[str]) -> list[Path]:
    """The text files named by paths, folders (searched recursively, but for hidden files and
    folders) and globs, each sorted. Prints what is left out of folders.
    """
    files = []
    for path in paths:
        if Path(path).is_file():
            inside = [Path(path)]
        elif path and Path(path).is_dir():
            inside = [f for f in Path(path).rglob("*") if not is_hidden(f.relative_to(path))]
        else:
            inside = [Path(p) for p in glob.glob(path, recursive=True)]  # noqa: PTH207 (any root)
        inside = [f for f in inside if f.is_file()]
        found = sorted(f for f in inside if f.name.endswith(SUFFIXES))
        if found and len(found) < len(inside) and Path(path).is_dir():
            left_out = Counter(f.suffix or "without suffix" for f in set(inside) - set(found))
            kinds = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common())
            print(f"{path}: {len(found)} files are read, others are left out: {kinds}")
        if not found:
            raise FileNotFoundError(
                f"{path} is neither a dataset (-h lists them) nor a file, folder or glob with "
                f"any of the suffixes {', '.join(SUFFIXES)}"
            )
        files += found
    return files


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def find_encoding(file: Path) -> str:
    """That of the file's byte order mark; without one, or in a damaged .gz, UTF-8."""
    try:
        with open_binary(file) as stream:
            start = stream.read(4)
    except DAMAGED_GZIP:  # `stop_at_damage` reports it
        start = b""
    found = (name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark))
    return next(found, "utf-8-sig")


def check_encoding(file: Path) -> None:
    """ValueError if more than MAX_UNDECODABLE of the start of the file is not UTF-8."""
    if problem := find_problem(file):
        raise ValueError(f"{file} {problem}; convert it, as iconv -f LATIN1 -t UTF-8 does")


def find_problem(file: Path) -> str | None:
    """Why a file cannot be read as text."""
    if file.suffix == ".parquet":
        return None
    try:
        encoding = find_encoding(file)
        with open_binary(file) as stream:
            data = stream.read(CHECKED_BYTES)
    except DAMAGED_GZIP:
        return None  # `stop_at_damage` reports it
    if encoding != "utf-8-sig":
        return f"is {encoding.upper()}, expected UTF-8" if ".jsonl" in file.suffixes else None
    n_valid = len(data.decode(errors="ignore").encode())
    undecodable, nul = ((n / max(1, len(data))) for n in (len(data) - n_valid, data.count(0)))
    if undecodable > MAX_UNDECODABLE:
        return f"is not UTF-8: {undecodable:.1%} of its bytes cannot be decoded"
    return f"is not text: {nul:.0%} of its bytes are NUL" if nul > MAX_NUL else None


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
            decoded = codecs.iterdecode(blocks, find_encoding(file), errors=errors)
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
            text = parse(json.loads, line.decode(errors=errors).lstrip("\ufeff"))[text_field]
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


def cut_into_pieces(
    blocks: Iterable[str], separator: str | None = None, n_chars: int | None = None
) -> Iterator[Piece]:
    """Cut text into documents, and documents of more than `n_chars` (PIECE_CHARS) where that does
    not change their tokens.
    """
    n_chars = n_chars or PIECE_CHARS
    text, starts = "", True
    for block in blocks:
        text += block
        if separator:
            *documents, text = text.split(separator)
            for document in documents:
                yield document, starts
                starts = True
        while end := find_cut(text, n_chars):
            yield text[:end], starts
            text, starts = text[end:], False
    if text or starts:
        yield text, starts


def find_cut(text: str, n_chars: int) -> int:
    """Where to cut about `n_chars` off a longer text, or 0 if more must be read first: before a
    space or newline after a non-space, because no token of GPT-2's pattern crosses there. The place
    depends on the text alone, not on how much of it has been read.
    """
    if len(text) <= n_chars:
        return 0
    if cut := re.match(r"(?s).*(?<=\S)(?=[ \n])", text[: n_chars + 1]):
        return cut.end()
    if cut := re.search(r"\S(?=[ \n])", text[n_chars : MAX_PIECE_CHARS + 1]):
        return n_chars + cut.end()
    return MAX_PIECE_CHARS if len(text) > MAX_PIECE_CHARS else 0
