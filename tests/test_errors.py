"""Wrong input ends a command with one line and exit code 2, without a traceback."""

import json
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GPT2_TOKENIZER
from processes import run_here

from engine.adapter import save_adapter
from engine.errors import run_and_report_errors
from engine.files import JSONLinesLog
from engine.lora import convert_linear_layer_to_lora
from engine.plots import plot_runs
from engine.pretrained import save_pretrained
from engine.shards import write_shard
from hellaswag import open_rows_log
from model import GPT, GPTConfig

NOISE = bytes(range(256)) * 4
NEW_OUT_DIR = "--device cpu --out_dir made/out"
# Flags that make each command work; the flags of a case come after them and override them.
FLAGS = {
    "train_gpt2": f"{NEW_OUT_DIR} --data_dir few --n_layer 1 --n_head 2 --n_embd 8 --block_size 8 "
    "--batch_size 1 --total_batch_size 8",
    "finetune_lora": f"{NEW_OUT_DIR} --model_name_or_path tiny --data rows.json",
    "hellaswag": f"{NEW_OUT_DIR} --model tiny --data row.jsonl",
    "sample": "--device cpu --model tiny --prompt x",
    "fineweb": "--out_dir made/out",
    "plot": "",
    "share": "--repo_id me/x --dry_run",
}
# Wrong commands (FLAGS come first), and part of the error that each must print.
WRONG = {
    "train_gpt2 --config syntax.yaml": "syntax.yaml cannot be read as YAML: ",
    "train_gpt2 --data_dir nothing": "no train shards in nothing",
    "train_gpt2 --data_dir half": "half/manifest.json is damaged",
    "train_gpt2 --data_dir llama": "tokenized with llama, but its tokenizer.json is missing",
    "train_gpt2 --batch_size 1000000000000": "not a multiple of batch_size 1000000000000",
    "train_gpt2 --n_embd 7": "n_embd 7 is not a multiple of n_head 2",
    "train_gpt2 --init_from nowhere": "hub did not provide nowhere",
    "train_gpt2 --hellaswag_every 1 --hellaswag_data x.jsonl": "there is no x.jsonl",
    "finetune_lora --model_name_or_path nowhere": "hub did not provide nowhere",
    "finetune_lora --data nothing.jsonl": "there is no nothing.jsonl",
    "finetune_lora --data noise.json": "noise.json is not UTF-8 at byte 128",
    "finetune_lora --data empty": "empty is neither a known dataset nor a file, folder",
    "finetune_lora --data *.tsv": "*.tsv is neither a known dataset nor a file, folder",
    "finetune_lora --data splits": "splits has files of test and train; name those of one split",
    "finetune_lora --split test": "rows.json has no splits or configs; name the files",
    "finetune_lora --model_name_or_path bad_template": "chat_template 5, expected text",
    "finetune_lora --val_data nothing.csv": "there is no nothing.csv; expected",
    "finetune_lora --val_fraction 0": "val_fraction is 0, but there is no val_data; set one of",
    "finetune_lora --prompt_column question": "expected question and completion",
    "finetune_lora --data null.jsonl": "null.jsonl line 2: completion is None, expected a string",
    "finetune_lora --data null.jsonl --skip_bad_rows": "there is only 1 usable example",
    "finetune_lora --merge_out file": "merge_out file already exists",
    "finetune_lora --examples_per_step 33": "examples_per_step 33 is not a multiple of",
    "finetune_lora --optimizer muon": "optimizer is muon, which trains the matrices",
    "hellaswag --limit 1000000000000000000000000000000": "at most 1,000,000,000,000",
    "hellaswag --model nowhere": "hub did not provide nowhere",
    "hellaswag --data noise.jsonl.gz": "noise.jsonl.gz is not a gzip file; rename or convert it",
    "hellaswag --data true.jsonl": "true.jsonl line 1: label is True, expected 0 to 1",
    "hellaswag --out_dir torn": "torn/settings.json is damaged",
    "hellaswag --out_dir file": "file: File exists; expected a folder",
    "sample --model own_base": "own_base has no config.json; expected the folder of a model",
    "sample --model broken": "broken has weights that are not finite",
    "sample --model broken/model.safetensors": "model.safetensors is a file; expected the folder",
    "share --run file": "file holds no checkpoint or model; expected the folder",
    "sample --num_return_sequences 10001": "10001, expected at least 1 and at most 10,000",
    "fineweb --dataset nothing": "nothing is neither a known dataset",
    "fineweb --dataset text.txt": "fewer than two different sections",
    "fineweb --dataset text.txt --max_tokens 1": "max_tokens is 1, expected at least 4",
    "plot nothing": "nothing/metrics.jsonl: No such file or directory; check that it exists",
    "plot noise_run": "noise_run/metrics.jsonl is damaged",
    "plot syntax_run": "syntax_run/config.yaml cannot be read as YAML: ",
    "share --run torn": "torn/checkpoints/step_000001/progress.json is damaged",
}
FILES = {
    "file": b"",
    "text.txt": b"some words " * 9,
    "syntax.yaml": b"max_steps: [1\n",
    "noise.json": NOISE,
    "noise.jsonl.gz": NOISE,
    "rows.json": json.dumps([{"prompt": "a", "completion": "b"}] * 2).encode(),
    "splits/data/train-0.jsonl": b'{"text": "a"}\n',
    "splits/data/test-0.jsonl": b'{"text": "a"}\n',
    "null.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n',
    "row.jsonl": b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n',
    "true.jsonl": b'{"ctx": "a", "endings": ["b", "c"], "label": true}\n',
    "half/manifest.json": b'{"shards": [{"name": "x"}]}',
    "llama/manifest.json": b'{"shards": [], "tokenizer": "llama"}',
    "torn/settings.json": b"{",
    "torn/checkpoints/step_000001/progress.json": b"{",
    "torn/checkpoints/step_000001/config.json": b"{}",
    "noise_run/metrics.jsonl": b'{"step": 1}\nno json, \xff no text\n',
    "syntax_run/metrics.jsonl": b'{"step": 1, "tokens": 1, "val_loss": 1.0}\n',
    "syntax_run/config.yaml": b"seed: [1\n",
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model and all kinds of bad input."""
    folder = tmp_path_factory.mktemp("errors")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("empty", "few"):
        (folder / name).mkdir()
    for split in ("train", "val"):
        write_shard(folder / "few" / f"x_{split}.npy", np.arange(9))
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    for name, weight in (("tiny", 0.0), ("broken", torch.nan)):
        model.transformer.wpe.weight.data.fill_(weight)
        save_pretrained(model, folder / name, GPT2_TOKENIZER)
    shutil.copytree(folder / "tiny", folder / "bad_template")
    (folder / "bad_template" / "tokenizer_config.json").write_text('{"chat_template": 5}')
    save_adapter(convert_linear_layer_to_lora(model), folder / "own_base", "own_base")
    return folder


@pytest.mark.parametrize(("line", "expected"), WRONG.items(), ids=WRONG)
def test_wrong_input_ends_in_one_line(bad_inputs, monkeypatch, capsys, line, expected):
    """One line on stderr says what is wrong, the exit code is 2, and no out_dir is created."""
    name, _, added = line.partition(" ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(bad_inputs)
    with pytest.raises(SystemExit) as exit_:
        run_here(f"{name}.py", *f"{FLAGS[name]} {added}".split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("error: ") == 1
    assert error.count("\n") == 1
    assert not Path("made").exists()


def test_an_evaluation_with_damaged_rows_does_not_resume(tmp_path):
    """If rows.jsonl is damaged, an evaluation does not resume; the error names the file."""
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl is damaged.* choose another folder"):
        open_rows_log(tmp_path, {})


def test_user_errors_are_one_line_and_bugs_are_not(capsys):
    """A system error without a file name, or running out of memory on a CPU or GPU, gives one plain
    line. A bug keeps its traceback, and with --debug every error does.
    """

    def fail(error: Exception) -> None:
        raise error

    for error, expected in (
        (
            OSError(28, os.strerror(28)),
            "the output or a temporary file (in TMPDIR, by default /tmp): No space left",
        ),
        (MemoryError("Unable to allocate 1 TiB"), "not enough memory: Unable to allocate 1 TiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory: CUDA out of memory"),
    ):
        with pytest.raises(SystemExit):
            run_and_report_errors(partial(fail, error))
        assert expected in capsys.readouterr().err
        with pytest.raises(type(error)):
            run_and_report_errors(partial(fail, error), debug=True)
    with pytest.raises(RuntimeError, match="a bug"):
        run_and_report_errors(partial(fail, RuntimeError("a bug")))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.npy", lambda: write_shard(Path("x.npy"), np.arange(200))),
        ("model", lambda: GPT(GPTConfig(64, 1000, 1, 1, 8)).save_pretrained("model")),
        ("run", lambda: GPT2_TOKENIZER.save("run")),
        ("run/log", lambda: JSONLinesLog(Path("run/log"), "step").append({"x": "x" * 300})),
        ("loss.png", lambda: plot_runs([Path("run")], Path("loss.png"))),
    ],
)
def test_a_full_disk_is_noticed_and_named(tmp_path, monkeypatch, name, write):
    """If only 300 bytes fit into a file, every writer fails with an error that names the file."""
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
