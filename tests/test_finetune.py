"""Fine-tuning as a user runs it: the command's main(), and processes that are killed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import peft
import pytest
import torch
from test_commands import ROOT, command, fails, run
from test_distributed import ENV, TORCHRUN
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_lora
import instructions
import training
from checkpoint import checkpoints, load_model, load_state, read_metrics, read_run_config
from finetune_lora import FinetuneConfig
from lora import lora_linears
from model import GPT, GPTConfig

TINY = {
    "model_name_or_path": "base",
    "data": "rows.jsonl",
    "examples_per_step": 12,
    "batch_size": 6,
    "max_steps": 8,
    "warmup_steps": 2,
    "max_lr": 1e-2,
    "eval_every": 4,
    "sample_every": 4,
    "save_every": 4,
    "val_fraction": 0.2,
    "device": "cpu",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a small GPT-2 called base and 40 rows."""
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, n_layer=12, n_head=2, n_embd=8)).save_pretrained(tmp_path / "base")
    words = ROOT.joinpath("README.md").read_text().split()
    prompts = [" ".join(words[i : i + i % 9 + 2]) for i in range(36)] + [""] * 4
    rows = [{"prompt": prompt, "completion": " yes"} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(out_dir: str, **options) -> Path:
    finetune_lora.main(FinetuneConfig(**{**TINY, "out_dir": out_dir, **options}))
    return Path(out_dir)


def losses(run: Path) -> list:
    return [(r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_metrics(run)]


def test_it_writes_what_it_promises(folder, capsys):
    """A run leaves an adapter that PEFT loads, a merged model that transformers loads with the same
    logits, train_data.json with all losses, and answers beside their references; it learns.
    """
    run_folder = finetune("runs/a", merge_out="merged")
    out = capsys.readouterr().out
    assert "48 linears, 96 trainable tensors" in out
    assert "[reference]  yes" in out
    metrics = read_metrics(run_folder)
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"]
    assert len(metrics[-1]["samples"]) == 3
    data = json.loads((run_folder / "train_data.json").read_text())
    assert (data["train_steps"], data["eval_steps"]) == (list(range(1, 9)), [0, 4, 8])
    assert data["train_loss"] == [r["train_loss"] for r in metrics[1:]]
    assert (run_folder / "loss.png").exists()
    newest = checkpoints(run_folder)[-1]
    assert (newest / "adapter_model.safetensors").stat().st_size < 150_000
    idx = torch.tensor([AutoTokenizer.from_pretrained("merged").encode("To be, or not")])
    stock = AutoModelForCausalLM.from_pretrained("base")
    models = [
        load_model(run_folder),
        load_model("base", run_folder),
        peft.AutoPeftModelForCausalLM.from_pretrained(newest),
        AutoModelForCausalLM.from_pretrained("merged"),
        GPT.from_pretrained("merged"),
    ]
    with torch.no_grad():
        outs = [getattr(out, "logits", out) for out in (m.eval()(idx) for m in models)]
        assert (outs[0] - stock(idx).logits).abs().max() > 1e-3
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-4, rtol=0)


def test_it_merges_into_the_base_that_it_trained_on(folder, monkeypatch):
    """A base run that gains a checkpoint meanwhile does not change what is merged."""
    first, second = (Path(f"base_run/checkpoints/step_00000{n}") for n in (1, 2))
    shutil.copytree("base", first)

    def train(*args):
        training.train(*args)
        shape = GPTConfig(block_size=64, n_layer=12, n_head=2, n_embd=8)
        GPT(shape).save_pretrained(second)

    monkeypatch.setattr(finetune_lora, "train", train)
    run_folder = finetune("runs/a", model_name_or_path="base_run", merge_out="merged")
    idx = torch.arange(20)[None]
    with torch.no_grad():
        merged, expected = load_model("merged")(idx), load_model(first, run_folder)(idx)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


def test_full_fine_tuning_by_the_same_code(folder):
    """--use_lora false trains every weight, and the run's checkpoint is an ordinary model."""
    run_folder = finetune("runs/full", use_lora=False, merge_out="merged")
    base, tuned = GPT.from_pretrained("base"), load_model(run_folder)
    assert not lora_linears(tuned)
    assert all(
        not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)
    )
    AutoModelForCausalLM.from_pretrained(checkpoints(run_folder)[-1])
    assert torch.equal(load_model("merged").lm_head.weight, tuned.lm_head.weight)


@pytest.mark.parametrize("use_lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_it_goes_on_to_the_bit(folder, use_lora):
    """Killed with kill -9 after a checkpoint, the same command gives the losses and the weights of
    an undisturbed run, dropout included; the optimizer has a state for each trained tensor.
    """
    options = {"lora_dropout": 0.2 if use_lora else None, "use_lora": use_lora, "max_steps": 12}
    whole = finetune("runs/whole", **options)
    flags = [f"--{k}={v}" for k, v in {**TINY, **options}.items() if v is not None]
    args = command("finetune_lora.py", *flags, "--out_dir", "runs/killed")
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(args, env=env) as process:
        deadline = time.monotonic() + 100
        while not checkpoints("runs/killed") and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed = finetune("runs/killed", **options)
    assert losses(killed) == losses(whole)
    a, b = load_model(killed), load_model(whole)
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    state = load_state(checkpoints(killed)[-1])["optimizer"]["state"]
    assert len(state) == (96 if use_lora else 148)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_do_not_change_the_curve(folder, parallel):
    """Two ranks have the losses of one, and one of them can go on alone."""
    single = finetune("runs/single", max_steps=8)
    flags = [f"--{k}={v}" for k, v in TINY.items()]
    script = [
        str(ROOT / "finetune_lora.py"),
        *flags,
        "--out_dir=runs/two",
        f"--parallel={parallel}",
    ]
    torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *script]
    result = subprocess.run(torchrun, capture_output=True, text=True, timeout=120, env=ENV)
    assert result.returncode == 0, result.stderr
    for mine, theirs in zip(losses(Path("runs/two")), losses(single), strict=True):
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if (a, b) != (None, None)]
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)
    finetune("runs/two")  # finished, so it says its results again


def test_starting_from_an_adapter(folder):
    """--lora_load_path takes a run, a PEFT folder or a lora.pt, keeps its settings, and refuses
    others; the base stays --model_name_or_path.
    """
    first = finetune("runs/first", lora_dim=2, lora_alpha=3.0, max_steps=4)
    before = read_metrics(first)[-1]["val_loss"]
    newest = checkpoints(first)[-1]
    for name, path in (("b", first), ("c", newest), ("d", newest / "lora.pt")):
        plain = {"lora_dim": 2, "lora_alpha": 3.0} if name == "d" else {}
        second = finetune(f"runs/{name}", lora_load_path=str(path), max_steps=1, **plain)
        assert read_metrics(second)[0]["val_loss"] == pytest.approx(before, rel=1e-6)
        assert next(iter(lora_linears(load_model(second)).values())).lora_alpha == 3.0
    with pytest.raises(ValueError, match=r"lora_dim is 4, but the adapter of .* has 2"):
        finetune("runs/e", lora_load_path=str(first), lora_dim=4)
    with pytest.raises(ValueError, match="is an adapter; give its base model"):
        finetune("runs/f", model_name_or_path=str(first))


def test_a_run_keeps_the_data_that_stood_in(folder, monkeypatch):
    """A run that began without a hub has noted what it trains on, and goes on with that when the
    hub is there again.
    """

    def hub(_):
        raise ConnectionError("the hub is away")

    rows = [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(40)]
    monkeypatch.setattr(instructions, "_docstring_rows", lambda: rows)
    monkeypatch.setattr(instructions, "_hub_rows", hub)
    run = finetune("runs/a", data=None)
    assert read_run_config(run)["data"] == "stdlib"
    monkeypatch.setattr(instructions, "_hub_rows", lambda _: rows[:20])
    before = losses(run)
    assert losses(finetune("runs/a", data=None)) == before


def test_another_base_is_refused(folder):
    """A run goes on with the weights it was started from, and with no others."""
    finetune("runs/a", max_steps=4)
    Path("base").rename("moved")
    torch.manual_seed(1)
    other = GPT(GPTConfig(block_size=64, n_layer=12, n_head=2, n_embd=8))
    other.save_pretrained("base")
    with pytest.raises(ValueError, match=r"base_sha256 \w+ then, \w+ now"):
        finetune("runs/a", max_steps=4)
    assert finetune("runs/a", model_name_or_path="moved", max_steps=4)
    with pytest.raises(ValueError, match="has weights of sha256"):
        finetune("runs/b", base_sha256="0" * 64)


def test_wrong_input_is_told_in_a_line(folder):
    """What cannot be is one line with the value, and exit code 2."""
    GPT(GPTConfig(vocab_size=1000, n_layer=1, n_head=1, n_embd=8)).save_pretrained("other_vocab")
    for wrong, match in (
        ({"lora_dim": 0}, "lora_dim is 0, expected at least 1"),
        ({"lora_module_name": "q_proj"}, "no linear has 'q_proj' in its name"),
        ({"model_name_or_path": "other_vocab"}, "has 1000 tokens, GPT-2's tokenizer 50257"),
        ({"lora_load_path": "nowhere"}, "nowhere does not exist"),
        ({"max_lr": -1.0}, "expected 0 <= min <= max"),
        ({"merge_out": "base"}, "merge_out base is there already"),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            finetune("runs/a", **wrong)
    flags = [f"--{k}={v}" for k, v in {**TINY, "data": "nothing.jsonl"}.items()]
    error = fails("finetune_lora.py", *flags, cwd=folder, HF_HUB_OFFLINE="1")
    assert "nothing.jsonl is no file here" in error
    assert not list(folder.glob("runs/*/metrics.jsonl"))
    for config, match in (
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected between 0 and 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, expected from 0 to below 1"),
        ({"use_lora": False, "lora_load_path": "x"}, "needs --use_lora true"),
        ({"use_lora": False, "lora_dim": 4}, "lora_dim is given, which needs --use_lora true"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0, expected above 0"),
        ({"examples_per_step": 0}, "examples_per_step is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            FinetuneConfig(**config)
    help_text = run("finetune_lora.py", "-h", cwd=folder).stdout
    assert "--lora_alpha" in help_text
