import gzip
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import NASTY_TEXT, expected_tokens, read_files

from engine import documents
from engine.documents import (
    Piece,
    TextFormat,
    choose_limit,
    cut_documents,
    draw_validation,
    find_files,
    hash_text,
    open_source,
    stdlib_documents,
)
from engine.hub import load_hub_rows
from engine.tokenizer import BatchEncoder
from fineweb import tokenize_pieces

ENCODER = BatchEncoder()
NASTY_DOCUMENTS = (NASTY_TEXT * 3, "a " * 30 + "\n\n\n  b\n\n", Path(__file__).read_text())


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [i for _, tokens in tokenize_pieces(ENCODER, pieces) for i in tokens.tolist()]


def cut(text: str, n_chars: int, block: int | None = None) -> list[Piece]:
    """The pieces of a document that is read in blocks of some characters."""
    block = block or max(1, len(text))
    blocks = [(text[i : i + block], False) for i in range(0, len(text), block)]
    return list(cut_documents([*blocks, ("", True)], n_chars))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_separators_in_a_txt(tmp_path, encoding):
    """<|endoftext|> in a .txt separates documents, several in a line or none."""
    parts = ["First one.", " second\n", "third " * 9]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(parts), encoding=encoding)
    for n_chars in (1, 5, 1000):
        pieces, _ = read_files(tmp_path / "a.txt", n_chars=n_chars)
        assert tokens_of(pieces) == expected_tokens(parts) or n_chars < 1000
        starts = [i for i, piece in enumerate(pieces) if piece.starts]
        texts = [
            "".join(piece.text for piece in pieces[i:j])
            for i, j in zip(starts, [*starts[1:], None], strict=True)
        ]
        assert texts == parts


@pytest.mark.parametrize("size", [7, 50, 4000])
def test_pieces_of_a_document_have_its_tokens(size):
    """The tokens of a document's pieces add up to the document's, with blank runs, numbers,
    accents, emoji and code, if each word fits a piece. Only the first piece starts a document.
    """
    for document in NASTY_DOCUMENTS:
        longest = max(map(len, document.replace("\n", " ").split(" ")))
        pieces = cut(document, max(size, longest + 1))
        assert "".join(piece.text for piece in pieces) == document
        assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert tokens_of(pieces) == expected_tokens([document])
        assert len(pieces) >= 2 or size == 4000


@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_cuts_depend_on_the_document_alone(block):
    """The cuts are the same whatever blocks a document is read in, with runs of spaces and newlines
    at its ends and wherever a cut may fall.
    """
    for document in (*NASTY_DOCUMENTS, "x" * 99, " \n" * 40 + "x \n" + "\n" * 70, "\t\ta\r\n" * 40):
        for n_chars in (1, 2, 10, 30):
            pieces = cut(document, n_chars)
            assert cut(document, n_chars, block) == pieces
            assert "".join(piece.text for piece in pieces) == document
            assert not any(piece.text.isspace() for piece in pieces)
            assert max(len(piece.text.strip()) for piece in pieces) <= n_chars


def test_where_a_document_is_cut():
    """Before the last newline after a non-space that fits, else before the last such space, else at
    the limit. Space at the end stays with what precedes it.
    """
    for document, expected in (
        ("one two\nthree four", ["one two", "\nthree four"]),
        ("one two\n\n\n\nthree", ["one two", "\n\n\n\nthree"]),
        ("one two three four", ["one two", " three four"]),
        ("abcdefghijklmnopqrstuvw", ["abcdefghijk", "lmnopqrstuv", "w"]),
        ("一二三四五六七八九十甲乙丙", ["一二三四五六七八九十甲", "乙丙"]),
        ("abcdefghijk\n\n", ["abcdefghijk\n\n"]),
        ("abcdefghijk\n\n.", ["abcdefghijk", "\n\n."]),
        ("\n" * 30 + "one two\nthree four\n", ["\n" * 30 + "one two", "\nthree four\n"]),
        (" " * 30, [" " * 30]),
        ("", [""]),
    ):
        assert [piece.text for piece in cut(document, 11)] == expected


def test_any_two_different_sections_have_both_splits():
    """Whatever the fraction, at least one section is drawn and one is not; else about the fraction
    is. Blank documents do not count.
    """
    sections = [Piece(f"section {i}") for i in range(2000)]
    for fraction in (0.0, 1e-9, 0.05, 0.5, 1.0):
        for n in (2, 3, 10, 2000):
            pieces = [Piece(""), *sections[:n], Piece(" \n")]
            limit = choose_limit(pieces, fraction, None)
            drawn = [hash_text(piece.text) < limit for piece in sections[:n]]
            assert 1 <= sum(drawn) <= n - 1
            if n == 2000 and fraction in (0.05, 0.5):
                assert abs(sum(drawn) / n - fraction) < 0.03
    for pieces in ([], [Piece("a"), Piece("\n")], [Piece("a")] * 3):
        with pytest.raises(ValueError, match="fewer than two different sections of 4000"):
            choose_limit(pieces, 0.5, None)


def test_a_section_beside_the_other_split_is_separated():
    """A section of a document is separated from one in the other split, not from one in its own.
    Copies of a section are in one split.
    """
    sections = [Piece(str(i % 7), i % 20 == 0) for i in range(50)]
    largest = max(hash_text(str(i)) for i in range(7))  # only its sections are not drawn
    drawn = list(draw_validation(sections, largest))
    assert [(piece.text, piece.starts) for piece in drawn] == [piece[:2] for piece in sections]
    assert {piece.is_val for piece in drawn} == {True, False}
    assert len({(piece.text, piece.is_val) for piece in drawn}) == 7
    for before, piece in pairwise(drawn):
        assert piece.is_separated == (piece.starts or before.is_val != piece.is_val)


BAD_UTF8 = [
    b"caf\xe9 au lait",
    b"\xff\xfe",
    b"cut \xe2\x82 and \xf0\x9f\x98",
    b"surrogate \xed\xa0\xbd\xed\xb8\x80",
    b"overlong \xc0\xaf",
]


@pytest.mark.parametrize("before", [0, 5, 20_000])
@pytest.mark.parametrize("bad", BAD_UTF8)
def test_bad_bytes(tmp_path, bad, before):
    """A file that is not UTF-8 is an error with the place of the first bad byte. With "replace" it
    has as many U+FFFD as Python's "replace" makes, and they are counted.
    """
    content = b"line 1\n" * before + b"genuine; " + bad + b" end"
    with pytest.raises(UnicodeDecodeError) as error:
        content.decode()
    replaced = content.decode(errors="replace")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UnicodeError, match=f"a.txt is not UTF-8 at byte {error.value.start}$"):
        read_files(tmp_path / "a.txt")
    pieces, problems = read_files(tmp_path / "a.txt", decode_errors="replace")
    assert "".join(piece.text for piece in pieces) == replaced
    assert problems == {"replaced characters": replaced.count("\ufffd")}
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + bad + b'"}')
    with pytest.raises(UnicodeError, match=r"a.jsonl is not UTF-8 at byte "):
        read_files(tmp_path / "a.jsonl")


def test_encodings(tmp_path):
    """A file is in UTF-8, or what its byte order mark says, or the given encoding; .jsonl too."""
    text = "naïve café, “quotes” 日本語 😀 " * 30
    for name, content in (("a.md", text), ("a.jsonl", json.dumps({"text": text}))):
        for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-8"):
            (tmp_path / name).write_bytes(content.encode(encoding))
            for given in ("utf-8", "latin-1"):
                if encoding != "utf-8" or given == "utf-8":
                    pieces, problems = read_files(tmp_path / name, encoding=given)
                    assert ("".join(piece.text for piece in pieces), problems) == (text, {})
    for encoding, text in (("latin-1", "un café"), ("gbk", "一二三"), ("utf-16-le", "ab一")):
        (tmp_path / "b.txt").write_bytes(text.encode(encoding))
        assert read_files(tmp_path / "b.txt", encoding=encoding)[0][0].text == text
    (tmp_path / "b.txt").write_bytes(b"a word without a mark")
    with pytest.raises(UnicodeError, match=r"b.txt is not UTF-16"):
        read_files(tmp_path / "b.txt", encoding="utf-16")


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(b"cut " * 99, mtime=0)[:15]],
    ids=["no gzip", "cut"],
)
def test_a_damaged_gz_does_not_stop_the_others(tmp_path, content, capsys):
    """A file that is no gzip, or ends within its first bytes, is reported; the others are read."""
    (tmp_path / "a.txt.gz").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    pieces, problems = read_files(tmp_path)
    assert Piece("good") in pieces
    assert problems == {"truncated files": 1}
    assert "a.txt.gz is truncated or damaged" in capsys.readouterr().out


def test_bad_rows_and_truncated_files(tmp_path, capsys):
    """Bad rows and truncated files are counted; the first is named by its line, and what is before
    the damage is used. Byte order marks and blank lines are no problem,
    and a lone surrogate becomes U+FFFD.
    """
    rows = ['\ufeff{"text": "first"}', "", '{"text": ""}', "{broken", '{"other": 1}', '{"text": 5}']
    rows += [r'{"text": "\ud800 \ud83d\ude00 \u2028"}', '{"text": "\u2028"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    pieces, problems = read_files(tmp_path)
    texts = ["first", "", "\ufffd 😀 \u2028", "\u2028", "second"]
    assert pieces == [Piece(text) for text in texts]
    assert problems == {"bad rows": 3}
    out = capsys.readouterr().out
    assert "a.jsonl line 4: no text under 'text'" in out
    assert out.count("\n") == 1
    text = os.urandom(200_000).hex("\n", 40).replace("a", "é")
    for name, content in (("c.txt.gz", text), ("d.jsonl.gz", f'{{"text": "x"}}\n{text}')):
        whole = gzip.compress(content.encode())
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        pieces, problems = read_files(tmp_path / name)
        assert problems["truncated files"] == 1
        assert f"{name} is truncated or damaged" in capsys.readouterr().out
        read = "".join(piece.text for piece in pieces)
        assert pieces[0].text == "x" or (text.startswith(read) and len(read) > 50_000)


def test_files_folders_and_globs(tmp_path, capsys):
    """Files are taken as they are, folders searched recursively, globs expanded, each sorted; only
    files with known suffixes count, and a line says what a folder has besides. Hidden files and
    folders are not searched.
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
    (tmp_path / ".venv").mkdir()
    for name in (".venv/a.py", ".hidden.txt", "deep/f.md", "deep/g.py", "deep/h.rst", "deep/i"):
        (tmp_path / name).touch()
    capsys.readouterr()
    assert found("deep")[2:] == ["deep/f.md", "deep/g.py", "deep/h.rst"]
    assert "deep: 5 files are read, others are left out: " in (out := capsys.readouterr().out)
    assert "1 .png" in out
    assert "1 without suffix" in out
    for path in ("deep/e.png", "nothing", "*.doc"):
        with pytest.raises(FileNotFoundError, match="is neither a dataset"):
            found(path)
    with pytest.raises(FileNotFoundError, match=r"^ is neither a dataset"):
        find_files([""])


def read_source(*dataset: object, skip: int = 0, **options: int) -> list[Piece]:
    source = open_source([str(d) for d in dataset], TextFormat(), **options)
    return list(source.pieces(skip, Counter()))


def test_a_source_continues_at_any_piece(tmp_path, monkeypatch):
    """Pieces from n on are all pieces but the first n, across files and in stdlib."""
    monkeypatch.setattr(documents, "stdlib_documents", lambda: list("abcdefgh"))
    rows = [{"text": f"document {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join("xyz"))
    for dataset in (tmp_path, "stdlib"):
        pieces = read_source(dataset)
        assert read_source(dataset, skip=3) == pieces[3:]
        assert len(pieces) == 8


def test_max_tokens_leaves_both_splits(tmp_path):
    """If the first max_tokens tokens hold two different sections, both splits get one of them,
    whatever the hashes of later sections are.
    """
    for i in range(20):
        rows = [f"{i} document {n}" for n in range(100)]
        (tmp_path / "a.txt").write_text("<|endoftext|>".join(rows))
        pieces = read_source(tmp_path / "a.txt", val_tokens=2, max_tokens=20)
        tokens, splits = 0, set()
        for piece in pieces:
            splits |= {piece.is_val} if tokens + 2 <= 20 else set()
            tokens += len(tokens_of([piece]))
        assert splits == {True, False}


def test_identity_depends_on_the_content(tmp_path):
    """Another byte in a file gives the source another identity."""
    (tmp_path / "a.txt").write_text("one")
    before = open_source([str(tmp_path)], TextFormat()).identity
    assert open_source([str(tmp_path / "a.txt")], TextFormat()).identity == before
    (tmp_path / "a.txt").write_text("two")
    assert open_source([str(tmp_path)], TextFormat()).identity != before


def test_wrong_sources_are_named(tmp_path):
    """A missing path and a wrong suffix are errors that name the file, and stdlib stands alone."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl is neither a dataset"):
        read_files(tmp_path / "nothing.jsonl")
    (tmp_path / "image.png").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"image.png .* any of the suffixes .txt"):
        read_files(tmp_path / "image.png")
    with pytest.raises(ValueError, match="stdlib cannot be combined"):
        read_source("stdlib", tmp_path)


def test_wrong_parquet_files_are_named(tmp_path, write_parquet):
    """A missing or wrong column, and a damaged file, are errors that name the file."""
    write_parquet({"body": ["x"], "n": [1]}, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' of text; text_field may be body$"):
        read_files(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'n' of text"):
        read_files(tmp_path / "a.parquet", text_field="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1?")
    with pytest.raises(ValueError, match=r"b.parquet is damaged"):
        read_files(tmp_path / "b.parquet")
    write_parquet({"text": ["x"] * 9}, tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()  # pages first, schema last
    (tmp_path / "c.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(ValueError, match=r"c.parquet is damaged"):
        read_files(tmp_path / "c.parquet")


def test_hub_text_streams_from_any_row(monkeypatch, datasets):
    """A hub dataset is streamed from the row where it is to continue; only its text counts."""

    def load_dataset(repo, name, split, streaming):
        assert (repo, name, split) == ("HuggingFaceFW/fineweb", "sample-10BT", "train")
        assert streaming
        rows = [{"text": f"document {i}", "url": "?"} for i in range(9)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_source("fineweb", skip=7) == [Piece("document 7"), Piece("document 8")]
    assert open_source(["fineweb"], TextFormat()).n_bytes is None


@pytest.mark.parametrize("error", [OSError("no\nroute."), ValueError("no\nroute"), KeyError("no")])
def test_hub_failures_name_the_data_and_the_remedy(monkeypatch, error, datasets, network):
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
    with pytest.raises(ConnectionError, match=r"fineweb-edu: '?no.*\. .*dataset stdlib"):
        read_source("fineweb-edu")

    def load_dataset(*_, **__):
        return datasets.IterableDataset.from_generator(break_off)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pieces = open_source(["fineweb-edu"], TextFormat()).pieces(0, Counter())
    assert next(pieces) == Piece("one")
    with pytest.raises(ConnectionError, match=r"fineweb-edu: .*dataset stdlib"):
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
