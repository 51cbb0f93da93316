"""Documents of files, of the hub and of Python itself: find, decode, cut and split them."""

import ast
import codecs
import glob
import io
import json
import re
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from engine.files import DAMAGED_GZIP, open_binary, sha256_file, sha256_text
from engine.hub import load_hub_rows, reporting_hub_errors

# Text on the hub: repository and configuration.
HUB_TEXT = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "slimpajama": ("DKYoon/SlimPajama-6B", "default"),
}
HUB_REMEDY = "The same command resumes; without a network, use dataset stdlib or your own files"
SUFFIXES = (".txt", ".txt.gz", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
SEPARATOR = "<|endoftext|>"  # between the documents of a text file
# Encodings that a file's first bytes tell. UTF-32 comes first, as its mark begins with UTF-16's.
BYTE_ORDER_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-8-sig": (codecs.BOM_UTF8,),
}
PARQUET_TEXT = re.compile("(dictionary<values=)?(large_)?string")  # types of columns
COMPRESSION = 3  # about that of text in .gz and .parquet
BYTES_PER_TOKEN = 4.4  # of English in GPT-2's BPE; for estimates
HUB_VAL_TOKENS = 10_485_760  # of FineWeb's validation shard, on which 124M speedruns are compared
VAL_FRACTION, MAX_VAL_FRACTION = 0.05, 0.5  # of text that is not from the hub
# Your own documents are drawn for validation in sections of about a context of 1,024 tokens. They
# are small, so that a text of 30 kB gives an eighth of itself rather than half. They have a fixed
# size, so that a document and its copies are cut alike in any corpus. A long document is cut only
# where a drawn section begins or ends.
SECTION_CHARS = 4000
MAX_PIECE_CHARS = 1 << 24  # of a document that should stay whole
NON_SPACE = re.compile(r"\S")
# No token of GPT-2 reaches from a non-space across a newline or space. The last resort may cut one.
CUT = re.compile(r".*\S(?=[\r\n])|.*\S(?= )|.*(?=.)", re.DOTALL)

Block = tuple[str, bool]  # text, and whether a document ends with it
PROBLEMS = ("bad rows", "replaced characters", "truncated files")


def note_problem(problems: Counter, kind: str, message: str, count: int = 1) -> None:
    """Count a problem, and print the first of its kind."""
    if not problems[kind]:
        print(message)
    problems[kind] += count


class TextFormat(NamedTuple):
    """How files become text."""

    text_field: str = "text"  # key or column in .jsonl and .parquet
    encoding: str = "utf-8"  # of files without a byte order mark
    decode_errors: str = "strict"  # or "replace", by U+FFFD
    skip_bad_files: bool = False  # those that cannot be decoded


class Piece(NamedTuple):
    """A document or a section of one."""

    text: str
    starts: bool = True  # a document
    is_separated: bool = True  # by <|endoftext|> from the piece before it
    is_val: bool = False  # drawn for validation


@dataclass(frozen=True)
class Source:
    """Where documents come from. `identity` changes when they do. `pieces(n, problems)` yields them
    from piece n on, and counts what is wrong; ValueError names a file that cannot be decoded.
    """

    name: str
    identity: str
    n_bytes: int | None  # of text, approximately
    split: dict  # how validation is chosen: the first val_tokens tokens, or drawn sections
    pieces: Callable[[int, Counter], Iterator[Piece]]


def open_source(
    dataset: list[str],
    text_format: TextFormat,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
) -> Source:
    """The source for "stdlib", a key of HUB_TEXT, or files, folders and globs."""
    if len(dataset) > 1 and (known := {"stdlib", *HUB_TEXT} & set(dataset)):
        raise ValueError(f"{' and '.join(known)} cannot be combined; prepare each dataset alone")
    if dataset == ["stdlib"]:
        documents = stdlib_documents()
        identity, n_bytes = sha256_text("\0".join(documents)), sum(map(len, documents))
        split = {"val_tokens": val_tokens or int(n_bytes / BYTES_PER_TOKEN * VAL_FRACTION)}
        return Source("stdlib", identity, n_bytes, split, lambda n, _: map(Piece, documents[n:]))
    if dataset[0] in HUB_TEXT:
        repo, name = HUB_TEXT[dataset[0]]
        split = {"val_tokens": val_tokens or HUB_VAL_TOKENS}
        pieces = partial(stream_hub_text, repo, name)
        return Source(dataset[0], f"{repo} {name}", None, split, pieces)
    return open_files(find_files(dataset), text_format, val_tokens, max_tokens)


def open_files(
    found: list[Path], text_format: TextFormat, val_tokens: int | None, max_tokens: int | None
) -> Source:
    files = select_text(found, text_format) if text_format.skip_bad_files else found
    sizes = {file: file.stat().st_size for file in files}
    sha256 = sha256_text(" ".join(map(sha256_file, files)))
    identity = f"{len(files)} files, {sum(sizes.values())} bytes, {sha256}"
    n_compressed = sum(sizes[file] for file in files if file.suffix in (".gz", ".parquet"))
    n_bytes = sum(sizes.values()) + (COMPRESSION - 1) * n_compressed
    n_tokens = max(1, min(n_bytes / BYTES_PER_TOKEN, max_tokens or n_bytes))
    wanted = val_tokens or min(HUB_VAL_TOKENS, n_tokens * VAL_FRACTION)

    def read(problems: Counter) -> Iterator[Piece]:
        return (piece for file in files for piece in read_pieces(file, text_format, problems))

    def draw(skip: int, problems: Counter) -> Iterator[Piece]:
        if not text_format.skip_bad_files:  # else they have been selected
            select_text(files, text_format)
        problems["bad files left out"] = len(found) - len(files)
        printed = Counter(PROBLEMS)  # the first pass over the text prints nothing
        limit = choose_limit(read(printed), min(MAX_VAL_FRACTION, wanted / n_tokens), max_tokens)
        return islice(draw_validation(read(problems), limit), skip, None)

    split = {"val_tokens": val_tokens, "section_chars": SECTION_CHARS}
    return Source("files", identity, n_bytes, split, draw)


def select_text(files: list[Path], text_format: TextFormat) -> list[Path]:
    """The files that can be decoded. Unless bad files are to be skipped, ValueError names one."""
    selected = []
    for file in files:
        try:
            if file.suffix != ".parquet":  # which holds UTF-8
                deque(decode_lines(file, text_format, Counter(PROBLEMS)), maxlen=0)
            selected.append(file)
        except UnicodeError as error:
            if not text_format.skip_bad_files:
                raise ValueError(
                    f"{error}; name its encoding (encoding NAME), replace what cannot be decoded "
                    "(decode_errors replace), or leave such files out (skip_bad_files)"
                ) from error
            print(f"{error}; left out")
    return selected


def stream_hub_text(repo: str, name: str, skip: int, _: Counter) -> Iterator[Piece]:
    """The texts of a hub dataset from row `skip` on."""
    rows = load_hub_rows(repo, name, "train", streaming=True, remedy=HUB_REMEDY)
    with reporting_hub_errors(repo, HUB_REMEDY):
        for row in rows.select_columns(["text"]).skip(skip):
            yield Piece(row["text"])


def stdlib_documents() -> list[str]:
    """Python's language reference by topic and the docstrings of its standard library. Each once,
    ordered by hash, so that any part is a random sample.
    """
    import pydoc_data.topics

    documents = set(pydoc_data.topics.topics.values())
    documents |= {docstring.strip() for _, docstring in stdlib_definitions()}
    return sorted(documents - {""}, key=sha256_text)


def stdlib_definitions() -> Iterator[tuple[ast.AST, str]]:
    """The standard library's modules, classes and functions with their docstrings, as parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, ast.get_docstring(node) or ""


def find_files(paths: list[str]) -> list[Path]:
    """The text files named by paths, folders (searched recursively, but for hidden files and
    folders) and globs, each sorted. Prints what is left out of folders.
    """
    files = []
    for path in paths:
        if Path(path).is_file():
            inside = [Path(path)]
        elif path and Path(path).is_dir():
            names = ((f, f.relative_to(path).parts) for f in Path(path).rglob("*"))
            inside = [f for f, parts in names if not any(part.startswith(".") for part in parts)]
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


def read_pieces(
    file: Path, text_format: TextFormat, problems: Counter, n_chars: int = SECTION_CHARS
) -> Iterator[Piece]:
    """The documents of a file in pieces of about `n_chars` at most. Bad rows are skipped, and of a
    damaged .gz the lines before the damage are read; `problems` counts both. UnicodeError if the
    file cannot be decoded.
    """
    if file.suffix == ".parquet":
        blocks = read_parquet(file, text_format.text_field)
    elif ".jsonl" in file.suffixes:
        blocks = read_jsonl(file, text_format, problems)
    else:
        blocks = read_text(file, text_format, problems)
    return cut_documents(blocks, n_chars)


def decode_lines(file: Path, text_format: TextFormat, problems: Counter) -> Iterator[str]:
    """The lines of a file, each with its end."""
    encoding, errors = text_format.encoding, text_format.decode_errors
    with open_binary(file) as stream:
        try:
            start = stream.read(4)
            stream.seek(0)
            marked = (name for name, marks in BYTE_ORDER_MARKS.items() if start.startswith(marks))
            encoding = next(marked, encoding)
            lines = io.TextIOWrapper(stream, encoding, errors, newline="\n")
            for line in lines:
                if errors == "replace" and (n := line.count("\ufffd")):
                    note_problem(problems, "replaced characters", f"{file} has U+FFFD", n)
                yield line
        except DAMAGED_GZIP:
            message = f"{file} is truncated or damaged; only the text before the damage is used"
            note_problem(problems, "truncated files", message)
        except UnicodeError as error:
            place = ""
            if isinstance(error, UnicodeDecodeError):  # in the part that was read last
                place = f" at byte {stream.tell() - len(error.object) + error.start}"
            raise UnicodeError(f"{file} is not {encoding.upper()}{place}") from error


def read_text(file: Path, text_format: TextFormat, problems: Counter) -> Iterator[Block]:
    for line in decode_lines(file, text_format, problems):
        *ended, rest = line.split(SEPARATOR)
        yield from ((part, True) for part in ended)
        yield rest, False
    yield "", True


def read_jsonl(file: Path, text_format: TextFormat, problems: Counter) -> Iterator[Block]:
    for number, line in enumerate(decode_lines(file, text_format, problems), start=1):
        if line.isspace():
            continue
        try:
            text = json.loads(line.lstrip("\ufeff"))[text_format.text_field]
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} instead of a string")
        except (ValueError, KeyError, TypeError) as error:
            problem = f"no text under {text_format.text_field!r} ({error!r})"
            note_problem(problems, "bad rows", f"{file} line {number}: {problem}; skipped")
        else:
            if "\\u" in line:  # may be lone surrogates, which UTF-8 cannot have: they become U+FFFD
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text, True


def read_parquet(file: Path, text_field: str) -> Iterator[Block]:
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = [f.name for f in parquet.schema_arrow if PARQUET_TEXT.match(str(f.type))]
        if text_field not in columns:
            raise ValueError(
                f"{file} has no column {text_field!r} of text; text_field may be "
                f"{' or '.join(columns) or 'none of its columns'}"
            )
        for batch in parquet.iter_batches(batch_size=1000, columns=[text_field]):
            yield from ((text or "", True) for text in batch.column(0).to_pylist())
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or not parquet: {error}; download it again") from error


def cut_documents(blocks: Iterable[Block], n_chars: int) -> Iterator[Piece]:
    """Cut documents into pieces of at most `n_chars`, not counting space at either end. Each block
    says whether it ends its document. The cuts depend on the document alone.
    """
    text, starts = "", True
    for block, is_last in blocks:
        text += block
        position = 0
        while end := find_cut(text, position, n_chars):
            yield Piece(text[position:end], starts, starts)
            position, starts = end, False
        text = text[position:]
        if is_last:
            yield Piece(text, starts, starts)
            text, starts = "", True


def find_cut(text: str, start: int, n_chars: int) -> int:
    """Where the piece that begins at `start` ends; 0 if at the end of the text, as far as it has
    been read. A piece always has a non-space.
    """
    first = NON_SPACE.search(text, start)
    if not first or len(text) <= first.start() + n_chars:
        return 0
    cut = CUT.match(text, first.start(), first.start() + n_chars + 1)
    return cut.end() if cut and NON_SPACE.search(text, cut.end()) else 0


def hash_text(text: str) -> int:
    """A number below 2**64 that is the same for equal texts."""
    return int(sha256_text(text)[:16], base=16)


def choose_limit(sections: Iterable[Piece], fraction: float, max_tokens: int | None) -> int:
    """A limit below which about `fraction` of the sections' hashes lie: at least one, but not all.
    Stops reading once hashes lie on both sides, or once two differ and the text is long enough for
    `max_tokens` tokens of a byte or more.
    """
    limit, n_bytes = round(fraction * 2**64), 0
    smallest, largest = 2**64, -1
    for text, *_ in sections:
        is_enough = max_tokens is not None and n_bytes >= max_tokens
        if smallest < limit <= largest or (smallest < largest and is_enough):
            break
        n_bytes += len(text.encode())
        if text and not text.isspace():
            smallest, largest = min(smallest, hash_text(text)), max(largest, hash_text(text))
    if smallest >= largest:
        raise ValueError(
            f"the text has fewer than two different sections of {SECTION_CHARS} characters, one "
            "for training and one for validation; add text, or name its field (text_field)"
        )
    return min(max(limit, smallest + 1), largest)


def draw_validation(sections: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """The sections, drawn for validation by the hash of their text, so that a document and its
    copies are always in the same split. A section is separated if the one before it is in the
    other split.
    """
    was_val = False
    for section in sections:
        is_val = hash_text(section.text) < limit
        yield section._replace(is_val=is_val, is_separated=section.starts or is_val != was_val)
        was_val = is_val
