import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import NASTY_TEXT

import fineweb
import text
from data import TokenShards, open_shard, read_manifest
from fineweb import PrepareConfig, main
from tokenizer import get_tokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [NASTY_TEXT, "One.\n", "  two  ", "Three and\n\n\nthree. " * 40, NASTY_TEXT[::-1]] * 6


def expected_tokens(documents: list[str]) -> list[int]:
    """The definition of a shard's content, in three lines."""
    tokens = []
    for document in documents:
        tokens += [50256, *get_tokenizer().encode_ordinary(document)]
    return tokens


def all_tokens(folder: Path) -> list[int]:
    shards = [open_shard(folder / s["name"]) for s in read_manifest(folder)["shards"]]
    return np.concatenate(shards).tolist()


def prepare(folder: Path, *dataset: object, **options) -> dict:
    options = {"shard_size": 300, "val_tokens": 100, "num_proc": 2, **options}
    main(PrepareConfig(dataset=[str(d) for d in dataset], out_dir=str(folder), **options))
    return read_manifest(folder)


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return file


def test_every_format_gives_the_same_tokens(tmp_path, jsonl):
    """.jsonl, .jsonl.gz and .parquet, and one .txt a document, become exactly the documents'
    tokens, each after <|endoftext|>; val comes first and has the size asked for.
    """
    with gzip.open(tmp_path / "documents.jsonl.gz", "wb") as file:
        file.write(jsonl.read_bytes())
    table = pyarrow.table({"text": DOCUMENTS})
    pyarrow.parquet.write_table(table, tmp_path / "documents.parquet")
    folder = tmp_path / "txt" / "deep"
    folder.mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        text = document.replace("<|endoftext|>", "<|end|>")  # in a .txt it is a separator
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    expected = expected_tokens(DOCUMENTS)
    for i, source in enumerate(("documents.jsonl", "documents.jsonl.gz", "documents.parquet")):
        manifest = prepare(tmp_path / f"out{i}", tmp_path / source)
        assert all_tokens(tmp_path / f"out{i}") == expected
        assert manifest["complete"]
        assert [s["tokens"] for s in manifest["shards"]][:2] == [100, 300]
    prepare(tmp_path / "out_txt", tmp_path / "txt")
    separated = [d.replace("<|endoftext|>", "<|end|>") for d in DOCUMENTS]
    assert all_tokens(tmp_path / "out_txt") == expected_tokens(separated)
    assert len(TokenShards(tmp_path / "out0", "val")) == 100
    assert len(TokenShards(tmp_path / "out0", "train")) == len(expected) - 100


def test_separators_in_a_txt(tmp_path):
    """A .txt with <|endoftext|> lines is several documents, wherever the reader's blocks end."""
    documents = ["First one.", " second\n", "third " * 9]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents))
    for size in (1, 3, 10, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "PIECE_CHARS", size)
            pieces = list(text.read_file(tmp_path / "a.txt", "text", Counter()))
        rows = fineweb.encode(pieces)
        assert np.concatenate(rows).tolist() == expected_tokens(documents)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_pieces_of_a_document_have_its_tokens(size, monkeypatch):
    """A long document cut into pieces gives the tokens of the whole: blank runs, numbers, accents,
    emoji and code included.
    """
    monkeypatch.setattr(text, "PIECE_CHARS", size)
    for document in (NASTY_TEXT, "a " * 30 + "\n\n\n  b", Path(__file__).read_text()):
        blocks = [document[i : i + size] for i in range(0, len(document), size)]
        pieces = list(text.in_pieces(blocks))
        assert "".join(piece for piece, _ in pieces) == document
        assert [starts for _, starts in pieces] == [True] + [False] * (len(pieces) - 1)
        assert np.concatenate(fineweb.encode(pieces)).tolist() == expected_tokens([document])
        assert len(pieces) >= 2


def test_a_text_without_any_space_is_cut_all_the_same(monkeypatch):
    """Memory stays bounded by MAX_PIECE_CHARS where a text offers no place to cut."""
    monkeypatch.setattr(text, "PIECE_CHARS", 10)
    monkeypatch.setattr(text, "MAX_PIECE_CHARS", 40)
    pieces = [piece for piece, _ in text.in_pieces("ab" * 5 for _ in range(20))]
    assert "".join(pieces) == "ab" * 100
    assert max(map(len, pieces)) == 40


def test_a_long_blank_run_is_tokenised():
    """A document of a million spaces neither crashes the tokeniser nor takes for ever."""
    (row,) = fineweb.encode([("x" + " " * 1_000_000, True)])
    assert get_tokenizer().decode(row[1:].tolist()) == "x" + " " * 1_000_000


def test_bad_input_is_handled_and_counted(tmp_path, capsys):
    """Empty documents, bytes that are no UTF-8, bad rows and a truncated .gz cost nothing else and
    stand in the summary; the first bad row is named by its line.
    """
    good = [json.dumps({"text": f"number {i} " * 50}) for i in range(20)]
    rows = [*good, '{"text": ""}', '{"text": "  \\n"}', "{broken", '{"other": 1}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join(rows).encode() + b'\n{"text": "caf\xe9 au lait"}\n'
    )
    whole = gzip.compress(os.urandom(200_000).hex().encode())
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl").write_text('{"text": "lone \\ud800 surrogate"}\n')
    manifest = prepare(tmp_path / "out", tmp_path)
    summary = manifest["summary"]
    assert summary["documents"] == 25
    assert summary["empty documents"] == 2
    assert summary["bad rows"] == 3
    assert summary["truncated files"] == 1
    assert summary["pieces with undecodable bytes"] == 1
    out = capsys.readouterr().out
    assert "a.jsonl line 23" in out
    assert "b.txt.gz is truncated" in out
    assert "3 bad rows" in out


def test_documents_longer_than_a_shard(tmp_path):
    """A document may span many shards; no shard is longer than asked and none is lost."""
    (tmp_path / "long.txt").write_text("All work and no play. " * 1000)
    manifest = prepare(tmp_path / "out", tmp_path / "long.txt", shard_size=77)
    sizes = [s["tokens"] for s in manifest["shards"] if s["split"] == "train"]
    assert set(sizes[:-1]) == {77}
    assert all_tokens(tmp_path / "out") == expected_tokens(["All work and no play. " * 1000])


def test_max_tokens_is_exact(tmp_path, jsonl):
    """The first max_tokens tokens are written and no others."""
    prepare(tmp_path / "out", jsonl, max_tokens=1234)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)[:1234]


def cmdline(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # the process has just ended
        return b""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_killed_preparation_goes_on_byte_identical(tmp_path):
    """kill -9 at several moments and the same command again: in the end every file is the one of an
    uninterrupted run.
    """
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{rng.integers(1e9)} words " * 200}) for _ in range(3000)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    options = {"shard_size": 50_000, "val_tokens": 10_000}
    prepare(tmp_path / "whole" / "out", tmp_path / "big.jsonl", **options)
    killed = tmp_path / "killed" / "out"
    command = [sys.executable, "fineweb.py", "--dataset", str(tmp_path / "big.jsonl")]
    command += ["--out_dir", str(killed), "--shard_size", "50000", "--val_tokens", "10000"]
    kills = 0
    for wanted in (2, 7, 15):
        process = subprocess.Popen([*command, "--num_proc", "2"], cwd=ROOT)
        while process.poll() is None and len(list(killed.glob("*.npy"))) < wanted:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    time.sleep(1)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(killed).encode() in cmdline(p)]
    assert not left, "workers outlived their parent"
    assert not read_manifest(killed)["complete"]
    prepare(killed, tmp_path / "big.jsonl", **options)
    assert snapshot(killed) == snapshot(tmp_path / "whole" / "out")


def test_a_damaged_shard_is_made_again(tmp_path, jsonl):
    """The same command checks what is there: from a shard that is gone or has another sha256 on,
    all is made anew.
    """
    prepare(tmp_path / "out", jsonl)
    before = snapshot(tmp_path / "out")
    (tmp_path / "out" / "out_train_000001.npy").write_bytes(b"?")
    prepare(tmp_path / "out", jsonl)
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "out" / "out_val_000000.npy").unlink()
    prepare(tmp_path / "out", jsonl)
    assert snapshot(tmp_path / "out") == before


def test_complete_and_changed_preparations(tmp_path, jsonl, capsys):
    """A second call says that all is there; one with other options is refused and harms nothing."""
    prepare(tmp_path / "out", jsonl)
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    prepare(tmp_path / "out", jsonl)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another shard_size"):
        prepare(tmp_path / "out", jsonl, shard_size=400)
    assert snapshot(tmp_path / "out") == before


def test_too_little_text_says_so_and_can_be_mended(tmp_path, jsonl):
    """val_tokens that leave nothing for training are an error; a smaller number then works."""
    with pytest.raises(ValueError, match="lower --val_tokens"):
        prepare(tmp_path / "out", jsonl, val_tokens=10**6, shard_size=10**6)
    prepare(tmp_path / "out", jsonl)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_wrong_sources_are_named(tmp_path):
    """A path that is nothing, of another type, or without the column, is an error that names it."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl is neither a data set"):
        prepare(tmp_path / "out", tmp_path / "nothing.jsonl")
    (tmp_path / "image.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"image.png is none of .txt"):
        prepare(tmp_path / "out", tmp_path / "image.png")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text'; --text_field may be one of body"):
        prepare(tmp_path / "out", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1?")
    with pytest.raises(ValueError, match=r"b.parquet is damaged"):
        prepare(tmp_path / "out", tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 9}), tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()  # its pages come first, its schema last
    (tmp_path / "c.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(ValueError, match=r"c.parquet is damaged"):
        prepare(tmp_path / "out", tmp_path / "c.parquet")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_all_start_methods_give_the_same(tmp_path, jsonl, method):
    """Tokenisation works where processes fork and where they spawn (Windows, macOS)."""
    program = (
        f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
        f"import fineweb; fineweb.main(fineweb.PrepareConfig(dataset=[{str(jsonl)!r}], "
        f"out_dir={str(tmp_path / 'out')!r}, val_tokens=100, num_proc=2))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_a_killed_worker_ends_in_a_line(tmp_path, jsonl, monkeypatch):
    """A worker that the system kills ends the preparation with the remedy instead of a hang."""
    monkeypatch.setattr(fineweb, "get_tokenizer", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="smaller --num_proc"):
        list(fineweb.tokenize(lambda: iter([("text", True)]), 1))


def test_hub_sets_stream_and_go_on(tmp_path, monkeypatch):
    """A hub data set is streamed row by row, and an interrupted preparation goes on at its row."""
    read = []

    def rows():
        for i, document in enumerate(DOCUMENTS):
            read.append(i)
            yield {"text": document, "url": "?"}

    def load_dataset(repo, name, split, streaming):
        assert (repo, name, split) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")
        assert streaming
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(tmp_path / "out", "fineweb-edu")
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)
    before = snapshot(tmp_path / "out")
    manifest = json.loads(before["manifest.json"])
    manifest["complete"], manifest["shards"] = False, manifest["shards"][:3]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepare(tmp_path / "out", "fineweb-edu")
    assert snapshot(tmp_path / "out") == before


def test_an_unreachable_hub_says_what_works_without(tmp_path, monkeypatch):
    """Without a network the error says what failed and what needs none."""

    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"no route.*--dataset stdlib"):
        prepare(tmp_path / "out", "fineweb-edu")


def test_ready_made_shards(tmp_path, monkeypatch):
    """Ready-made shards are fetched until there are enough, and read as they are."""

    def hf_hub_download(repo, name, repo_type, local_dir):
        assert (repo, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 1000
        file = Path(local_dir) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(header.tobytes() + np.full(1000, 7, dtype="<u2").tobytes())
        return str(file)

    monkeypatch.setattr(fineweb, "hf_hub_download", hf_hub_download)
    prepare(tmp_path / "out", "fineweb10B-gpt2", max_tokens=2500)
    assert len(TokenShards(tmp_path / "out", "train")) == 3000
    assert len(TokenShards(tmp_path / "out", "val")) == 1000


def test_stdlib_is_a_deterministic_corpus(tmp_path):
    """Python's own documentation: no duplicates, the same order every time, about half a million
    tokens, and neither tests nor installed packages.
    """
    documents = text.stdlib_documents()
    assert documents == text.stdlib_documents()
    assert len(set(documents)) == len(documents) > 5000
    assert 350_000 < len(expected_tokens(documents)) < 900_000
    sentence = "statement is used to iterate over the elements of a sequence"
    assert any(sentence in " ".join(document.split()) for document in documents)
    assert not any("transformers" in d and "tokenizer" in d for d in documents)


def test_real_text_has_the_tokens_of_tiktoken(shared_data, tmp_path):
    """Real web text and a play of a million characters become exactly tiktoken's tokens."""
    web, play = shared_data / "fineweb_edu_sample_docs.jsonl", shared_data / "tinyshakespeare.txt"
    prepare(tmp_path / "out", web, play, shard_size=100_000, val_tokens=20_000)
    documents = [json.loads(line)["text"] for line in web.read_text().splitlines()]
    documents.append(play.read_bytes().decode())
    assert all_tokens(tmp_path / "out") == expected_tokens(documents)
