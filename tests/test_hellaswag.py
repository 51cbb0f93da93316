"""The evaluation command: its metrics, its files, and how it resumes."""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ONE_THREAD, ROOT, TORCHRUN, run_script, talkative_model
from transformers import GPT2LMHeadModel

from engine import scoring
from engine.adapter import save_adapter
from engine.checkpoint import load_model
from engine.lora import LoRAConfig, convert_linear_layer_to_lora, merge_lora
from engine.metrics import read_metrics
from engine.scoring import encode, encode_request, score
from engine.tasks import TASKS, Example, Task, find_task
from engine.tokenizer import save_tokenizer
from hellaswag import EvalConfig, main
from model import GPT

BLOCK_SIZE = 128
ROWS = Path(__file__).parent / "hellaswag_rows.jsonl"
TEXT = ROWS.read_text()[:3000] + "“Naïve café” — 日本語 😀\n\n"
BATCH_TOKENS = 200  # few, so that an evaluation has many batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    talkative_model(BLOCK_SIZE).save_pretrained(folder)
    save_tokenizer(folder, BLOCK_SIZE)
    return folder


def read_results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def read_rows(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["row"])


def save_random_adapter(model: Path, folder: Path) -> GPT:
    """Save an adapter with dropout for the model; return the model with it."""
    adapted = GPT.from_pretrained(model)
    convert_linear_layer_to_lora(adapted, config=LoRAConfig(lora_dim=2, lora_dropout=0.5))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if name.endswith("lora_B"):
                param.normal_()
    save_adapter(adapted, folder)
    return adapted


@pytest.mark.parametrize("stride", [None, 50])
def test_perplexity_is_transformers(folder, tmp_path, monkeypatch, stride):
    """Token and word perplexity and bits per byte are those of windows that slide through
    transformers' model, where each token of the text is predicted once. On a CPU that trains in
    bf16 evaluation is still in fp32.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    config = EvalConfig(
        str(folder), task="text", data=str(file), stride=stride, out_dir=str(tmp_path / "out")
    )
    main(config)
    found = read_results(tmp_path / "out")
    assert found["config"]["precision"] == "fp32"
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = [50256, *encode(TEXT)]
    step = stride or BLOCK_SIZE
    nats, start = 0.0, 1
    while start < len(ids):
        end = min(len(ids), start + (BLOCK_SIZE if start == 1 else step))
        window = torch.tensor([ids[max(0, end - BLOCK_SIZE - 1) : end]])
        targets = window[:, 1:].clone()
        targets[:, : -(end - start)] = -100
        with torch.no_grad():
            logits = theirs(window[:, :-1]).logits.double()
        nats += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
        start = end
    assert found["token_perplexity"]["value"] == pytest.approx(
        math.exp(nats / (len(ids) - 1)), rel=1e-5
    )
    words = len(re.split(r"\s+", TEXT))
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    n_bytes = len(TEXT.encode())
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_perplexity_of_documents(folder, tmp_path, capsys):
    """Each document has a context of its own; a bad row is an error, unless it may be skipped."""
    file = tmp_path / "text.jsonl"
    documents = [{"text": "One document."}, {"text": "Another one, a little longer."}]
    file.write_text("\n".join(map(json.dumps, documents)) + "\n{}\n")
    config = EvalConfig(str(folder), task="text", data=str(file))
    with pytest.raises(ValueError, match="bad rows"):
        main(config)
    main(replace(config, skip_bad_rows=True))
    lengths = [len(encode(document["text"])) for document in documents]
    assert f"{sum(lengths)} tokens" in capsys.readouterr().out
    main(replace(config, skip_bad_rows=True, limit=1))
    assert f"{lengths[0]} tokens" in capsys.readouterr().out


def test_perplexity_of_one_endless_word(folder, tmp_path, capsys):
    """A perplexity too large for a float is printed as inf."""
    file = tmp_path / "word.txt"
    file.write_text("qzx" * 500)
    main(EvalConfig(str(folder), task="text", data=str(file)))
    assert re.search(r"word_perplexity +inf", capsys.readouterr().out)


def test_adapter_is_evaluated(folder, tmp_path):
    """With --lora_load_path the adapter is used, without its dropout."""
    adapted = save_random_adapter(folder, tmp_path / "adapter")
    out = tmp_path / "out"
    main(EvalConfig(str(folder), str(tmp_path / "adapter"), data=str(ROWS), out_dir=str(out)))
    examples = find_task("hellaswag", data=str(ROWS)).load(BLOCK_SIZE)
    requests = [example.request for example in examples]
    expected, plain = (
        dict(pair for batch in score(m, requests, CPU) for pair in batch)
        for m in (merge_lora(adapted), GPT.from_pretrained(folder))
    )
    for i, row in enumerate(read_rows(out)):
        assert row["log_probs"] == pytest.approx(
            [s.log_prob for s in expected[i]], abs=1e-3, rel=1e-5
        )
        assert row["log_probs"] != pytest.approx([s.log_prob for s in plain[i]], abs=1)


def test_results_are_the_counts(folder, tmp_path, capsys):
    """The command prints and writes the fractions of correct predictions, the same for gzip and
    plain files; rows with ctx alone are reported to differ from lm-eval's.
    """
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(ROWS.read_bytes()))
    config = EvalConfig(str(folder), data=str(packed), out_dir=str(tmp_path / "out"))
    main(config)
    found, rows = read_results(tmp_path / "out"), read_rows(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(1, 21))
    acc, acc_norm = (
        sum(row[key] == row["label"] for row in rows) / 20 for key in ("pred", "pred_norm")
    )
    assert (found["acc"]["value"], found["acc_norm"]["value"]) == (acc, acc_norm)
    assert f"acc_norm         {acc_norm:.4f}" in capsys.readouterr().out
    short = [{k: json.loads(line)[k] for k in ("ctx", "endings", "label")} for line in ROWS.open()]
    plain = tmp_path / "short.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in short))
    main(replace(config, data=str(plain), out_dir=None, limit=7))
    assert "7 of 7 rows have no ctx_a" in capsys.readouterr().out


def test_killed_evaluation_resumes(folder, tmp_path, monkeypatch):
    """The rows that a killed evaluation has written are kept and the others computed, with the
    results of one that was not killed.
    """
    monkeypatch.setattr(scoring, "BATCH_SHAPE", {"cpu": (BATCH_TOKENS, 1)})
    config = EvalConfig(str(folder), data=str(ROWS), out_dir=str(tmp_path / "whole"))
    main(config)
    killed = replace(config, out_dir=str(tmp_path / "killed"))
    n_calls, original = 0, scoring.compute_log_probs

    def compute_log_probs(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(scoring, "compute_log_probs", compute_log_probs)
    with pytest.raises(KeyboardInterrupt):
        main(killed)
    file = tmp_path / "killed" / "rows.jsonl"
    written = file.read_text().splitlines(keepends=True)
    assert 3 <= len(written) < 20
    file.write_text("".join(written)[:-9])  # the last line is incomplete
    main(killed)
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")
    assert len(file.read_text().splitlines()) == 20
    strip = [{**read_results(tmp_path / name), "config": 0} for name in ("whole", "killed")]
    assert strip[0] == strip[1]
    n_calls = 10
    main(killed)  # nothing is left to compute
    assert n_calls == 10


@pytest.mark.parametrize(
    ("n_ranks", "n_begun"), [(2, 7), pytest.param(3, 0, marks=pytest.mark.slow)]
)
def test_ranks_share_out_the_rows(folder, tmp_path, n_ranks, n_begun):
    """On several ranks, rows.jsonl and the results are those of one process to the byte, with an
    adapter, and where ranks resume what one process has begun.
    """
    save_random_adapter(folder, tmp_path / "adapter")
    args = ["--model", folder, "--lora_load_path", tmp_path / "adapter", "--data", ROWS]

    def evaluate(out: Path, *start: str) -> list[str]:
        command = [*start, ROOT / "hellaswag.py", *args, "--out_dir", out, "--device", "cpu"]
        result = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=ONE_THREAD
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("acc_norm ") == 1
        return (out / "rows.jsonl").read_text().splitlines(keepends=True)

    rows = evaluate(tmp_path / "one", sys.executable)
    assert len(rows) == 20
    shutil.copytree(tmp_path / "one", tmp_path / "ranks")
    (tmp_path / "ranks" / "rows.jsonl").write_text("".join(rows[:n_begun]))
    torchrun = [*TORCHRUN, "--standalone", f"--nproc_per_node={n_ranks}"]
    assert evaluate(tmp_path / "ranks", *torchrun) == rows
    one, ranks = (read_results(tmp_path / name) for name in ("one", "ranks"))
    assert {**one, "config": 0} == {**ranks, "config": 0}


def test_other_settings_do_not_resume(folder, tmp_path):
    """A folder with results of another model, other data or options is an error and untouched."""
    config = EvalConfig(str(folder), data=str(ROWS), out_dir=str(tmp_path / "out"))
    main(config)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    other = GPT.from_pretrained(folder)
    other.transformer.wpe.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    other_data = tmp_path / "other.jsonl"
    other_data.write_text(ROWS.read_text().partition("\n")[0])
    for changed, name in (
        ({"model": str(tmp_path / "other")}, "weights"),
        ({"data": str(other_data)}, "data"),
        ({"text": "raw"}, "text"),
        ({"limit": 3}, "limit"),
        ({"precision": "bf16"}, "precision"),
    ):
        with pytest.raises(ValueError, match=f"other {name}"):
            main(replace(config, **changed))
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


def test_bad_flags_and_damaged_models_are_named(folder, tmp_path):
    """Flags that do not fit the task, and a model with weights that are not finite, are errors."""
    for wrong in ({"stride": 5}, {"task": "lambada", "text": "raw"}, {"limit": 0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            EvalConfig(**wrong)
    with pytest.raises(ValueError, match="task is piqa, expected hellaswag or lambada or text"):
        EvalConfig(task="piqa")
    broken = GPT.from_pretrained(folder)
    broken.transformer.wpe.weight.data[3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the model is damaged"):
        main(EvalConfig(str(tmp_path / "broken"), data=str(ROWS)))


class Continue(Task):
    """A task with the least that a task has: the log-probability of a word."""

    name = "continue"

    def make_example(self, row: dict) -> Example:
        return Example(encode_request(row["start"], [row["word"]]), {"word": row["word"]})

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        nats = -sum(record["log_probs"][0] for record in records)
        return {"nats": {"value": nats, "meaning": f"{len(records)} words"}}


def test_a_task_in_the_table_is_a_task_of_the_command(folder, tmp_path, monkeypatch, capsys):
    """A task that is added to the table is evaluated, with its own metrics, and resumes."""
    monkeypatch.setitem(TASKS, "continue", Continue)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"start": "The cat", "word": w} for w in (" sat", " flew")]))
    config = EvalConfig(str(folder), task="continue", data=str(file), out_dir=str(tmp_path / "out"))
    main(config)
    rows = read_rows(tmp_path / "out")
    logits = (
        GPT2LMHeadModel.from_pretrained(folder).eval()(torch.tensor([encode("The cat")])).logits
    )
    for row in rows:
        (token,) = encode(row["word"])
        expected = logits[0, -1].log_softmax(-1)[token].item()
        assert row["log_probs"] == pytest.approx([expected], abs=1e-4)
    found = read_results(tmp_path / "out")["nats"]
    assert found == {"value": -sum(row["log_probs"][0] for row in rows), "meaning": "2 words"}
    main(config)
    assert read_rows(tmp_path / "out") == rows
    assert capsys.readouterr().out.count("2 words") == 2
    with pytest.raises(ValueError, match="task continue needs data"):
        main(replace(config, data=None))


TRAINING = """
data_dir: data/text
n_layer: 2
n_head: 2
n_embd: 32
block_size: 32
batch_size: 1
total_batch_size: 384
max_steps: 4
warmup_steps: 2
eval_tokens: 500
sample_every: 0
hellaswag_every: 2
device: cpu
"""


@pytest.mark.slow
def test_training_evaluates_hellaswag_on_all_ranks(tmp_path):
    """With --hellaswag_every training logs the accuracies of its checkpoint, on two ranks with FSDP
    as on one device with a compiled step.
    """
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    (tmp_path / "tiny.yaml").write_text(TRAINING + f"hellaswag_data: {ROWS}\n")
    assert (
        run_script(
            "fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=tmp_path
        ).returncode
        == 0
    )
    script = [str(ROOT / "train_gpt2.py"), "--config", "tiny.yaml", "--out_dir"]
    torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    logs = []
    for command in (
        [sys.executable, *script, "one", "--compile", "true"],
        [*torchrun, *script, "two", "--parallel", "fsdp"],
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        log = read_metrics(tmp_path / command[command.index("--out_dir") + 1])
        logs.append({r["step"]: r for r in log if "hellaswag_acc" in r})
    assert [*logs[0]] == [*logs[1]] == [2, 4]
    model = load_model(tmp_path / "one")
    task = find_task("hellaswag", data=str(ROWS))
    rows = [row for batch in task.score_examples(model, task.load(32), CPU) for row in batch]
    assert len(rows) == 20
    for log in logs:
        for key, prediction in (("hellaswag_acc", "pred"), ("hellaswag_acc_norm", "pred_norm")):
            assert log[4][key] == sum(row[prediction] == row["label"] for row in rows) / 20
