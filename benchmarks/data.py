"""How fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py                                    # Python's documentation: 2 minutes
    python benchmarks/data.py --data docs.jsonl more/*.parquet   # any text that fineweb.py reads

Preparation: whole processes, from JSON lines to shards on disk. fineweb.py, which also checks the
text and hashes the shards, and two programs with tiktoken (benchmarks/tiktoken_peers.py) take turns
on all cores. The tokens must be those of equally long text. Repeated text flatters fineweb.py,
because gigatoken caches words; so the encoders also encode one copy, without starting, reading and
writing. Loader: batches of random tokens in the page cache, on one core. Prefetching: how long a
step waits for its batch; the step is a sleep, as of a CPU whose GPU computes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import PretrainingData
from engine.shards import TokenShards, read_manifest, write_manifest, write_shard
from engine.sources import open_source
from engine.step import Prefetcher
from engine.tokenizer import END_OF_TEXT_ID, BatchEncoder, get_tokenizer, token_lengths
from fineweb import batch_pieces, tokenize_pieces

OURS, PEERS = "fineweb.py", "benchmarks/tiktoken_peers.py"
POLL_SECONDS = 0.02
BATCH_SIZE, BLOCK_SIZE = 64, 1024  # of the loader's batches
STEPS, STEP_SECONDS = 20, 0.15  # with prefetching, and as many without


@dataclass(frozen=True)
class DataBenchmarkConfig:
    data: list[str] = flag(["stdlib"], "files, folders or globs of text, or stdlib")
    copies: int = flag(8, "copies of the text that are prepared, so that starting weighs less")
    rounds: int = flag(3, "turns of each contender")
    tokens: int = flag(50_000_000, "tokens that the loader reads")


def read_documents(data: list[str]) -> list[str]:
    documents: list[str] = []
    for text, is_start in open_source(data, "text").pieces(0, Counter()):
        if is_start:
            documents.append("")
        documents[-1] += text
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


def count_bytes(tokens: np.ndarray) -> int:
    """Bytes of text. fineweb.py draws documents, and sections of long ones, for validation, so its
    tokens have another order and more separators.
    """
    return int(np.bincount(tokens, minlength=END_OF_TEXT_ID + 1) @ token_lengths())


def compare_preparation(documents: list[str], config: DataBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary), Path(temporary) / "documents.jsonl"
        lines = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
        with file.open("w") as stream:
            stream.writelines([lines] * config.copies)
        commands = {
            OURS: ["fineweb.py", "--dataset", str(file), "--out_dir"],
            "tiktoken, encode_ordinary_batch": [PEERS, "batch", str(file)],
            "tiktoken, a pool of processes": [PEERS, "pool", str(file)],
        }
        contenders = {n: partial(run_process, command, folder) for n, command in commands.items()}
        results, rows = harness.take_turns(contenders, config.rounds, warmup=0), []
        tokens = read_tokens(results[OURS][0]["out_dir"])
        for name, turns in results.items():
            if count_bytes(read_tokens(turns[0]["out_dir"])) != count_bytes(tokens):
                raise ValueError(f"{name} makes tokens of other text than {OURS}")
            seconds, peak = harness.median(turns), harness.median(turns, "peak_bytes") / 1e6
            times = harness.median(results[OURS]) / seconds
            rows.append([name, f"{seconds:.2f}", f"{peak:.0f}", f"{times:.3f}"])
        print(f"{file.stat().st_size / 1e6:.0f} MB of JSON lines, {os.cpu_count()} cores")
        print(f"{len(documents) * config.copies:,} documents, {len(tokens):,} tokens")
        harness.print_table(["text to shards", "s", "peak MB", "ours takes"], rows)
        measure_parts(file, tokens, folder)


def measure_parts(file: Path, tokens: np.ndarray, folder: Path) -> None:
    """How long the parts of fineweb.py take when nothing runs beside them."""
    encoder, batches = BatchEncoder(), list[list]()
    encoder.encode(["warm up"])

    def read(_: int) -> None:
        pieces = open_source([str(file)], "text").pieces(0, Counter())
        batches.extend(batch_pieces((text, starts, False) for text, starts in pieces))

    def encode(_: int) -> None:
        for batch in batches:
            tokenize_pieces(encoder, batch)

    def write(_: int) -> None:
        write_shard(folder / "shard.npy", tokens)

    parts = {"reading": read, "encoding": encode, "writing": write}
    results = harness.take_turns(parts, rounds=1, warmup=0)
    seconds = {part: harness.median(turns) for part, turns in results.items()}
    total = sum(seconds.values())
    rows = [[part, f"{s:.2f}", f"{s / total:.0%}"] for part, s in seconds.items()]
    harness.print_table(["part of fineweb.py alone", "s", "share"], rows)


def compare_encoders(documents: list[str], rounds: int) -> None:
    """Encode one copy, with a new encoder in each round."""
    pieces = ((document, True, False) for document in documents)
    batches = [[text for text, *_ in batch] for batch in batch_pieces(pieces)]
    encoders = [BatchEncoder() for _ in range(rounds + 1)]

    def encode(i: int) -> None:
        for texts in batches:
            encoders[i].encode(texts)

    def encode_with_tiktoken(_: int) -> None:
        for texts in batches:
            get_tokenizer().encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    contenders = {
        "gigatoken, empty cache": encode,
        "gigatoken, again": encode,
        "tiktoken, encode_ordinary_batch": encode_with_tiktoken,
    }
    results = harness.take_turns(contenders, rounds)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    rows = [[name, f"{megabytes / harness.median(results[name]):.1f}"] for name in results]
    harness.print_table([f"encoding {megabytes:.1f} MB", "MB/s"], rows)


def measure_loading(folder: Path, config: DataBenchmarkConfig) -> None:
    ids = np.random.default_rng(0).integers(END_OF_TEXT_ID + 1, size=config.tokens, dtype=np.uint16)
    entry = {**write_shard(folder / "random_train_000000.npy", ids), "split": "train"}
    write_manifest(folder, {"shards": [entry]})
    total = BATCH_SIZE * BLOCK_SIZE
    sizes = {"block_size": BLOCK_SIZE, "batch_size": BATCH_SIZE, "total_batch_size": total}
    data = PretrainingData(TokenShards(folder, "train"), seed=0, **sizes)
    n_steps, prefetcher = config.tokens // total, Prefetcher(data, harness.CPU)

    def load(i: int) -> None:
        data.micro_batch(i + 1, 1)

    def read_epoch(_: int) -> None:
        for i in range(n_steps):
            load(i)

    def wait_for_batch(i: int) -> None:
        prefetcher(i + 1, 1)

    epochs = harness.take_turns({"epoch": read_epoch}, config.rounds)["epoch"]
    speed = f"{n_steps * total / harness.median(epochs) / 1e6:.0f}"
    harness.print_table(["loader", "M tokens/s"], [[f"{BATCH_SIZE} x {BLOCK_SIZE}", speed]])
    contenders = {
        "prefetched": wait_for_batch,
        "step": lambda _: time.sleep(STEP_SECONDS),
        "not prefetched": load,
    }
    results, rows = harness.take_turns(contenders, STEPS), []
    for name in ("prefetched", "not prefetched"):
        wait = harness.median(results[name])
        rows.append([name, f"{wait * 1e3:.3f}", f"{wait / (wait + STEP_SECONDS):.2%}"])
    columns = f"batch of a step of {STEP_SECONDS * 1e3:g} ms", "wait, ms", "of the step"
    harness.print_table(columns, rows)


def main(config: DataBenchmarkConfig) -> None:
    documents = read_documents(config.data)
    compare_preparation(documents, config)
    compare_encoders(documents, config.rounds)
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(Path(folder), config)


if __name__ == "__main__":
    run_command(main, DataBenchmarkConfig, __doc__)
