"""Read rows (dicts) from files, the hub, or Python's standard library."""

import ast
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.documents import find_files, read_table, stdlib_definitions
from engine.files import DAMAGED_GZIP, clean_text, open_binary, read_json, read_lines, sha256_text
from engine.hub import check_hub_name, load_hub_rows

Converted = TypeVar("Converted")
STDLIB = "stdlib"  # the source whose rows are functions of Python's standard library
SUFFIXES: tuple[str, ...] = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
SUFFIXES += tuple(f"{suffix}.gz" for suffix in SUFFIXES)
HUB_REMEDY = "Without a network, set data or hellaswag_data to a file, or fine-tune on stdlib"
SPLIT_NAME = re.compile(r"(train|test|valid(ation)?|val|dev)(?![a-z])")  # as on the hub
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
        files = find_files([str(folder)], SUFFIXES)
        splits = {match[0] for file in files if (match := SPLIT_NAME.match(file.name))}
        if len(splits) > 1 and path.is_dir():
            kinds = " and ".join(sorted(splits))
            raise ValueError(f"{source} has files of {kinds}; name those of one split, as a glob")
        return files
    if path.exists():
        return [path]
    check_hub_name(source, f"the name of a dataset, or a file with {', '.join(SUFFIXES)}")
    return []


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
        for n, content in read_rows(file):
            unit = "line" if isinstance(content, bytes) else "row"
            number = first + n
            yield Row(number, f"{file} {unit} {n}", content)
        first = number


def read_rows(file: Path) -> Iterable[tuple[int, Any]]:
    """Return the number and content of each row of a file. A file without a known suffix has a row
    of JSON per line.
    """
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return read_csv(file, "\t" if suffix == ".tsv" else ",")
    if suffix in (".parquet", ".arrow"):
        return enumerate(read_table(file), start=1)
    lines = read_lines(file)
    if suffix != ".json":
        return lines
    numbered = list(lines)
    try:
        content = json.loads(b"".join(line for _, line in numbered))
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # a row per line, as Dataset.to_json writes
            return numbered
        raise ValueError(f"{file} is not JSON: {error}") from error
    return enumerate(content if isinstance(content, list) else [content], start=1)


def read_csv(file: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file whose first line has the names of the columns. All values are
    strings, exactly as they are written.
    """
    csv.field_size_limit(MAX_FIELD)  # for the whole process; there is no other way
    with open_binary(file) as binary:
        text = io.TextIOWrapper(binary, "utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            yield from enumerate(reader, start=1)
        except (*DAMAGED_GZIP, UnicodeDecodeError, csv.Error) as error:
            problem = f"cannot be read as CSV in UTF-8 after line {reader.line_num}"
            raise ValueError(f"{file} {problem}: {error}; save it again") from error


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
            content = json.loads(row.content) if isinstance(row.content, bytes) else row.content
            if not isinstance(content, dict):
                raise ValueError(f"{content!r:.80} is not a JSON object")
            if None in content:  # from DictReader
                raise ValueError("it has more fields than the first line")
            converted = convert(content)
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            reason = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else reason
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
