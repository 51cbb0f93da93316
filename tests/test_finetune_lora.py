"""finetune_lora.py from end to end: in this process, in another, on several ranks, and killed."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU_DIST,
    GPT2_TOKENIZER,
    as_flags,
    expect_error,
    read_curve,
    read_values,
    run_script,
)
from processes import ROOT, Job
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_lora
from engine import training
from engine.adapter import save_adapter
from engine.chat import PLAIN_TEMPLATE
from engine.checkpoint import (
    RunState,
    choose_checkpoint,
    list_checkpoints,
    load_model,
    read_progress,
    read_run_config,
    read_state,
    save_checkpoint,
)
from engine.evaluation import Evaluation
from engine.lora import get_lora_state_dict, lora_linears, merge_lora
from engine.metrics import read_metrics
from engine.pretrained import hash_weights, save_pretrained
from engine.tensors import read_tensors
from finetune_lora import FinetuneConfig, resolve_config
from model import GPT, GPTConfig

SETTINGS = {"model_name_or_path": "base", "data": "rows.jsonl", "device": "cpu", "max_lr": 1e-2}
SETTINGS |= {"examples_per_step": 12, "batch_size": 6, "max_steps": 8, "warmup_steps": 2}
SETTINGS |= {"eval_every": 4, "save_every": 4, "sample_every": 0, "val_fraction": 0.2}
SHAPE = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def folder(tmp_path, no_plots, write_rows, monkeypatch) -> Path:
    """The current directory, with a small GPT-2 and its tokenizer in base/ and 40 rows of data."""
    torch.manual_seed(0)
    save_pretrained(GPT(SHAPE), tmp_path / "base", GPT2_TOKENIZER)
    words = ROOT.joinpath("README.md").read_text().split()
    prompts = [" ".join(words[i : i + i % 9 + 2]) for i in range(36)] + [""] * 4
    write_rows([{"prompt": prompt, "completion": " yes"} for prompt in prompts])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(out_dir: str, **settings: object) -> Path:
    finetune_lora.main(FinetuneConfig(**{**SETTINGS, "out_dir": out_dir, **settings}))
    return Path(out_dir)


def command(out_dir: str, **settings: object) -> list[str]:
    """Return the command line for what `finetune` does, to run it in its own process."""
    return ["finetune_lora.py", *as_flags({**SETTINGS, "out_dir": out_dir, **settings})]


def test_a_run_writes_what_is_documented(folder):
    """A run lowers the loss. It writes an adapter for PEFT and a merged model for transformers,
    with the same logits, all losses in train_data.json, and samples next to their references.
    """
    run, flags = Path("runs/a"), command("runs/a", merge_out="merged", sample_every=4)
    out = run_script(*flags).stdout
    assert "8 layers, 16 trainable tensors" in out
    assert "[reference]  yes" in out
    metrics = read_metrics(run)
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"]
    assert len(metrics[-1]["samples"]) == 3
    data = json.loads((run / "train_data.json").read_text())
    assert (data["train_steps"], data["eval_steps"]) == (list(range(1, 9)), [0, 4, 8])
    assert data["train_loss"] == [r["train_loss"] for r in metrics[1:]]
    assert data["eval_loss"] == [r["val_loss"] for r in metrics if "val_loss" in r]
    assert (run / "loss.png").exists()
    assert "<dt>training data</dt><dd>32 examples with " in (run / "report.html").read_text()
    latest = list_checkpoints(run)[-1]
    assert (latest / "adapter_model.safetensors").stat().st_size < 150_000
    idx = torch.tensor([AutoTokenizer.from_pretrained("merged").encode("To be, or not")])
    stock = AutoModelForCausalLM.from_pretrained("base")
    # The command prints how to load the model in transformers, with its path in quotes.
    hint = next(line for line in out.splitlines() if line.startswith("in transformers"))
    models = [load_model("base", run), GPT.from_pretrained("merged")]
    theirs = [
        AutoModelForCausalLM.from_pretrained(hint.split("'")[1]),
        peft.AutoPeftModelForCausalLM.from_pretrained(latest),
        AutoModelForCausalLM.from_pretrained("merged"),
    ]
    with torch.no_grad():
        expected = load_model(run).eval()(idx)
        found = [model.eval()(idx) for model in models]
        found += [model.eval()(idx).logits for model in theirs]
        assert (expected - stock(idx).logits).abs().max() > 1e-3  # training changed something
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_adapter_is_merged_into_the_base_it_was_trained_on(folder, monkeypatch):
    """If the base run gets a new checkpoint during training, the merge still uses the old one."""
    first, second = (Path(f"base_run/checkpoints/step_00000{n}") for n in (1, 2))
    shutil.copytree("base", first)

    def train(*args, **options):
        training.train(*args, **options)
        GPT(SHAPE).save_pretrained(second)

    monkeypatch.setattr(finetune_lora, "train", train)
    run = finetune("runs/a", model_name_or_path="base_run", merge_out="merged")
    idx = torch.arange(20)[None]
    with torch.no_grad():
        merged, expected = load_model("merged")(idx), load_model(first, run)(idx)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("n_examples", "per_step", "batch_size", "steps", "warmup"),
    [(43, 4, 4, 33, 3), (5, 1, 1, 15, 1), (160, 16, 16, 30, 3), (5000, 16, 16, 938, 10)],
)
def test_defaults_fit_few_examples(n_examples, per_step, batch_size, steps, warmup):
    """By default, a step has at most a tenth of the examples, and warmup a tenth of the steps."""
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))
    config = FinetuneConfig(device="cpu", use_lora=False)
    resolved = resolve_config(config, model, n_examples, CPU_DIST)
    assert (resolved.examples_per_step, resolved.batch_size) == (per_step, batch_size)
    assert (resolved.max_steps, resolved.warmup_steps) == (steps, warmup)
    assert resolved.eval_every == math.ceil(steps / 20)
    two = resolve_config(config, model, n_examples, replace(CPU_DIST, world_size=2))
    assert two.examples_per_step == per_step
    assert two.batch_size == max(1, min(16, per_step // 2))
    given = replace(config, examples_per_step=32, warmup_steps=7, max_steps=9, eval_every=5)
    resolved = resolve_config(given, model, n_examples, CPU_DIST)
    assert (resolved.examples_per_step, resolved.batch_size) == (32, 16)
    assert (resolved.warmup_steps, resolved.max_steps, resolved.eval_every) == (7, 9, 5)


def test_few_examples_resume_with_the_same_command(folder):
    """Defaults that depend on the number of examples do not stop the same command from resuming."""
    defaults = {"examples_per_step": None, "batch_size": 16, "warmup_steps": None}
    finetune("runs/a", **defaults, save_every=2, max_steps=4)
    for checkpoint in list_checkpoints("runs/a")[1:]:
        shutil.rmtree(checkpoint)
    run = finetune("runs/a", **defaults, save_every=2, max_steps=4)
    assert [p.name for p in list_checkpoints(run)] == ["step_000002", "step_000004"]


def test_the_log_follows_what_was_computed(folder):
    """A resumed run drops the records after its checkpoint, so its log has every evaluation, even
    if eval_every has changed.
    """
    finetune("runs/a")
    whole = read_metrics("runs/a")
    shutil.rmtree("runs/a/checkpoints/step_000008")
    run = finetune("runs/a", eval_every=1)
    records = read_metrics(run)
    assert [r["step"] for r in records if "val_loss" in r] == [0, 4, 5, 6, 7, 8]
    assert [r["step"] for r in records] == [*range(9)]
    assert records[:5] == whole[:5]
    assert [r.get("train_loss") for r in records] == [r.get("train_loss") for r in whole]


def test_settings_of_layers_may_differ(folder):
    """An adapter from PEFT with other ranks in some layers is fine-tuned further as it is."""
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], rank_pattern={"c_attn": 2}, fan_in_fan_out=True
    )
    model = AutoModelForCausalLM.from_pretrained("base")
    peft.get_peft_model(model, config).save_pretrained("adapter")
    for lora_dim in (2, 4, None):
        run = finetune(f"runs/{lora_dim}", lora_load_path="adapter", lora_dim=lora_dim, max_steps=1)
        linears = lora_linears(load_model("base", run))
        ranks = {name.split(".", 3)[-1]: m.config.lora_dim for name, m in linears.items()}
        assert ranks == {"attn.c_attn": 2, "mlp.c_fc": 4}
    with pytest.raises(ValueError, match="lora_dim is 3, but the adapter of adapter has 2"):
        finetune("runs/b", lora_load_path="adapter", lora_dim=3)


def test_data_may_move(folder):
    """A run resumes if its data file has moved. If the content differs, that is an error."""
    finetune("runs/a", max_steps=4)
    Path("rows.jsonl").rename("moved.jsonl")
    run = finetune("runs/a", max_steps=4, data="moved.jsonl")  # finished
    Path("rows.jsonl").write_text(Path("moved.jsonl").read_text().replace("yes", "no"))
    with pytest.raises(ValueError, match="was trained on different data"):
        finetune("runs/a", max_steps=4)
    assert len(read_curve(run)) == 5


def test_a_checkpoint_has_the_tokenizer_and_ordinary_permissions(folder):
    """An adapter has a tokenizer that transformers loads, and files that other users can read."""
    latest = list_checkpoints(finetune("runs/a", max_steps=1))[-1]
    assert AutoTokenizer.from_pretrained(latest).encode("To be") == [2514, 307]
    Path("new").touch()
    modes = {file.name: file.stat().st_mode for file in [*latest.iterdir(), Path("new")]}
    assert set(modes.values()) == {modes["new"]}
    weights = Path("base/model.safetensors").stat().st_mode
    assert weights == modes["new"]


def test_a_finished_run_merges(folder, capsys):
    """--merge_out on a finished run merges the adapter into the full-precision base. Repeating the
    command changes nothing. A folder with anything else in it is an error.
    """
    settings = {"base_precision": "bf16", "max_steps": 4}
    Path("other").mkdir()
    Path("other/file").touch()
    with pytest.raises(ValueError, match="merge_out other already exists"):
        finetune("runs/a", **settings, merge_out="other")
    run = finetune("runs/a", **settings)
    tensors = read_tensors(choose_checkpoint(run) / "lora.pt").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    finetune("runs/a", **settings, merge_out="merged")
    idx = torch.arange(20)[None]
    with torch.no_grad():
        merged, expected = load_model("merged")(idx), load_model("base", run)(idx)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    weights = Path("merged/model.safetensors")
    os.utime(weights, (0, 0))
    finetune("runs/a", **settings, merge_out="merged")
    assert weights.stat().st_mtime == 0  # not written again
    assert "already finished" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained("merged").chat_template == PLAIN_TEMPLATE
    assert AutoTokenizer.from_pretrained(choose_checkpoint(run)).chat_template == PLAIN_TEMPLATE
    for name in ("base", "other", "rows.jsonl"):
        with pytest.raises(
            ValueError, match=f"merge_out {name} holds something other than this model"
        ):
            finetune("runs/a", **settings, merge_out=name)


VAL_LOSSES = [5.0, 5.5, 3.5, 3.0, 3.25, 3.0, 3.75, None, 2.5]  # of each step


@pytest.fixture
def scripted_losses(monkeypatch) -> None:
    """Make VAL_LOSSES the validation losses, whatever the model."""

    def evaluate_step(self: Evaluation, step: int) -> dict:
        self.val_losses += VAL_LOSSES[step : step + 1] if step else []
        return {"val_loss": VAL_LOSSES[step], "val_bpb": None}

    monkeypatch.setattr(Evaluation, "evaluate_step", evaluate_step)


def read_adapter(path: Path) -> dict:
    return read_tensors(path / "adapter_model.safetensors")


def test_a_run_stands_for_its_best_evaluation(folder, scripted_losses, capsys):
    """The adapter of the best evaluation is saved even if no checkpoint is due. Wherever a model is
    taken, the run stands for it, and the command says so. A checkpoint can be named instead. The
    last lines name the best and the last one.
    """
    all_steps = finetune("runs/all", save_every=1, keep=99, max_steps=7)
    run = finetune("runs/a", max_steps=7, merge_out="merged", eval_every=1)
    best, last = run / "best" / "step_000003", run / "checkpoints" / "step_000007"
    assert list_checkpoints(run) == [run / "checkpoints" / "step_000004", last]
    assert [*run.glob("best/*")] == [best]
    assert not (best / "state.pt").exists()
    lines = dict(re.findall("^(.+?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["best saved checkpoint"] == f"{best}, validation loss 3.0000"
    assert lines["last checkpoint"] == f"{last}, not evaluated"
    assert lines["in transformers"].endswith(f"({str(best)!r})")
    expected = read_adapter(all_steps / "checkpoints" / "step_000003")
    assert all(torch.equal(expected[name], t) for name, t in read_adapter(best).items())
    for path, found in ((run, best), (last, last)):
        for names in ((path,), ("base", path)):
            adapter = get_lora_state_dict(load_model(*names))
            tensors = read_adapter(found)
            for name, tensor in adapter.items():
                assert torch.equal(tensor, tensors[f"base_model.model.{name}.weight"])
        notice = "runs/a: using its best checkpoint, best/step_000003\n"
        assert capsys.readouterr().err == (notice * 2 if path == run else "")
    merged = merge_lora(load_model(best))
    assert hash_weights(load_model("merged")) == hash_weights(merged)
    # A later checkpoint that is better replaces it.
    finetune("runs/b", max_steps=8)
    assert choose_checkpoint("runs/b") == Path("runs/b/checkpoints/step_000008")
    assert not [*Path("runs/b/best").iterdir()]


def test_patience_ends_a_run(folder, scripted_losses, capsys):
    """A run ends after `patience` evaluations without a better one, also if it was killed before
    the last save. It is then finished, unless patience gets larger.
    """
    run = finetune("runs/a", patience=2)
    assert [r["step"] for r in read_metrics(run)] == [*range(6)]
    assert (
        "ending after step 5: no lower validation loss in 2 evaluations" in capsys.readouterr().out
    )
    expected = read_adapter(run / "checkpoints" / "step_000005")
    for _ in range(2):
        finetune("runs/a", patience=2)
        assert [p.name for p in list_checkpoints(run)] == ["step_000004", "step_000005"]
        again = read_adapter(run / "checkpoints" / "step_000005")
        assert all(torch.equal(expected[name], tensor) for name, tensor in again.items())
        shutil.rmtree(run / "checkpoints" / "step_000005")  # as if killed before the save
    assert "already finished" in capsys.readouterr().out
    finetune("runs/a", patience=2, merge_out="merged")
    finetune("runs/a", patience=2, merge_out="merged")  # finished, so it may exist
    with pytest.raises(ValueError, match="merge_out merged already exists"):
        finetune("runs/a", patience=5, merge_out="merged")  # not finished any more
    finetune("runs/a", patience=5)
    assert [r["step"] for r in read_metrics(run)] == [*range(9)]
    assert choose_checkpoint(run).name == "step_000008"


@pytest.mark.parametrize(("given", "dtype"), [(None, "float16"), ("bf16", "bfloat16")])
def test_precision_of_merged_weights(folder, given, dtype):
    """A merged model has the precision of its base, or --merge_dtype. transformers loads it with
    the weights of the fp32 model, rounded. Repeating the command changes nothing.
    """
    AutoModelForCausalLM.from_pretrained("base").half().save_pretrained("base")
    for _ in range(2):
        run = finetune("runs/a", max_steps=2, merge_out="merged", merge_dtype=given)
    assert {str(t.dtype) for t in read_tensors(Path("merged/model.safetensors")).values()} == {
        f"torch.{dtype}"
    }
    with pytest.raises(ValueError, match="holds something other than this model in this precision"):
        finetune("runs/a", max_steps=2, merge_out="merged", merge_dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained("merged")
    assert theirs.dtype == getattr(torch, dtype)
    expected = merge_lora(load_model(run)).to(theirs.dtype)
    assert hash_weights(load_model("merged").to(theirs.dtype)) == hash_weights(expected)
    idx = torch.arange(20)[None]
    with torch.no_grad():
        logits = theirs.float()(idx).logits
        torch.testing.assert_close(load_model("merged")(idx), logits, atol=1e-4, rtol=0)


def test_a_lone_lora_pt_needs_its_alpha(folder):
    """A lora.pt without its config loads only with --lora_alpha. The tensors give its rank; if
    --lora_dim differs from it, that is an error.
    """
    first = finetune("runs/first", lora_dim=2, lora_alpha=3.0, max_steps=4)
    before = read_metrics(first)[-1]["val_loss"]
    Path(list_checkpoints(first)[-1] / "lora.pt").rename("lora.pt")
    for settings in ({}, {"lora_dim": 2}):
        with pytest.raises(ValueError, match=r"does not contain lora_alpha .* its --lora_alpha"):
            finetune("runs/a", lora_load_path="lora.pt", **settings)
    settings = {"lora_load_path": "lora.pt", "lora_alpha": 3.0, "max_steps": 1}
    with pytest.raises(ValueError, match=r"lora_dim is 4, but the adapter of lora.pt has 2"):
        finetune("runs/a", **settings, lora_dim=4)
    run = finetune("runs/b", **settings)
    assert read_metrics(run)[0]["val_loss"] == pytest.approx(before, rel=1e-6)
    assert read_run_config(run)["lora_dim"] == 2


def test_an_adapter_keeps_its_chat_template(folder, write_rows):
    """Fine-tuning an adapter further uses the chat template in its folder."""
    write_rows([{"messages": CHAT[1:3]}] * 20)
    first = choose_checkpoint(finetune("runs/first", max_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(first)
    tokenizer.chat_template = TAGGED_TEMPLATE
    tokenizer.save_pretrained(first)
    run = finetune("runs/a", lora_load_path=str(first), max_steps=1)
    assert AutoTokenizer.from_pretrained(choose_checkpoint(run)).chat_template == TAGGED_TEMPLATE


def test_the_base_of_an_adapter_is_kept(folder):
    """A run never deletes an adapter's base. If it is gone anyway, the error asks for a copy."""
    first = Path("base_run/checkpoints/step_000001")
    shutil.copytree("base", first)
    (first / "progress.json").write_text('{"step": 1}')
    run = finetune("runs/a", model_name_or_path="base_run", max_steps=1)
    base = load_model("base")
    for step in (1, 2, 3, 4):
        state = RunState({"step": step}, {"moment": torch.zeros(1)})
        save_checkpoint(Path("base_run"), base, GPT2_TOKENIZER, {}, state, keep=1)
    assert [p.name for p in list_checkpoints("base_run")] == ["step_000001", "step_000004"]
    finetune("runs/a", model_name_or_path=str(first), max_steps=1)  # already finished
    assert (first / "adapter_base").exists()
    assert lora_linears(load_model(run))
    shutil.rmtree("base_run")
    assert hash_weights(base) in (run / "config.yaml").read_text()
    with pytest.raises(
        FileNotFoundError,
        match=r"no longer exists; pass a copy of it \(its hash is base_sha256 in config.yaml\)",
    ):
        load_model(run)


def test_training_all_weights(folder):
    """--no-use_lora trains every weight. The checkpoint of the run is an ordinary model."""
    run = finetune("runs/full", use_lora=False, merge_out="merged")
    base, tuned = GPT.from_pretrained("base"), load_model(run)
    assert not lora_linears(tuned)
    pairs = zip(base.parameters(), tuned.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in pairs)
    AutoModelForCausalLM.from_pretrained(list_checkpoints(run)[-1])
    assert torch.equal(load_model("merged").lm_head.weight, tuned.lm_head.weight)


@pytest.mark.parametrize("use_lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(folder, use_lora):
    """After kill -9, the same command ends with the losses and weights of an uninterrupted run."""
    settings = {"lora_dropout": 0.2 if use_lora else None, "use_lora": use_lora, "eval_every": 1}
    whole = finetune("runs/whole", **settings)
    job = Job(*command("runs/killed", **settings), signal_at=(6, signal.SIGKILL))
    assert job.wait().returncode == -signal.SIGKILL
    best = choose_checkpoint("runs/killed")
    losses = [r["val_loss"] for r in read_metrics("runs/killed") if r["step"]]
    # Step 6 was logged, but not saved, and the save of step 5 may have been interrupted.
    assert read_progress(best)["val_loss"] in (min(losses[:4]), min(losses[:5]))
    assert load_model(best)
    killed = finetune("runs/killed", **settings)
    assert read_curve(killed) == read_curve(whole)
    assert len({choose_checkpoint(run).relative_to(run) for run in (killed, whole)}) == 1
    a, b = load_model(killed), load_model(whole)
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    state = read_state(list_checkpoints(killed)[-1])["optimizer"]["state"]
    assert len(state) == (16 if use_lora else 28)  # one per trained tensor


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        ("ddp", {"lora_form": "summed"}),
        pytest.param("ddp", {"base_precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param("fsdp", {"base_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_ranks_do_not_change_the_curve(folder, write_rows, parallel, settings):
    """Two ranks have the losses of one process, and the same best evaluation, which they save
    together. One process can resume their run.
    """
    settings = {"precision": "fp32", "eval_every": 1, "save_every": 9, **settings}
    # Trained to answer " yes", the model gets worse at " no" after the first steps.
    write_rows([{"prompt": "", "completion": " no"}] * 4, "val.jsonl")
    settings |= {"val_data": "val.jsonl", "val_fraction": 0.0}
    single = finetune("runs/single", **settings)
    result = run_script(*command("runs/two", parallel=parallel, **settings), ranks=2)
    assert result.returncode == 0, result.stderr
    for key in ("train_loss", "val_loss"):
        expected = read_values(single, key)
        assert read_values(Path("runs/two"), key) == pytest.approx(expected, rel=1e-4)
    best = choose_checkpoint("runs/two")
    assert best.parent.name == "best"  # it was not due
    assert best.name == choose_checkpoint(single).name
    assert load_model("runs/two")
    finetune("runs/two", **settings)  # already finished


CHAT = [  # a system message, several turns, characters of several bytes, a lone surrogate
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où est le café?"},
    {"role": "assistant", "content": "Là-bas 😀"},
    {"role": "user", "content": "And \ud800 here?"},
    {"role": "assistant", "content": "No"},
]
# The {% generation %} tags tell transformers which part is an answer.
TAGGED_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_conversations_train_as_in_peft_and_transformers(folder, write_rows):
    """With LoRA, on conversations, the losses of training and validation equal those of a loop with
    peft and transformers, which finds the answers by the tags in the template of the base. The
    merged model keeps this template. Samples have no lone surrogates, so they fit into the report.
    """
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = TAGGED_TEMPLATE
    tokenizer.save_pretrained("base")
    rows = [{"messages": CHAT[i % 2 :][: 4 - i % 2]} for i in range(6)]
    write_rows([{"messages": [*row["messages"], CHAT[4 - i % 2]]} for i, row in enumerate(rows)])
    write_rows([{"messages": CHAT}], "val.jsonl")
    settings = {"val_data": "val.jsonl", "val_fraction": 0, "examples_per_step": 6}
    settings |= {"precision": "fp32", "recompute": "none", "eval_every": 1, "sample_every": 1}
    run = finetune("runs/a", **settings, merge_out="merged")
    config = FinetuneConfig(**SETTINGS)
    lora = finetune_lora.add_adapter(load_model("base"), config)
    save_adapter(lora, folder / "start", "base")
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "start", is_trainable=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def compute_loss(file: str) -> torch.Tensor:
        losses = []
        for line in Path(file).read_text().splitlines():
            messages = json.loads(line.replace("\\ud800", "\\ufffd"))["messages"]
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            encoded = tokenizer.apply_chat_template(messages, **options)
            ids, mask = (torch.tensor(encoded[key]) for key in ("input_ids", "assistant_masks"))
            logits = model(ids[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, ids[1:], reduction="none")[mask[1:] == 1])
        return torch.cat(losses).mean()

    metrics = read_metrics(run)
    for record in metrics[1:]:
        loss = compute_loss("rows.jsonl")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = record["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert record["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        with torch.no_grad():
            assert record["val_loss"] == pytest.approx(compute_loss("val.jsonl").item(), rel=1e-5)
    assert metrics[-1]["train_loss"] < metrics[1]["train_loss"] - 0.05
    assert AutoTokenizer.from_pretrained("merged").chat_template == TAGGED_TEMPLATE
    assert Path("merged/Modelfile").read_text() == "FROM ./model.gguf\n"
    assert "user: And \ufffd here?\nassistant:" in metrics[-1]["samples"][0]


def test_starting_from_an_adapter(folder):
    """--lora_load_path takes a run, a PEFT folder or a lora.pt, and keeps the settings of that
    adapter. Other settings are an error, and so is an adapter as --model_name_or_path.
    """
    first = finetune("runs/first", lora_dim=2, lora_alpha=3.0, max_steps=4)
    before = read_metrics(first)[-1]["val_loss"]
    latest = list_checkpoints(first)[-1]
    for name, path in (("b", first), ("c", latest), ("d", latest / "lora.pt")):
        settings = {"lora_dim": 2, "lora_alpha": 3.0} if name == "d" else {}
        second = finetune(f"runs/{name}", lora_load_path=str(path), max_steps=1, **settings)
        assert read_metrics(second)[0]["val_loss"] == pytest.approx(before, rel=1e-6)
        assert next(iter(lora_linears(load_model(second)).values())).config.lora_alpha == 3.0
        assert read_run_config(second)["lora_dim"] == 2
    with pytest.raises(ValueError, match=r"lora_dim is 4, but the adapter of .* has 2"):
        finetune("runs/e", lora_load_path=str(first), lora_dim=4)
    with pytest.raises(ValueError, match="is an adapter; pass its base model"):
        finetune("runs/f", model_name_or_path=str(first))


def test_default_data_never_change_silently(folder):
    """If the hub does not answer, the error suggests stdlib, and no run starts with other data."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    error = expect_error(*command("runs/a", data=None), **offline)
    assert "the Hugging Face hub did not provide yahma/alpaca-cleaned" in error
    assert "fine-tune on stdlib" in error
    assert error.count("\n") == 1
    assert not Path("runs/a/metrics.jsonl").exists()


def test_another_base_is_refused(folder):
    """A run resumes only with the base weights it started from, but they may have moved."""
    finetune("runs/a", max_steps=4)
    Path("base").rename("moved")
    torch.manual_seed(1)
    GPT(SHAPE).save_pretrained("base")
    with pytest.raises(ValueError, match=r"base_sha256 was \w+, is \w+"):
        finetune("runs/a", max_steps=4)
    assert finetune("runs/a", model_name_or_path="moved", max_steps=4)
    with pytest.raises(ValueError, match=r"the weights of .* have sha256"):
        finetune("runs/b", base_sha256="0" * 64)


WRONG_SETTINGS = [
    ({"lora_dim": 0}, "lora_dim is 0, expected at least 1"),
    ({"lora_form": "summed", "lora_dropout": 0.1}, "summed needs lora_dropout 0.0"),
    ({"lora_form": "summed", "parallel": "fsdp"}, "summed needs parallel ddp"),
    ({"lora_form": "summed", "base_precision": "bf16"}, "summed needs base_precision fp32"),
    ({"lora_form": "summed", "use_lora": False}, "lora_form is summed, but it needs --use_lora"),
    ({"base_precision": "bf16", "use_lora": False}, "bf16, but it needs --use_lora"),
    ({"lora_module_name": "q_proj"}, "no linear layer has 'q_proj' in its name"),
    (
        {"model_name_or_path": "other_vocab"},
        "1,000 tokens and no tokenizer files in its folder; .*--tokenizer",
    ),
    ({"lora_load_path": "nowhere"}, "did not provide nowhere.* no local folder of that name"),
    ({"lora_load_path": "no/such/file"}, "there is no no/such/file; expected a hub name"),
    ({"merge_dtype": "bf16"}, "merge_dtype is bf16, but it needs --merge_out"),
    ({"merge_out": "base"}, "merge_out base already exists"),
    ({"val_fraction": 1.0}, "val_fraction is 1.0, expected at least 0 and below 1"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0, expected at least 0 and below 1"),
    ({"use_lora": False, "lora_load_path": "x"}, "lora_load_path is x, but it needs --use_lora"),
    ({"use_lora": False, "lora_dim": 4}, "lora_dim is 4, but it needs --use_lora"),
    ({"use_lora": False, "lora_module_name": "mlp"}, "mlp, but it needs --use_lora"),
    ({"lora_load_path": "x", "lora_module_name": "mlp"}, "lora_load_path decides; omit one"),
    ({"lora_alpha": 0.0}, "lora_alpha is 0.0, expected above 0"),
    ({"examples_per_step": 0}, "examples_per_step is 0"),
]


@pytest.mark.parametrize(("settings", "expected"), WRONG_SETTINGS, ids=str)
def test_wrong_settings_are_named(folder, settings, expected):
    """The error for a wrong setting names the value, and no run starts."""
    GPT(GPTConfig(vocab_size=1000, n_layer=1, n_head=1, n_embd=8)).save_pretrained("other_vocab")
    with pytest.raises((ValueError, OSError), match=expected):
        finetune("runs/a", **settings)
    assert not list(folder.glob("runs/*/metrics.jsonl"))
