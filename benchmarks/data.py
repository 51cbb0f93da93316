"""How fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py                                    # Python's own docs: 2 minutes
    python benchmarks/data.py --data docs.jsonl more/*.parquet   # any text that fineweb.py reads

Two programs turn JSON lines into shards on disk, on all cores: fineweb.py and
benchmarks/tiktoken_peer.py. They take turns, and we time each from start to exit. fineweb.py also
checks the text and hashes the shards. Both must tokenize the same number of bytes. Repeating the
text favors fineweb.py, because its tokenizer (gigatoken) caches words; --copies 1 avoids that. Then
the loader reads batches of random tokens from the page cache, on one core.
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
from engine.documents import TextFormat, join_pieces, open_source
from engine.shards import TokenShards, read_manifest, write_manifest, write_shard
from engine.tokenizer import Tokenizer
from model import GPTConfig

OURS, PEER = "fineweb.py", "benchmarks/tiktoken_peer.py"
POLL_SECONDS = 0.02
BATCH_SIZE, BLOCK_SIZE = 64, 1024  # the batches that the loader reads


@dataclass(frozen=True)
class DataBenchmarkConfig:
    data: list[str] = flag(["stdlib"], "text files, folders or globs; stdlib is Python's docs")
    copies: int = flag(8, "times to repeat the text, so that startup matters less")
    rounds: int = flag(3, "turns of each contender")
    tokens: int = flag(50_000_000, "tokens for the loader to read")


def read_documents(data: list[str]) -> list[str]:
    # Nobody reads the counts of problems.
    documents = join_pieces(open_source(data, TextFormat()).pieces(0, Counter()))
    return [document for document in documents if document.strip()]


def run_process(arguments: list[str], folder: Path, turn: int) -> harness.Result:
    """Run a program that writes shards. Return their folder and the program's peak memory."""
    out_dir = folder / f"{Path(arguments[0]).stem}_{turn}"
    out_dir.mkdir()
    command, peak = [sys.executable, *arguments, str(out_dir)], 0
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(StopIteration, OSError):  # it has just ended, so there is no VmHWM
                peak = harness.read_memory("VmHWM", process.pid)  # not counting its workers
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed, see above")
    return {"out_dir": out_dir, "peak_bytes": peak}


def read_tokens(out_dir: Path) -> np.ndarray:
    # The peer writes no manifest, so `names` is empty and we look for its files instead.
    names = [shard["name"] for shard in read_manifest(out_dir)["shards"]]
    files = [out_dir / name for name in names] or sorted(out_dir.glob("*.npy"))
    return np.concatenate([np.load(file) for file in files])


def count_bytes(tokens: np.ndarray) -> int:
    """Count the bytes of the text. Tokens differ, because fineweb.py holds out validation text."""
    return int(Tokenizer.gpt2().token_bytes[tokens].sum())


def compare_preparation(documents: list[str], config: DataBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary), Path(temporary) / "documents.jsonl"
        text = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
        with file.open("w") as stream:
            stream.writelines([text] * config.copies)
        commands = {
            OURS: ["fineweb.py", "--dataset", str(file), "--out_dir"],
            "tiktoken, a pool of processes": [PEER, str(file)],
        }
        contenders = {n: partial(run_process, command, folder) for n, command in commands.items()}
        results, rows = harness.take_turns(contenders, config.rounds, warmup=0), []
        tokens = read_tokens(results[OURS][0]["out_dir"])
        for name, turns in results.items():
            if count_bytes(read_tokens(turns[0]["out_dir"])) != count_bytes(tokens):
                raise ValueError(f"{name} and {OURS} tokenized different amounts of text")
            seconds, peak = harness.median(turns), harness.median(turns, "peak_bytes") / 1e6
            ratio = harness.median(results[OURS]) / seconds
            rows.append([name, f"{seconds:.2f}", f"{peak:.0f}", f"{ratio:.3f}"])
        print(f"{file.stat().st_size / 1e6:.0f} MB of JSON lines, {os.cpu_count()} cores")
        print(f"{len(documents) * config.copies:,} documents, {len(tokens):,} tokens")
        harness.print_table(["text to shards", "s", "peak MB", "fineweb.py's s / s"], rows)


def measure_loading(folder: Path, config: DataBenchmarkConfig) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(GPTConfig.vocab_size, size=config.tokens, dtype=np.uint16)
    entry = {**write_shard(folder / "random_train_000000.npy", ids), "split": "train"}
    write_manifest(folder, {"shards": [entry]})
    total = BATCH_SIZE * BLOCK_SIZE
    sizes = {"block_size": BLOCK_SIZE, "batch_size": BATCH_SIZE, "total_batch_size": total}
    data = PretrainingData(TokenShards(folder, "train"), seed=0, **sizes)
    n_steps = config.tokens // total

    def read_epoch(_: int) -> None:
        for i in range(n_steps):
            data.micro_batch(i + 1, 1)

    epochs = harness.take_turns({"epoch": read_epoch}, config.rounds)["epoch"]
    speed = f"{n_steps * total / harness.median(epochs) / 1e6:.0f}"
    harness.print_table(["loader", "M tokens/s"], [[f"{BATCH_SIZE} x {BLOCK_SIZE}", speed]])


def main(config: DataBenchmarkConfig) -> None:
    documents = read_documents(config.data)
    compare_preparation(documents, config)
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(Path(folder), config)


if __name__ == "__main__":
    run_command(main, DataBenchmarkConfig, __doc__)
