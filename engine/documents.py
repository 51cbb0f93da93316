"""Read documents from your files, the Hugging Face Hub or Python itself, and choose which text is
for validation.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from engine.files import (
    COMPRESSIONS,
    DamagedFileError,
    data_suffix,
    decode_lines,
    sha256_file,
    sha256_text,
)
from engine.hub import load_hub_rows, reporting_hub_errors
from engine.rows import (
    ROW_SUFFIXES,
    find_files,
    get_text,
    read_rows,
    read_table,
    row_to_dict,
    stdlib_definitions,
)

# Text datasets on the hub: repository and configuration.
HUB_TEXT = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "slimpajama": ("DKYoon/SlimPajama-6B", "default"),
}
HUB_REMEDY = "Rerun the command to resume; without a network, use dataset stdlib or your own files"
SUFFIXES = (".txt", ".md", ".rst", ".py", *ROW_SUFFIXES)  # also compressed
SEPARATOR = "<|endoftext|>"  # between the documents of a text file
COMPRESSION_RATIO = 3  # a guess for text in compressed and Parquet files, to estimate its size
BYTES_PER_TOKEN = 4.4  # English text in GPT-2's BPE; for estimates
HUB_VAL_TOKENS = 10_485_760  # the validation set of 124M speedruns on FineWeb (modded-nanogpt)
VAL_FRACTION, MAX_VAL_FRACTION = 0.05, 0.5  # default and limit, for text that is not from the hub
# Your own files are cut into sections of about 1,024 tokens, the context of GPT-2. The hash of a
# section's text decides whether it goes to train or to val.
#   - They are small, because val gets at least one: for a text of 30 kB, only 1/8 of it.
#   - Their size is fixed, so that copies of a document are cut the same way in any corpus.
# Neighbors in the same split are written without a separator, so a long document is broken only
# where the split changes.
SECTION_CHARS = 4000
MAX_PIECE_CHARS = 1 << 24  # practically no limit: documents stay whole
NON_SPACE = re.compile(r"\S")
# Where a piece may end, best place first: before the last newline that follows a non-space, before
# the last space that follows a non-space, or anywhere. No token of GPT-2 has a newline or space
# after a non-space, so only "anywhere" can cut through a token.
CUT = re.compile(r".*\S(?=[\r\n])|.*\S(?= )|.*(?=.)", re.DOTALL)

Chunk = tuple[str, bool]  # part of a document's text, and whether the document ends there
Problems = Counter[str] | None  # how many of each kind; None: neither count nor print them


def note_problem(problems: Problems, kind: str, message: str, count: int = 1) -> None:
    """Count a problem. Print the message if it is the first problem of its kind."""
    if problems is not None:
        if not problems[kind]:
            print(message)
        problems[kind] += count


class TextFormat(NamedTuple):
    """How to get text out of files."""

    text_field: str = "text"  # key or column of the text in rows
    encoding: str = "utf-8"  # for files without a byte order mark
    decode_errors: str = "strict"  # or "replace": undecodable bytes become U+FFFD
    skip_bad_files: bool = False  # leave out files that cannot be decoded


class Piece(NamedTuple):
    """A document, or part of one."""

    text: str
    starts_document: bool = True
    is_separated: bool = True  # from the piece before it, by <|endoftext|>
    is_val: bool = False


def join_pieces(pieces: Iterable[Piece]) -> list[str]:
    """Join the pieces of each document. Return the documents."""
    documents: list[list[str]] = []
    for piece in pieces:
        if piece.starts_document:
            documents.append([])
        documents[-1].append(piece.text)
    return ["".join(texts) for texts in documents]


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `identity` changes when the documents change. `pieces(n, problems)` yields all pieces but the
    first n, and adds the problems that it finds in the text to the counter `problems`. It raises
    ValueError if a file cannot be decoded.
    """

    name: str
    identity: str
    n_bytes: int | None  # approximate size of the text, if known
    # If this has the key "section_chars", Piece.is_val says which pieces are for validation. If
    # not, the first "val_tokens" tokens are.
    split_options: dict
    pieces: Callable[[int, Problems], Iterator[Piece]]


def open_source(
    dataset: list[str],
    text_format: TextFormat,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
) -> Source:
    """Open a source of documents: "stdlib", a key of HUB_TEXT, or files, folders and globs.

    `val_tokens` is the number of validation tokens (None: a default number or share).
    `max_tokens` is the total number of tokens that will be written (None: all).
    """
    if len(dataset) > 1 and (known := {"stdlib", *HUB_TEXT} & set(dataset)):
        raise ValueError(f"{' and '.join(known)} cannot be combined; prepare each dataset alone")
    if dataset == ["stdlib"]:
        documents = stdlib_documents()
        identity, n_bytes = sha256_text("\0".join(documents)), sum(map(len, documents))
        options = {"val_tokens": val_tokens or int(n_bytes / BYTES_PER_TOKEN * VAL_FRACTION)}
        return Source("stdlib", identity, n_bytes, options, lambda n, _: map(Piece, documents[n:]))
    if dataset[0] in HUB_TEXT:
        repo, name = HUB_TEXT[dataset[0]]
        options = {"val_tokens": val_tokens or HUB_VAL_TOKENS}
        pieces = partial(stream_hub_text, repo, name)
        return Source(dataset[0], f"{repo} {name}", None, options, pieces)
    return open_files(find_files(dataset, SUFFIXES), text_format, val_tokens, max_tokens)


def open_files(
    found: list[Path], text_format: TextFormat, val_tokens: int | None, max_tokens: int | None
) -> Source:
    """Open text files as a source whose pieces are sections, some of them for validation."""
    # With skip_bad_files, the identity covers only the files that can be decoded, so we decode them
    # now. Otherwise pieces() checks the files. It is not called if the shards are complete.
    files = select_decodable(found, text_format) if text_format.skip_bad_files else found
    sizes = {file: file.stat().st_size for file in files}
    sha256 = sha256_text(" ".join(map(sha256_file, files)))
    identity = f"{len(files)} files, {sum(sizes.values())} bytes, {sha256}"
    compressed = (*COMPRESSIONS, ".parquet")
    n_compressed = sum(sizes[file] for file in files if file.suffix.lower() in compressed)
    n_bytes = sum(sizes.values()) + (COMPRESSION_RATIO - 1) * n_compressed
    n_tokens = max(1, min(n_bytes / BYTES_PER_TOKEN, max_tokens or math.inf))
    n_val = val_tokens or min(HUB_VAL_TOKENS, n_tokens * VAL_FRACTION)
    fraction = min(MAX_VAL_FRACTION, n_val / n_tokens)

    def read(problems: Problems) -> Iterator[Piece]:
        return (piece for file in files for piece in read_pieces(file, text_format, problems))

    def pieces(skip: int, problems: Problems) -> Iterator[Piece]:
        if not text_format.skip_bad_files:
            select_decodable(files, text_format)  # raises ValueError if one cannot be decoded
        if problems is not None:
            problems["bad files left out"] = len(found) - len(files)
        # A first pass over the text chooses the threshold. A second one yields the pieces.
        try:
            threshold = choose_threshold(read(None), fraction, max_tokens)
        except ValueError:
            _ = [*read(Counter())]  # read again, to print the problems
            raise
        return islice(mark_validation(read(problems), threshold), skip, None)

    options = {"val_tokens": val_tokens, "section_chars": SECTION_CHARS}
    return Source("files", identity, n_bytes, options, pieces)


def select_decodable(files: list[Path], text_format: TextFormat) -> list[Path]:
    """Return the files that can be decoded. With skip_bad_files, print why the others cannot.
    Without, raise ValueError for the first one.
    """
    selected = []
    for file in files:
        try:
            if data_suffix(file) != ".parquet":  # text in Parquet is always UTF-8
                for _ in read_text_lines(file, text_format, None):
                    pass
            selected.append(file)
        except ValueError as error:
            if not text_format.skip_bad_files:
                remedies = (
                    "; pass the file's encoding (encoding NAME), replace undecodable bytes "
                    "(decode_errors replace)"
                )
                raise ValueError(
                    f"{error}{remedies if isinstance(error, UnicodeError) else ''}, or leave such "
                    "files out (skip_bad_files)"
                ) from error
            print(f"{error}; left out")
    return selected


def stream_hub_text(repo: str, name: str, skip: int, _: Problems) -> Iterator[Piece]:
    """Yield the texts of a hub dataset, except for the first `skip` rows."""
    rows = load_hub_rows(repo, name, "train", streaming=True, remedy=HUB_REMEDY)
    with reporting_hub_errors(repo, HUB_REMEDY):
        for row in rows.select_columns(["text"]).skip(skip):
            yield Piece(row["text"])


def stdlib_documents() -> list[str]:
    """Return the topics of Python's language reference and the docstrings of its standard library,
    without duplicates. They are sorted by hash, so that any slice is a random sample.
    """
    import pydoc_data.topics

    documents = set(pydoc_data.topics.topics.values())
    documents |= {docstring.strip() for _, docstring in stdlib_definitions()}
    return sorted(documents - {""}, key=sha256_text)


def read_pieces(
    file: Path, text_format: TextFormat, problems: Problems, n_chars: int = SECTION_CHARS
) -> Iterator[Piece]:
    """Yield the documents of a file, cut into pieces of up to about `n_chars` characters. Skips bad
    rows, reads a damaged .gz up to the damage, and counts both in `problems`. Raises UnicodeError
    if the file cannot be decoded, ValueError if it is a .parquet that is damaged or has no text
    column.
    """
    field, suffix = text_format.text_field, data_suffix(file)
    chunks: Iterable[Chunk]
    if suffix == ".parquet":
        chunks = ((row[field] or "", True) for row in read_table(file, field))
    elif suffix in ROW_SUFFIXES:
        chunks = read_row_texts(file, text_format, problems)
    else:
        chunks = read_text(file, text_format, problems)
    return cut_documents(chunks, n_chars)


def read_text_lines(file: Path, text_format: TextFormat, problems: Problems) -> Iterator[str]:
    """Yield the decoded lines of a file, up to the damage if it is damaged."""
    try:
        for line in decode_lines(file, text_format.encoding, text_format.decode_errors):
            if text_format.decode_errors == "replace" and (n := line.count("\ufffd")):
                message = f"{file} has U+FFFD characters"
                note_problem(problems, "replaced characters", message, n)
            yield line
    except DamagedFileError as error:
        message = f"{error}; only the text before the damage is used"
        note_problem(problems, "truncated files", message)


def read_text(file: Path, text_format: TextFormat, problems: Problems) -> Iterator[Chunk]:
    for line in read_text_lines(file, text_format, problems):
        *ended, rest = line.split(SEPARATOR)
        yield from ((part, True) for part in ended)
        yield rest, False
    yield "", True


def read_row_texts(file: Path, text_format: TextFormat, problems: Problems) -> Iterator[Chunk]:
    """Yield the text of each row of a .json, .jsonl, .csv or .tsv file."""
    try:
        for row in read_rows(file, read_text_lines(file, text_format, problems)):
            try:
                text = get_text(row_to_dict(row.content), text_format.text_field)
            except (ValueError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                note_problem(problems, "bad rows", f"{row.place}: {reason}; skipped")
            else:
                yield text, True
    except DamagedFileError as error:
        note_problem(problems, "bad rows", f"{error}; the rest of the file is skipped")


def cut_documents(chunks: Iterable[Chunk], n_chars: int) -> Iterator[Piece]:
    """Cut documents into pieces of at most `n_chars` characters, not counting whitespace at either
    end. The cuts depend only on the document, not on the chunks in which it is read.
    """
    text, is_first = "", True  # text not yielded yet, and whether it starts a document
    for chunk, ends_document in chunks:
        text += chunk
        position = 0
        while end := find_cut(text, position, n_chars):
            yield Piece(text[position:end], starts_document=is_first, is_separated=is_first)
            position, is_first = end, False
        text = text[position:]
        if ends_document:
            yield Piece(text, starts_document=is_first, is_separated=is_first)
            text, is_first = "", True


def find_cut(text: str, start: int, n_chars: int) -> int | None:
    """Return the end of the piece that begins at `start`, or None if we need more text to decide.
    There is a non-space on both sides of a cut, so a document is never split into blank pieces.
    """
    first = NON_SPACE.search(text, start)  # whitespace before it does not count
    if not first or len(text) <= first.start() + n_chars:
        return None
    # CUT looks at the character after the piece too, so give it one character more than n_chars.
    cut = CUT.match(text, first.start(), first.start() + n_chars + 1)
    return cut.end() if cut and NON_SPACE.search(text, cut.end()) else None


def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text. It is the same on every machine."""
    return int(sha256_text(text)[:16], base=16)


def choose_threshold(sections: Iterable[Piece], fraction: float, max_tokens: int | None) -> int:
    """Choose the threshold for `mark_validation`, so that about `fraction` of the sections have a
    hash below it, and each split gets at least one. Raises ValueError if no two sections differ.

    We start with fraction * 2**64, because hashes are uniform, and read sections until both splits
    have one, or until max_tokens bytes, because later sections may never be written. If all hashes
    are on one side of the threshold, we move it:

        hashes          s  x x   x  l
        threshold    |                   all are in train; s + 1 puts s into val
        threshold                     |  all are in val; l puts l into train
    """
    threshold, n_bytes = round(fraction * 2**64), 0
    smallest, largest = 2**64, -1  # hashes so far
    for text, *_ in sections:
        has_both_sides = smallest < threshold <= largest
        reached_max_tokens = max_tokens is not None and n_bytes >= max_tokens  # a token has a byte
        if has_both_sides or (reached_max_tokens and smallest < largest):
            break
        n_bytes += len(text.encode())
        if text and not text.isspace():
            smallest, largest = min(smallest, hash_text(text)), max(largest, hash_text(text))
    if smallest >= largest:
        raise ValueError(
            f"the text has fewer than two different sections of {SECTION_CHARS} characters, one "
            "for training and one for validation; add text, or check text_field"
        )
    return min(max(threshold, smallest + 1), largest)


def mark_validation(sections: Iterable[Piece], threshold: int) -> Iterator[Piece]:
    """Mark a section as validation if the hash of its text is below the threshold, so that copies
    of a document are always in the same split. Whenever the split changes, even within a document,
    a separator comes before the section.
    """
    was_val = False
    for section in sections:
        is_val = hash_text(section.text) < threshold
        is_separated = section.starts_document or is_val != was_val
        yield section._replace(is_val=is_val, is_separated=is_separated)
        was_val = is_val
