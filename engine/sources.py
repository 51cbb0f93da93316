"""Documents and rows: from files, from the hub, from Python itself."""

import ast
import codecs
import hashlib
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from engine.documents import Piece, check_encoding, cut_into_pieces, find_files, read_documents
from engine.files import sha256_file, sha256_text
from engine.hub import load_hub_rows, reporting_hub_errors

# Text on the hub: repository and configuration.
HUB_TEXT = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "slimpajama": ("DKYoon/SlimPajama-6B", "default"),
}
COMPRESSION = 3  # about that of text in .gz and .parquet
SECTIONS = 400  # a document of more than this part of the text is drawn in sections
HUB_REMEDY = "The same command resumes; without a network, use --dataset stdlib or your own files"


@dataclass(frozen=True)
class Source:
    """Where documents come from. `identity` changes when they do; `pieces(n, problems)` yields them
    from piece n on and counts what is wrong. Bytes that are not UTF-8 become lone surrogates.
    """

    name: str
    identity: str
    pieces: Callable[[int, Counter], Iterator[Piece]]
    n_bytes: int | None  # approximate
    is_ordered: bool = False  # neighbours are alike, so that the first are no random sample


def open_source(dataset: list[str], text_field: str, skip_bad_files: bool = False) -> Source:
    """The source for "stdlib", a key of HUB_TEXT, or files, folders and globs. ValueError names a
    file that is not UTF-8; with `skip_bad_files` such files are left out.
    """
    if len(dataset) > 1 and (known := {"stdlib", *HUB_TEXT} & set(dataset)):
        raise ValueError(f"{' and '.join(known)} cannot be combined; prepare each dataset alone")
    if dataset == ["stdlib"]:
        documents = stdlib_documents()
        return Source(
            name="stdlib",
            identity=sha256_text("\0".join(documents)),
            pieces=lambda skip, _: iter([(text, True) for text in documents[skip:]]),
            n_bytes=sum(map(len, documents)),
        )
    if dataset[0] in HUB_TEXT:
        repo, name = HUB_TEXT[dataset[0]]
        return Source(dataset[0], f"{repo} {name}", partial(stream_hub_text, repo, name), None)
    found = find_files(dataset)
    files = select_text(found, skip_bad_files)
    # Like "replace", whose U+FFFD may also be in valid text.
    codecs.register_error("lone_surrogate", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

    def pieces(skip: int, problems: Counter) -> Iterator[Piece]:
        problems["bad files"] = len(found) - len(files)
        read = partial(read_documents, text_field=text_field, problems=problems)
        return islice((p for f in files for p in read(f, errors="lone_surrogate")), skip, None)

    n_bytes = sum(f.stat().st_size for f in files)
    n_compressed = sum(f.stat().st_size for f in files if f.suffix in (".gz", ".parquet"))
    sha256 = sha256_text(" ".join(map(sha256_file, files)))
    identity = f"{len(files)} files, {n_bytes} bytes, {sha256}"
    n_text_bytes = n_bytes + (COMPRESSION - 1) * n_compressed
    return Source("files", identity, pieces, n_text_bytes, is_ordered=True)


def select_text(files: list[Path], skip_bad_files: bool) -> list[Path]:
    """The files that are text. ValueError names the first other one, or, with `skip_bad_files`,
    says that there is none.
    """
    selected = []
    for file in files:
        try:
            check_encoding(file)
        except ValueError as error:
            if not skip_bad_files:
                raise ValueError(f"{error}, or leave such files out: --skip_bad_files") from error
            print(f"{error}; left out")
        else:
            selected.append(file)
    if not selected:
        raise ValueError(f"none of the {len(files)} files is text in UTF-8; give others")
    return selected


def draw_validation(
    pieces: Iterable[Piece], fraction: float, n_bytes: int
) -> Iterator[tuple[str, bool, bool]]:
    """The pieces, each with whether it is drawn for validation: by the hash of its text, so that a
    document and its copies are always in the same split. Documents that are long for a text of
    `n_bytes` are drawn in sections, and a section whose neighbour is in the other split starts a
    document.
    """
    limit = round(fraction * 2**64)
    section_chars = max(1, n_bytes // SECTIONS)
    was_val = False
    for piece, starts in pieces:
        for section, is_first in cut_into_pieces([piece], n_chars=section_chars):
            digest = hashlib.sha256(section.encode(errors="surrogatepass")).digest()
            is_val = int.from_bytes(digest[:8]) < limit
            yield section, (starts and is_first) or is_val != was_val, is_val
            was_val = is_val


def stream_hub_text(repo: str, name: str, skip: int, _: Counter) -> Iterator[Piece]:
    """The texts of a hub dataset from row `skip` on."""
    rows = load_hub_rows(repo, name, streaming=True, remedy=HUB_REMEDY)
    with reporting_hub_errors(repo, HUB_REMEDY):
        for row in rows.select_columns(["text"]).skip(skip):
            yield row["text"], True


def stdlib_documents() -> list[str]:
    """Python's language reference by topic and the docstrings of its standard library. Each once,
    ordered by hash, so that any part is a random sample.
    """
    import pydoc_data.topics

    documents = set(pydoc_data.topics.topics.values())
    documents |= {docstring.strip() for _, docstring in stdlib_definitions()}
    documents.discard("")
    return sorted(documents, key=sha256_text)


def stdlib_definitions() -> Iterator[tuple[ast.AST, str]]:
    """The standard library's modules, classes and functions with their docstrings, as parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node, ast.get_docstring(node) or ""
