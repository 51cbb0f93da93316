"""One reader reads rows in all formats, and its errors say which row is bad."""

import gzip
import json
from pathlib import Path

import pytest

from engine.rows import check_source, convert_rows, get_text, open_rows

ROWS = [{"text": "one"}, {"text": "two\u2028\u2029\x85lines"}, {"text": "three"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)  # with blank lines


def write(file: Path, text: str) -> str:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def read_texts(source: str, skip_bad_rows: bool | None = None) -> list[tuple[int, str]]:
    rows = convert_rows(source, open_rows(source), lambda row: get_text(row, "text"), skip_bad_rows)
    return list(rows)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz", "a"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_files_hold_the_same_rows(tmp_path, name, bom):
    """Lists and lines of JSON give the same rows, plain or gzipped, with or without a byte order
    mark. Each row comes with its line number, or its position in the list.
    """
    is_list = ".json" in Path(name).suffixes
    source = write(tmp_path / name, bom + (json.dumps(ROWS, indent=1) if is_list else LINES))
    texts = [row["text"] for row in ROWS]
    assert read_texts(source) == list(zip([1, 2, 3] if is_list else [1, 3, 5], texts, strict=True))


def test_lines_are_read_as_they_are_needed(tmp_path):
    """The first row is read before the rest of the file, here before the damage at its end."""
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
def test_bad_rows_are_refused_or_skipped(tmp_path, capsys, name, text, problem):
    """The error for a bad row gives the file, row number, value and remedy. The remedy mentions
    skip_bad_rows only if the command has it. With it, the row is skipped with a message.
    """
    source = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"{problem}.*; repair it$"):
        read_texts(source)
    with pytest.raises(ValueError, match=f"{problem}.*; repair it, or set skip_bad_rows$"):
        read_texts(source, skip_bad_rows=False)
    texts = [text for _, text in read_texts(source, skip_bad_rows=True)]
    assert texts == [row["text"] for row in ROWS]
    assert "; skipped" in capsys.readouterr().out


def test_files_without_rows_are_refused(tmp_path):
    """A .json file that is damaged or not a list, or a missing file, is an error that names it."""
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


def test_rows_come_from_the_hub(monkeypatch, datasets, network):
    """A name that is not a file is a hub dataset, read with the given configuration and split. If
    the hub fails, the error has the name and the reason, and suggests data that works offline.
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
