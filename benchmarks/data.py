"""How fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py                                    # Python's documentation: 2 minutes
    python benchmarks/data.py --data docs.jsonl more/*.parquet   # any text that fineweb.py reads

Preparation: whole processes, from JSON lines to shards on disk. fineweb.py, which also checks the
text and hashes the shards, and two programs with tiktoken (benchmarks/tiktoken_peers.py) take turns
on all cores. The tokens must be equal. Repeated text flatters fineweb.py, because gigatoken caches
words; so the encoders also encode one copy, without starting, reading and writing. Loader: batches
of random tokens in the page cache, on one core. Prefetching: how long a step waits for its batch;
the step is a sleep, as of a CPU whose GPU computes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import PretrainingData
from engine.documents import Piece, TextFormat, open_source
from engine.shards import ShardFile, read_manifest
from engine.step import Prefetcher
from engine.tokenizer import BatchEncoder, get_tokenizer
from fineweb import batch_pieces, tokenize_pieces

OURS = "fineweb.py"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class DataBenchmarkConfig:
    data: list[str] = flag(["stdlib"], "files, folders or globs of text, or stdlib")
    copies: int = flag(8, "copies of the text that are prepared, so that starting weighs less")
    rounds: int = flag(3, "turns of each contender")
    tokens: int = flag(50_000_000, "tokens that the loader reads")
    block_size: int = flag(1024, "tokens per sequence")
    batch_size: int = flag(64, "sequences per batch")
    steps: int = flag(20, "steps with prefetching, and as many without")
    step_ms: float = flag(150.0, "milliseconds of a step")


def read_documents(data: list[str]) -> list[str]:
    documents: list[str] = []
    for piece in open_source(data, TextFormat()).pieces(0, Counter()):
        if piece.starts:
            documents.append("")
        documents[-1] += piece.text
    return [document for document in documents if document.strip()]


def run_process(arguments: list[str], folder: Path, turn: int) -> harness.Result:
    """Run a program that writes shards to a new folder; return that and its peak memory."""
    out_dir = folder / f"{Path(arguments[0]).stem}_{arguments[1].strip('-')}_{turn}"
    out_dir.mkdir()
    command, peak = [sys.executable, *arguments, str(out_dir)], 0
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(StopIteration, OSError):  # it may just have ended
                peak = harness.read_memory("VmHWM", process.pid)
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed, see above")
    return {"out_dir": out_dir, "peak_bytes": peak}


def read_tokens(out_dir: Path) -> np.ndarray:
    names = [shard["name"] for shard in read_manifest(out_dir)["shards"]]
    files = [out_dir / name for name in names] or sorted(out_dir.glob("*.npy"))
    return np.concatenate([np.load(file) for file in files])


def compare_preparation(documents: list[str], config: DataBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary), Path(temporary) / "documents.jsonl"
        lines = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
        with file.open("w") as stream:
            stream.writelines([lines] * config.copies)
        peer = "benchmarks/tiktoken_peers.py"
        commands = {
            OURS: ["fineweb.py", "--dataset", str(file), "--out_dir"],
            "tiktoken, encode_ordinary_batch": [peer, "batch", str(file)],
            "tiktoken, a pool of processes": [peer, "pool", str(file)],
        }
        contenders = {n: partial(run_process, command, folder) for n, command in commands.items()}
        results = harness.take_turns(contenders, range(config.rounds), warmup=0)
        tokens = read_tokens(results[OURS][0]["value"]["out_dir"])
        print(f"{file.stat().st_size / 1e6:.0f} MB of JSON lines, {os.cpu_count()} cores")
        print(f"{len(documents) * config.copies:,} documents, {len(tokens):,} tokens")
        harness.print_header("text to shards", "s", "peak MB", "ours takes")
        for name, turns in results.items():
            if not np.array_equal(read_tokens(turns[0]["value"]["out_dir"]), tokens):
                raise ValueError(f"{name} makes other tokens of {config.data} than {OURS}")
            peak = harness.median([turn["value"] for turn in turns], "peak_bytes") / 1e6
            seconds = f"{harness.median(turns):.2f}"
            times = harness.median(results[OURS]) / harness.median(turns)
            harness.print_row(name, seconds, f"{peak:.0f}", f"{times:.3f}")
        measure_parts(file, tokens, folder)


def measure_parts(file: Path, tokens: np.ndarray, folder: Path) -> None:
    """How long the parts of fineweb.py take when nothing runs beside them."""
    encoder, encode = BatchEncoder(), 0.0
    encoder.encode(["warm up"])
    start = time.perf_counter()
    for batch in batch_pieces(open_source([str(file)], TextFormat()).pieces(0, Counter())):
        began = time.perf_counter()
        tokenize_pieces(encoder, batch)
        encode += time.perf_counter() - began
    read = time.perf_counter() - start - encode
    start = time.perf_counter()
    shard = ShardFile(folder / "shard.npy")
    shard.write(tokens)
    shard.finish()
    write = time.perf_counter() - start
    harness.print_header("part of fineweb.py alone", "s", "share")
    for part, seconds in (("reading", read), ("encoding", encode), ("writing", write)):
        harness.print_row(part, f"{seconds:.2f}", f"{seconds / (read + encode + write):.0%}")


def compare_encoders(documents: list[str], rounds: int) -> None:
    """Encode one copy, with a new encoder in each round."""
    batches = [[text for text, *_ in batch] for batch in batch_pieces(map(Piece, documents))]

    def encode(encoder: BatchEncoder) -> None:
        for texts in batches:
            encoder.encode(texts)

    def encode_with_tiktoken(_: BatchEncoder) -> None:
        for texts in batches:
            get_tokenizer().encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    contenders = {
        "gigatoken, empty cache": encode,
        "gigatoken, again": encode,
        "tiktoken, encode_ordinary_batch": encode_with_tiktoken,
    }
    encoders = [BatchEncoder() for _ in range(rounds + 1)]
    results = harness.take_turns(contenders, encoders)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    harness.print_header(f"encoding {megabytes:.1f} MB", "MB/s")
    for name, turns in results.items():
        harness.print_row(name, f"{megabytes / harness.median(turns):.1f}")


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
    documents = read_documents(config.data)
    compare_preparation(documents, config)
    compare_encoders(documents, config.rounds)
    sizes = {"block_size": config.block_size, "batch_size": config.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        shards = harness.random_shards(folder, config.tokens)
        data = PretrainingData(shards, total_batch_size=total, seed=0, **sizes)
        measure_loading(data, config)


if __name__ == "__main__":
    run_command(main, DataBenchmarkConfig, __doc__)
