"""The evaluation command: its metrics, its files, and how it resumes."""

import gzip
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_DIST, GPT2_TOKENIZER, HELLASWAG_ROWS, TIKTOKEN, as_flags, tiny_run
from processes import run_script
from transformers import GPT2LMHeadModel

from engine import scoring
from engine.adapter import save_adapter
from engine.checkpoint import load_model
from engine.lora import LoRAConfig, convert_linear_layer_to_lora, merge_lora
from engine.metrics import read_metrics
from engine.pretrained import hash_weights
from engine.scoring import encode_request, score
from engine.tasks import TASKS, Example, Task, make_task
from engine.tokenizer import Tokenizer
from hellaswag import EvalConfig, main
from model import GPT

BLOCK_SIZE = 128  # of the model in gpt2_folder
ROWS = str(HELLASWAG_ROWS)
TEXT = Path(ROWS).read_text()[:3000] + "“Naïve café” — 日本語 😀\n\n"
BATCH_TOKENS = 200  # few, so that an evaluation has many batches


def read_results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def read_rows(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["row"])


def save_random_adapter(model: Path, folder: Path) -> GPT:
    """Save an adapter with dropout for a model. Return the model with the adapter."""
    adapted = GPT.from_pretrained(model)
    convert_linear_layer_to_lora(adapted, config=LoRAConfig(lora_dim=2, lora_dropout=0.5))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if name.endswith("lora_B"):
                param.normal_()
    save_adapter(adapted, folder)
    return adapted


def evaluate(model: Path, out: Path | str | None = None, **options) -> EvalConfig:
    """Run hellaswag.py, by default on the 20 rows of the tests. Return its config."""
    config = EvalConfig(str(model), out_dir=str(out) if out else None, **{"data": ROWS, **options})
    main(config)
    return config


@pytest.mark.parametrize("stride", [None, 50])
def test_perplexity_equals_transformers(gpt2_folder, tmp_path, monkeypatch, stride):
    """Perplexities and bits per byte equal those of transformers with a sliding window, in which
    each token is predicted once. On any CPU, the evaluation is in fp32.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    evaluate(gpt2_folder, tmp_path / "out", task="perplexity", data=str(file), stride=stride)
    found = read_results(tmp_path / "out")
    assert found["config"]["precision"] == "fp32"
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    ids = [50256, *TIKTOKEN.encode(TEXT)]
    step = stride or BLOCK_SIZE
    nats, start = 0.0, 1
    while start < len(ids):  # score ids[start:end], with at most BLOCK_SIZE tokens as input
        end = min(len(ids), start + (BLOCK_SIZE if start == 1 else step))
        window = torch.tensor([ids[max(0, end - BLOCK_SIZE - 1) : end]])
        targets = window[:, 1:].clone()
        targets[:, : -(end - start)] = -100
        with torch.no_grad():
            logits = theirs(window[:, :-1]).logits.double()
        nats += F.cross_entropy(logits[0], targets[0], reduction="sum").item()
        start = end
    n_tokens, n_words, n_bytes = len(ids) - 1, len(re.split(r"\s+", TEXT)), len(TEXT.encode())
    assert found["token_perplexity"]["value"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(nats / n_words), rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_perplexity_of_documents(gpt2_folder, tmp_path, write_rows, capsys):
    """All tokens of each document count. A bad row is an error, unless skip_bad_rows is set. The
    output counts windows and documents.
    """
    out = tmp_path / "out"
    documents = [{"text": "One document."}, {"text": "Another one, a little longer."}]
    options = {"task": "perplexity", "data": write_rows([*documents, {}])}
    with pytest.raises(ValueError, match="bad rows"):
        evaluate(gpt2_folder, **options)
    evaluate(gpt2_folder, **options, skip_bad_rows=True)
    lengths = [len(TIKTOKEN.encode(document["text"])) for document in documents]
    assert f"{sum(lengths)} tokens, 2 documents" in capsys.readouterr().out
    evaluate(gpt2_folder, out, **options, skip_bad_rows=True, limit=1)
    printed = capsys.readouterr().out
    assert f"{lengths[0]} tokens, 1 document\n" in printed
    assert "1 windows in" in printed
    results = read_results(out)
    assert (results["rows"], results["windows"]) == (1, 1)


def test_perplexity_of_one_endless_word(gpt2_folder, tmp_path, capsys):
    """A perplexity too large for a float is printed as inf."""
    file = tmp_path / "word.txt"
    file.write_text("qzx" * 500)
    evaluate(gpt2_folder, task="perplexity", data=str(file))
    assert re.search(r"word_perplexity +inf", capsys.readouterr().out)


def test_adapter_is_evaluated(gpt2_folder, tmp_path):
    """With --lora_load_path, the model is evaluated with the adapter and without dropout."""
    adapted = save_random_adapter(gpt2_folder, tmp_path / "adapter")
    evaluate(gpt2_folder, tmp_path / "out", lora_load_path=str(tmp_path / "adapter"))
    examples = make_task("hellaswag", data=ROWS).load(GPT2_TOKENIZER, BLOCK_SIZE)
    requests = [example.request for example in examples]

    def compute_log_probs(model: GPT) -> list[list[float]]:
        scores = dict(itertools.chain(*score(model, requests, CPU_DIST)))
        return [[s.log_prob for s in scores[i]] for i in range(len(requests))]

    adapter, base = map(compute_log_probs, (merge_lora(adapted), GPT.from_pretrained(gpt2_folder)))
    for i, row in enumerate(read_rows(tmp_path / "out")):
        assert row["log_probs"] == pytest.approx(adapter[i], abs=1e-3, rel=1e-5)
        assert row["log_probs"] != pytest.approx(base[i], abs=1)


def test_accuracy_is_the_fraction_of_correct_predictions(gpt2_folder, tmp_path, write_rows, capsys):
    """The command prints and writes the fraction of correct predictions, even for a .gz file. If
    rows have no ctx_a, it warns that lm-eval would build their prompts differently.
    """
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(HELLASWAG_ROWS.read_bytes()))
    evaluate(gpt2_folder, tmp_path / "out", data=str(packed))
    found, rows = read_results(tmp_path / "out"), read_rows(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(1, 21))
    acc, acc_norm = (
        sum(row[key] == row["label"] for row in rows) / 20 for key in ("pred", "pred_norm")
    )
    assert (found["acc"]["value"], found["acc_norm"]["value"]) == (acc, acc_norm)
    assert f"acc_norm         {acc_norm:.4f}" in capsys.readouterr().out
    full = map(json.loads, HELLASWAG_ROWS.read_text().splitlines())
    short = [{key: row[key] for key in ("ctx", "endings", "label")} for row in full]
    evaluate(gpt2_folder, data=write_rows(short), limit=7)
    assert "7 of 7 rows have no ctx_a" in capsys.readouterr().out


def test_killed_evaluation_resumes(gpt2_folder, tmp_path, monkeypatch):
    """A killed evaluation keeps its rows. When resumed, it ends with the same results."""
    monkeypatch.setattr(scoring, "BATCH_LIMITS", {"cpu": (BATCH_TOKENS, 1)})
    config = evaluate(gpt2_folder, tmp_path / "whole")
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
    whole, resumed = (read_results(tmp_path / name) for name in ("whole", "killed"))
    assert {**whole, "config": 0} == {**resumed, "config": 0}
    calls_before = n_calls
    main(killed)  # nothing is left to compute
    assert n_calls == calls_before


@pytest.mark.parametrize(("ranks", "n_begun"), [(2, 7), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_ranks_split_the_rows(gpt2_folder, tmp_path, ranks, n_begun):
    """On several ranks, the rows and results equal those of one process, even after a resume."""
    save_random_adapter(gpt2_folder, tmp_path / "adapter")

    def evaluate_on(ranks: int, name: str) -> list[str]:
        options = {"model": gpt2_folder, "lora_load_path": "adapter", "out_dir": name}
        flags = as_flags({**options, "data": ROWS, "device": "cpu"})
        result = run_script("hellaswag.py", *flags, cwd=tmp_path, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("acc_norm ") == 1
        return (tmp_path / name / "rows.jsonl").read_text().splitlines(keepends=True)

    rows = evaluate_on(1, "one")
    assert len(rows) == 20
    shutil.copytree(tmp_path / "one", tmp_path / "ranks")
    (tmp_path / "ranks" / "rows.jsonl").write_text("".join(rows[:n_begun]))
    assert evaluate_on(ranks, "ranks") == rows
    one, several = (read_results(tmp_path / name) for name in ("one", "ranks"))
    assert {**one, "config": 0} == {**several, "config": 0}


def test_other_settings_do_not_resume(gpt2_folder, tmp_path):
    """If out_dir has results of another model, data or options, that is an error; they are kept.
    Settings of an earlier version, which lack the sample, are those without a sample.
    """
    config = evaluate(gpt2_folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings.pop("sample") is None
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    main(config)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    other = GPT.from_pretrained(gpt2_folder)
    other.transformer.wpe.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other.jsonl").write_text(Path(ROWS).read_text().partition("\n")[0])
    for changed, name in (
        ({"model": str(tmp_path / "other")}, "weights"),
        ({"data": str(tmp_path / "other.jsonl")}, "data"),
        ({"text": "raw"}, "text"),
        ({"limit": 3}, "limit"),
        ({"sample": 3}, "sample"),
        ({"precision": "bf16"}, "precision"),
    ):
        with pytest.raises(ValueError, match=f"results with different {name}; choose"):
            main(replace(config, **changed))
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


def test_bad_flags_and_damaged_models_are_named(gpt2_folder, tmp_path):
    """Flags that do not fit the task are an error, and so are weights that are not finite."""
    for wrong in (
        {"stride": 5},
        {"task": "lambada", "text": "raw"},
        {"limit": 0},
        {"limit": 3, "sample": 4},
        {"compare": ["a"]},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            EvalConfig(**wrong)
    with pytest.raises(ValueError, match="task is text, expected hellaswag or lambada or perplex"):
        EvalConfig(task="text")  # the earlier name of perplexity
    broken = GPT.from_pretrained(gpt2_folder)
    broken.transformer.wpe.weight.data[3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the model is damaged"):
        evaluate(tmp_path / "broken")


def test_results_name_the_checkpoint(gpt2_folder, tmp_path):
    """results.json has the checkpoint of a run that was evaluated, its step, and the hash of its
    weights, so that results can be traced. A model that is no checkpoint of a run has no step.
    """
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000007"
    shutil.copytree(gpt2_folder, checkpoint)
    (checkpoint / "progress.json").write_text('{"step": 7}')
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    weights = hash_weights(GPT.from_pretrained(gpt2_folder))
    for model, path, step in (
        (tmp_path / "run", checkpoint, 7),
        (checkpoint, checkpoint, 7),
        (gpt2_folder, gpt2_folder, None),
    ):
        evaluate(model, tmp_path / f"{model.name} out", limit=1)
        found = read_results(tmp_path / f"{model.name} out")
        assert [found[k] for k in ("checkpoint", "step", "weights")] == [str(path), step, weights]


def write_evaluation(folder: Path, records: list[dict], **settings) -> str:
    """Write the files of an evaluation that `compare` reads."""
    folder.mkdir(exist_ok=True)
    settings = {"task": "hellaswag", "text": "lm-eval", "weights": folder.name} | settings
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = (json.dumps({"row": row, **r}) + "\n" for row, r in enumerate(records, start=1))
    (folder / "rows.jsonl").write_text("".join(lines))
    return str(folder)


def compare_and_read(capsys, *folders: str) -> str:
    main(EvalConfig(compare=list(folders)))
    return capsys.readouterr().out


def test_compare_pairs_the_rows(tmp_path, capsys):
    """The interval of a difference of accuracies equals that of McNemar's counts, on the rows that
    both evaluations have. The rows that only one model gets right are listed, up to 12.
    """
    rng = np.random.default_rng(0)
    right = rng.random((2, 300)) < [[0.4], [0.5]]
    folders = []
    for name, hits in zip("ab", right, strict=True):
        # "pred" is right for every row of both, so that only acc_norm differs.
        records = [{"label": 1, "pred": 1, "pred_norm": int(hit)} for hit in hits]
        records += [{"label": 1, "pred": 1, "pred_norm": 1}] * (name == "a")  # not in b
        folders.append(write_evaluation(tmp_path / name, records))
    with Path(folders[1], "rows.jsonl").open("a") as file:
        file.write(json.dumps({"row": 302, **records[0]}) + "\n")  # not in a
    printed = compare_and_read(capsys, *folders)
    only_a, only_b = (np.flatnonzero(one & ~other) + 1 for one, other in (right, right[::-1]))
    n_a, n_b = len(only_a), len(only_b)
    difference = (n_b - n_a) / 300
    error = 1.959964 * math.sqrt((n_a + n_b - (n_b - n_a) ** 2 / 300) / 299 / 300)
    low, high = difference - error, difference + error
    assert f"b - a {difference:.4f}, paired 95% interval {low:.4f} to {high:.4f}\n" in printed
    assert f"acc_norm         a {right[0].mean():.4f}, b {right[1].mean():.4f}, " in printed
    assert "acc              a 1.0000, b 1.0000, b - a 0.0000" in printed
    assert "300 rows in both" in printed
    for name, rows in (("a", only_a), ("b", only_b)):
        assert len(rows) > 12
        assert f"right only in {name}: {len(rows)} rows {rows[:12].tolist()}\n" in printed


def test_compare_perplexities_by_their_ratio(tmp_path, capsys):
    """Perplexities are compared by their ratio: the interval is that of the mean difference in
    nats. Windows of a text have none. They must be the same windows.
    """
    nats = np.random.default_rng(0).normal([[3.0], [3.2]], 1.0, (2, 50))
    differences = nats[1] - nats[0]
    mean, error = differences.mean(), 1.959964 * differences.std(ddof=1) / math.sqrt(50)
    folders = [
        write_evaluation(
            tmp_path / name, [{"log_probs": [-x], "greedy": False} for x in xs], task="lambada"
        )
        for name, xs in zip("ab", nats, strict=True)
    ]
    interval = f"{math.exp(mean - error):.4f} to {math.exp(mean + error):.4f}"
    expected = f"b / a {math.exp(mean):.4f}, paired 95% interval {interval}\n"
    assert expected in compare_and_read(capsys, *folders)
    size = {"document": 1, "words": 2, "bytes": 8}
    for tokens, log_prob, name in ((2, -3.0, "a"), (2, -4.0, "b"), (3, -4.0, "c")):
        records = [{**size, "log_probs": [log_prob], "tokens": tokens}]
        write_evaluation(tmp_path / name, records, task="perplexity")
    printed = compare_and_read(capsys, *folders)
    assert (
        f"word_perplexity  a {math.exp(1.5):.4f}, b {math.exp(2):.4f}, b / a {math.exp(0.5):.4f}\n"
        in printed
    )
    assert f"b - a {1 / 8 / math.log(2):.4f}\n" in printed
    with pytest.raises(ValueError, match="different windows"):
        compare_and_read(capsys, folders[0], str(tmp_path / "c"))


def test_only_models_are_compared(tmp_path, capsys):
    """Evaluations with other data, tasks or settings are refused by name; another tokenizer is part
    of the model. An earlier version had no sample.
    """
    record = {"label": 1, "pred": 1, "pred_norm": 1}
    a = write_evaluation(tmp_path / "a", [record], data="x", limit=None)
    b = write_evaluation(tmp_path / "b", [record], data="x", tokenizer="y", sample=None)
    assert "1 rows in both" in compare_and_read(capsys, a, b)
    write_evaluation(tmp_path / "b", [record], data="z", text="raw", task="lambada", limit=1)
    with pytest.raises(ValueError, match="have different data, limit, task, text; compare"):
        compare_and_read(capsys, a, b)


class Continue(Task):
    """A minimal task: the log-probability of one word."""

    name = "continue"

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        request = encode_request(tokenizer, row["start"], [row["word"]])
        return Example(request, {"word": row["word"]})

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        nats = -sum(record["log_probs"][0] for record in records)
        return {"nats": {"value": nats, "meaning": f"{len(records)} words"}}


def test_a_task_in_the_table_is_evaluated(gpt2_folder, tmp_path, write_rows, monkeypatch, capsys):
    """A task added to TASKS is evaluated with its own metrics, and resumes."""
    monkeypatch.setitem(TASKS, "continue", Continue)
    data = write_rows([{"start": "The cat", "word": word} for word in (" sat", " flew")])
    config = evaluate(gpt2_folder, tmp_path / "out", task="continue", data=data)
    rows = read_rows(tmp_path / "out")
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    logits = theirs(torch.tensor([TIKTOKEN.encode("The cat")])).logits
    for row in rows:
        (token,) = TIKTOKEN.encode(row["word"])
        expected = logits[0, -1].log_softmax(-1)[token].item()
        assert row["log_probs"] == pytest.approx([expected], abs=1e-4)
    found = read_results(tmp_path / "out")["nats"]
    assert found == {"value": -sum(row["log_probs"][0] for row in rows), "meaning": "2 words"}
    main(config)
    assert read_rows(tmp_path / "out") == rows
    assert capsys.readouterr().out.count("2 words") == 2
    with pytest.raises(ValueError, match="task continue needs data"):
        main(replace(config, data=None))


@pytest.mark.slow
def test_training_evaluates_hellaswag_on_all_ranks(workdir):
    """Training logs the accuracies of the model it saves, on two ranks with FSDP as on one."""
    settings = {"max_steps": 4, "hellaswag_every": 2, "hellaswag_data": HELLASWAG_ROWS}
    settings |= {"sample_every": 0}
    logs = []
    for ranks, options in ((1, {"compile": True}), (2, {"parallel": "fsdp"})):
        command = tiny_run(f"hellaswag/{ranks}", **settings, **options)
        result = run_script(*command, cwd=workdir, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
        log = read_metrics(workdir / "hellaswag" / str(ranks))
        logs.append({r["step"]: r for r in log if "hellaswag_acc" in r})
    assert [*logs[0]] == [*logs[1]] == [2, 4]
    model = load_model(workdir / "hellaswag" / "1")
    task = make_task("hellaswag", data=ROWS)
    examples = task.load(GPT2_TOKENIZER, 32)
    rows = [row for batch in task.score_examples(model, examples, CPU_DIST) for row in batch]
    assert len(rows) == 20
    for log in logs:
        for key, prediction in (("hellaswag_acc", "pred"), ("hellaswag_acc_norm", "pred_norm")):
            assert log[4][key] == sum(row[prediction] == row["label"] for row in rows) / 20
