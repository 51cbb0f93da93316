"""JSON lines to shards with tiktoken, as others do it; benchmarks/data.py runs this.

python benchmarks/tiktoken_peers.py batch|pool DOCUMENTS.jsonl OUT_DIR

batch: encode_ordinary_batch over a few thousand documents at a time. pool: build-nanogpt's
fineweb.py, which deals documents out to processes with Pool.imap in chunks of 16.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.tokenizer import END_OF_TEXT_ID, get_tokenizer

DOCUMENTS_IN_BATCH, SHARD_SIZE, CORES = 4096, 100_000_000, os.cpu_count() or 1


def to_array(ids: list[int]) -> np.ndarray:
    return np.array([END_OF_TEXT_ID, *ids], dtype=np.uint16)


def tokenize(document: str) -> np.ndarray:
    return to_array(get_tokenizer().encode_ordinary(document))


def tokenize_in_batches(documents: Iterator[str]) -> Iterator[np.ndarray]:
    while batch := list(islice(documents, DOCUMENTS_IN_BATCH)):
        rows = get_tokenizer().encode_ordinary_batch(batch, num_threads=CORES)
        yield from map(to_array, rows)


def tokenize_in_a_pool(documents: Iterator[str]) -> Iterator[np.ndarray]:
    with multiprocessing.Pool(CORES) as pool:
        yield from pool.imap(tokenize, documents, chunksize=16)


def write_shards(documents: Iterable[np.ndarray], out_dir: Path) -> None:
    shard, filled, index = np.empty(SHARD_SIZE, dtype=np.uint16), 0, 0
    for tokens in documents:
        if filled + len(tokens) > SHARD_SIZE:
            np.save(out_dir / f"peer_{index:06d}.npy", shard[:filled])
            filled, index = 0, index + 1
        shard[filled : filled + len(tokens)] = tokens
        filled += len(tokens)
    np.save(out_dir / f"peer_{index:06d}.npy", shard[:filled])


if __name__ == "__main__":
    way = {"batch": tokenize_in_batches, "pool": tokenize_in_a_pool}[sys.argv[1]]
    with Path(sys.argv[2]).open() as lines:
        write_shards(way(json.loads(line)["text"] for line in lines), Path(sys.argv[3]))
