"""Checkpoints work in other tools: transformers, lm-eval, converters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPT2_TOKENIZER, HELLASWAG_ROWS, small_gpt2
from processes import HANG_SECONDS
from transformers import pipeline

import hellaswag
import sample
from engine.chat import ALPACA_TEMPLATE, CHAT_TEMPLATE
from engine.checkpoint import RunState, choose_checkpoint, load_model, save_checkpoint
from engine.tokenizer import Tokenizer
from hellaswag import EvalConfig
from sample import SampleConfig, Sampler


def save_run(run: Path, tokenizer: Tokenizer) -> Path:
    """Save a checkpoint of a small model and return its folder."""
    model = small_gpt2(block_size=128)
    params, state = dict(model.named_parameters()), RunState({"step": 1}, {"x": torch.zeros(1)})
    save_checkpoint(run, model, tokenizer, params, state, keep=1)
    return choose_checkpoint(run)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("interop"), GPT2_TOKENIZER)


def test_transformers_pipeline_generates_the_same_text(checkpoint, capsys):
    """From a checkpoint, pipeline("text-generation") and sample.py make the same greedy text."""
    prompt = "Caf\u00e9 \u2014 once upon a time"
    config = SampleConfig(temperature=0, max_new_tokens=40)
    sampler = Sampler(load_model(checkpoint), GPT2_TOKENIZER, config, 40, torch.Generator())
    sampler.print_continuations([prompt])
    generate = pipeline("text-generation", str(checkpoint), device="cpu")
    theirs = generate(prompt, max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert capsys.readouterr().out == f"{theirs}\n"
    assert len(theirs) > len(prompt) + 40


@pytest.mark.parametrize("template", [ALPACA_TEMPLATE, CHAT_TEMPLATE])
def test_transformers_pipeline_gives_the_same_answer(tmp_path, capsys, template):
    """With messages, pipeline("text-generation") answers what sample.py --instruction does."""
    tokenizer = Tokenizer.gpt2()
    tokenizer.chat_template = template
    checkpoint = save_run(tmp_path, tokenizer)
    options = {"max_new_tokens": 40, "temperature": 0.0, "device": "cpu"}
    sample.main(SampleConfig(str(tmp_path), instruction="Say caf\u00e9.\n", **options))
    answer = capsys.readouterr().out
    generate = pipeline("text-generation", str(checkpoint), device="cpu")
    messages = [{"role": "user", "content": "Say caf\u00e9.\n"}]
    theirs = generate(messages, max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert answer == f"{theirs[-1]['content']}\n"
    assert len(answer) > 40


def test_checkpoints_have_the_files_that_converters_read(checkpoint):
    """A checkpoint has the vocabulary in each file where llama.cpp and litgpt look for it."""
    vocab = json.loads((checkpoint / "vocab.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    assert len(vocab) == 50257
    assert tokenizer["model"]["vocab"] == vocab
    merges = (checkpoint / "merges.txt").read_text().splitlines()
    assert len(merges) == 1 + 50000  # the first line is the version
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["vocab_size"] == 50257


@pytest.mark.slow
def test_lm_eval_gives_the_same_accuracies(checkpoint, tmp_path):
    """lm_eval, with its own HellaSwag task, reports the same accuracies as hellaswag.py."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
    source = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    task = (source / "hellaswag.yaml").read_text()
    task = task.replace("task: hellaswag", "task: local_hellaswag")
    task = task.replace("Rowan/hellaswag", "json").replace("training_split: train\n", "")
    files = {"data_files": {"validation": str(HELLASWAG_ROWS)}}
    files["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "utils.py").write_text((source / "utils.py").read_text())
    task += f"\ndataset_kwargs: {json.dumps(files)}\n"
    (tmp_path / "local_hellaswag.yaml").write_text(task)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={checkpoint}", "--batch_size", "1"]
    command += ["--tasks", "local_hellaswag", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out.json")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = tmp_path.glob("out*.json")
    theirs = json.loads(file.read_text())["results"]["local_hellaswag"]
    data, out = str(HELLASWAG_ROWS), tmp_path / "ours"
    hellaswag.main(EvalConfig(str(checkpoint), data=data, device="cpu", out_dir=str(out)))
    ours = json.loads((out / "results.json").read_text())
    assert ours["rows"] == 20
    for name in ("acc", "acc_norm"):
        assert ours[name]["value"] == pytest.approx(theirs[f"{name},none"])
