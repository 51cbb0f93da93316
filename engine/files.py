"""Files: atomic writes, JSON and JSON lines, locks."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the file's name to system errors that lack it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Write the file completely or not at all, even if interrupted."""
    temporary = path.with_name(path.name + ".tmp")
    with naming_file(path), temporary.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def drop_lost_terminal() -> None:
    """Send what is printed nowhere if the terminal has gone, as writing to it would be an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        try:
            os.write(stream, b"\n")
        except OSError:
            os.dup2(null, stream)
    os.close(null)


def fsync_folder(folder: Path) -> None:
    """Make new names in the folder survive a power cut. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in a file; ValueError with the remedy if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error


def open_binary(path: Path) -> IO[bytes]:
    """A file opened for reading, decompressed if its name ends in .gz."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]  # GzipFile is one in all but name


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, plain or .gz, that are not blank, with their numbers from 1. ValueError
    where the file is damaged.
    """
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
    except DAMAGED_GZIP as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


class JSONLinesLog:
    """A file of JSON objects, one a line, that is only ever appended to. Each has a number under
    `key`. A last line that a crash cut short counts as never written.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.records: list[dict] = []  # those from before
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self.records = self.read(path, key)

    @staticmethod
    def read(path: Path, key: str) -> list[dict]:
        lines = path.read_bytes()
        lines = lines[: lines.rfind(b"\n") + 1]
        try:
            records = [dict(json.loads(line)) for line in lines.splitlines()]
            _ = [record[key] + 0 for record in records]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}), expected a JSON object with a {key} on every "
                "line; repair the line, or choose another folder"
            ) from error
        return records

    def append(self, *records: dict) -> None:
        with naming_file(self.path), self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make the folder and lock it, so that no other process writes into it. The lock ends with the
    process. A new folder that ends up empty is removed, with any parents made for it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                if [*folder.iterdir()] == [lock]:
                    with suppress(OSError):  # Windows keeps a file that is open
                        lock.unlink()
                        for path in new:
                            path.rmdir()
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another process; wait until it ends, or choose another out_dir"
        ) from error
