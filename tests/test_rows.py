"""Rows of all forms are read by one reader, and a bad one is named."""

import gzip
import json
from pathlib import Path

import pytest

from engine.rows import check_source, convert_rows, get_text, open_rows

ROWS = [{"text": "one"}, {"text": "two\u2028\u2029\x85lines"}, {"text": "three"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)  # each second is blank


def write(file: Path, text: str) -> str:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def read_texts(source: str, skip_bad_rows: bool | None = None) -> list[tuple[int, str]]:
    rows = convert_rows(source, open_rows(source), lambda row: get_text(row, "text"), skip_bad_rows)
    return list(rows)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz", "a"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_hold_the_same_rows(tmp_path, name, mark):
    """Lists and lines of JSON, plain and gzipped, with a byte order mark or not, hold the same
    rows. The number is that of the line, or of the place in the list.
    """
    is_list = ".json" in Path(name).suffixes
    source = write(tmp_path / name, mark + (json.dumps(ROWS, indent=1) if is_list else LINES))
    texts = [row["text"] for row in ROWS]
    assert read_texts(source) == list(zip([1, 2, 3] if is_list else [1, 3, 5], texts, strict=True))


def test_lines_are_read_as_they_are_needed(tmp_path):
    """The first row of a large file does not wait for the others: here the last is damaged."""
    data = gzip.compress(LINES.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-4])
    number, line = next(iter(open_rows(str(tmp_path / "a.jsonl.gz"))))
    assert (number, json.loads(line)) == (1, ROWS[0])
    with pytest.raises(ValueError, match=r"a.jsonl.gz is truncated or damaged"):
        read_texts(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", LINES + "\n{", "a.jsonl line 6: not JSON: Expecting"),
        ("a.jsonl", LINES + "\n[1]", r"a.jsonl line 6: \[1\] is not a JSON object"),
        ("a.jsonl", LINES + "\n{}", "a.jsonl line 6: 'text' is missing"),
        ("a.json", json.dumps([*ROWS, {"text": 5}]), "a.json row 4: text is 5, expected a string"),
    ],
)
def test_bad_rows_are_named_or_skipped(tmp_path, capsys, name, text, problem):
    """A bad row is an error with its file, number, value and a remedy, which includes a flag only
    where the command has it; or it is skipped with a line.
    """
    source = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"{problem}.*; repair it$"):
        read_texts(source)
    with pytest.raises(ValueError, match=f"{problem}.*; repair it, or set skip_bad_rows$"):
        read_texts(source, skip_bad_rows=False)
    assert [text for _, text in read_texts(source, skip_bad_rows=True)] == [
        row["text"] for row in ROWS
    ]
    assert "; skipped" in capsys.readouterr().out


def test_files_that_hold_no_rows_are_named(tmp_path):
    """A .json file that is damaged or no list, and a file that is missing, are errors."""
    with pytest.raises(ValueError, match=r"a.json is not JSON: Expecting"):
        open_rows(write(tmp_path / "a.json", "[1,"))
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(ValueError, match=r"latin.json is not JSON: 'utf-8' codec"):
        open_rows(str(tmp_path / "latin.json"))
    with pytest.raises(ValueError, match=r"b.json holds a dict, expected a list of rows"):
        open_rows(write(tmp_path / "b.json", "{}"))
    for call in (check_source, open_rows):
        with pytest.raises(FileNotFoundError, match=r"there is no ./x; expected a .json or .jsonl"):
            call("./x")


def test_the_hub_has_rows(monkeypatch, datasets, network):
    """A name that is not a file is a hub dataset, read with the given configuration and split.
    Without the hub, the error has its name, the reason, and data that need no network.
    """
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda repo, **options: asked.append((repo, options)) or ROWS
    )
    assert read_texts("me/mine") == list(enumerate((row["text"] for row in ROWS), start=1))
    list(open_rows("me/mine", "default", "test"))
    assert [(repo, options["name"], options["split"]) for repo, options in asked] == [
        ("me/mine", None, "train"),
        ("me/mine", "default", "test"),
    ]

    def fail(*_, **__):
        raise FileNotFoundError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"me/mine: no route\. .*stdlib"):
        open_rows("me/mine")
