import json
from collections import Counter

import pytest
from conftest import expected_tokens, read_pieces

from engine import sources
from engine.hub import load_hub_rows
from engine.sources import open_source, stdlib_documents


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


def test_wrong_sources_are_named(tmp_path):
    """A missing path and a wrong suffix are errors that name the file, and stdlib stands alone."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl is neither a dataset"):
        read_pieces(tmp_path / "nothing.jsonl")
    (tmp_path / "image.png").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"image.png .* any of the suffixes .txt"):
        read_pieces(tmp_path / "image.png")
    with pytest.raises(ValueError, match="stdlib cannot be combined"):
        read_pieces("stdlib", tmp_path)


def test_wrong_parquet_files_are_named(tmp_path, write_parquet):
    """A missing or wrong column, and a damaged file, are errors that name the file."""
    write_parquet({"body": ["x"], "n": [1]}, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; --text_field may be body or n"):
        read_pieces(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: column 'n' holds int, expected text"):
        list(open_source([str(tmp_path / "a.parquet")], "n").pieces(0, Counter()))
    (tmp_path / "b.parquet").write_bytes(b"PAR1?")
    with pytest.raises(ValueError, match=r"b.parquet is damaged"):
        read_pieces(tmp_path / "b.parquet")
    write_parquet({"text": ["x"] * 9}, tmp_path / "c.parquet")
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
