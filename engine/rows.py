"""Rows, JSON objects: from .json and .jsonl files, the hub, or Python itself."""

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from engine.documents import stdlib_definitions
from engine.files import read_lines, sha256_text
from engine.hub import check_hub_name, load_hub_rows

Converted = TypeVar("Converted")
STDLIB = "stdlib"  # the source whose rows are Python's own functions
HUB_REMEDY = "Without a network, use a file as data or hellaswag_data, or fine-tune on stdlib"
DOCSTRING_WORDS = range(5, 60)  # longer or shorter first paragraphs are left out


def check_source(source: str) -> None:
    """FileNotFoundError if there is no such file and the name cannot be one of the hub."""
    if source != STDLIB and not Path(source).exists():
        check_hub_name(source, "a .json or .jsonl file, plain or .gz, or the name of a dataset")


def open_rows(
    source: str, config: str | None = None, split: str = "train"
) -> Iterable[tuple[int, Any]]:
    """The rows of a file, a dataset of the hub (and its configuration and split), or STDLIB, with
    their numbers from 1. Lines of JSON are read one at a time, and not parsed.
    """
    check_source(source)
    if source == STDLIB:
        return enumerate(stdlib_rows(), start=1)
    if not Path(source).exists():
        hub_rows = load_hub_rows(source, config, split, streaming=False, remedy=HUB_REMEDY)
        return enumerate(hub_rows, start=1)
    lines = read_lines(Path(source))
    if not source.removesuffix(".gz").endswith(".json"):
        return lines
    rows = parse_json(b"".join(line for _, line in lines), f"{source} is ")
    if not isinstance(rows, list):
        raise ValueError(f"{source} holds a {type(rows).__name__}, expected a list of rows")
    return enumerate(rows, start=1)


def convert_rows(
    source: str,
    rows: Iterable[tuple[int, Any]],
    convert: Callable[[dict], Converted],
    skip_bad_rows: bool | None = None,
) -> Iterator[tuple[int, Converted]]:
    """What `convert` makes of each row, and the row's number. ValueError names the first row for
    which it raises a ValueError or KeyError; `skip_bad_rows` prints and skips such rows instead
    (None: the command has no such flag).
    """
    for number, row in rows:
        try:
            content = parse_json(row) if isinstance(row, bytes) else row
            if not isinstance(content, dict):
                raise ValueError(f"{content!r} is not a JSON object")
            yield number, convert(content)
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            unit = "line" if isinstance(row, bytes) else "row"
            problem = f"{source} {unit} {number}: {reason}"
            if not skip_bad_rows:
                option = "" if skip_bad_rows is None else ", or set skip_bad_rows"
                raise ValueError(f"{problem}; repair it{option}") from error
            print(f"{problem}; skipped")


def parse_json(text: bytes, place: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}not JSON: {error}") from error


def stdlib_rows() -> list[dict]:
    """Python functions and the first paragraphs of their docstrings, one per signature."""
    rows = {}
    for node, docstring in stdlib_definitions():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph.split()) in DOCSTRING_WORDS:
            rows[f"def {node.name}({ast.unparse(node.args)}):\n"] = paragraph
    return [{"prompt": p, "completion": rows[p]} for p in sorted(rows, key=sha256_text)]


def get_text(row: dict, field: str) -> str:
    """The string under `field`; KeyError if there is nothing, ValueError if it is no string."""
    if not isinstance(row[field], str):
        raise ValueError(f"{field} is {row[field]!r}, expected a string")
    return row[field]
