import gzip
import hashlib
import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import NASTY_TEXT, TIKTOKEN, read_files

from engine.documents import (
    SUFFIXES,
    Piece,
    TextFormat,
    choose_threshold,
    cut_documents,
    hash_text,
    mark_validation,
    open_source,
    stdlib_documents,
)
from engine.rows import find_files

NASTY_DOCUMENTS = (NASTY_TEXT * 3, "a " * 30 + "\n\n\n  b\n\n", Path(__file__).read_text())


def cut(text: str, n_chars: int, chunk: int | None = None) -> list[Piece]:
    """Cut a document into pieces, reading it in chunks of `chunk` characters (default: all)."""
    chunk = chunk or max(1, len(text))
    chunks = [(text[i : i + chunk], False) for i in range(0, len(text), chunk)]
    return list(cut_documents([*chunks, ("", True)], n_chars))  # True: the document ends


def join(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_separators_in_a_txt(tmp_path):
    """<|endoftext|> in a .txt starts a new document, whatever the size of the pieces."""
    content = "First one.<|endoftext|> second\n<|endoftext|>" + "third " * 9
    (tmp_path / "a.txt").write_text(content)
    for n_chars in (1, 5, 1000):
        pieces, _ = read_files(tmp_path / "a.txt", n_chars=n_chars)
        marked = ("<|endoftext|>" * piece.starts_document + piece.text for piece in pieces)
        assert "".join(marked) == "<|endoftext|>" + content


@pytest.mark.parametrize("size", [7, 50, 4000])
def test_pieces_of_a_document_have_its_tokens(size):
    """If every word fits into a piece, the pieces have exactly the tokens of the document."""
    encode = TIKTOKEN.encode_ordinary
    for document in NASTY_DOCUMENTS:
        longest = max(map(len, document.replace("\n", " ").split(" ")))
        pieces = cut(document, max(size, longest + 1))
        assert join(pieces) == document
        assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [i for piece in pieces for i in encode(piece.text)] == encode(document)
        assert len(pieces) >= 2 or size == 4000


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_cuts_depend_on_the_document_alone(chunk):
    """A document is cut at the same places whatever chunks it is read in. No piece is blank."""
    spaced = (" \n" * 40 + "x \n" + "\n" * 70, "\t\ta\r\n" * 40, "a\t" * 40, "一\u3000" * 40)
    for document in (*NASTY_DOCUMENTS, "x" * 99, *spaced):
        for n_chars in (1, 2, 10, 30):
            pieces = cut(document, n_chars)
            assert cut(document, n_chars, chunk) == pieces
            assert join(pieces) == document
            assert not any(piece.text.isspace() for piece in pieces)
            assert max(len(piece.text.strip()) for piece in pieces) <= n_chars


def test_where_a_document_is_cut():
    """A piece ends before the last newline that follows a non-space, or else before the last space
    that does, or else at the limit. Trailing space stays in the piece.
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
    """About `fraction` of the sections go to validation, but always at least one and never all."""
    sections = [Piece(f"section {i}") for i in range(2000)]
    for fraction in (0.0, 1e-9, 0.05, 0.5, 1.0):
        for n in (2, 3, 10, 2000):
            pieces = [Piece(""), *sections[:n], Piece(" \n")]  # blank ones do not count
            threshold = choose_threshold(pieces, fraction, None)
            n_val = sum(hash_text(piece.text) < threshold for piece in sections[:n])
            assert 1 <= n_val <= n - 1
            if n == 2000 and fraction in (0.05, 0.5):
                assert abs(n_val / n - fraction) < 0.03
    for pieces in ([], [Piece("a"), Piece("\n")], [Piece("a")] * 3):
        with pytest.raises(ValueError, match="fewer than two different sections of 4000"):
            choose_threshold(pieces, 0.5, None)


def test_separators_at_documents_and_changes_of_split():
    """A separator precedes each document and each change of split. Copies are in the same split."""
    sections = [Piece(str(i % 7), i % 20 == 0) for i in range(50)]
    largest = max(hash_text(str(i)) for i in range(7))
    marked = list(mark_validation(sections, threshold=largest))  # 6 of 7 texts are for validation
    assert [piece[:2] for piece in marked] == [piece[:2] for piece in sections]
    assert {piece.is_val for piece in marked} == {True, False}
    assert len({(piece.text, piece.is_val) for piece in marked}) == 7
    for before, piece in pairwise(marked):
        assert piece.is_separated == (piece.starts_document or before.is_val != piece.is_val)


@pytest.mark.parametrize("before", [0, 20_000])
@pytest.mark.parametrize("bad", [b"caf\xe9 au lait", b"cut \xe2\x82 and \xf0\x9f\x98"])
def test_bad_bytes(tmp_path, bad, before):
    """If a file is not UTF-8, the error has the position of the first bad byte. With "replace", bad
    bytes become U+FFFD as in Python, and these are counted.
    """
    content = b"line 1\n" * before + b"genuine; " + bad + b" end"
    with pytest.raises(UnicodeDecodeError) as error:
        content.decode()
    replaced = content.decode(errors="replace")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UnicodeError, match=f"a.txt is not UTF-8 at byte {error.value.start}$"):
        read_files(tmp_path / "a.txt")
    pieces, problems = read_files(tmp_path / "a.txt", decode_errors="replace")
    assert join(pieces) == replaced
    assert problems == {"replaced characters": replaced.count("\ufffd")}
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + bad + b'"}')
    with pytest.raises(UnicodeError, match=r"a.jsonl is not UTF-8 at byte "):
        read_files(tmp_path / "a.jsonl")


def test_encodings(tmp_path):
    """A byte order mark decides the encoding. Without one, it is the given encoding or UTF-8."""
    text = "naïve café, “quotes” 日本語 😀 " * 30
    for name, content in (("a.md", text), ("a.jsonl", json.dumps({"text": text}))):
        for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-8"):
            (tmp_path / name).write_bytes(content.encode(encoding))
            given = "utf-8" if encoding == "utf-8" else "latin-1"  # the mark overrides it
            pieces, problems = read_files(tmp_path / name, encoding=given)
            assert (join(pieces), problems) == (text, {})
    for encoding, text in (("latin-1", "un café"), ("gbk", "一二三"), ("utf-16-le", "ab一")):
        (tmp_path / "b.txt").write_bytes(text.encode(encoding))
        assert read_files(tmp_path / "b.txt", encoding=encoding)[0][0].text == text
    (tmp_path / "b.txt").write_bytes(b"a word without a mark")
    with pytest.raises(UnicodeError, match=r"b.txt is not UTF-16"):
        read_files(tmp_path / "b.txt", encoding="utf-16")


def test_bad_rows(tmp_path, capsys):
    """Bad rows are left out and counted, and so is the rest of a file that cannot be parsed. A
    message names the first one. Byte order marks and blank lines are fine, and a lone surrogate
    becomes U+FFFD.
    """
    rows = ['\ufeff{"text": "first"}', "", '{"text": ""}', "{broken", '{"other": 1}', '{"text": 5}']
    rows += [r'{"text": "\ud800 \ud83d\ude00 \u2028"}', '{"text": "\u2028"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    pieces, problems = read_files(tmp_path)
    assert pieces == [Piece(t) for t in ("first", "", "\ufffd 😀 \u2028", "\u2028", "second")]
    assert problems == {"bad rows": 3}
    out = capsys.readouterr().out
    assert "a.jsonl line 4: not JSON: " in out
    assert out.count("\n") == 1
    for name, content, problem in (
        ("list.jsonl", '[{"text": "a"}]', "line 1.*not one per line, rename the file to .json"),
        ("joined.jsonl", '{"text": "a"}{"text": "b"}', "line 1.*rename the file to .json"),
        ("c.json", '[{"text": "a"},', "cannot be read as .json: .*; the rest of the file is"),
        ("c.csv", 'text\nfine\n"open', "cannot be read as .csv: .* after line 2; the rest of"),
    ):
        (tmp_path / name).write_text(content)
        pieces, problems = read_files(tmp_path / name)
        assert pieces == [Piece("fine")] * (name == "c.csv")
        assert problems == {"bad rows": 1}
        assert re.search(f"{name} {problem}", capsys.readouterr().out)


def test_damaged_gz_files(tmp_path, capsys):
    """A damaged .gz file is read up to the damage and counted. Other files are read as usual."""
    text = os.urandom(200_000).hex("\n", 40).replace("a", "é")
    whole = gzip.compress(text.encode())
    (tmp_path / "b.txt").write_text("good")
    for content in (whole[:15], whole[: len(whole) // 2]):
        (tmp_path / "a.txt.gz").write_bytes(content)
        pieces, problems = read_files(tmp_path)
        assert pieces.pop() == Piece("good")
        assert text.startswith(join(pieces))
        assert problems == {"truncated files": 1}
        assert "a.txt.gz is truncated or damaged" in capsys.readouterr().out
    assert len(join(pieces)) > 50_000


def test_files_folders_and_globs(tmp_path, capsys):
    """A path is a file, a glob or a folder. Folders are searched recursively for files with
    known suffixes, except hidden ones, and sorted. A message says how many others there are.
    """
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.parquet", "deep/c.jsonl", "deep/er/d.TXT.gz", "deep/e.png", "[1].txt"):
        (tmp_path / name).touch()

    def found(*paths: str) -> list[str]:
        files = find_files([str(tmp_path / path) for path in paths], SUFFIXES)
        return [file.relative_to(tmp_path).as_posix() for file in files]

    in_deep = ["deep/c.jsonl", "deep/er/d.TXT.gz"]
    everything = ["[1].txt", "a.parquet", "b.txt", *in_deep]
    assert found("") == found("**") == found("*") == everything
    assert found("b.txt", "deep", "[1].txt") == ["b.txt", *in_deep, "[1].txt"]
    assert found("**/*.gz", "?.txt") == ["deep/er/d.TXT.gz", "b.txt"]
    (tmp_path / ".venv").mkdir()
    for name in (".venv/a.py", ".hidden.txt", "deep/f.md", "deep/g.py", "deep/h.rst", "deep/i"):
        (tmp_path / name).touch()
    capsys.readouterr()
    assert found("deep")[2:] == ["deep/f.md", "deep/g.py", "deep/h.rst"]
    out = capsys.readouterr().out
    assert "deep: reading 5 files and ignoring the others: " in out
    assert "1 .png" in out
    assert "1 without suffix" in out
    for path in ("deep/e.png", "nothing", "*.doc"):
        wrong = re.escape(f"{path} is neither a known dataset") + ".* any of the suffixes .txt"
        with pytest.raises(FileNotFoundError, match=wrong):
            found(path)
    with pytest.raises(FileNotFoundError, match=r"^ is neither a known dataset"):
        find_files([""], SUFFIXES)


def test_links_are_followed_once(tmp_path, capsys):
    """Links to files and folders are followed. A file to which several links lead is read once, and
    a link to a parent folder is no endless loop. Broken links are counted, or named.
    """
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus, elsewhere):
        folder.mkdir()
        (folder / "a.txt").write_text(folder.name)
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "same").symlink_to(elsewhere)
    (corpus / "loop").symlink_to(corpus)
    (elsewhere / "back.txt").symlink_to(corpus / "a.txt")
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing")
    for path in (corpus, corpus / "**", tmp_path / "c*"):
        files = find_files([str(path)], SUFFIXES)
        assert files == [corpus / "a.txt", corpus / "linked" / "a.txt"]
        assert "reading 2 files and ignoring the others: 1 broken link" in capsys.readouterr().out
    os.mkfifo(tmp_path / "pipe.txt")
    for path, problem in (("corpus/gone.txt", "broken link"), ("pipe.txt", "not a regular file")):
        with pytest.raises(FileNotFoundError, match=f"{path} is (a )?{problem}"):
            find_files([str(tmp_path / path)], SUFFIXES)


def read_source(dataset: str, **options: int) -> list[Piece]:
    return list(open_source([dataset], TextFormat(), **options).pieces(0, Counter()))


def test_max_tokens_leaves_both_splits(tmp_path):
    """Each split gets at least one of the sections within the first max_tokens tokens."""
    for i in range(20):
        rows = [f"{i} document {n}" for n in range(100)]  # 4 tokens with the separator
        (tmp_path / "a.txt").write_text("<|endoftext|>".join(rows))
        pieces = read_source(str(tmp_path / "a.txt"), val_tokens=2, max_tokens=20)
        assert {piece.is_val for piece in pieces[:5]} == {True, False}


def test_identity_depends_on_the_content(tmp_path):
    """The identity of a source changes with the content of its files, but not with their path."""
    (tmp_path / "a.txt").write_text("one")
    before = open_source([str(tmp_path)], TextFormat()).identity
    assert open_source([str(tmp_path / "a.txt")], TextFormat()).identity == before
    (tmp_path / "a.txt").write_text("two")
    assert open_source([str(tmp_path)], TextFormat()).identity != before


def test_wrong_parquet_files_are_named(tmp_path, write_parquet):
    """The error for a missing or wrong column, or a damaged file, names the file."""
    write_parquet({"body": ["x"], "n": [1]}, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no text column 'text'; expected .*: body$"):
        read_files(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no text column 'n'"):
        read_files(tmp_path / "a.parquet", text_field="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1?")
    with pytest.raises(ValueError, match=r"b.parquet is damaged"):
        read_files(tmp_path / "b.parquet")
    write_parquet({"text": ["x"] * 9}, tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()  # pages first, schema last
    (tmp_path / "c.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(ValueError, match=r"c.parquet is damaged"):
        read_files(tmp_path / "c.parquet")


def test_hub_failures_name_the_data_and_the_remedy(monkeypatch, datasets, network):
    """Whatever the hub's libraries raise, the error names the data, the reason and the remedy."""
    error = Exception("no\nroute.")

    def fail(*_, **__):
        raise error

    def yield_one_row():
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"/fineweb-edu: no route\. .*dataset stdlib"):
        read_source("fineweb-edu")
    stream = datasets.IterableDataset.from_generator(yield_one_row)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    pieces = open_source(["fineweb-edu"], TextFormat()).pieces(0, Counter())
    assert next(pieces) == Piece("one")
    with pytest.raises(ConnectionError, match=r"fineweb-edu: .*dataset stdlib"):
        next(pieces)


def test_stdlib_is_a_deterministic_corpus():
    """stdlib is Python's own documentation: about half a million tokens, in a fixed order, without
    duplicates, tests or installed packages. It cannot be combined with other datasets.
    """
    documents = stdlib_documents()
    assert documents == sorted(set(documents), key=lambda d: hashlib.sha256(d.encode()).hexdigest())
    assert len(documents) > 5000
    assert 350_000 < sum(map(len, documents)) / 4.4 < 900_000  # about the number of tokens
    sentence = "statement is used to iterate over the elements of a sequence"
    assert any(sentence in " ".join(document.split()) for document in documents)
    assert not any("transformers" in d and "tokenizer" in d for d in documents)
    with pytest.raises(ValueError, match="stdlib cannot be combined"):
        open_source(["stdlib", "text.txt"], TextFormat())
