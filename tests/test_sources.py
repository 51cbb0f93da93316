import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import NASTY_TEXT

from engine import sources
from engine.sources import (
    cut_into_pieces,
    find_files,
    load_hub_rows,
    open_source,
    read_documents,
    stdlib_documents,
)
from engine.tokenizer import BatchEncoder, get_tokenizer
from fineweb import tokenize_pieces

ENCODER = BatchEncoder()


def expected_tokens(documents: list[str]) -> list[int]:
    return [i for d in documents for i in (50256, *get_tokenizer().encode_ordinary(d))]


def tokens_of(pieces: list[tuple[str, bool]]) -> list[int]:
    return tokenize_pieces(ENCODER, pieces).tokens.tolist()


def read_pieces(*dataset: object, skip: int = 0) -> tuple[list[tuple[str, bool]], Counter]:
    problems: Counter = Counter()
    return list(open_source([str(d) for d in dataset], "text").pieces(skip, problems)), problems


def test_separators_in_a_txt(tmp_path, monkeypatch):
    """<|endoftext|> in a .txt separates documents, wherever the reader's blocks end."""
    documents = ["First one.", " second\n", "third " * 9]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents))
    for size in (1, 3, 10, 1000):
        monkeypatch.setattr(sources, "PIECE_CHARS", size)
        pieces = list(read_documents(tmp_path / "a.txt", "text", Counter()))
        tokens = tokens_of(pieces)
        assert tokens == expected_tokens(documents)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_pieces_of_a_document_have_its_tokens(size, monkeypatch):
    """The tokens of a document's pieces add up to the document's, with blank runs, numbers,
    accents, emoji and code. Only the first piece starts a document.
    """
    monkeypatch.setattr(sources, "PIECE_CHARS", size)
    for document in (NASTY_TEXT, "a " * 30 + "\n\n\n  b", Path(__file__).read_text()):
        blocks = [document[i : i + size] for i in range(0, len(document), size)]
        pieces = list(cut_into_pieces(blocks))
        assert "".join(piece for piece, _ in pieces) == document
        assert [starts for _, starts in pieces] == [True] + [False] * (len(pieces) - 1)
        assert tokens_of(pieces) == expected_tokens([document])
        assert len(pieces) >= 2
        assert list(cut_into_pieces([document])) == pieces


def test_a_text_without_spaces_is_cut(monkeypatch):
    """No piece is longer than MAX_PIECE_CHARS, even where a text offers no place to cut."""
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    monkeypatch.setattr(sources, "MAX_PIECE_CHARS", 40)
    pieces = [piece for piece, _ in cut_into_pieces("ab" * 5 for _ in range(20))]
    assert "".join(pieces) == "ab" * 100
    assert max(map(len, pieces)) == 40


def test_a_source_continues_at_any_piece(tmp_path, monkeypatch):
    """Pieces from n on are all pieces but the first n, across files and in stdlib."""
    monkeypatch.setattr(sources, "stdlib_documents", lambda: list("abcdefgh"))
    rows = [{"text": f"document {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join("xyz"))
    for dataset in (tmp_path, "stdlib"):
        pieces, _ = read_pieces(dataset)
        assert read_pieces(dataset, skip=3)[0] == pieces[3:]
        assert len(pieces) == 8


def test_identity_depends_on_the_content(tmp_path):
    """Another byte in a file gives the source another identity."""
    (tmp_path / "a.txt").write_text("one")
    before = open_source([str(tmp_path)], "text").identity
    assert open_source([str(tmp_path / "a.txt")], "text").identity == before
    (tmp_path / "a.txt").write_text("two")
    assert open_source([str(tmp_path)], "text").identity != before


BAD_UTF8 = [
    b"caf\xe9 au lait",
    b"\xff\xfe",
    b"cut \xe2\x82 and \xf0\x9f\x98",
    b"surrogate \xed\xa0\xbd\xed\xb8\x80",
    b"overlong \xc0\xaf",
]


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize("bad", BAD_UTF8)
def test_bad_bytes_have_the_tokens_of_u_fffd(tmp_path, monkeypatch, bad, block):
    """Bytes that are not UTF-8 are lone surrogates in a source's pieces, as many as Python's
    "replace" makes U+FFFD, and give its tokens. Genuine U+FFFD stays what it is.
    """
    content = b"genuine \xef\xbf\xbd; " + bad + b" end"
    replaced = content.decode(errors="replace")
    row = b'{"text": "' + content + b'"}'
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.jsonl").write_bytes(row)
    monkeypatch.setattr(sources, "PIECE_CHARS", block)
    for name in ("a.txt", "a.jsonl"):
        pieces, _ = read_pieces(tmp_path / name)
        text = "".join(piece for piece, _ in pieces)
        assert text.count("\ufffd") == 1
        assert text.replace("\udcff", "\ufffd") == replaced
        assert tokens_of(pieces) == expected_tokens([replaced])
        documents = read_documents(tmp_path / name, "text", Counter())
        assert "".join(piece for piece, _ in documents) == replaced


def test_bad_rows_and_truncated_files(tmp_path, capsys):
    """Bad rows and truncated files are counted; the first is named by its line, and what is before
    the damage is used. Byte order marks and blank lines are no problem.
    """
    rows = ['\ufeff{"text": "first"}', "", '{"text": ""}', "{broken", '{"other": 1}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    pieces, problems = read_pieces(tmp_path)
    assert pieces == [("first", True), ("", True), ("second", True)]
    assert problems == {"bad rows": 3}
    out = capsys.readouterr().out
    assert "a.jsonl line 4: no text under 'text'" in out
    assert out.count("\n") == 1
    text = os.urandom(200_000).hex()
    for name, content in (("c.txt.gz", text), ("d.jsonl.gz", f'{{"text": "x"}}\n{text}')):
        whole = gzip.compress(content.encode())
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        pieces, problems = read_pieces(tmp_path / name)
        assert problems == {"truncated files": 1}
        assert f"{name} is truncated or damaged" in capsys.readouterr().out
        assert pieces[0][0] == "x" or (text.startswith(pieces[0][0]) and len(pieces[0][0]) > 50_000)


def test_files_folders_and_globs(tmp_path):
    """Files are taken as they are, folders searched recursively, globs expanded, each sorted; only
    files with known suffixes count.
    """
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.parquet", "deep/c.jsonl", "deep/er/d.txt.gz", "deep/e.png", "[1].txt"):
        (tmp_path / name).touch()

    def found(*paths: str) -> list[str]:
        files = find_files([str(tmp_path / path) for path in paths])
        return [file.relative_to(tmp_path).as_posix() for file in files]

    assert found("") == ["[1].txt", "a.parquet", "b.txt", "deep/c.jsonl", "deep/er/d.txt.gz"]
    assert found("b.txt", "deep", "[1].txt") == [
        "b.txt",
        "deep/c.jsonl",
        "deep/er/d.txt.gz",
        "[1].txt",
    ]
    assert found("**/*.gz", "?.txt") == ["deep/er/d.txt.gz", "b.txt"]
    for path in ("deep/e.png", "nothing", "*.md"):
        with pytest.raises(FileNotFoundError, match="is neither a dataset"):
            found(path)
    with pytest.raises(FileNotFoundError, match=r"^ is neither a dataset"):
        find_files([""])


def test_wrong_sources_are_named(tmp_path):
    """A missing path, a wrong suffix, a missing or wrong column, and a damaged file are errors that
    name the file.
    """
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl is neither a dataset"):
        read_pieces(tmp_path / "nothing.jsonl")
    (tmp_path / "image.png").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"image.png .* any of the suffixes .txt"):
        read_pieces(tmp_path / "image.png")
    with pytest.raises(ValueError, match="stdlib cannot be combined"):
        read_pieces("stdlib", tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; --text_field may be body or n"):
        read_pieces(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: column 'n' holds int, expected text"):
        list(open_source([str(tmp_path / "a.parquet")], "n").pieces(0, Counter()))
    (tmp_path / "b.parquet").write_bytes(b"PAR1?")
    with pytest.raises(ValueError, match=r"b.parquet is damaged"):
        read_pieces(tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 9}), tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()  # pages first, schema last
    (tmp_path / "c.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(ValueError, match=r"c.parquet is damaged"):
        read_pieces(tmp_path / "c.parquet")


def test_hub_text_streams_from_any_row(monkeypatch, datasets):
    """A hub dataset is streamed from the row where it is to continue; only its text counts."""

    def load_dataset(repo, name, split, streaming):
        assert (repo, name, split) == ("HuggingFaceFW/fineweb", "sample-10BT", "train")
        assert streaming
        rows = [{"text": f"document {i}", "url": "?"} for i in range(9)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_pieces("fineweb", skip=7)[0] == [("document 7", True), ("document 8", True)]
    assert open_source(["fineweb"], "text").n_bytes is None


@pytest.mark.parametrize("error", [OSError("no\nroute."), ValueError("no\nroute"), KeyError("no")])
def test_hub_failures_name_the_data_and_the_remedy(monkeypatch, error, datasets):
    """Whatever the hub's libraries raise, at once or in the middle of a stream, becomes one
    ConnectionError with the repository, the reason and the remedy.
    """

    def fail(*_, **__):
        raise error

    def break_off():
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ConnectionError, match=r"did not provide some/data: '?no( route)?'?\. Do this$"
    ):
        load_hub_rows("some/data", remedy="Do this")
    with pytest.raises(ConnectionError, match=r"fineweb-edu: '?no.*\. .*--dataset stdlib"):
        read_pieces("fineweb-edu")

    def load_dataset(*_, **__):
        return datasets.IterableDataset.from_generator(break_off)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pieces = open_source(["fineweb-edu"], "text").pieces(0, Counter())
    assert next(pieces) == ("one", True)
    with pytest.raises(ConnectionError, match=r"fineweb-edu: .*--dataset stdlib"):
        next(pieces)


def test_stdlib_is_a_deterministic_corpus():
    """Python's own documentation: no duplicates, the same order every time, about half a million
    tokens, and neither tests nor installed packages.
    """
    documents = stdlib_documents()
    assert documents == stdlib_documents()
    assert len(set(documents)) == len(documents) > 5000
    assert 350_000 < len(expected_tokens(documents)) < 900_000
    sentence = "statement is used to iterate over the elements of a sequence"
    assert any(sentence in " ".join(document.split()) for document in documents)
    assert not any("transformers" in d and "tokenizer" in d for d in documents)
