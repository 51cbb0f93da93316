"""Read rows (dicts) from files, the hub, or Python's standard library."""

import ast
import csv
import glob
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.files import (
    COMPRESSIONS,
    DAMAGED,
    DamagedFileError,
    clean_text,
    data_suffix,
    decode_lines,
    open_binary,
    read_json,
    sha256_text,
)
from engine.hub import check_hub_name, load_hub_rows

Converted = TypeVar("Converted")
STDLIB = "stdlib"  # the source whose rows are functions of Python's standard library
ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")  # also compressed
HUB_REMEDY = "Without a network, set data or hellaswag_data to a file, or fine-tune on stdlib"
SPLIT_NAME = re.compile(r"(train|test|valid(ation)?|val|dev)(?![a-z])")  # as on the hub
PARQUET_TEXT = re.compile("(dictionary<values=)?(large_)?string")  # column types that hold text
NON_SPACE = re.compile(r"\S")
ONE_PER_LINE = "(if its objects are not one per line, rename the file to .json)"
MAX_FIELD = 2**31 - 1  # characters in a field of a CSV file; Python's default is 131,072
DOCSTRING_WORDS = range(5, 60)  # docstrings with a longer or shorter first paragraph are left out


class Row(NamedTuple):
    """A row of a source, numbered from 1. `content` is a line of JSON as bytes, or a value: a dict
    if the row is good.
    """

    number: int
    place: str  # for messages: the file and the line or row
    content: Any


def find_row_files(source: str, split: str = "train") -> list[Path]:
    """Return the files that hold the rows of a source: a file, a folder or a glob. Return [] for
    STDLIB and for the name of a hub dataset. Raises FileNotFoundError for anything else. `split`
    selects a folder of a DatasetDict that was saved with `save_to_disk`.
    """
    path = Path(source)
    if source == STDLIB:
        return []
    is_saved_dict = (path / "dataset_dict.json").is_file()
    folder = path / split if is_saved_dict else path
    if (folder / "state.json").is_file():  # written by save_to_disk
        state = read_json(folder / "state.json", remedy="save the dataset again")
        return [folder / file["filename"] for file in state["_data_files"]]
    if is_saved_dict or path.is_dir() or (not path.exists() and set(source) & set("*?[")):
        files = find_files([str(folder)], ROW_SUFFIXES)
        splits = {match[0] for file in files if (match := SPLIT_NAME.match(file.name))}
        if len(splits) > 1 and path.is_dir():
            kinds = " and ".join(sorted(splits))
            raise ValueError(f"{source} has files of {kinds}; name those of one split, as a glob")
        return files
    if path.exists():
        return [path]
    check_hub_name(source, f"the name of a dataset, or a file with {list_suffixes(ROW_SUFFIXES)}")
    return []


def find_files(paths: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes that `paths` stand for, sorted within each path. A path
    is a file, a glob or a folder. Folders are searched recursively, except for hidden files and
    folders. If a folder has other files, prints how many of each suffix it leaves out.
    """
    files = []
    for path in paths:
        exists = path and Path(path).exists()  # Path("") is the current folder
        # The name of a file may look like a glob. (Path.glob rejects absolute paths.)
        matches = [path] if exists else glob.glob(path, recursive=True)  # noqa: PTH207
        seen: set[str] = set()
        candidates = sorted(f for match in matches for f in walk(Path(match), seen))
        found = [f for f in candidates if data_suffix(f) in suffixes and f.is_file()]
        if found and len(found) < len(candidates) and any(map(os.path.isdir, matches)):
            others = set(candidates) - set(found)
            kinds = Counter(f.suffix if f.exists() else "broken link" for f in others)
            counts = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in kinds.most_common())
            print(f"{path}: reading {len(found)} files and ignoring the others: {counts}")
        if not found:
            problem = (
                "neither a known dataset nor a file, folder or glob with any of the suffixes "
                f"{list_suffixes(suffixes)}"
            )
            if candidates and not candidates[0].exists():
                problem = "a broken link"
            elif candidates and not candidates[0].is_file():
                problem = "not a regular file; copy its content to one, because it is read twice"
            raise FileNotFoundError(f"{path} is {problem}")
        files += found
    return files


def walk(path: Path, seen: set[str]) -> Iterator[Path]:
    """Yield a file, or the files in a folder and its subfolders, except for hidden ones. Links are
    followed. What is in `seen` already is skipped, so links cannot form an endless loop.
    """
    real = os.path.realpath(path)
    if real in seen:
        return
    seen.add(real)
    if not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith("."):
            yield from walk(child, seen)


def list_suffixes(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes)} (optionally {' or '.join(COMPRESSIONS)})"


def open_rows(source: str, config: str | None = None, split: str = "train") -> Iterator[Row]:
    """Yield the rows of files (see `find_row_files`), of a hub dataset with its configuration and
    split, or of STDLIB. The lines of a .jsonl file are read one at a time. Row numbers continue
    from one file to the next.
    """
    files = find_row_files(source, split)
    if not files:
        hub = partial(load_hub_rows, source, config, split, streaming=False, remedy=HUB_REMEDY)
        rows = stdlib_rows() if source == STDLIB else hub()
        yield from (Row(n, f"{source} row {n}", row) for n, row in enumerate(rows, start=1))
    first = number = 0
    for file in files:
        for row in read_rows(file):
            number = first + row.number
            yield row._replace(number=number)
        first = number


def read_rows(file: Path, lines: Iterable[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file. A file without a known suffix has a row of JSON per line. Pass
    `lines` if you have decoded the file already. Raises ValueError if the file is damaged.
    """
    suffix, unit = data_suffix(file), "row"
    is_json_lines = suffix not in (".json", ".csv", ".tsv")
    if lines is None:  # a line of JSON that is not UTF-8 is one bad row
        lines = decode_lines(file, errors="surrogateescape" if is_json_lines else "strict")
    contents: Iterable[tuple[int, Any]]
    try:
        if suffix in (".parquet", ".arrow"):
            contents = enumerate(read_table(file), start=1)
        elif suffix == ".json":
            contents = enumerate(parse_json("".join(lines)), start=1)
        elif suffix in (".csv", ".tsv"):
            contents = enumerate(parse_csv(lines, suffix), start=1)
        else:
            unit, encoded = "line", (line.encode(errors="surrogateescape") for line in lines)
            contents = ((n, line) for n, line in enumerate(encoded, 1) if not line.isspace())
        for n, content in contents:
            yield Row(n, f"{file} {unit} {n}", content)
    except (json.JSONDecodeError, csv.Error) as error:
        raise DamagedFileError(f"{file} cannot be read as {suffix}: {error}") from error


def parse_json(text: str) -> Iterator[Any]:
    """Yield the items of a list, or objects that follow one another."""
    decoder, end = json.JSONDecoder(), 0
    while start := NON_SPACE.search(text, end):
        value, end = decoder.raw_decode(text, start.start())
        yield from value if isinstance(value, list) else [value]


def parse_csv(lines: Iterable[str], suffix: str) -> Iterator[dict]:
    """Yield the rows of a file whose first line has the names of the columns. All values are
    strings, exactly as they are written. A .csv may be separated by semicolons or tabs.
    """
    csv.field_size_limit(MAX_FIELD)  # for the whole process; there is no other way
    lines = iter(lines)
    header = next(lines, "")
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise csv.Error(f"{error} after line {reader.line_num}") from error


def read_table(file: Path, text_column: str | None = None) -> Iterator[dict]:
    """Yield the rows of a Parquet file, or of an Arrow file that `save_to_disk` wrote: all columns,
    or only `text_column`. Raises ValueError if that is not a column of text, or if the file is
    damaged.
    """
    import pyarrow.parquet

    try:
        with open_binary(file) as stream:
            # Parquet is read from its end, to which a decompressed stream cannot seek.
            is_compressed = file.suffix.lower() in COMPRESSIONS
            table = pyarrow.BufferReader(stream.read()) if is_compressed else stream
            if data_suffix(file) == ".arrow":
                batches = pyarrow.ipc.open_stream(table)
            else:
                parquet = pyarrow.parquet.ParquetFile(table)
                texts = [f.name for f in parquet.schema_arrow if PARQUET_TEXT.match(str(f.type))]
                if text_column not in (None, *texts):
                    raise ValueError(
                        f"{file} has no text column {text_column!r}; expected text_field to be one "
                        f"of its text columns: {', '.join(texts) or 'none'}"
                    )
                batches = parquet.iter_batches(1000, columns=[text_column] if text_column else None)
            for batch in batches:
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, *DAMAGED) as error:
        problem = f"is damaged or not {data_suffix(file)}: {error}"
        raise ValueError(f"{file} {problem}; download it again") from error


def convert_rows(
    rows: Iterable[Row], convert: Callable[[dict], Converted], skip_bad_rows: bool | None = None
) -> Iterator[tuple[int, Converted]]:
    """Yield each row's number and `convert(row)`.

    A row is bad if it is not a JSON object, or if `convert` raises ValueError or KeyError. Raises
    ValueError at the first bad row. With `skip_bad_rows`, skip bad rows instead: print the first
    one, and at the end how many there were. Pass None if the command has no such flag, so that the
    error does not suggest it.
    """
    n_bad = 0
    for row in rows:
        try:
            converted = convert(row_to_dict(row.content))
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            if not skip_bad_rows:
                option = "" if skip_bad_rows is None else ", or set skip_bad_rows"
                raise ValueError(f"{row.place}: {reason}; repair it{option}") from error
            n_bad += 1
            if n_bad == 1:
                print(f"{row.place}: {reason}; skipped")
        else:
            yield row.number, converted
    if n_bad > 1:
        print(f"skipped {n_bad:,} bad rows in all")


def row_to_dict(content: Any) -> dict:
    """Return the content of a row as a dict. Raises ValueError if it is not one."""
    is_line = isinstance(content, bytes)
    try:
        row = json.loads(content) if is_line else content
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno} {ONE_PER_LINE}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.80} is not a JSON object{' ' + ONE_PER_LINE if is_line else ''}")
    if None in row:  # from DictReader
        raise ValueError("it has more fields than the first line")
    return row


def stdlib_definitions() -> Iterator[tuple[ast.AST, str]]:
    """Yield each module, class and function of the standard library as an AST node, with its
    docstring ("" if it has none).
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, ast.get_docstring(node) or ""


def stdlib_rows() -> list[dict]:
    """Return rows from the functions of Python's standard library, one per signature, with the
    first paragraph of the docstring.
    """
    rows = {}
    for node, docstring in stdlib_definitions():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph.split()) in DOCSTRING_WORDS:
            rows[f"def {node.name}({ast.unparse(node.args)}):"] = paragraph
    # A shuffle that is the same on every machine; the newline is there for historical reasons.
    signatures = sorted(rows, key=lambda signature: sha256_text(f"{signature}\n"))
    return [{"signature": signature, "docstring": rows[signature]} for signature in signatures]


def get_text(row: dict, field: str) -> str:
    """Return `row[field]`, with lone surrogates replaced by U+FFFD. Raises KeyError if it is
    missing, ValueError if it is not a string.
    """
    if not isinstance(row[field], str):
        raise ValueError(f"{field} is {row[field]!r:.80}, expected a string")
    return clean_text(row[field])
