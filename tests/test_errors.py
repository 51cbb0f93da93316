"""What the commands say of wrong input, in-process: each a line, exit code 2, no traceback."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

import cli
import finetune_lora
import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from model import GPT, GPTConfig
from tokenizer import save_tokenizer

CONFIGS = {
    "train_gpt2": (train_gpt2.main, train_gpt2.PretrainConfig),
    "finetune_lora": (finetune_lora.main, finetune_lora.FinetuneConfig),
    "hellaswag": (hellaswag.main, hellaswag.EvalConfig),
    "sample": (sample.main, sample.SampleConfig),
    "fineweb": (fineweb.main, fineweb.PrepareConfig),
}
NOISE = bytes(range(256)) * 4

# The command line and a part of what it must say, which names the value or the file.
WRONG = [
    ("train_gpt2 --config noise.yaml", "--config is no YAML"),
    ("train_gpt2 --config list.yaml", "config"),
    ("train_gpt2 --config syntax.yaml", "in the --config file, line 1"),
    ("train_gpt2 --config null.yaml", "batch_size is null"),
    ("train_gpt2 --data_dir empty", "no train shards in empty"),
    ("train_gpt2 --max_lr nan", "nan"),
    ("train_gpt2 surplus", "surplus"),
    ("train_gpt2 --seed 99999999999999999999999", "expected less than 2**63"),
    ("finetune_lora --model_name_or_path words", "words/config.json: n_layer is 'two'"),
    ("finetune_lora --model_name_or_path tiny --lora_load_path noise.pt", "noise.pt"),
    ("finetune_lora --model_name_or_path tiny --data noise.json", "noise.json is damaged"),
    ("finetune_lora --model_name_or_path tiny --data empty", "empty: Is a directory"),
    ("finetune_lora --model_name_or_path tiny --merge_out file", "merge_out file is there"),
    ("hellaswag --model tiny --data nothing.jsonl", "nothing.jsonl: No such file"),
    ("hellaswag --model tiny --data noise.jsonl.gz", "noise.jsonl.gz is truncated or damaged"),
    ("hellaswag --model tiny --data row.jsonl --out_dir torn", "torn/settings.json is damaged"),
    ("hellaswag --model tiny --data row.jsonl --out_dir file", "file: File exists"),
    ("sample --model empty --prompt x", "empty holds no config.json"),
    ("sample --model gpt2-nowhere --prompt x", "Without a network, name a folder"),
    ("sample --model tiny --top_p 2", "top_p is 2.0, expected above 0"),
    ("fineweb --dataset empty", "empty is neither a data set"),
    ("fineweb --dataset text.txt --out_dir file", "file"),
    ("plot nothing", "nothing is no run folder"),
    ("plot noise_run", "noise_run/metrics.jsonl is damaged"),
    ("plot list_run", "list_run/metrics.jsonl is damaged"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model and with everything that is wrong."""
    folder = tmp_path_factory.mktemp("errors")
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    for name in ("tiny", "words"):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, 32)
    config = json.loads((folder / "words" / "config.json").read_text())
    (folder / "words" / "config.json").write_text(json.dumps({**config, "n_layer": "two"}))
    for name in ("empty", "torn", "noise_run", "list_run"):
        (folder / name).mkdir()
    for name, content in {
        "noise.yaml": b"\xff\xfe\x00",
        "list.yaml": b"- a\n",
        "syntax.yaml": b"max_steps: [1\n",
        "null.yaml": b"batch_size: null\n",
        "noise.pt": NOISE,
        "noise.json": NOISE,
        "noise.jsonl.gz": NOISE,
        "row.jsonl": b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n',
        "text.txt": b"some words " * 9,
        "torn/settings.json": b"{",
        "noise_run/metrics.jsonl": b"no json\n",
        "list_run/metrics.jsonl": b"[1]\n",
        "file": b"",
    }.items():
        (folder / name).write_bytes(content)
    return folder


def command(name: str) -> None:
    if name == "plot":
        runpy.run_path(plot.__file__, run_name="__main__")
    else:
        cli.run(*CONFIGS[name], "")


@pytest.mark.parametrize(("line", "expected"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_told_in_a_line(workplace, monkeypatch, capsys, line, expected):
    """One statement on stderr that names what is wrong, exit code 2, and no traceback."""
    name, *args = line.split()
    device = [] if name in ("fineweb", "plot") else ["--device", "cpu"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, *device])
    with pytest.raises(SystemExit) as exit_:
        command(name)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("error: ") == 1
    assert error.count("\n") == 1 or "Get some with" in error  # which lists commands


def test_full_disk_is_told_with_a_remedy(capsys):
    """An error of the system that names no file is told in plain words too."""

    def write() -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(SystemExit):
        cli.tell_errors(write)
    assert "the output: No space left on device; check" in capsys.readouterr().err
