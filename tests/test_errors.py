"""Wrong input to the commands ends in one line and exit code 2, without a traceback."""

import json
import os
import resource
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_lora
import fineweb
import hellaswag
import plot
import sample
import share
import train_gpt2
from engine.adapter import save_adapter
from engine.config import run_command
from engine.errors import with_reported_errors
from engine.files import JSONLinesLog
from engine.lora import convert_linear_layer_to_lora
from engine.plots import plot_runs
from engine.shards import write_shard
from engine.tokenizer import save_tokenizer
from model import GPT, GPTConfig

CONFIGS = {
    "train_gpt2": (train_gpt2.main, train_gpt2.PretrainConfig),
    "finetune_lora": (finetune_lora.main, finetune_lora.FinetuneConfig),
    "hellaswag": (hellaswag.main, hellaswag.EvalConfig),
    "sample": (sample.main, sample.SampleConfig),
    "fineweb": (fineweb.main, fineweb.PrepareConfig),
    "share": (share.main, share.ShareConfig),
}
NOISE = bytes(range(256)) * 4

# The command line and a part of what it must say, which names the value or the file.
WRONG = [
    (
        "train_gpt2 --config nothing.yaml",
        "nothing.yaml cannot be read as YAML: [Errno 2] No such file",
    ),
    ("train_gpt2 --config empty", "empty cannot be read as YAML: [Errno 21] Is a directory"),
    ("train_gpt2 --config noise.yaml", "noise.yaml cannot be read as YAML"),
    ("train_gpt2 --config list.yaml", "list.yaml holds ['a'], expected lines of NAME: VALUE"),
    ("train_gpt2 --config file", "file holds None, expected lines of NAME: VALUE"),
    ("train_gpt2 --config syntax.yaml", "syntax.yaml cannot be read as YAML: "),
    ("train_gpt2 --config deep.yaml", "deep.yaml cannot be read as YAML: "),
    ("train_gpt2 --data_dir deep", "deep/manifest.json is damaged: "),
    ("train_gpt2 --config key.yaml", "key.yaml: max_stepz is not a setting of this command"),
    ("train_gpt2 --config choice.yaml", "choice.yaml: optimizer is sgd, expected adamw or muon"),
    ("train_gpt2 --config null.yaml", "batch_size is null"),
    ("train_gpt2 --config nan.yaml", "weight_decay is nan, expected a number"),
    ("train_gpt2 --n_layer two", "n_layer is two, expected an integer"),
    ("train_gpt2 --precision fp8", "precision is fp8, expected fp32 or bf16 or fp16"),
    ("train_gpt2 --data_dir empty", "no train shards in empty"),
    ("train_gpt2 --data_dir half", "half/manifest.json is damaged"),
    ("train_gpt2 --data_dir llama", "llama has tokens of 'llama', expected 'gpt2'; prepare the"),
    ("train_gpt2 --max_lr nan", "nan"),
    ("train_gpt2 surplus", "surplus"),
    ("train_gpt2 --max_steps 1000000000000000000", "and at most 1,000,000,000,000"),
    ("train_gpt2 --total_batch_size 1125899906842624", "and at most 1,000,000,000,000"),
    (
        "train_gpt2 --data_dir few --batch_size 1000000000000",
        "not a multiple of batch_size 1000000",
    ),
    (
        "train_gpt2 --data_dir few --block_size 8 --n_layer 1 --n_head 1 --n_embd 1" + "0" * 30,
        "expected at least 1 and at most 1,000,000,000,000",
    ),
    ("train_gpt2 --out_dir=", "out_dir is empty, expected text"),
    ("train_gpt2 --data_dir few --block_size 8 --init_from=", "init_from is empty, expected text"),
    ("train_gpt2 --seed 99999999999999999999999", "and at most 9,223,372,036,854,775,807"),
    ("finetune_lora --model_name_or_path words", "words/config.json: n_layer is 'two'"),
    ("finetune_lora --model_name_or_path slack", "slack/config.json: layer_norm_epsilon is 'x'"),
    (
        "finetune_lora --model_name_or_path tiny --data rows.json --lora_dim 33",
        "expected at most 32",
    ),
    (
        "finetune_lora --model_name_or_path tiny --data rows.json --lora_load_path noise.pt",
        "noise.pt",
    ),
    ("finetune_lora --model_name_or_path tiny --data noise.json", "noise.json is not JSON"),
    ("finetune_lora --model_name_or_path tiny --data deep.json", "deep.json is not JSON: "),
    ("finetune_lora --model_name_or_path tiny --data deep.jsonl", "deep.jsonl line 1: not JSON"),
    ("finetune_lora --model_name_or_path tiny --data empty", "empty: Is a directory"),
    (
        "finetune_lora --model_name_or_path tiny --data rows.json --merge_out file",
        "merge_out file already exists",
    ),
    ("finetune_lora --examples_per_step 1125899906842624", "and at most 1,000,000,000,000"),
    ("hellaswag --limit 1" + "0" * 30, "and at most 1,000,000,000,000"),
    (
        "hellaswag --model tiny --data nothing.jsonl",
        "there is no nothing.jsonl; expected a",
    ),
    ("hellaswag --model tiny --data noise.jsonl.gz", "noise.jsonl.gz is truncated or damaged"),
    ("hellaswag --model tiny --data row.jsonl --out_dir torn", "torn/settings.json is damaged"),
    ("hellaswag --model tiny --data row.jsonl --out_dir file", "file: File exists; expected a"),
    (
        "hellaswag --model tiny --data true.jsonl",
        "true.jsonl line 1: label is True, expected 0 to 1",
    ),
    ("hellaswag --model tiny --data deep.jsonl", "deep.jsonl line 1: not JSON"),
    ("sample --model deep --prompt x", "deep/config.json is damaged: "),
    ("sample --model own_base --prompt x", "own_base holds no config.json, expected a model"),
    ("sample --model second_base --prompt x", "own_base holds no config.json, expected a model"),
    ("sample --model empty --prompt x", "empty holds no config.json"),
    ("sample --model gpt2-nowhere --prompt x", "without a network, name one with config.json"),
    (
        "sample --model tiny --prompt x --num_return_sequences 1000000000000",
        "num_return_sequences is 1000000000000, expected at least 1 and at most 10,000",
    ),
    ("sample --model tiny --max_new_tokens 0", "expected at least 1"),
    ("sample --model= --prompt x", "model is empty, expected text"),
    ("sample --model tiny --top_p 2", "top_p is 2.0, expected above 0"),
    ("sample --model slack --prompt x", "slack/config.json: layer_norm_epsilon is 'x'"),
    ("sample --model broken --prompt x", "broken has weights that are not finite"),
    ("fineweb --dataset empty", "empty is neither a dataset"),
    ("fineweb --dataset text.txt --out_dir file", "file"),
    ("fineweb --dataset deep.jsonl --out_dir new", "fewer than two different sections"),
    ("plot nothing", "nothing/metrics.jsonl: No such file or directory; check that it exists"),
    ("plot word_run", "word_run/metrics.jsonl is damaged"),
    ("plot syntax_run", "syntax_run/config.yaml is damaged"),
    ("plot deep", "deep/metrics.jsonl is damaged"),
    ("plot noise_run", "noise_run/metrics.jsonl is damaged"),
    ("plot list_run", "list_run/metrics.jsonl is damaged"),
    ("share --repo_id me/x --dry_run true --run bare", "bare holds no checkpoint; expected an"),
    ("share --repo_id me/x --dry_run true --run list_run", "progress.json is damaged"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model and all kinds of wrong input."""
    folder = tmp_path_factory.mktemp("errors")
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    for name, wrong in (
        ("tiny", {}),
        ("words", {"n_layer": "two"}),
        ("slack", {"layer_norm_epsilon": "x"}),
        ("broken", {}),
    ):
        if name == "broken":
            model.transformer.wpe.weight.data.fill_(torch.nan)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, 32)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | wrong))
    for name in ("empty", "torn", "half", "few", "deep", "llama"):
        (folder / name).mkdir()
    for name in ("noise_run", "list_run", "word_run", "syntax_run"):
        (folder / name).mkdir()
    for name in ("own_base", "second_base"):
        adapter = convert_linear_layer_to_lora(GPT(GPTConfig(32, n_layer=1, n_head=1, n_embd=8)))
        save_adapter(adapter, folder / name, "own_base")
    for name in ("bare", "list_run"):
        (folder / name / "checkpoints" / "step_000001").mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(folder / "few" / f"x_{split}.npy", np.arange(9))
    for name, content in {
        "noise.yaml": b"\xff\xfe\x00",
        "list.yaml": b"- a\n",
        "syntax.yaml": b"max_steps: [1\n",
        "null.yaml": b"batch_size: null\n",
        "key.yaml": b"max_stepz: 3\n",
        "choice.yaml": b"optimizer: sgd\n",
        "nan.yaml": b"weight_decay: .nan\n",
        "noise.pt": NOISE,
        "noise.json": NOISE,
        "noise.jsonl.gz": NOISE,
        "row.jsonl": b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n',
        "rows.json": json.dumps([{"prompt": "a", "completion": "b"}] * 2).encode(),
        "text.txt": b"some words " * 9,
        "half/manifest.json": b'{"shards": [{"name": "x"}]}',
        "torn/settings.json": b"{",
        "noise_run/metrics.jsonl": b'{"step": 1}\nno json, \xff no text\n',
        "list_run/metrics.jsonl": b"[1]\n",
        "list_run/checkpoints/step_000001/progress.json": b"{",
        "word_run/metrics.jsonl": b'{"step": "one"}\n',
        "syntax_run/metrics.jsonl": b'{"step": 1, "tokens": 1, "val_loss": 1.0}\n',
        "syntax_run/config.yaml": b"seed: [1\n",
        "file": b"",
        "true.jsonl": b'{"ctx": "a", "endings": ["b", "c"], "label": true}\n',
        "llama/manifest.json": b'{"shards": [], "tokenizer": "llama"}',
        "deep.yaml": b"[1",
        "deep.json": b"[1",
        "deep.jsonl": b"[1\n",
        "deep/config.json": b"[1",
        "deep/manifest.json": b"[1",
        "deep/metrics.jsonl": b"[1\n",
    }.items():
        (folder / name).write_bytes(content)
    return folder


def start(line: str, workplace: Path, monkeypatch) -> None:
    """Run a command line on a CPU, without a network."""
    name, *args = line.split()
    device = [] if name in ("fineweb", "plot", "share") else ["--device", "cpu"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, *device])
    if name == "plot":
        runpy.run_path(plot.__file__, run_name="__main__")
    else:
        run_command(*CONFIGS[name], "")


@pytest.mark.parametrize(("line", "expected"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_ends_in_one_line(workplace, monkeypatch, capsys, line, expected):
    """One line on stderr that names what is wrong, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as exit_:
        start(line, workplace, monkeypatch)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("error: ") == 1
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "train_gpt2 --data_dir nothing",
        "train_gpt2 --data_dir few --block_size 8 --total_batch_size 7",
        "train_gpt2 --data_dir few --n_embd 7",
        "train_gpt2 --data_dir few --init_from nowhere",
        "train_gpt2 --data_dir few --block_size 8 --n_layer 1 --n_head 1 --n_embd 8 --batch_size 1 "
        "--total_batch_size 8 --hellaswag_every 1 --hellaswag_data nothing.jsonl",
        "finetune_lora --model_name_or_path tiny --data nothing.jsonl",
        "finetune_lora --model_name_or_path nowhere --data rows.json",
        "finetune_lora --model_name_or_path tiny --data rows.json --examples_per_step 33",
        "finetune_lora --model_name_or_path tiny --data rows.json --optimizer muon",
        "hellaswag --model nowhere --data row.jsonl",
        "hellaswag --model tiny --data noise.jsonl.gz",
        "fineweb --dataset nothing",
        "fineweb --dataset text.txt --max_tokens 1",
        "fineweb --dataset fineweb-edu",
    ],
)
def test_a_refused_command_leaves_no_folder(workplace, monkeypatch, line):
    """A command that is refused has made neither its out_dir nor a parent of it."""
    with pytest.raises(SystemExit) as exit_:
        start(f"{line} --out_dir made/out", workplace, monkeypatch)
    assert exit_.value.code == 2
    assert not (workplace / "made").exists()


def test_damaged_rows_of_an_evaluation_are_named(tmp_path):
    """An evaluation does not resume from a damaged rows.jsonl."""
    (tmp_path / "settings.json").write_text("{}")
    for content in ("{\n", "[1]\n", "{}\n"):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"rows.jsonl is damaged.* choose another folder"):
            hellaswag.open_rows_log(tmp_path, {})


def test_user_errors_are_one_line_and_bugs_are_not(capsys):
    """A system error without a file name, and running out of memory on a CPU or GPU, are one plain
    line; a bug, and any error with --debug, keeps its traceback.
    """
    full = OSError(28, os.strerror(28))
    for error, expected in (
        (full, "the output: No space left on device; check"),
        (MemoryError("Unable to allocate 1 TiB"), "not enough memory: Unable to allocate 1 TiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory: CUDA out of memory"),
    ):
        with pytest.raises(SystemExit):
            with_reported_errors(raiser(error))
        assert expected in capsys.readouterr().err
        with pytest.raises(type(error)):
            with_reported_errors(raiser(error), debug=True)
    with pytest.raises(RuntimeError, match="a bug"):
        with_reported_errors(raiser(RuntimeError("a bug")))


def raiser(error: Exception):
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda: write_shard(Path("x.npy"), np.arange(200)), "x.npy"),
        (lambda: GPT(GPTConfig(64, 1000, 1, 1, 8)).save_pretrained("model"), "model"),
        (lambda: save_tokenizer("run"), "run"),
        (lambda: JSONLinesLog(Path("run/log"), "step").append({"x": "x" * 300}), "run/log"),
        (lambda: plot_runs([Path("run")], Path("loss.png")), "loss.png"),
    ],
    ids=["shard", "model", "tokenizer", "log", "plot"],
)
def test_a_full_disk_is_noticed_and_named(tmp_path, monkeypatch, write, name):
    """If only 300 bytes fit into a file, every writer fails with the file's name; none truncates
    it silently.
    """
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("seed: 1\n")
    Path("run/metrics.jsonl").write_text('{"step": 1, "tokens": 1, "val_loss": 1.0}\n')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match=name) as raised:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(raised.value)
