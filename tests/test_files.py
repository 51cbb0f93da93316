"""Files: atomic writes, JSON, JSON lines, locks."""

import gzip
import hashlib
import os
import subprocess
import sys

import pytest
from conftest import WORKERS, worker_env

from engine.files import (
    JSONLinesLog,
    adding_path_to_errors,
    lock_folder,
    open_binary,
    read_json,
    read_lines,
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


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_lines_have_their_numbers(tmp_path, name):
    """Lines that are not blank come with their line number, from plain and compressed files."""
    content = b'{"a": 1}\n\n  \t\n{"a": 2}\r\n\xff not text'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    expected = [(1, b'{"a": 1}\n'), (4, b'{"a": 2}\r\n'), (5, b"\xff not text")]
    assert list(read_lines(tmp_path / name)) == expected
    with open_binary(tmp_path / name) as file:
        assert file.read() == content


def test_damaged_gz_is_named(tmp_path):
    """The error for a damaged .gz file names it. An empty file has no lines."""
    intact = gzip.compress(os.urandom(99).hex("\n").encode())
    file = tmp_path / "x.gz"
    for content in (intact[:-20], intact[:-8] + bytes(8), intact[:10] + b"\xff" * 30, b"no gzip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gz is truncated or damaged"):
            list(read_lines(file))
    file.write_bytes(b"")
    assert list(read_lines(file)) == []


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
