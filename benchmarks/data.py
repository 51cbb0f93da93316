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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import PretrainingData
from engine.sources import open_source
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


def tokenize_document(document: str) -> np.ndarray:
    tokens = [END_OF_TEXT_ID, *get_tokenizer().encode_ordinary(document)]
    return np.array(tokens, dtype=np.uint16)


def compare_tokenization(config: DataBenchmarkConfig) -> None:
    pieces = open_source(config.data, "text").pieces(0, Counter())
    pieces = [piece for piece in pieces if piece[0].strip()] * config.repeat
    starts = [i for i, (_, is_start) in enumerate(pieces) if is_start]
    ends = [*starts[1:], len(pieces)]
    documents = [
        "".join(text for text, _ in pieces[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]
    n = config.processes

    def with_fineweb(_: int) -> np.ndarray:
        return np.concatenate([tokens for _, tokens in tokenize(lambda: iter(pieces), n)])

    def with_tiktoken(_: int) -> np.ndarray:
        rows = get_tokenizer().encode_ordinary_batch(documents, num_threads=n)
        return np.concatenate([np.array([END_OF_TEXT_ID, *row], dtype=np.uint16) for row in rows])

    def one_at_a_time(_: int) -> np.ndarray:
        with multiprocessing.Pool(n) as pool:
            return np.concatenate(list(pool.imap(tokenize_document, documents, chunksize=16)))

    contenders = {
        OURS: with_fineweb,
        "encode_ordinary_batch": with_tiktoken,
        "one document at a time": one_at_a_time,
    }
    turns = harness.take_turns(contenders, range(config.rounds + 1))
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    print(
        f"{megabytes:.1f} MB, {len(documents):,} documents, {n} processes, {config.rounds} rounds"
    )
    harness.print_header("tokenization", "MB/s", "ours is")
    ours, expected = harness.median_seconds(turns[OURS]), turns[OURS][0][1]
    for name, of_one in turns.items():
        if not np.array_equal(of_one[0][1], expected):
            raise ValueError(f"{name} makes other tokens of {config.data} than {OURS}")
        seconds = harness.median_seconds(of_one)
        harness.print_row(name, f"{megabytes / seconds:.2f}", f"{seconds / ours:.2f} x")


def measure_loader(data: PretrainingData, config: DataBenchmarkConfig) -> None:
    steps = range(1, len(data.shards) // data.total_batch_size + 1)
    epoch = {"": lambda _: [data.micro_batch(step, 1) for step in steps] and None}
    seconds = harness.median_seconds(harness.take_turns(epoch, range(config.rounds + 1))[""])
    harness.print_header("loader", "M tokens/s")
    tokens = len(steps) * data.total_batch_size
    harness.print_row(f"{data.batch_size} x {data.block_size}", f"{tokens / seconds / 1e6:.0f}")


def measure_prefetching(data: PretrainingData, config: DataBenchmarkConfig) -> None:
    prefetcher = Prefetcher(data, harness.CPU)
    contenders = {
        "with prefetching": lambda step: prefetcher(step, 1),
        "": lambda _: time.sleep(config.step_ms / 1e3),
        "without": lambda step: data.micro_batch(step, 1),
    }
    turns = harness.take_turns(contenders, range(1, config.steps + 2))
    harness.print_header(f"batch of a step of {config.step_ms:g} ms", "wait, ms", "of the step")
    for name in ("with prefetching", "without"):
        wait = harness.median_seconds(turns[name]) * 1e3
        harness.print_row(name, f"{wait:.3f}", f"{wait / (wait + config.step_ms):.2%}")


def main(config: DataBenchmarkConfig) -> None:
    total = config.batch_size * config.block_size
    if config.tokens <= total:
        raise ValueError(f"tokens is {config.tokens}, expected more than a batch of {total}")
    compare_tokenization(config)
    with tempfile.TemporaryDirectory() as folder:
        data = PretrainingData(
            harness.random_shards(folder, config.tokens),
            block_size=config.block_size,
            batch_size=config.batch_size,
            total_batch_size=total,
            seed=0,
        )
        measure_loader(data, config)
        measure_prefetching(data, config)


if __name__ == "__main__":
    run_command(main, DataBenchmarkConfig, __doc__)
