"""How fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py                                    # Python's own documentation
    python benchmarks/data.py --data docs.jsonl more/*.parquet   # any text that fineweb.py reads

Tokenisation: fineweb.py's own path, tiktoken's threads over the whole list (encode_ordinary_batch)
and one document at a time (build-nanogpt's fineweb.py: Pool.imap, chunks of 16) take turns, with
equally many processes or threads, and start-up is part of each. All end in the same row of uint16,
which is checked. Loader: an epoch of random tokens in the page cache, on one core. Prefetch: how
long a step waits for its batch; the step itself is a sleep, as of a CPU whose GPU is at work.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from data import PretrainingData, TokenShards, write_manifest, write_shard
from fineweb import tokenize
from runtime import Prefetch, on_host, to_device
from text import Piece, open_source
from tokenizer import END_OF_TEXT_ID, get_tokenizer

CPU = torch.device("cpu")
OURS = "this project"


@dataclass(frozen=True)
class DataBenchmarkConfig:
    data: list[str] = field(
        default_factory=lambda: ["stdlib"],
        metadata={"help": "files, folders or globs of text, or stdlib"},
    )
    repeat: int = 4
    """times that the text is taken, so that start-up and the last batches weigh less"""
    rounds: int = 5
    """times that each contender is measured"""
    processes: int = os.cpu_count() or 1
    """for tokenisation; as many threads of tiktoken"""
    tokens: int = 50_000_000
    """that the loader reads"""
    block_size: int = 1024
    """tokens in a sequence"""
    batch_size: int = 64
    """sequences in a batch"""
    steps: int = 20
    """with Prefetch, and as many without it"""
    step_ms: float = 150.0
    """length of the stand-in for a step, beside its batch"""


def this_project(pieces: list[Piece], processes: int) -> np.ndarray:
    return np.concatenate([tokens for _, tokens in tokenize(lambda: iter(pieces), processes)])


def tiktoken_batch(documents: list[str], processes: int) -> np.ndarray:
    rows = get_tokenizer().encode_ordinary_batch(documents, num_threads=processes)
    return np.concatenate([np.array([END_OF_TEXT_ID, *row], dtype=np.uint16) for row in rows])


def tokenize_document(document: str) -> np.ndarray:
    tokens = np.array([END_OF_TEXT_ID, *get_tokenizer().encode_ordinary(document)])
    return tokens.astype(np.uint16)


def one_at_a_time(documents: list[str], processes: int) -> np.ndarray:
    with multiprocessing.Pool(processes) as pool:
        return np.concatenate(list(pool.imap(tokenize_document, documents, chunksize=16)))


def whole_documents(pieces: list[Piece]) -> list[str]:
    documents: list[list[str]] = []
    for text, starts in pieces:
        if starts:
            documents.append([])
        documents[-1].append(text)
    return ["".join(parts) for parts in documents]


def compare_tokenisation(config: DataBenchmarkConfig) -> None:
    pieces = list(open_source(config.data, "text").pieces(0, Counter()))
    pieces = [piece for piece in pieces if piece[0].strip()]  # fineweb.py alone leaves out blanks
    pieces *= config.repeat
    documents = whole_documents(pieces)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    contenders: dict[str, Callable[[], np.ndarray]] = {
        OURS: lambda: this_project(pieces, config.processes),
        "encode_ordinary_batch": lambda: tiktoken_batch(documents, config.processes),
        "one document at a time": lambda: one_at_a_time(documents, config.processes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    expected = contenders[OURS]()  # warms up, too
    for _ in range(config.rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            found = contender()
            seconds[name].append(time.perf_counter() - started)
            if not np.array_equal(found, expected):
                raise ValueError(f"{name} makes other tokens of {config.data} than {OURS}")
    print(
        f"{megabytes:.1f} MB in {len(documents):,} documents, {len(expected):,} tokens, "
        f"{config.processes} processes, {config.rounds} rounds\n"
    )
    print("| tokenisation | MB/s | ours is |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / own for t, own in zip(times, seconds[OURS], strict=True))
        speed = megabytes / statistics.median(times)
        print(f"| {name} | {speed:.2f} | {ratio:.2f} x |", flush=True)


def random_shards(folder: Path | str, n_tokens: int) -> TokenShards:
    """The train split of a new data folder, one shard of random tokens."""
    n_vocab = END_OF_TEXT_ID + 1
    ids = np.random.default_rng(0).integers(n_vocab, size=n_tokens, dtype=np.uint16)
    entry = write_shard(Path(folder) / "random_train_000000.npy", ids)
    write_manifest(Path(folder), {"shards": [{**entry, "split": "train"}]})
    return TokenShards(folder, "train")


def measure_loader(data: PretrainingData, config: DataBenchmarkConfig) -> None:
    steps = range(1, len(data.shards) // data.total_batch_size + 1)
    speeds = []
    for number in range(config.rounds + 1):
        started = time.perf_counter()
        for step in steps:
            data.micro_batch(step, 1)
        if number:  # the first epoch warms up
            speeds.append(len(steps) * data.total_batch_size / (time.perf_counter() - started))
    print(f"\n| loader, {data.batch_size} x {data.block_size} | M tokens/s |\n|---|---|")
    print(f"| one core, page cache | {statistics.median(speeds) / 1e6:.0f} |", flush=True)


def measure_prefetch(data: PretrainingData, config: DataBenchmarkConfig) -> None:
    prefetch = Prefetch(data, CPU)
    contenders = {
        "with Prefetch": lambda step: prefetch(step, 1),
        "without": lambda step: to_device(on_host(data.micro_batch(step, 1), CPU), CPU),
    }
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(config.steps + 1):
        for name, batch_of in contenders.items():
            started = time.perf_counter()
            batch_of(step + 1)
            if step:  # nothing is ahead of the first
                waits[name].append(time.perf_counter() - started)
            time.sleep(config.step_ms / 1e3)
    print(f"\n| batch of a {config.step_ms:g} ms step | wait, ms | of the step |\n|---|---|---|")
    for name, times in waits.items():
        wait = statistics.median(times) * 1e3
        print(f"| {name} | {wait:.3f} | {wait / (wait + config.step_ms):.2%} |", flush=True)


def main(config: DataBenchmarkConfig) -> None:
    total = config.batch_size * config.block_size
    if config.tokens < total + 1:
        raise ValueError(f"tokens is {config.tokens}, expected more than a batch of {total}")
    compare_tokenisation(config)
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(folder, config.tokens)
        data = PretrainingData(shards, config.block_size, config.batch_size, total, seed=0)
        measure_loader(data, config)
        measure_prefetch(data, config)


if __name__ == "__main__":
    cli.run(main, DataBenchmarkConfig, __doc__)
