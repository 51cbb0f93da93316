import gzip
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import NASTY_TEXT, expected_tokens, read_pieces

from engine import documents
from engine.documents import check_encoding, cut_into_pieces, find_files, read_documents
from engine.tokenizer import BatchEncoder
from fineweb import tokenize_pieces

ENCODER = BatchEncoder()


def tokens_of(pieces: list[tuple[str, bool]]) -> list[int]:
    return tokenize_pieces(ENCODER, [(*piece, False) for piece in pieces]).tokens.tolist()


def test_separators_in_a_txt(tmp_path, monkeypatch):
    """<|endoftext|> in a .txt separates documents, wherever the reader's blocks end."""
    parts = ["First one.", " second\n", "third " * 9]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(parts))
    for size in (1, 3, 10, 1000):
        monkeypatch.setattr(documents, "PIECE_CHARS", size)
        pieces = list(read_documents(tmp_path / "a.txt", "text", Counter()))
        tokens = tokens_of(pieces)
        assert tokens == expected_tokens(parts)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_pieces_of_a_document_have_its_tokens(size, monkeypatch):
    """The tokens of a document's pieces add up to the document's, with blank runs, numbers,
    accents, emoji and code. Only the first piece starts a document.
    """
    monkeypatch.setattr(documents, "PIECE_CHARS", size)
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
    monkeypatch.setattr(documents, "PIECE_CHARS", 10)
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 40)
    pieces = [piece for piece, _ in cut_into_pieces("ab" * 5 for _ in range(20))]
    assert "".join(pieces) == "ab" * 100
    assert max(map(len, pieces)) == 40


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
    monkeypatch.setattr(documents, "PIECE_CHARS", block)
    monkeypatch.setattr(documents, "MAX_UNDECODABLE", 1)
    for name in ("a.txt", "a.jsonl"):
        pieces, _ = read_pieces(tmp_path / name)
        text = "".join(piece for piece, _ in pieces)
        assert text.count("\ufffd") == 1
        assert text.replace("\udcff", "\ufffd") == replaced
        assert tokens_of(pieces) == expected_tokens([replaced])
        read = read_documents(tmp_path / name, "text", Counter())
        assert "".join(piece for piece, _ in read) == replaced


def test_a_byte_order_mark_decides_the_encoding(tmp_path):
    """UTF-16 and UTF-32 with a byte order mark are decoded, as a text file; without a mark they are
    refused, as are other encodings, random bytes, and .jsonl in UTF-16.
    """
    text = "naïve café, “quotes” 日本語 😀 " * 30
    for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-8"):
        (tmp_path / "a.md").write_bytes(text.encode(encoding))
        check_encoding(tmp_path / "a.md")
        assert "".join(p for p, _ in read_documents(tmp_path / "a.md", "text", Counter())) == text
    for name, content, expected in (
        ("b.txt", "plain words".encode("utf-16-le"), "is not text: 50% of its bytes are NUL"),
        ("c.txt", ("naïve café " * 9).encode("latin-1"), "is not UTF-8: 18.2% of its bytes"),
        ("d.txt", os.urandom(9999), "is not UTF-8"),
        ("e.jsonl", '{"text": "x"}'.encode("utf-16"), "is UTF-16, expected UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} {expected}.*iconv"):
            check_encoding(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(b"cut " * 99, mtime=0)[:15]],
    ids=["no gzip", "cut"],
)
def test_a_damaged_gz_does_not_stop_the_others(tmp_path, content, capsys):
    """A file that is no gzip, or ends within its first bytes, is reported; the others are read."""
    (tmp_path / "a.txt.gz").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    pieces, problems = read_pieces(tmp_path)
    assert ("good", True) in pieces
    assert problems["truncated files"] == 1
    assert "a.txt.gz is truncated or damaged" in capsys.readouterr().out


def test_bad_rows_and_truncated_files(tmp_path, capsys):
    """Bad rows and truncated files are counted; the first is named by its line, and what is before
    the damage is used. Byte order marks and blank lines are no problem.
    """
    rows = ['\ufeff{"text": "first"}', "", '{"text": ""}', "{broken", '{"other": 1}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    pieces, problems = read_pieces(tmp_path)
    assert pieces == [("first", True), ("", True), ("second", True)]
    assert problems == {"bad rows": 3, "bad files": 0}
    out = capsys.readouterr().out
    assert "a.jsonl line 4: no text under 'text'" in out
    assert out.count("\n") == 1
    text = os.urandom(200_000).hex()
    for name, content in (("c.txt.gz", text), ("d.jsonl.gz", f'{{"text": "x"}}\n{text}')):
        whole = gzip.compress(content.encode())
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        pieces, problems = read_pieces(tmp_path / name)
        assert problems == {"truncated files": 1, "bad files": 0}
        assert f"{name} is truncated or damaged" in capsys.readouterr().out
        assert pieces[0][0] == "x" or (text.startswith(pieces[0][0]) and len(pieces[0][0]) > 50_000)


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
