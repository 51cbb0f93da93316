"""One reader reads rows in all formats, and its errors say which row is bad."""

import gzip
import json
from pathlib import Path

import pytest

from engine.rows import Row, convert_rows, find_row_files, get_text, open_rows

ROWS = [{"text": "one"}, {"text": "two\u2028\u2029\x85lines"}, {"text": "three"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)  # with blank lines
CSV = "id,text\n" + "".join(f"{i},{row['text']}\n" for i, row in enumerate(ROWS))
# Values that readers of tables like to convert, and text that has to be quoted.
TABLE = [
    {"prompt": "00501", "completion": "NA"},
    {"prompt": "2024-01-02", "completion": "true"},
    {"prompt": "null", "completion": ""},
    {"prompt": "\"a\", 'b'\tc\r\nd\n", "completion": " 1e5,\u2028日本 \\n "},
]
FILES = ["list.json", "lines.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"]


def write(file: Path, text: str) -> str:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return str(file)


def read_texts(source: str, skip_bad_rows: bool | None = None) -> list[tuple[int, str]]:
    rows = convert_rows(open_rows(source), lambda row: get_text(row, "text"), skip_bad_rows)
    return list(rows)


def read_contents(source: str, **options: str) -> list[dict]:
    return [content for _, content in convert_rows(open_rows(source, **options), dict)]


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


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_values_arrive_as_they_are_written(tmp_path, datasets, name, compression):
    """The files that Hugging Face's datasets writes (and a list of JSON) give back the same rows,
    numbered from 1. No value is converted, stripped or taken for a missing one.
    """
    table, file = datasets.Dataset.from_list(TABLE), tmp_path / name
    write_file = {
        ".json": table.to_json,
        ".jsonl": table.to_json,
        ".csv": table.to_csv,
        ".tsv": lambda path: table.to_csv(path, sep="\t"),
        ".parquet": table.to_parquet,
    }[file.suffix]
    write_file(file)
    if name == "list.json":
        file.write_text(json.dumps(TABLE, indent=1))
    source = tmp_path / f"{name}{compression}"
    source.write_bytes(gzip.compress(file.read_bytes()) if compression else file.read_bytes())
    assert read_contents(str(source)) == TABLE
    assert [row.number for row in open_rows(str(source))] == [1, 2, 3, 4]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_files_of_a_spreadsheet(tmp_path, end):
    """A byte order mark is not part of the first column's name, and either line ending is read."""
    lines = ["prompt,completion", '007,"a ""b"", c"', ",d"]
    source = write(tmp_path / "a.csv", "\ufeff" + end.join(lines))
    expected = [{"prompt": "007", "completion": 'a "b", c'}, {"prompt": "", "completion": "d"}]
    assert read_contents(source) == expected


def test_long_fields(tmp_path):
    """A field of a CSV file may be longer than the csv module's limit of 131,072 characters."""
    source = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")
    assert read_texts(source) == [(1, "x" * 200_000)]


def test_folders_and_globs_are_read_in_order(tmp_path, write_parquet, capsys):
    """A folder gives the rows of all its files, and a glob those of the files that match, sorted
    by name. Row numbers never repeat, and messages have the file and its own number.
    """
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.csv", "text\na1\na2\n")
    write(tmp_path / "b.jsonl", '{"text": "b1"}\n\n{"text": "b3"}\n')
    write_parquet({"text": ["c1"]}, tmp_path / "c.parquet")
    write(tmp_path / "sub" / "d.json", '[{"text": "d1"}]')
    write(tmp_path / ".hidden.json", "[1]")
    write(tmp_path / "notes.txt", "no rows")
    numbered = list(enumerate(["a1", "a2", "b1", "b3", "c1", "d1"], start=1))
    expected = [(n if n < 4 else n + 1, text) for n, text in numbered]  # after the blank line
    assert read_texts(str(tmp_path)) == expected
    assert "reading 4 files and ignoring the others: 1 .txt" in capsys.readouterr().out
    assert read_texts(str(tmp_path / "[ab].*")) == expected[:4]
    places = [row.place for row in open_rows(str(tmp_path / "*.*"))]
    files = ["a.csv row 1", "a.csv row 2", "b.jsonl line 1", "b.jsonl line 3", "c.parquet row 1"]
    assert places == [f"{tmp_path}/{file}" for file in files]


def test_saved_datasets(tmp_path, datasets):
    """What Dataset.save_to_disk and DatasetDict.save_to_disk write gives the rows of the dataset,
    also if it was saved in several files. `split` selects one of a DatasetDict.
    """
    table = datasets.Dataset.from_list(TABLE)
    table.save_to_disk(tmp_path / "one", num_shards=3)
    splits = {"train": table, "test": table.select([2, 0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert read_contents(str(tmp_path / "one")) == read_contents(str(tmp_path / "dict")) == TABLE
    assert [row.number for row in open_rows(str(tmp_path / "one"))] == [1, 2, 3, 4]
    assert read_contents(str(tmp_path / "dict"), split="test") == [TABLE[2], TABLE[0]]
    with pytest.raises(FileNotFoundError, match="dict/validation is neither"):
        read_contents(str(tmp_path / "dict"), split="validation")


def test_a_dataset_that_was_saved_again(tmp_path, datasets):
    """Files that an earlier save_to_disk left in the folder are not part of the dataset."""
    table = datasets.Dataset.from_list(TABLE)
    table.save_to_disk(tmp_path, num_shards=2)
    table.save_to_disk(tmp_path, num_shards=1)
    assert read_contents(str(tmp_path)) == datasets.load_from_disk(tmp_path).to_list() == TABLE


def test_lines_are_read_as_they_are_needed(tmp_path):
    """The first row is read before the rest of the file, here before the damage at its end."""
    data = gzip.compress(LINES.encode())
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(data[:-4])
    number, place, line = next(open_rows(str(file)))
    assert (number, place, json.loads(line)) == (1, f"{file} line 1", ROWS[0])
    with pytest.raises(ValueError, match=r"a.jsonl.gz is truncated or damaged"):
        read_texts(str(file))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", LINES + "\n{", "a.jsonl line 6: not JSON: Expecting"),
        ("a.jsonl", LINES + "\n[1]", r"a.jsonl line 6: \[1\] is not a JSON object"),
        ("a.jsonl", LINES + "\n{}", "a.jsonl line 6: 'text' is missing"),
        ("a.json", json.dumps([*ROWS, {"text": 5}]), "a.json row 4: text is 5, expected a string"),
        ("a.csv", CSV + "4", "a.csv row 4: text is None, expected a string"),
        ("a.csv", CSV + "4,d,", "a.csv row 4: it has more fields than the first line"),
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


def test_only_the_first_bad_row_is_printed(capsys):
    """Of many bad rows, the first is printed, and at the end how many there were."""
    rows = [Row(n, f"x row {n}", {"text": "a"} if n % 2 else {}) for n in range(1, 2401)]
    texts = convert_rows(rows, lambda row: get_text(row, "text"), skip_bad_rows=True)
    assert [number for number, _ in texts] == list(range(1, 2401, 2))
    printed = "x row 2: 'text' is missing; skipped\nskipped 1,200 bad rows in all\n"
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"[1,"),
        ("a.json", b'["caf\xe9"]'),
        ("a.json", LINES.encode() + b"\n{"),
        ("a.json.gz", gzip.compress(b"[]", mtime=0)[:-4]),
        ("a.jsonl.gz", b'{"text": "plain"}'),
        ("a.csv", "text\ncafé".encode("latin1")),
        ("a.csv", b'text\n"never closed\n'),
        ("a.tsv.gz", gzip.compress(b"text\na\n", mtime=0)[:-4]),
        ("a.csv.gz", b"text\na\n"),
        ("a.parquet", b"PAR1 and more"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0)[:-4]),
        ("a.arrow", b"\xff\xff\xff\xff"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data):
    """A file that is damaged, or not what its name says, is an error that names it. Its rows
    cannot be skipped.
    """
    (tmp_path / name).write_bytes(data)
    problem = "(cannot be read as|is not UTF-8|is not a gzip|is damaged or|is truncated or damaged)"
    for skip_bad_rows in (False, True):
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name} {problem}"):
            read_texts(str(tmp_path / name), skip_bad_rows)


MISSING = dict.fromkeys(
    ["./x", "a/b/c", "x.json", "x.csv.gz", "x.tsv", "x.parquet"], "there is no "
)
MISSING |= {"*.csv": "is neither ", ".": "is neither "}  # a glob and a folder without rows


@pytest.mark.parametrize("source", MISSING)
def test_missing_files_are_named(tmp_path, monkeypatch, source):
    """A source that neither has rows nor can be the name of a hub dataset is an error. A name with
    the suffix of a file is never looked up on the hub.
    """
    monkeypatch.chdir(tmp_path)
    for call in (find_row_files, lambda source: next(open_rows(source))):
        with pytest.raises(FileNotFoundError, match=rf"{MISSING[source]}.*\.jsonl") as error:
            call(source)
        assert source in str(error.value)
    assert find_row_files("stdlib") == find_row_files("me/mine") == []


def test_rows_come_from_the_hub(monkeypatch, datasets, network):
    """A name that is not a file is a hub dataset, read with the given configuration and split. If
    the hub fails, the error has the name and the reason, and suggests data that works offline.
    """
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda repo, **options: asked.append((repo, options)) or ROWS
    )
    assert read_texts("me/mine") == list(enumerate((row["text"] for row in ROWS), start=1))
    assert next(open_rows("me/mine", "default", "test")).place == "me/mine row 1"
    assert [(repo, options["name"], options["split"]) for repo, options in asked] == [
        ("me/mine", None, "train"),
        ("me/mine", "default", "test"),
    ]

    def fail(*_, **__):
        raise FileNotFoundError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"me/mine: no route\. .*stdlib"):
        next(open_rows("me/mine"))
