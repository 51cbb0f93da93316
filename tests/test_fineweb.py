import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import NASTY_TEXT, ROOT, expected_tokens

import fineweb
from engine.config import parse_flags
from engine.documents import find_files, open_source, read_pieces
from engine.files import lock_folder
from engine.shards import TokenShards, open_shard, read_manifest
from engine.tokenizer import get_tokenizer
from fineweb import PrepareConfig, main

TEXTS = (NASTY_TEXT, "One.\n", "  two  ", "Three and\n\n\nthree. " * 40, NASTY_TEXT[::-1])
DOCUMENTS = [f"{text}{i}" for i in range(6) for text in TEXTS]


def all_tokens(folder: Path) -> list[int]:
    shards = [open_shard(folder / s["name"]) for s in read_manifest(folder)["shards"]]
    return np.concatenate(shards).tolist()


def split_tokens(folder: Path) -> tuple[list[int], list[int]]:
    """The tokens for training and for validation."""
    splits = [TokenShards(folder, split) for split in ("train", "val")]
    train, val = (split.read(0, len(split)).tolist() for split in splits)
    return train, val


def expected_split(documents: list[str], file: Path) -> tuple[list[int], list[int]]:
    """The tokens for training and for validation, if whole documents are drawn: those whose sha256
    is among the lowest, about 100 tokens of a file with 4.4 bytes a token.
    """
    n_bytes = file.stat().st_size * (3 if file.suffix in (".gz", ".parquet") else 1)
    fraction = min(0.5, 100 / (n_bytes / 4.4))
    hashes = [int(hashlib.sha256(d.encode()).hexdigest(), 16) / 16**64 for d in documents]
    pairs = list(zip(documents, hashes, strict=True))
    return (
        expected_tokens([document for document, x in pairs if x >= fraction]),
        expected_tokens([document for document, x in pairs if x < fraction]),
    )


def prepare(folder: Path, *dataset: object, **options) -> dict:
    options = {"shard_size": 300, "val_tokens": 100, **options}
    main(PrepareConfig(dataset=[str(d) for d in dataset], out_dir=str(folder), **options))
    return read_manifest(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return file


@pytest.fixture
def unordered(monkeypatch):
    """Files in a random order, as documents of the hub are: validation is their first tokens."""

    def open_unordered(dataset, text_format, val_tokens, max_tokens):
        def read(skip, problems):
            files = find_files(dataset)
            pieces = (p for f in files for p in read_pieces(f, text_format, problems))
            return islice(pieces, skip, None)

        source = open_source(dataset, text_format, val_tokens, max_tokens)
        return replace(source, split={"val_tokens": val_tokens}, pieces=read)

    monkeypatch.setattr(fineweb, "open_source", open_unordered)


def test_every_format_gives_the_same_tokens(tmp_path, jsonl, write_parquet):
    """.jsonl, .jsonl.gz, .parquet and one .txt a document become exactly the documents' tokens,
    each after <|endoftext|>, in the split that its hash gives. Full shards have the requested size.
    """
    with gzip.open(tmp_path / "documents.jsonl.gz", "wb") as file:
        file.write(jsonl.read_bytes())
    write_parquet({"text": DOCUMENTS}, tmp_path / "documents.parquet")
    folder = tmp_path / "txt" / "deep"
    folder.mkdir(parents=True)
    for i, document in enumerate(DOCUMENTS):
        text = document.replace("<|endoftext|>", "<|end|>")  # in a .txt it is a separator
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    for i, source in enumerate(("documents.jsonl", "documents.jsonl.gz", "documents.parquet")):
        manifest = prepare(tmp_path / f"out{i}", tmp_path / source)
        assert split_tokens(tmp_path / f"out{i}") == expected_split(DOCUMENTS, tmp_path / source)
        assert manifest["complete"]
        sizes = [s["tokens"] for s in manifest["shards"] if s["split"] == "train"]
        assert set(sizes[:-1]) == {300}
    prepare(tmp_path / "out_txt", tmp_path / "txt")
    separated = [d.replace("<|endoftext|>", "<|end|>") for d in DOCUMENTS]
    (tmp_path / "all").write_text("".join(separated))
    assert split_tokens(tmp_path / "out_txt") == expected_split(separated, tmp_path / "all")


def test_bad_input_is_handled_and_counted(tmp_path, capsys, unordered):
    """Empty documents, bytes that are not UTF-8, bad rows and a truncated .gz affect nothing else
    and are counted in the summary; the first bad row is named by its line.
    """
    good = [json.dumps({"text": f"number {i} " * 50}) for i in range(20)]
    rows = [*good, '{"text": ""}', '{"text": "  \\n"}', "{broken", '{"other": 1}', '{"text": 5}']
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join(rows).encode() + b'\n{"text": "caf\xe9 au lait"}\n'
    )
    whole = gzip.compress(os.urandom(20_000).hex("\n", 40).encode())
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl").write_text('{"text": "lone \\ud800 surrogate"}\n')
    manifest = prepare(tmp_path / "out", tmp_path, decode_errors="replace")
    assert manifest["options"]["decode_errors"] == "replace"
    train, val = split_tokens(tmp_path / "out")
    assert manifest["summary"] == {
        "documents": 25,
        "val tokens": len(val),
        "train tokens": len(train),
        "empty documents": 2,
        "replaced characters": 1,
        "bad rows": 3,
        "truncated files": 1,
        "bad files left out": 0,
    }
    out = capsys.readouterr().out
    assert "a.jsonl line 23" in out
    assert "b.txt.gz is truncated" in out
    assert "3 bad rows" in out


def prepare_sections(folder: Path, text: str, name: str = "a.txt", **options) -> list[list[str]]:
    """Prepare one document; return the parts of it in either split."""
    folder.mkdir()
    (folder / name).write_text(text)
    prepare(folder / "out", folder / name, val_tokens=None, shard_size=10**6, **options)
    decode = get_tokenizer().decode
    return [decode(tokens).split("<|endoftext|>")[1:] for tokens in split_tokens(folder / "out")]


def test_validation_is_drawn_from_all_of_a_long_document(tmp_path):
    """One long document is drawn in sections of 4,000 characters: together they are the document,
    about 5% are for validation, from its first, second, third and last quarter alike, and each part
    starts with <|endoftext|>. It counts as one document.
    """
    text = " ".join(f"word{i}" for i in range(120_000))
    train, val = prepare_sections(tmp_path / "a", text)
    assert "".join(sorted(train + val, key=text.index)) == text
    assert 0.02 < len("".join(val)) / len(text) < 0.09
    assert {4 * text.index(part) // len(text) for part in val} == {0, 1, 2, 3}
    assert read_manifest(tmp_path / "a" / "out")["summary"]["documents"] == 1


HARD_TO_CUT = {
    "cjk": "".join(chr(0x4E00 + i * i % 9999) for i in range(9000)),
    "dna": "".join("ACGT"[i * i % 13 % 4] for i in range(9000)),
    "tabs": "".join(f"word{i}\t" for i in range(2000)),
    "ideographic spaces": "".join(f"{chr(0x4E00 + i)}\u3000" for i in range(5000)),
    "space at the ends": "\n" * 9000 + "a" * 4001 + "\n" * 9000,
    "two sections": "a" * 4001,
    "30 kB": " ".join(f"word{i}" for i in range(3500)),
}


@pytest.mark.parametrize("name", HARD_TO_CUT)
def test_any_text_of_two_sections_has_both_splits(tmp_path, name):
    """Text without spaces or newlines is prepared too, nothing of it is lost, and what is for
    validation is at most about a half, of 30 kB an eighth.
    """
    text = HARD_TO_CUT[name]
    train, val = prepare_sections(tmp_path / "a", text)
    assert sorted("".join(train + val)) == sorted(text)
    if name != "space at the ends":
        assert 0 < len("".join(val)) <= len(text) / 2 + 4000
    if name == "30 kB":
        assert len("".join(val)) < len(text) / 6


def test_text_of_one_section_is_refused(tmp_path):
    """One section cannot be split; the error says how much text is needed, and with it the same
    command works. Nothing is written before.
    """
    file = tmp_path / "a.txt"
    for text in ("a" * 4000, "a" * 4000 + "<|endoftext|>" + "a" * 4000, "  \n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"fewer than two different sections .*add text"):
            prepare(tmp_path / "out", file)
        assert not (tmp_path / "out").exists()
    file.write_text("a" * 4000 + "<|endoftext|>b")
    assert prepare(tmp_path / "out", file)["complete"]


def test_small_files_are_documents(tmp_path):
    """30 files that end in newlines, one of which begins a section, are 30 documents."""
    (tmp_path / "text").mkdir()
    for i in range(30):
        text = f"{i} " + "x" * 3998 + "\n" * (i % 3)
        (tmp_path / "text" / f"{i}.txt").write_text(text[: 4000 + i % 3])
    summary = prepare(tmp_path / "out", tmp_path / "text")["summary"]
    assert (summary["documents"], summary["empty documents"]) == (30, 0)


def test_a_document_and_its_copies_are_in_one_split(tmp_path):
    """Among copies, adding other documents before them or after them changes no split."""
    documents = [f"document {i} " * 20 for i in range(400)]
    for name, rows in (("one", documents), ("two", [*documents[::-1], "new " * 99, *documents])):
        lines = [json.dumps({"text": row}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        prepare(tmp_path / name, tmp_path / f"{name}.jsonl", val_tokens=None, shard_size=10**6)
    splits = [
        [set(get_tokenizer().decode(tokens).split("<|endoftext|>")) for tokens in split_tokens(out)]
        for out in (tmp_path / "one", tmp_path / "two")
    ]
    assert 8 < len(splits[0][1]) < 40
    assert splits[0][1] == splits[1][1]
    assert splits[0][0] == splits[1][0] - {"new " * 99}


@pytest.mark.parametrize(
    "split", [{"val_tokens": 100}, {"val_fraction": 0.05}], ids=["leading", "drawn"]
)
def test_folders_of_earlier_versions(tmp_path, jsonl, split):
    """A complete folder of files that an earlier version split in another way stays complete and as
    it is; an incomplete one is refused, because its cuts cannot be continued.
    """
    prepare(tmp_path / "out", jsonl)
    manifest = read_manifest(tmp_path / "out")
    del manifest["options"]["val_tokens"], manifest["options"]["section_chars"]
    manifest["options"] |= split
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(tmp_path / "out")
    prepare(tmp_path / "out", jsonl)
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"another .*shard_size"):
        prepare(tmp_path / "out", jsonl, shard_size=400)
    (tmp_path / "out" / manifest["shards"][-1]["name"]).unlink()
    for complete in (True, False):
        (tmp_path / "out" / "manifest.json").write_text(
            json.dumps({**manifest, "complete": complete})
        )
        with pytest.raises(ValueError, match=r"another section_chars.*delete the folder"):
            prepare(tmp_path / "out", jsonl)


def test_files_in_other_encodings(tmp_path, capsys):
    """A file in Latin-1 is refused by name and place before anything is written. Each remedy of the
    error works, and is noted in the manifest if the shards depend on it.
    """
    (tmp_path / "text").mkdir()
    good, latin = "Grüße. " * 900, "Un café. " * 900
    (tmp_path / "text" / "good.txt").write_bytes(b"\xef\xbb\xbf" + good.encode())
    (tmp_path / "text" / "latin.txt").write_bytes(latin.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 at byte 6") as e:
        prepare(tmp_path / "out", tmp_path / "text")
    assert not (tmp_path / "out").exists()
    for flag, value, text in (
        ("encoding", "latin1", good + latin),
        ("decode_errors", "replace", good + latin.replace("é", "\ufffd")),
        ("skip_bad_files", True, good),
    ):
        assert f"{flag}" in str(e.value)
        manifest = prepare(tmp_path / flag, tmp_path / "text", **{flag: value})
        decoded = get_tokenizer().decode(all_tokens(tmp_path / flag))
        assert sorted(decoded.replace("<|endoftext|>", "")) == sorted(text)
        options = {"encoding": "iso8859-1", "decode_errors": "replace"}
        noted = {flag: options[flag]} if flag in options else {}
        assert {key: manifest["options"][key] for key in options if key in manifest["options"]} == (
            noted
        )
    assert manifest["summary"]["bad files left out"] == 1
    assert "latin.txt is not UTF-8" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another encoding .*iso8859-1.* before, .*None.* now"):
        prepare(tmp_path / "encoding", tmp_path / "text", skip_bad_files=True)
    with pytest.raises(ValueError, match="unknown encoding: klingon; expected a Python encoding"):
        PrepareConfig(encoding="klingon")


def test_two_preparations_in_one_folder(tmp_path, jsonl):
    """A second fineweb.py that would write into the same folder is refused while the first runs."""
    with (
        lock_folder(tmp_path / "out"),
        pytest.raises(ValueError, match="out is in use by another process; wait"),
    ):
        prepare(tmp_path / "out", jsonl)


def test_documents_longer_than_a_shard(tmp_path, unordered):
    """A document may span many shards; no shard is too long and no token is lost."""
    (tmp_path / "long.txt").write_text("All work and no play. " * 1000)
    manifest = prepare(tmp_path / "out", tmp_path / "long.txt", shard_size=77)
    sizes = [s["tokens"] for s in manifest["shards"] if s["split"] == "train"]
    assert set(sizes[:-1]) == {77}
    assert all_tokens(tmp_path / "out") == expected_tokens(["All work and no play. " * 1000])


def test_max_tokens_is_exact(tmp_path, jsonl, unordered):
    """The first max_tokens tokens are written and no others."""
    prepare(tmp_path / "out", jsonl, max_tokens=1234)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)[:1234]
    with pytest.raises(ValueError, match=r"max_tokens is 101, expected at least 102"):
        prepare(tmp_path / "out2", jsonl, max_tokens=101)


def test_a_killed_preparation_resumes_byte_identically(tmp_path):
    """After kill -9 at several moments the same command completes the same files as a run without
    interruption.
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
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and len(list(killed.glob("*.npy"))) < wanted:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert not read_manifest(killed)["complete"]
    prepare(killed, tmp_path / "big.jsonl", **options)
    assert snapshot(killed) == snapshot(tmp_path / "whole" / "out")


@pytest.mark.parametrize("is_ordered", [True, False])
def test_any_shard_is_a_place_to_resume(tmp_path, jsonl, is_ordered, request):
    """From the manifest after any shard the same command completes the same files, with max_tokens
    as without, whether validation is drawn or leads. The cursor keeps names that earlier versions
    wrote.
    """
    if not is_ordered:
        request.getfixturevalue("unordered")
    for name, options in (("all", {}), ("some", {"max_tokens": 2500})):
        folder = tmp_path / name
        prepare(folder, jsonl, **options)
        before = snapshot(folder)
        manifest = json.loads(before["manifest.json"])
        names = {"pieces", "tokens", "documents", "empty"}
        assert all(shard["cursor"].keys() == names for shard in manifest["shards"])
        del manifest["summary"]
        cursors = [shard["cursor"] for shard in manifest["shards"]]
        for n in range(0, len(cursors), 3):
            if n and cursors[n] == cursors[n - 1]:  # finished together
                continue
            for shard in manifest["shards"][n:]:
                (folder / shard["name"]).unlink()
            unfinished = {**manifest, "complete": False, "shards": manifest["shards"][:n]}
            (folder / "manifest.json").write_text(json.dumps(unfinished))
            prepare(folder, jsonl, **options)
            assert snapshot(folder) == before


def test_a_damaged_shard_is_written_again(tmp_path, jsonl):
    """The same command checks the shards, and writes again the first that is missing or has
    another sha256 and all after it.
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
    """A second call reports that the folder is complete; one with other options is refused and
    changes nothing.
    """
    prepare(tmp_path / "out", jsonl)
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    prepare(tmp_path / "out", jsonl)
    assert "is complete: 30 documents" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another shard_size: .*300.* before, .*400.* now"):
        prepare(tmp_path / "out", jsonl, shard_size=400)
    assert snapshot(tmp_path / "out") == before


def test_too_little_text_is_an_error_with_a_remedy(tmp_path, jsonl, unordered):
    """val_tokens that leave nothing for training are an error; a smaller number then works."""
    with pytest.raises(ValueError, match="expected at least 2; lower --val_tokens"):
        prepare(tmp_path / "out", jsonl, val_tokens=10**6, shard_size=10**6)
    prepare(tmp_path / "out", jsonl)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_settings_are_checked(tmp_path):
    """Sizes out of range, and a dataset that is not a list are errors."""
    for name, value in (("max_tokens", 3), ("shard_size", 10**13), ("val_tokens", 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least [124]"):
            PrepareConfig(**{name: value})
    (tmp_path / "a.yaml").write_text("dataset: text.txt\n")
    with pytest.raises(SystemExit):
        parse_flags(PrepareConfig, "", ["--config", str(tmp_path / "a.yaml")])


def test_without_gigatoken_the_shards_are_the_same(tmp_path, jsonl, monkeypatch):
    """tiktoken alone writes the same files."""
    prepare(tmp_path / "fast" / "out", jsonl)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    prepare(tmp_path / "slow" / "out", jsonl)
    assert snapshot(tmp_path / "slow" / "out") == snapshot(tmp_path / "fast" / "out")


def test_hub_data_streams_and_resumes(tmp_path, monkeypatch, datasets):
    """A hub dataset is streamed row by row; an interrupted preparation resumes at its row,
    also one of an earlier version, whose cursor has one more count.
    """

    def load_dataset(repo, name, split, streaming):
        assert (repo, name, split) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")
        assert streaming
        rows = [{"text": document, "url": "?"} for document in DOCUMENTS]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(tmp_path / "out", "fineweb-edu")
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)
    before = snapshot(tmp_path / "out")
    manifest = json.loads(before["manifest.json"])
    manifest["complete"], manifest["shards"] = False, (shards := manifest["shards"][:3])
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepare(tmp_path / "out", "fineweb-edu")
    assert snapshot(tmp_path / "out") == before
    manifest["shards"] = [{**s, "cursor": {**s["cursor"], "undecodable": 0}} for s in shards]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepare(tmp_path / "out", "fineweb-edu")
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_an_unreachable_hub_names_what_works_without(tmp_path, monkeypatch, datasets, network):
    """Without a network the error says what failed and what needs none, for text and for ready-made
    shards.
    """

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"no route.*dataset stdlib"):
        prepare(tmp_path / "out", "fineweb-edu")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ConnectionError, match=r"fineweb_val_000000.bin of kjj0.*no route.*stdlib"):
        prepare(tmp_path / "out2", "fineweb10B-gpt2")


def test_ready_made_shards(tmp_path, jsonl, monkeypatch):
    """Ready-made shards are downloaded until there are enough, and are read as they are. A folder
    with shards of other text is refused.
    """

    def hf_hub_download(repo, name, repo_type, local_dir):
        assert (repo, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 1000
        file = Path(local_dir) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(header.tobytes() + np.full(1000, 7, dtype="<u2").tobytes())
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    for _ in range(2):
        prepare(tmp_path / "out", "fineweb10B-gpt2", max_tokens=2500)
        assert len(TokenShards(tmp_path / "out", "train")) == 3000
        assert len(TokenShards(tmp_path / "out", "val")) == 1000
    prepare(tmp_path / "other", jsonl)
    with pytest.raises(ValueError, match="holds shards of other text; choose another --out_dir"):
        prepare(tmp_path / "other", "fineweb10B-gpt2")


def test_stdlib_becomes_shards(tmp_path, monkeypatch, capsys):
    """stdlib needs no network; about 5% are for validation; the summary has all counts."""
    texts = [f"Document {i}. " * 20 for i in range(50)]
    monkeypatch.setattr("engine.documents.stdlib_documents", lambda: texts)
    main(PrepareConfig(dataset=["stdlib"], out_dir=str(tmp_path / "out")))
    val = int(sum(map(len, texts)) / 4.4 / 20)
    tokens = expected_tokens(texts)
    assert all_tokens(tmp_path / "out") == tokens
    assert len(TokenShards(tmp_path / "out", "val")) == val
    expected = (
        f"out: 50 documents, {val:,} val tokens, {len(tokens) - val:,} train tokens, 0 empty "
        "documents, 0 replaced characters, 0 bad rows, 0 truncated files, 0 bad files left out, "
        "2 shards"
    )
    assert expected in capsys.readouterr().out


def test_real_text_has_the_tokens_of_tiktoken(shared_data, tmp_path, unordered):
    """Real web text and a play of a million characters become exactly tiktoken's tokens."""
    web, play = shared_data / "fineweb_edu_sample_docs.jsonl", shared_data / "tinyshakespeare.txt"
    prepare(tmp_path / "out", web, play, shard_size=100_000, val_tokens=20_000)
    documents = [json.loads(line)["text"] for line in web.read_text().splitlines()]
    documents.append(play.read_bytes().decode())
    assert all_tokens(tmp_path / "out") == expected_tokens(documents)
