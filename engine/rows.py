"""Read rows: JSON objects from .json and .jsonl files, the hub, or Python's standard library."""

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from engine.documents import stdlib_definitions
from engine.files import read_lines, sha256_text
from engine.hub import check_hub_name, load_hub_rows

Converted = TypeVar("Converted")
STDLIB = "stdlib"  # the source whose rows are functions of Python's standard library
HUB_REMEDY = "Without a network, set data or hellaswag_data to a file, or fine-tune on stdlib"
DOCSTRING_WORDS = range(5, 60)  # docstrings with a longer or shorter first paragraph are left out


def check_source(source: str) -> None:
    """Raise FileNotFoundError if `source` is not an existing file and cannot be a hub dataset."""
    if source != STDLIB and not Path(source).exists():
        check_hub_name(source, "a .json or .jsonl file, plain or .gz, or the name of a dataset")


def open_rows(
    source: str, config: str | None = None, split: str = "train"
) -> Iterable[tuple[int, Any]]:
    """Return the rows of a file, a hub dataset (with its configuration and split) or STDLIB, as
    pairs (number, row), numbered from 1. The rows of a .jsonl file are its lines as bytes, read
    one at a time. `convert_rows` parses them, so that it can skip bad lines.
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
    """Yield each row's number and `convert(row)`.

    A row is bad if it is not a JSON object, or if `convert` raises ValueError or KeyError. Raises
    ValueError at the first bad row. With `skip_bad_rows`, print and skip bad rows instead.
    Pass None if the command has no such flag, so that the error does not suggest it.
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


def parse_json(text: bytes, prefix: str = "") -> Any:
    """Parse JSON. Raises ValueError with a message that starts with `prefix`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{prefix}not JSON: {error}") from error


def stdlib_rows() -> list[dict]:
    """Return rows from the functions of Python's standard library, one per signature. The prompt is
    the signature, and the completion is the first paragraph of the docstring.
    """
    rows = {}
    for node, docstring in stdlib_definitions():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph.split()) in DOCSTRING_WORDS:
            rows[f"def {node.name}({ast.unparse(node.args)}):\n"] = paragraph
    prompts = sorted(rows, key=sha256_text)  # a shuffle that is the same on every machine
    return [{"prompt": prompt, "completion": rows[prompt]} for prompt in prompts]


def get_text(row: dict, field: str) -> str:
    """Return `row[field]`. Raises KeyError if it is missing, ValueError if it is not a string."""
    if not isinstance(row[field], str):
        raise ValueError(f"{field} is {row[field]!r}, expected a string")
    return row[field]
