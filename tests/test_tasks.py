"""Tasks and metrics equal those of lm-eval (run as a library) and build-nanogpt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import CPU_DIST, GPT2_TOKENIZER, HELLASWAG_ROWS, TIKTOKEN
from transformers import GPT2LMHeadModel

from engine.distributed import Distributed
from engine.evaluation import evaluate_task
from engine.scoring import Request
from engine.tasks import Example, Task, make_task, perplexity, split_into_windows, wilson_interval
from model import GPT

BLOCK_SIZE = 128  # of gpt2_folder
ROWS = [json.loads(line) for line in HELLASWAG_ROWS.read_text().splitlines()]


@pytest.fixture
def model(gpt2_folder) -> GPT:
    return GPT.from_pretrained(gpt2_folder)


def lm_eval_samples(folder: Path, task: str, data: str) -> list[dict]:
    """Run a task of lm-eval on the rows of a local file, offline. Return its results by row."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs

    source = Path(lm_eval.__file__).parent / "tasks" / task.partition("_")[0] / f"{task}.yaml"
    config = yaml.safe_load(source.read_text().replace("!function ", ""))
    split = config.get("test_split") or config["validation_split"]
    cache = str(Path(data).parent / "cache")
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: data}, "cache_dir": cache},
        "training_split": None,
    }
    if "process_docs" in config:
        config["process_docs"] = process_docs
    tasks = TaskManager(include_defaults=False).load([config])["tasks"]
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    results = lm_eval.evaluate(lm, tasks, bootstrap_iters=0)
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def score_all(task: Task, model: GPT, examples: list[Example]) -> list[dict]:
    """Return the records of the examples, in order."""
    records = [r for batch in task.score_examples(model, examples, CPU_DIST) for r in batch]
    return sorted(records, key=lambda record: record["row"])


def assert_same_as_lm_eval(folder: Path, model: GPT, data: str) -> None:
    """Check that log-probabilities match to 1e-4 and that predictions of both metrics are equal.
    (rtol is for sums beyond 1000 nats: lm-eval adds in fp32, which is coarser than 1e-4 there.)
    """
    samples = lm_eval_samples(folder, "hellaswag", data)
    task = make_task("hellaswag", data=data)
    records = score_all(task, model, task.load(GPT2_TOKENIZER, BLOCK_SIZE))
    for sample, record in zip(samples, records, strict=True):
        theirs = np.array([response[0] for response in sample["filtered_resps"]])
        np.testing.assert_allclose(record["log_probs"], theirs, atol=1e-4, rtol=2e-7)
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert record["lengths"] == lengths.tolist()
        with np.errstate(divide="ignore"):
            expected = int(np.argmax(theirs)), int(np.argmax(theirs / lengths))
        assert (record["pred"], record["pred_norm"]) == expected
        metrics = task.compute_metrics([record])
        found = {key: metrics[key]["value"] for key in ("acc", "acc_norm")}
        assert found == {key: sample[key] for key in found}


def row(ctx_a="A man sits down.", ctx_b="he", endings=None, label=0, activity="Sitting") -> dict:
    endings = endings or ["stands up.", "sings.", "sleeps.", "flies away."]
    ctx = {"ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}"}
    return {"activity_label": activity, **ctx, "endings": endings, "label": label}


ADVERSARIAL = [
    row(),  # lm-eval fails on an empty choice in the first row
    row(endings=["stands up.", "", "sleeps.", "flies."], label=1),  # no characters to divide by
    row(endings=["", "", "", ""]),
    row(endings=["[step]", "[title]", " [title] ", "[a][b]"], label=2),  # nothing but tags
    row(endings=["[step] goes.", "  goes.", "goes.", "goes. "], label=1),  # leading spaces
    row(endings=["goes.", "goes.", "goes.", "goes."], label=0),  # ties: the first counts
    row(endings=["runs home", "runs", "runs home now", "runs"], label=1),  # prefixes of each other
    row(ctx_a="It rains. [header] How to [title] Stay dry. [step]", ctx_b=""),
    row(ctx_a="Ends in a tag. [step]", ctx_b="[substeps]"),  # the context keeps spaces at its end
    row(ctx_a="Nested [a [b] c] and open [ bracket", ctx_b="] he  has   spaces"),
    row(ctx_a="Line one\nline [two\nlines] three", ctx_b="\n"),
    row(ctx_a="Other white space\t", ctx_b="\u00a0\u3000"),
    row(ctx_a="A separator.\x1c", ctx_b="\x1c", endings=["a\x1c", "\x1cb", "\x85", "c"]),
    row(ctx_a="Capitals.", ctx_b="HE SHOUTS in ALL of Them"),
    row(ctx_a="Schnee.", ctx_b="ßtraße ŉ İstanbul ǆ"),
    row(ctx_a="Ein naïves „Zitat“ …", ctx_b="日本語", endings=["を話す。", "😀👨‍👩‍👧", "é", "ﷺ"]),
    row(ctx_a="A document<|endoftext|>", ctx_b="ends <|endoftext|>"),
    row(activity="", ctx_a="", ctx_b=""),
    row(activity="  ", ctx_a=" ", ctx_b=" "),
    row(activity="<|endoftext|>", ctx_a="Begins a document.", ctx_b=""),
    row(ctx_a="It goes on. " * 60),  # longer than the window: truncated on the left
    # Only some of the endings make the row too long.
    row(ctx_a="word " * 117, endings=["a", "b c d e f g h i", "c d e", "d"], label=3),
    row(ctx_a="tied " * 200, endings=["goes on", "is cut", "goes on", "is cut"], label=2),
    row(endings=["long " * 126, "short", "long " * 127, "long " * 60]),
    row(endings=["one", "two"], label=1),
    row(endings=list("abcdefg"), label=6),
    row(ctx_b="don't 's", endings=["'s late", "'ll go", " 't", "n't"], label=3),
]


def test_agrees_with_lm_eval(gpt2_folder, model, write_rows):
    """Predictions and log-probabilities match lm-eval on ordinary rows and on empty, blank, tied,
    nested, truncated and foreign texts.
    """
    assert_same_as_lm_eval(gpt2_folder, model, write_rows(ROWS + ADVERSARIAL))


@pytest.mark.slow
def test_agrees_with_lm_eval_on_real_rows(gpt2_folder, model, write_rows, shared_data):
    """Predictions and log-probabilities match lm-eval on 400 real rows."""
    # If a row has no ctx_a and ctx_b, all of its ctx becomes ctx_a.
    lines = (shared_data / "hellaswag_val_raw_400.jsonl").read_text().splitlines()
    rows = [row(found["ctx"], "") | found for found in map(json.loads, lines)]
    assert len(rows) == 400
    assert_same_as_lm_eval(gpt2_folder, model, write_rows(rows))


@torch.no_grad()
def predict_like_build_nanogpt(theirs: GPT2LMHeadModel, row: dict) -> tuple[int, int]:
    """Predict as build-nanogpt does: padded rows, and the loss over the tokens of the endings."""
    context = TIKTOKEN.encode(row["ctx"])
    endings = [TIKTOKEN.encode(" " + ending) for ending in row["endings"]]
    longest = max(map(len, endings))
    tokens = torch.zeros(len(endings), len(context) + longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ending in enumerate(endings):
        tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
        mask[i, len(context) : len(context) + len(ending)] = 1
    logits = theirs(tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    sums = (losses.view(len(endings), -1) * mask[:, 1:]).sum(1)
    return int(sums.argmin()), int((sums / mask[:, 1:].sum(1)).argmin())


def test_raw_text_equals_build_nanogpt(gpt2_folder, model):
    """With raw text, predictions match build-nanogpt, run here with transformers."""
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    task = make_task("hellaswag", data=str(HELLASWAG_ROWS), text="raw", limit=8)
    records = score_all(task, model, task.load(GPT2_TOKENIZER, BLOCK_SIZE))
    for found, record in zip(ROWS[:8], records, strict=True):
        assert (record["pred"], record["pred_norm"]) == predict_like_build_nanogpt(theirs, found)
    assert list(task.compute_metrics(records)) == ["acc_raw", "acc_token_norm"]


LAMBADA = [
    "The cat sat on the mat and looked at the other cat",
    "word",
    "ends in a space ",
    "two  spaces  here",
    "a line\nbreak before the last\nword",
    "“Quotes,” she said, and a naïve café",
    "It goes on and on " * 40 + "forever",
    "before <|endoftext|> after",
    " leading",
]


def test_lambada_equals_lm_eval(gpt2_folder, model, write_rows):
    """The log-probability of the last word, and whether it is the most likely, match lm-eval."""
    prompt = "Now the next word is"
    idx = model.generate(torch.tensor([TIKTOKEN.encode(prompt)]), 1, temperature=0)
    texts = [*LAMBADA, TIKTOKEN.decode(idx[0].tolist())]
    data = write_rows([{"text": text} for text in texts])
    samples = lm_eval_samples(gpt2_folder, "lambada_openai", data)
    task = make_task("lambada", data=data)
    records = score_all(task, model, task.load(GPT2_TOKENIZER, BLOCK_SIZE))
    for sample, record in zip(samples, records, strict=True):
        # What lm-eval calls the perplexity of a sample is its log-probability.
        assert record["log_probs"] == pytest.approx([sample["perplexity"]], abs=1e-4)
        assert record["greedy"] == sample["acc"]
    nats = [-sample["perplexity"] for sample in samples]
    error = 1.959964 * np.std(nats, ddof=1) / len(nats) ** 0.5
    metrics = task.compute_metrics(records)
    assert metrics["acc"]["value"] == np.mean([sample["acc"] for sample in samples]) > 0
    for key, offset in (("value", 0), ("low", -error), ("high", error)):
        assert metrics["perplexity"][key] == pytest.approx(np.exp(np.mean(nats) + offset), 1e-4)


def test_perplexity_of_documents_equals_lm_eval(gpt2_folder, model, write_rows):
    """Perplexity per word and bits per byte match lm-eval's wikitext task, on documents that are
    empty (first, in between and last), blank, or longer than the window.
    """
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    texts = ["", "One document about cats. ", "", " \n\t ", "word " * 300, "“Café”\n\nends", ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    lm = HFLM(pretrained=str(gpt2_folder), device="cpu", batch_size=1)
    pairs = zip(texts, lm.loglikelihood_rolling(requests), strict=True)
    theirs = [process_results({"page": text}, (log_prob,)) for text, log_prob in pairs]
    task = make_task("perplexity", data=write_rows([{"text": text} for text in texts]))
    records = score_all(task, model, task.load(GPT2_TOKENIZER, BLOCK_SIZE))
    metrics = task.compute_metrics(records)
    for name, aggregate in (
        ("word_perplexity", weighted_perplexity),
        ("bits_per_byte", bits_per_byte),
    ):
        expected = aggregate([result[name] for result in theirs])
        assert metrics[name]["value"] == pytest.approx(expected, rel=1e-5)
    assert [record["document"] for record in records][:2] == [2, 4]


def test_windows_of_a_text_equal_lm_eval():
    """Windows without overlap match the rolling windows of lm-eval for texts of any length."""
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-eval")
    for length in (1, 127, 128, 129, 300, 1024):
        ids = list(range(length))
        theirs = utils.get_rolling_token_windows(ids, 50256, BLOCK_SIZE, context_len=1)
        pairs = map(utils.make_disjoint_window, theirs)
        expected = [Request(context, [window]) for context, window in pairs]
        assert list(split_into_windows([50256, *ids], BLOCK_SIZE, BLOCK_SIZE)) == expected


def test_interval_satisfies_wilsons_definition():
    """Each end p of the interval is 1.96 standard errors, computed at p, from the proportion."""
    for correct, n in ((0, 7), (3, 10), (3127, 10_042), (20, 20)):
        low, high = wilson_interval(correct, n)
        assert low <= correct / n <= high
        assert high - low > 0.01
        for p in (low, high):
            distance = 1.959964 * (p * (1 - p) / n) ** 0.5
            assert abs(correct / n - p) == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"endings": ["a"]}, r"\['a'\], expected a list of at least two strings"),
        ({"endings": ["a", None]}, "None], expected a list of at least two strings"),
        ({"endings": ["a", "b " * 200]}, "tokens to predict exceed block_size 128"),
        ({"label": 2}, "label is 2, expected 0 to 1"),
        ({"label": ""}, "label is '', expected 0"),
        ({"label": 1.5}, "label is 1.5, expected 0"),
        ({"ctx": 7}, "ctx is 7, expected a string"),
        ({"ctx": "\ud800"}, "surrogates"),
        ({"ctx_a": "a"}, "'ctx_b' is missing"),
    ],
)
def test_bad_rows_are_refused_or_skipped(write_rows, capsys, changes, reason):
    """The error for a bad row names its line. With skip_bad_rows, it is skipped with a message."""
    good = {"ctx": "a", "endings": ["a", "b"], "label": 0}
    data = write_rows([good, good | changes, good])
    with pytest.raises(ValueError, match=f"rows.jsonl line 2: .*{reason}"):
        make_task("hellaswag", data=data).load(GPT2_TOKENIZER, BLOCK_SIZE)
    task = make_task("hellaswag", data=data, skip_bad_rows=True)
    examples = task.load(GPT2_TOKENIZER, BLOCK_SIZE)
    assert [example.record["row"] for example in examples] == [1, 3]
    assert "line 2" in capsys.readouterr().out


def test_wrong_settings_are_refused(tmp_path):
    """Empty or missing data, a stride longer than the window, a setting of another task, and an
    unknown task are errors.
    """
    empty = str(tmp_path / "empty.txt")
    Path(empty).touch()
    for name, settings, expected in (
        ("hellaswag", {"data": empty}, "contains nothing to evaluate on"),
        ("perplexity", {"data": empty}, "contains nothing to evaluate on"),
        ("perplexity", {}, "task perplexity needs data"),
        ("perplexity", {"data": empty, "stride": 129}, "stride is 129, expected at most block_siz"),
        ("lambada", {"stride": 3}, "stride is not a setting of task lambada; omit --stride"),
        ("piqa", {}, "task is piqa, expected hellaswag or lambada or perplexity"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_task(name, **settings).load(GPT2_TOKENIZER, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("hellaswag", ("Rowan/hellaswag", None, "validation")),
        ("lambada", ("EleutherAI/lambada_openai", "default", "test")),
    ],
)
def test_default_rows_come_from_the_hub(task, expected, monkeypatch, datasets, network):
    """Without a file, rows come from the validation or test split on the hub. Without a network,
    the error names the flags that read a file instead.
    """
    asked = []

    def load_once(repo: str, name: str | None, split: str, **options) -> list[dict]:
        asked.append((repo, name, split))
        if len(asked) > 1:
            raise OSError("no network")
        return [ROWS[0] | {"text": "The last word"}] * 2

    monkeypatch.setattr("datasets.load_dataset", load_once)
    examples = make_task(task, limit=1).load(GPT2_TOKENIZER, BLOCK_SIZE)
    assert [example.record["row"] for example in examples] == [1]
    assert asked == [expected]
    problem = f"{expected[0]}: no network.* data or hellaswag_data"
    with pytest.raises(ConnectionError, match=problem):
        make_task(task).load(GPT2_TOKENIZER, BLOCK_SIZE)


def test_a_sample_is_the_same_for_every_model(write_rows):
    """A sample has so many rows or documents, spread over all of them, with the numbers they have
    in the data. The context length of the model does not matter. A larger sample contains it.
    """
    rows = [ROWS[0] | {"text": f"document {i}", "ctx": f"row {i}"} for i in range(100)]
    for name, number in (("hellaswag", "row"), ("perplexity", "document")):
        every, some, same, more, most = (
            make_task(name, data=write_rows(rows), sample=n).load(GPT2_TOKENIZER, block_size)
            for n, block_size in ((None, 64), (30, 64), (30, 128), (31, 64), (1000, 64))
        )
        assert [e.request for e in some] == [e.request for e in same]
        assert most == every
        by_number = {e.record[number]: e.request for e in every}
        numbers = [e.record[number] for e in some]
        assert len(numbers) == 30
        assert numbers == sorted(numbers)
        assert [by_number[n] for n in numbers] == [e.request for e in some]
        assert {*numbers} < {e.record[number] for e in more}
        # Drawn without a preference, 30 of 100 have a mean of 50.5, give or take 4.4.
        assert abs(np.mean(numbers) - 50.5) < 3 * 4.4


def test_ranks_score_every_example_once(model, monkeypatch):
    """Three ranks together give the same records as a single process."""
    task = make_task("hellaswag", data=str(HELLASWAG_ROWS))
    examples = task.load(GPT2_TOKENIZER, BLOCK_SIZE)
    expected = score_all(task, model, examples)
    monkeypatch.setattr(Distributed, "all_gather", lambda self, value: [value])  # only its share
    ranks = [Distributed(rank, 3, CPU_DIST.device) for rank in range(3)]
    found = [r for rank in ranks for b in task.score_examples(model, examples, rank) for r in b]
    assert sorted(found, key=lambda record: record["row"]) == expected
    assert len(expected) == 20


def test_training_evaluates_a_task_by_name(model, write_rows):
    """evaluate_task returns the metrics of the task, each under the key TASK_METRIC."""
    lambada = write_rows([{"text": text} for text in LAMBADA])
    for name, data, keys in (
        ("hellaswag", str(HELLASWAG_ROWS), ["hellaswag_acc", "hellaswag_acc_norm"]),
        ("lambada", lambada, ["lambada_acc", "lambada_perplexity"]),
    ):
        task = make_task(name, data=data)
        examples = task.load(GPT2_TOKENIZER, BLOCK_SIZE)
        metrics = task.compute_metrics(score_all(task, model, examples))
        logged = evaluate_task(name, model, examples, CPU_DIST)
        assert list(logged) == keys
        assert list(logged.values()) == [metric["value"] for metric in metrics.values()]


def test_perplexity_beyond_floats_is_infinite():
    """A perplexity too large for a float, or of no words at all, is inf."""
    assert perplexity(1e6) == perplexity(1.0, 0) == float("inf")
    assert perplexity(6.0, 3) == pytest.approx(np.exp(2.0))
