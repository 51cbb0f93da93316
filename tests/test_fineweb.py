import csv
import gzip
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2_TOKENIZER, NASTY_TEXT, TIKTOKEN, expected_tokens, read_files
from processes import Job

import fineweb
from engine import tokenizer
from engine.documents import COMPRESSION_RATIO
from engine.files import lock_folder
from engine.shards import TokenShards, open_shard, read_manifest, write_manifest
from fineweb import PrepareConfig, main

TEXTS = (NASTY_TEXT, "One.\n", "  two  ", "Three and\n\n\nthree. " * 40, NASTY_TEXT[::-1])
DOCUMENTS = [f"{text}{i}" for i in range(6) for text in TEXTS]


def all_tokens(folder: Path) -> list[int]:
    """Read the tokens of all shards, in the order of the manifest."""
    shards = [open_shard(folder / s["name"]) for s in read_manifest(folder)["shards"]]
    return np.concatenate(shards).tolist()


def split_tokens(folder: Path) -> tuple[list[int], list[int]]:
    """Read the tokens for training and for validation."""
    splits = [TokenShards(folder, split) for split in ("train", "val")]
    train, val = (split.read(0, len(split)).tolist() for split in splits)
    return train, val


def expected_split(documents: list[str], n_bytes: int) -> tuple[list[int], list[int]]:
    """Return the tokens for training and for validation, which gets documents with a low sha256."""
    fraction = min(0.5, 100 / (n_bytes / 4.4))  # about 100 tokens, at 4.4 bytes per token
    hashes = {d: int(hashlib.sha256(d.encode()).hexdigest(), 16) / 16**64 for d in documents}
    train = [document for document in documents if hashes[document] >= fraction]
    val = [document for document in documents if hashes[document] < fraction]
    return expected_tokens(train), expected_tokens(val)


def prepare(folder: Path, *dataset: object, **options) -> dict:
    """Run fineweb.py. Return the manifest."""
    options = {"shard_size": 300, "val_tokens": 100, **options}
    main(PrepareConfig(dataset=[str(d) for d in dataset], out_dir=str(folder), **options))
    return read_manifest(folder)


def prepare_documents(folder: Path, *documents: str) -> list[list[str]]:
    """Prepare one .txt with these documents. Return the texts in each split."""
    folder.mkdir()
    (folder / "a.txt").write_text("<|endoftext|>".join(documents))
    prepare(folder / "out", folder / "a.txt", val_tokens=None, shard_size=10**6)
    decode = TIKTOKEN.decode
    return [decode(tokens).split("<|endoftext|>")[1:] for tokens in split_tokens(folder / "out")]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def one_gigatoken():
    """Build the gigatoken encoder once for all tests here, because that takes seconds."""
    gigatoken = tokenizer.load_gigatoken(GPT2_TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load_gigatoken", lambda _: gigatoken)
        yield


@pytest.fixture
def jsonl(write_rows) -> Path:
    return Path(write_rows([{"text": document} for document in DOCUMENTS], "documents.jsonl"))


@pytest.fixture
def stdlib(monkeypatch) -> str:
    """Replace the stdlib corpus with DOCUMENTS. Its first tokens go to validation."""
    monkeypatch.setattr("engine.documents.stdlib_documents", lambda: DOCUMENTS)
    return "stdlib"


def test_every_format_gives_the_same_tokens(tmp_path, jsonl, write_parquet, monkeypatch):
    """The same documents in files of every format, also compressed, give the same tokens. Each
    document follows <|endoftext|>, and its hash decides the split.
    """
    monkeypatch.setattr(fineweb, "BATCH_CHARS", 1000)  # several batches
    names = (
        "documents.jsonl.gz",
        "a.parquet",
        "list.json",
        "joined.json",
        "t.csv",
        "t.tsv",
        "deep",
    )
    gz, parquet, listed, joined, semicolons, tabs, folder = (tmp_path / name for name in names)
    gz.write_bytes(gzip.compress(jsonl.read_bytes()))
    write_parquet({"text": DOCUMENTS}, parquet)
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    listed.write_text(json.dumps(rows, indent=1))
    joined.write_text("".join(json.dumps(row, ensure_ascii=False, indent=1) for row in rows))
    for table, delimiter in ((semicolons, ";"), (tabs, "\t")):
        with table.open("w", newline="", encoding="utf-16") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "er").mkdir(parents=True)
    # In a .txt, <|endoftext|> would separate documents.
    in_txt = [document.replace("<|endoftext|>", "<|end|>") for document in DOCUMENTS]
    in_txt = [document + "\n" * (i % 3) for i, document in enumerate(in_txt)]
    for i, document in enumerate(in_txt):
        (folder / "er" / f"{i:03d}.txt").write_bytes(document.encode())
    for source, documents, n_bytes in (
        (jsonl, DOCUMENTS, jsonl.stat().st_size),
        (gz, DOCUMENTS, gz.stat().st_size * COMPRESSION_RATIO),
        (parquet, DOCUMENTS, parquet.stat().st_size * COMPRESSION_RATIO),
        *((file, DOCUMENTS, file.stat().st_size) for file in (listed, joined, semicolons, tabs)),
        (folder, in_txt, len("".join(in_txt).encode())),
    ):
        out = tmp_path / f"out_{source.name}"
        manifest = prepare(out, source)
        assert split_tokens(out) == expected_split(documents, n_bytes)
        assert manifest["summary"]["documents"] == 30
        assert max(shard["tokens"] for shard in manifest["shards"]) == 300


def test_bad_input_is_handled_and_counted(tmp_path, capsys):
    """Bad input does not affect other documents. It is counted, and each kind is printed once."""
    good = [json.dumps({"text": f"number {i} " * 50}) for i in range(20)]
    rows = [*good, '{"text": ""}', '{"text": "  \\n"}', "{broken", '{"other": 1}', '{"text": 5}']
    latin = b'\n{"text": "caf\xe9 au lait"}\n'
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + latin)
    whole = gzip.compress(os.urandom(20_000).hex("\n", 40).encode())
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    manifest = prepare(tmp_path / "out", tmp_path, decode_errors="replace")
    train, val = split_tokens(tmp_path / "out")
    assert manifest["summary"] == {
        "documents": 24,
        "val tokens": len(val),
        "train tokens": len(train),
        "empty documents": 2,
        "replaced characters": 1,
        "bad rows": 3,
        "truncated files": 1,
        "bad files left out": 0,
    }
    out = capsys.readouterr().out
    for problem in (
        "a.jsonl line 23",
        "a.jsonl has U+FFFD",
        "b.txt.gz is truncated",
        "3 bad rows",
    ):
        assert out.count(problem) == 1


def test_validation_is_drawn_from_all_of_a_long_document(tmp_path):
    """About 5% of a long document, from every quarter, goes to validation. Nothing is lost."""
    text = " ".join(f"word{i}" for i in range(120_000))
    train, val = prepare_documents(tmp_path / "a", text)
    assert "".join(sorted(train + val, key=text.index)) == text
    assert 0.02 < len("".join(val)) / len(text) < 0.09
    assert {4 * text.index(part) // len(text) for part in val} == {0, 1, 2, 3}
    assert read_manifest(tmp_path / "a" / "out")["summary"]["documents"] == 1


@pytest.mark.parametrize(
    ("text", "max_val_chars"),
    [
        ("".join(chr(0x4E00 + i * i % 9999) for i in range(9000)), 8500),
        ("\n" * 9000 + "a" * 4001 + "\n" * 9000, 13_000),
        ("a" * 4001, 4000),
        (" ".join(f"word{i}" for i in range(3500)), 5000),  # a sixth of the text
    ],
    ids=["cjk", "space at the ends", "two sections", "30 kB"],
)
def test_any_text_of_two_sections_has_both_splits(tmp_path, text, max_val_chars):
    """Text of two or more sections gives two nonempty splits, and nothing is lost."""
    train, val = map("".join, prepare_documents(tmp_path / "a", text))
    assert sorted(train + val) == sorted(text)
    assert 0 < len(val) <= max_val_chars


def test_text_of_one_section_is_refused(tmp_path, capsys):
    """Text of one section cannot be split. The error asks for more text, and with more it works. If
    there is little text because rows are bad, a line says why.
    """
    file = tmp_path / "a.txt"
    file.write_text("a" * 4000 + "<|endoftext|>" + "a" * 4000)
    with pytest.raises(ValueError, match=r"fewer than two different sections .*add text"):
        prepare(tmp_path / "out", file)
    assert not (tmp_path / "out").exists()
    file.write_text("a" * 4000 + "<|endoftext|>b")
    assert prepare(tmp_path / "out", file)["complete"]
    (tmp_path / "b.jsonl").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    with pytest.raises(ValueError, match="fewer than two different sections"):
        prepare(tmp_path / "b", tmp_path / "b.jsonl")
    assert "rename the file to .json); skipped" in capsys.readouterr().out


def test_a_document_and_its_copies_are_in_one_split(tmp_path):
    """Repeating documents and adding others does not move a document to the other split."""
    documents = [f"document {i} " * 20 for i in range(400)]
    new = "new " * 99
    train, val = map(set, prepare_documents(tmp_path / "one", *documents))
    more = prepare_documents(tmp_path / "two", *documents[::-1], new, *documents)
    assert 8 < len(val) < 40
    assert [set(split) for split in more] == [train | {new}, val]


def test_folders_of_earlier_versions(tmp_path, jsonl):
    """A folder that an earlier version completed, with other splits, is accepted as it is. An
    incomplete one is an error, because this version would cut the rest differently.
    """
    manifest = prepare(tmp_path / "out", jsonl)
    del manifest["options"]["val_tokens"], manifest["options"]["section_chars"]
    manifest["options"]["val_fraction"] = 0.05
    write_manifest(tmp_path / "out", manifest)
    before = snapshot(tmp_path / "out")
    prepare(tmp_path / "out", jsonl)
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"other options: .*shard_size"):
        prepare(tmp_path / "out", jsonl, shard_size=400)
    (tmp_path / "out" / manifest["shards"][-1]["name"]).unlink()
    for complete in (True, False):  # with a shard missing, neither is complete
        write_manifest(tmp_path / "out", {**manifest, "complete": complete})
        with pytest.raises(ValueError, match=r"section_chars was None, now 4000.*delete"):
            prepare(tmp_path / "out", jsonl)


def test_files_in_other_encodings(tmp_path, capsys):
    """The error for a Latin-1 file has its name and the position of the bad byte, and nothing is
    written. Each flag that the error suggests works, and is in the manifest if it changes shards.
    """
    (tmp_path / "text").mkdir()
    good, latin = "Grüße. " * 900, "Un café. " * 900
    replaced = good + latin.replace("é", "\ufffd")
    (tmp_path / "text" / "good.txt").write_bytes(b"\xef\xbb\xbf" + good.encode())
    (tmp_path / "text" / "latin.txt").write_bytes(latin.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 at byte 6") as e:
        prepare(tmp_path / "out", tmp_path / "text")
    assert not (tmp_path / "out").exists()
    for flag, value, text, noted in (
        ("encoding", "latin1", good + latin, {"encoding": "iso8859-1"}),
        ("decode_errors", "replace", replaced, {"decode_errors": "replace"}),
        ("skip_bad_files", True, good, {}),
    ):
        assert flag in str(e.value)
        manifest = prepare(tmp_path / flag, tmp_path / "text", **{flag: value})
        decoded = TIKTOKEN.decode(all_tokens(tmp_path / flag))
        assert sorted(decoded.replace("<|endoftext|>", "")) == sorted(text)
        options = manifest["options"]
        assert {k: options[k] for k in ("encoding", "decode_errors") if k in options} == noted
    assert manifest["summary"]["bad files left out"] == 1
    assert "latin.txt is not UTF-8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="encoding was iso8859-1, now None"):
        prepare(tmp_path / "encoding", tmp_path / "text", skip_bad_files=True)


def test_max_tokens_and_shard_size_are_exact(tmp_path, stdlib):
    """Exactly the first max_tokens tokens are written. A document may span several shards."""
    manifest = prepare(tmp_path / "out", stdlib, max_tokens=1234, shard_size=77)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)[:1234]
    sizes = [shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train"]
    assert set(sizes[:-1]) == {77}
    with pytest.raises(ValueError, match=r"max_tokens is 101, expected at least 102"):
        prepare(tmp_path / "out2", stdlib, max_tokens=101)


# Run fineweb.py, and kill it at the given call of fsync, before the new file gets its name.
KILLED = """
import itertools, os, signal, sys
from fineweb import PrepareConfig, main

calls = itertools.count(1)

def kill_at_call(_):
    if next(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = kill_at_call
sys.modules["gigatoken"] = None  # use tiktoken, which starts sooner
main(PrepareConfig(dataset=["documents.jsonl"], out_dir="out", shard_size=300, val_tokens=100))
"""


def test_a_killed_preparation_resumes_byte_identically(tmp_path, jsonl):
    """After kill -9, the same command ends with exactly the files of an uninterrupted run."""
    prepare(tmp_path / "whole" / "out", jsonl)
    (tmp_path / "killed.py").write_text(KILLED)
    for call in (1, 4, 9):  # the first shard, the manifest that lists the second, a later shard
        result = Job(tmp_path / "killed.py", call, cwd=tmp_path).wait()
        assert result.returncode == -signal.SIGKILL, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert not manifest["complete"]
    assert manifest["shards"]
    prepare(tmp_path / "out", jsonl)  # with gigatoken
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole" / "out")


@pytest.mark.parametrize("max_tokens", [None, 2500])
@pytest.mark.parametrize("val_comes_first", [True, False])
def test_any_shard_is_a_place_to_resume(tmp_path, jsonl, stdlib, val_comes_first, max_tokens):
    """The same command rewrites a damaged shard and all after it, with or without max_tokens,
    whether validation is chosen by hash or comes first. Cursors keep the keys of earlier versions.
    """
    out, sources = tmp_path / "out", [stdlib] if val_comes_first else [jsonl, jsonl]
    shards = prepare(out, *sources, max_tokens=max_tokens)["shards"]
    names = {"pieces", "tokens", "documents", "empty"}
    assert all(shard["cursor"].keys() == names for shard in shards)
    before = snapshot(out)
    for shard in (*shards[::4], shards[-1]):
        (out / shard["name"]).write_bytes(b"?")
        prepare(out, *sources, max_tokens=max_tokens)
        assert snapshot(out) == before


def test_complete_and_changed_preparations(tmp_path, jsonl, capsys):
    """A complete folder is left as it is. Other options, or a folder in use, are errors."""
    prepare(tmp_path / "out", jsonl)
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    prepare(tmp_path / "out", jsonl)
    assert "is complete: 30 documents" in capsys.readouterr().out
    with pytest.raises(ValueError, match="options: shard_size was 300, now 400"):
        prepare(tmp_path / "out", jsonl, shard_size=400)
    in_use = pytest.raises(ValueError, match="out is in use by another process; wait")
    with lock_folder(tmp_path / "out"), in_use:
        prepare(tmp_path / "out", jsonl)
    assert snapshot(tmp_path / "out") == before


def test_too_little_text_is_an_error_with_a_remedy(tmp_path, stdlib):
    """If val_tokens leaves nothing for training, that is an error. A smaller number then works."""
    with pytest.raises(ValueError, match="expected at least 2; lower --val_tokens"):
        prepare(tmp_path / "out", stdlib, val_tokens=10**6, shard_size=10**6)
    prepare(tmp_path / "out", stdlib)
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_settings_are_checked():
    """Sizes out of range and unknown encodings are errors."""
    for name, value in (("max_tokens", 3), ("shard_size", 10**13), ("val_tokens", 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least [124]"):
            PrepareConfig(**{name: value})
    with pytest.raises(ValueError, match="unknown encoding: klingon; expected a Python encoding"):
        PrepareConfig(encoding="klingon")


def test_hub_data_streams_and_resumes(tmp_path, monkeypatch, datasets, network, capsys):
    """A hub dataset is streamed row by row, and only its text is used. If a shard is missing, the
    command resumes at the shard's first row, even with cursors of an earlier version.
    """

    def load_dataset(repo, name, split, streaming):
        assert (repo, name, split) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")
        assert streaming
        rows = [{"text": document, "url": "?"} for document in DOCUMENTS]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manifest = prepare(tmp_path / "out", "fineweb-edu")
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)
    assert "min left" not in "".join(capsys.readouterr())  # the size is unknown
    for shard in manifest["shards"]:
        shard["cursor"]["undecodable"] = 0  # a key of earlier versions
    write_manifest(tmp_path / "out", manifest)
    (tmp_path / "out" / manifest["shards"][3]["name"]).unlink()
    prepare(tmp_path / "out", "fineweb-edu")
    assert all_tokens(tmp_path / "out") == expected_tokens(DOCUMENTS)


def test_ready_made_shards(tmp_path, jsonl, monkeypatch, network):
    """Ready-made shards are downloaded until there are enough tokens, and used as they are. If the
    folder has other shards, that is an error. If the hub fails, the error suggests stdlib.
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
    with pytest.raises(ValueError, match="out holds shards made with other options"):
        prepare(tmp_path / "out", jsonl)
    prepare(tmp_path / "other", jsonl)
    with pytest.raises(ValueError, match="holds shards of another dataset; choose another"):
        prepare(tmp_path / "other", "fineweb10B-gpt2")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ConnectionError, match=r"fineweb_val_000000.bin of kjj0.*no route.*stdlib"):
        prepare(tmp_path / "out2", "fineweb10B-gpt2")


def test_stdlib_becomes_shards(tmp_path, stdlib, capsys):
    """stdlib needs no network. About 5% go to validation. The summary has all counts."""
    main(PrepareConfig(dataset=[stdlib], out_dir=str(tmp_path / "out")))
    tokens, val = expected_tokens(DOCUMENTS), int(sum(map(len, DOCUMENTS)) / 4.4 / 20)
    assert all_tokens(tmp_path / "out") == tokens
    assert len(TokenShards(tmp_path / "out", "val")) == val
    assert (
        f"out: 30 documents, {val:,} val tokens, {len(tokens) - val:,} train tokens, 0 empty "
        "documents, 0 replaced characters, 0 bad rows, 0 truncated files, 0 bad files left out, "
        "2 shards"
    ) in capsys.readouterr().out


def test_real_text_has_the_tokens_of_tiktoken(shared_data):
    """Real web text and a play of a million characters become exactly the tokens of tiktoken."""
    web, play = shared_data / "fineweb_edu_sample_docs.jsonl", shared_data / "tinyshakespeare.txt"
    pieces, _ = read_files(web, play)
    tokens = [tokens for batch in fineweb.tokenize(pieces, GPT2_TOKENIZER) for _, tokens in batch]
    documents = [json.loads(line)["text"] for line in web.read_text().splitlines()]
    documents.append(play.read_bytes().decode())
    assert np.concatenate(tokens).tolist() == expected_tokens(documents)
