"""Files: atomic writes, decompression, JSON, JSON lines, locks."""

import gzip
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import WORKERS, worker_env

from engine.files import (
    DamagedFileError,
    JSONLinesLog,
    adding_path_to_errors,
    data_suffix,
    decode_lines,
    lock_folder,
    open_binary,
    read_json,
    sha256_file,
    sha256_text,
    write_atomically,
    write_json,
)


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_writes_are_atomic(tmp_path, monkeypatch, failing):
    """A write replaces the file with the given parts. If it fails halfway, the old file stays."""
    file = tmp_path / "x.bin"
    file.write_bytes(b"something longer than the new content")
    write_atomically(file, b"one ", memoryview(b"two"))
    assert file.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [file]

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"one two"


def test_system_errors_get_the_name_of_the_file(tmp_path):
    """`adding_path_to_errors` adds the path to an OSError and keeps its number and message."""
    no_space = pytest.raises(OSError, match="No space left")
    with no_space as raised, adding_path_to_errors(tmp_path / "x"):
        raise OSError(28, os.strerror(28))
    assert (raised.value.errno, raised.value.filename) == (28, str(tmp_path / "x"))


def test_hashes_are_sha256(tmp_path):
    """sha256_text and sha256_file equal hashlib's SHA-256. Text is hashed as UTF-8."""
    expected = hashlib.sha256("naïve".encode()).hexdigest()
    (tmp_path / "x").write_bytes("naïve".encode())
    assert sha256_text("naïve") == sha256_file(tmp_path / "x") == expected


def test_json_files(tmp_path):
    """A JSON object reads back as written. The error for other content has the file and remedy."""
    file = tmp_path / "x.json"
    content = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(file, content)
    assert read_json(file, "delete it") == content
    for damaged in ("{", "", "3", "[1]", "\xff\xfe"):
        file.write_bytes(damaged.encode("latin-1"))
        with pytest.raises(ValueError, match=r"x\.json is damaged: .*; delete it"):
            read_json(file, "delete it")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json", "delete it")


def compress_zst(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": compress_zst}
TEXT = "é\r\n\n" + os.urandom(30_000).hex("\n", 40) + "\u2028 end"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_keep_their_endings(tmp_path, suffix):
    """The lines of a file, plain or compressed in one or two parts, add up to its text. Only a
    newline ends a line. A compressed file that is damaged is an error that names it.
    """
    file, data = tmp_path / f"X.TXT{suffix.upper()}", TEXT.encode()
    assert data_suffix(file) == ".txt"
    for parts in ([data], [data[:5000], data[5000:]]):
        file.write_bytes(b"".join(map(COMPRESS[suffix], parts)))
        assert list(decode_lines(file)) == re.findall(r".*\n|.+$", TEXT)
    whole = COMPRESS[suffix](data)
    damaged = [whole[:-8] + bytes(8), whole[:200] + b"\xff" * 30 + whole[230:]]  # not seen in .zst
    for content in [whole[:-20], *damaged * (suffix == ".gz")] if suffix else []:
        file.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"X\.TXT.* is truncated or damaged"):
            list(decode_lines(file))
    file.write_bytes(b"")
    assert list(decode_lines(file)) == []


@pytest.mark.parametrize(
    ("name", "start", "problem"),
    [
        ("a.gz", b"PK\x03\x04", "is a zip archive or an Office document"),
        ("a.jsonl.gz", b"plain", "is not a gzip file"),
        ("a.zst", b"\x1f\x8b", "is a gzip file"),
        ("a.parquet", b"version https://git-lfs.github.com", "is a Git LFS pointer"),
        ("a.parquet", b"a,b", "is not a Parquet file"),
        ("a.txt", b"%PDF-1.7", "is a PDF"),
        ("a.jsonl", b"PAR1", "is a Parquet file"),
        ("a.csv", b"\x28\xb5\x2f\xfd", "is a Zstandard file"),
    ],
)
def test_a_file_must_be_what_its_name_says(tmp_path, name, start, problem):
    """The error for a file with the suffix of another kind says what it is."""
    (tmp_path / name).write_bytes(start + b" and more")
    with pytest.raises(ValueError, match=rf"{name} {problem}.*; rename or convert it$"):
        open_binary(tmp_path / name)


def test_a_pipe_is_read_from_its_first_byte(tmp_path):
    """Opening a pipe consumes none of its content."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_bytes, b"one\ntwo\n")
        assert list(decode_lines(tmp_path / "pipe")) == ["one\n", "two\n"]


def test_log_is_appended(tmp_path):
    """A log can be reopened and appended to. If a crash cut the last line short, it is dropped."""
    log = JSONLinesLog(tmp_path / "log.jsonl", "row")
    assert log.records == []
    log.append({"row": 0}, {"row": 1, "text": "ä\n"})
    intact = log.path.read_bytes()
    log.path.write_bytes(intact + b'{"row": 2, "te')
    assert [r["row"] for r in JSONLinesLog.read(log.path, "row")] == [0, 1]
    again = JSONLinesLog(log.path, "row")
    assert again.records == [{"row": 0}, {"row": 1, "text": "ä\n"}]
    again.append({"row": 2})
    assert log.path.read_bytes() == intact + b'{"row": 2}\n'


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"3", b"{}", b'{"row": "one"}', b'{"row": null}', b"\xff", b""]
)
def test_damaged_log_is_named(tmp_path, line):
    """A line that is not an object with a number under the key is an error; the file is kept."""
    file = tmp_path / "log.jsonl"
    content = b'{"row": 1}\n' + line + b'\n{"row": 2}\n'
    file.write_bytes(content)
    expected = r"log\.jsonl is damaged .*expected a JSON object with a row .* choose another folder"
    with pytest.raises(ValueError, match=expected):
        JSONLinesLog(file, "row")
    assert file.read_bytes() == content


def test_one_process_holds_a_folder(tmp_path):
    """Only one process can lock a folder. Killing it or raising an exception releases the lock."""
    folder = tmp_path / "new" / "run"
    command = [sys.executable, str(WORKERS / "hold_folder.py"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=worker_env()) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match=r"in use by another process.* out_dir")
        with refused, lock_folder(folder):
            pytest.fail("the folder was held twice")
        holder.kill()
    for _ in range(2):
        with pytest.raises(KeyError), lock_folder(folder):
            raise KeyError
