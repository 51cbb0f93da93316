"""Files: atomic writes, hashes, decompression, decoding, JSON and JSON Lines, and locks."""

import codecs
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)  # what a damaged .gz or .zst raises
COMPRESSIONS = {".gz": "a gzip file", ".zst": "a Zstandard file"}
# First bytes of files that often have the wrong suffix.
SIGNATURES = {
    b"\x1f\x8b": COMPRESSIONS[".gz"],
    b"\x28\xb5\x2f\xfd": COMPRESSIONS[".zst"],
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF-": "a PDF",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a Git LFS pointer (run git lfs pull)",
}
# UTF-32 comes first, because its little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-8-sig": (codecs.BOM_UTF8,),
}


@contextmanager
def adding_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that may lack one, such as ENOSPC from a write to a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Write `content` to a file. If that fails or is interrupted, the old file stays as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with adding_path_to_errors(path), temporary.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def drop_lost_terminal() -> None:
    """If the terminal has gone, discard what is printed from now on, because print() would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # stdout and stderr
        try:
            os.write(stream, b"\n")  # fails if the terminal has gone
        except OSError:
            os.dup2(null, stream)
    os.close(null)


def fsync_folder(folder: Path) -> None:
    """Make new and renamed files in the folder survive a power cut. Does nothing on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def clean_text(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, remedy: str) -> dict:
    """Read a file that holds a JSON object. Raises ValueError, ending in `remedy`, if it holds
    anything else.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error


def data_suffix(path: Path) -> str:
    """Return the lower-case suffix, ignoring .gz and .zst: .txt for a.TXT.gz."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def open_binary(path: Path) -> io.BufferedReader:
    """Open a file for reading. A .gz or .zst file is decompressed. Raises ValueError if its content
    is not what its suffix says.
    """
    compression = path.suffix.lower()
    if path.is_file():  # reading the start of a pipe would lose it
        with path.open("rb") as file:
            start = file.read(32)
        is_parquet = compression == ".parquet"
        expected = "a Parquet file" if is_parquet else COMPRESSIONS.get(compression)
        found = next((kind for s, kind in SIGNATURES.items() if start.startswith(s)), None)
        if start and found != expected:
            problem = f"is {found}" if found else f"is not {expected}"
            raise ValueError(f"{path} {problem}; rename or convert it")
    if compression == ".gz":
        return cast(io.BufferedReader, gzip.open(path))
    return io.BufferedReader(ZstdFile(path)) if compression == ".zst" else path.open("rb")


class ZstdFile(io.RawIOBase):
    """Decompresses a .zst file. If it is damaged, raises EOFError, as a truncated .gz does."""

    def __init__(self, path: Path):
        import pyarrow

        self.stream = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self.stream.readinto(buffer)
        except OSError as error:
            raise EOFError(str(error)) from error


class DamagedFileError(ValueError):
    """A file is truncated or damaged, or cannot be parsed."""


def decode_lines(path: Path, encoding: str = "utf-8", errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a file, with their line endings. A byte order mark overrides `encoding`.
    Raises UnicodeError if the file cannot be decoded, DamagedFileError if it is damaged.
    """
    with open_binary(path) as stream:
        try:
            start = stream.peek(4)
            marked = (name for name, marks in BYTE_ORDER_MARKS.items() if start.startswith(marks))
            encoding = next(marked, encoding)
            lines = io.TextIOWrapper(stream, encoding, errors, newline="\n")
            yield from lines
        except DAMAGED as error:
            raise DamagedFileError(f"{path} is truncated or damaged: {error}") from error
        except UnicodeError as error:
            place = ""
            if isinstance(error, UnicodeDecodeError) and path.suffix.lower() != ".zst":
                # error.object was read last, and error.start counts within it.
                place = f" at byte {stream.tell() - len(error.object) + error.start}"
            raise UnicodeError(f"{path} is not {encoding.upper()}{place}") from error


class JSONLinesLog:
    """An append-only file of JSON objects, one per line, each with a number under `key`. A last
    line without a newline was cut short by a crash and is dropped.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.records: list[dict] = []  # those in the file when it is opened
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self.records = self.read(path, key)

    @staticmethod
    def read(path: Path, key: str) -> list[dict]:
        lines = path.read_bytes().split(b"\n")[:-1]  # without a last line that was cut short
        try:
            records = [dict(json.loads(line)) for line in lines]
            _ = [record[key] + 0 for record in records]  # raises if there is no number under key
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}), expected a JSON object with a {key} on every "
                "line; repair the line, or choose another folder"
            ) from error
        return records

    def drop_after(self, number: int) -> None:
        """Drop the records with a number above `number`, also from the file."""
        kept = [record for record in self.records if record[self.key] <= number]
        if kept != self.records:
            self.records = kept
            lines = "".join(json.dumps(record) + "\n" for record in kept)
            write_atomically(self.path, lines.encode())

    def append(self, *records: dict) -> None:
        with adding_path_to_errors(self.path), self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it, so that no other process writes into it. The lock is released
    on exit, even if the process is killed. If a new folder ends up empty, it is removed, with any
    parents created for it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    try:
        with FileLock(lock, timeout=0):  # fail at once if it is held
            try:
                yield
            finally:
                if [*folder.iterdir()] == [lock]:
                    with suppress(OSError):  # Windows does not delete a file that is open
                        lock.unlink()
                        for path in new:
                            path.rmdir()
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another process; wait until it ends, or choose another out_dir"
        ) from error
