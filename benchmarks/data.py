"""How fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py                                    # Python's documentation: 3 minutes
    python benchmarks/data.py --data docs.jsonl more/*.parquet   # any text that fineweb.py reads

Tokenization: fineweb.py's own code, tiktoken's encode_ordinary_batch over all documents, and one
document at a time (build-nanogpt's fineweb.py: Pool.imap, chunks of 16) take turns, with equally
many processes or threads and including their start. The tokens must be equal. Loader: batches of
random tokens in the page cache, on one core. Prefetching: how long a step waits for its batch; the
step is a sleep, as of a CPU whose GPU computes.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import PretrainingData
from engine.sources import Piece, open_source
from engine.step import Prefetcher
from engine.tokenizer import END_OF_TEXT_ID, get_tokenizer
from fineweb import tokenize

OURS = "this project"


@dataclass(frozen=True)
class DataBenchmarkConfig:
    data: list[str] = flag(["stdlib"], "files, folders or globs of text, or stdlib")
    repeat: int = flag(4, "times that the text is repeated, so that starting weighs less")
    rounds: int = flag(5, "measured turns of each contender, after one that warms up")
    processes: int = flag(os.cpu_count() or 1, "of tokenization; as many threads of tiktoken")
    tokens: int = flag(50_000_000, "tokens that the loader reads")
    block_size: int = flag(1024, "tokens per sequence")
    batch_size: int = flag(64, "sequences per batch")
    steps: int = flag(20, "steps with prefetching, and as many without")
    step_ms: float = flag(150.0, "milliseconds of a step")


def to_array(ids: list[int]) -> np.ndarray:
    return np.array([END_OF_TEXT_ID, *ids], dtype=np.uint16)


def tokenize_document(document: str) -> np.ndarray:
    return to_array(get_tokenizer().encode_ordinary(document))


def tokenize_with_fineweb(pieces: list[Piece], n: int) -> np.ndarray:
    return np.concatenate([tokens for _, tokens in tokenize(lambda: iter(pieces), n)])


def tokenize_with_tiktoken(documents: list[str], n: int) -> np.ndarray:
    rows = get_tokenizer().encode_ordinary_batch(documents, num_threads=n)
    return np.concatenate([to_array(row) for row in rows])


def tokenize_one_at_a_time(documents: list[str], n: int) -> np.ndarray:
    with multiprocessing.Pool(n) as pool:
        return np.concatenate(list(pool.imap(tokenize_document, documents, chunksize=16)))


def compare_tokenization(config: DataBenchmarkConfig) -> None:
    found = open_source(config.data, "text").pieces(0, Counter())
    pieces = [piece for piece in found if piece[0].strip()] * config.repeat
    documents: list[str] = []
    for text, is_start in pieces:
        if is_start:
            documents.append("")
        documents[-1] += text
    contenders: dict[str, Callable[[int], np.ndarray]] = {
        OURS: lambda n: tokenize_with_fineweb(pieces, n),
        "encode_ordinary_batch": lambda n: tokenize_with_tiktoken(documents, n),
        "one document at a time": lambda n: tokenize_one_at_a_time(documents, n),
    }
    results = harness.take_turns(contenders, [config.processes] * (config.rounds + 1))
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    print(f"{megabytes:.1f} MB, {len(documents):,} documents, {config.processes} processes")
    harness.print_header("tokenization", "MB/s", "ours is")
    for name, turns in results.items():
        if not np.array_equal(turns[0]["value"], results[OURS][0]["value"]):
            raise ValueError(f"{name} makes other tokens of {config.data} than {OURS}")
        speed = f"{megabytes / harness.median(turns):.2f}"
        harness.print_row(name, speed, f"{harness.ratio(results, name, OURS)} x")


def measure_loading(data: PretrainingData, config: DataBenchmarkConfig) -> None:
    n_steps, prefetcher = len(data.shards) // data.total_batch_size, Prefetcher(data, harness.CPU)

    def read_epoch(_: int) -> None:
        for step in range(1, n_steps + 1):
            data.micro_batch(step, 1)

    turns = harness.take_turns({"epoch": read_epoch}, range(config.rounds + 1))["epoch"]
    speed = n_steps * data.total_batch_size / harness.median(turns)
    harness.print_header("loader", "M tokens/s")
    harness.print_row(f"{data.batch_size} x {data.block_size}", f"{speed / 1e6:.0f}")
    contenders: dict[str, Callable[[int], object]] = {
        "prefetched": lambda step: prefetcher(step, 1),
        "step": lambda _: time.sleep(config.step_ms / 1e3),
        "not prefetched": lambda step: data.micro_batch(step, 1),
    }
    results = harness.take_turns(contenders, range(1, config.steps + 2))
    harness.print_header(f"batch of a step of {config.step_ms:g} ms", "wait, ms", "of the step")
    for name in ("prefetched", "not prefetched"):
        wait = harness.median(results[name]) * 1e3
        harness.print_row(name, f"{wait:.3f}", f"{wait / (wait + config.step_ms):.2%}")


def main(config: DataBenchmarkConfig) -> None:
    total = config.batch_size * config.block_size
    if config.tokens <= total:
        raise ValueError(f"tokens is {config.tokens}, expected more than a batch of {total}")
    compare_tokenization(config)
    sizes = {"block_size": config.block_size, "batch_size": config.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        shards = harness.random_shards(folder, config.tokens)
        data = PretrainingData(shards, total_batch_size=total, seed=0, **sizes)
        measure_loading(data, config)


if __name__ == "__main__":
    run_command(main, DataBenchmarkConfig, __doc__)
