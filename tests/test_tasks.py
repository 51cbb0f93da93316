"""Tasks and metrics equal those of lm-eval (run as a library), build-nanogpt and scipy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import CPU
from transformers import GPT2LMHeadModel

from engine.distributed import Distributed
from engine.evaluation import evaluate_task
from engine.scoring import encode, score
from engine.tasks import (
    Example,
    Task,
    find_task,
    perplexity,
    split_into_windows,
    wilson_interval,
)
from engine.tokenizer import get_tokenizer, save_tokenizer
from model import GPT, GPTConfig

BLOCK_SIZE = 128
ROWS = Path(__file__).parent / "hellaswag_rows.jsonl"
HUB_LAMBADA = "EleutherAI/lambada_openai"
ORIGINAL = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small GPT-2 with the real vocabulary, and weights so large that endings differ by nats."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, n_layer=2, n_head=4, n_embd=64))
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(4)
    model.save_pretrained(folder)
    save_tokenizer(folder, BLOCK_SIZE)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> GPT:
    return GPT.from_pretrained(folder)


@pytest.fixture
def write_rows(tmp_path) -> Callable[[list[dict]], str]:
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def lm_eval_samples(folder: Path, task: str, data: str, batch_size: int = 1) -> list[dict]:
    """lm-eval's own results for each row of a local file, with its own task and no network."""
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
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        lm, tasks=[config], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def score_all(task: Task, model: GPT, examples: list[Example]) -> list[dict]:
    """The records of the examples, in their order."""
    records = [record for batch in task.score_examples(model, examples, CPU) for record in batch]
    return sorted(records, key=lambda record: record["row"])


def assert_same_as_lm_eval(folder: Path, model: GPT, data: str) -> None:
    """Every log-probability within 1e-4, and every prediction of both metrics the same. (lm-eval
    adds in fp32, whose last digit is worth more than that beyond 1000 nats.)
    """
    samples = lm_eval_samples(folder, "hellaswag", data)
    task = find_task("hellaswag", data=data)
    records = score_all(task, model, task.load(BLOCK_SIZE))
    assert len(samples) == len(records) > 0
    for sample, record in zip(samples, records, strict=True):
        theirs = np.array([response[0] for response in sample["filtered_resps"]])
        np.testing.assert_allclose(record["log_probs"], theirs, atol=1e-4, rtol=2e-7)
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert record["lengths"] == lengths.tolist()
        with np.errstate(divide="ignore"):
            expected = int(np.argmax(theirs)), int(np.argmax(theirs / lengths))
        assert (record["pred"], record["pred_norm"]) == expected
        metrics = task.compute_metrics([record])
        assert [metrics[key]["value"] for key in ("acc", "acc_norm")] == [
            sample["acc"],
            sample["acc_norm"],
        ]


def test_agrees_with_lm_eval(folder, model, write_rows):
    """On rows of both sources, all predictions and log-probabilities are lm-eval's."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    assert_same_as_lm_eval(folder, model, write_rows(rows))


def row(ctx_a="A man sits down.", ctx_b="he", endings=None, label=0, activity="Sitting") -> dict:
    endings = endings or ["stands up.", "sings.", "sleeps.", "flies away."]
    return {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings} | {
        "ctx": f"{ctx_a} {ctx_b}",
        "label": label,
    }


ADVERSARIAL = [
    row(),  # lm-eval fails on an empty choice in the first row
    row(endings=["stands up.", "", "sleeps.", "flies."], label=1),  # no characters to divide by
    row(endings=["", "", "", ""]),
    row(endings=["[step]", "[title]", " [title] ", "[a][b]"], label=2),  # nothing but tags
    row(endings=["[step] goes.", "  goes.", "goes.", "goes. "], label=1),  # leading spaces
    row(endings=["goes.", "goes.", "goes.", "goes."], label=0),  # ties: the first counts
    row(endings=["runs home", "runs", "runs home now", "runs"], label=1),  # prefixes of each other
    row(endings=["up.", "sings.", "sings.", "  up."], label=2),
    row(ctx_a="It rains. [header] How to [title] Stay dry. [step]", ctx_b=""),
    row(ctx_a="Ends in a tag. [step]", ctx_b="[substeps]"),  # the context keeps spaces at its end
    row(ctx_a="Nested [a [b] c] and open [ bracket", ctx_b="] he  has   spaces"),
    row(ctx_a="Line one\nline [two\nlines] three", ctx_b="\n"),
    row(ctx_a="Other white space\t", ctx_b="\u00a0\u3000"),
    row(ctx_a="A separator.\x1c", ctx_b="\x1c", endings=["a\x1c", "\x1cb", "\x85", "c"]),
    row(ctx_a="Capitals.", ctx_b="HE SHOUTS in ALL of Them"),
    row(ctx_a="Schnee.", ctx_b="ßtraße ŉ İstanbul ǆ"),
    row(
        ctx_a="Ein naïves café — „Zitat“ …",
        ctx_b="日本語",
        endings=["を話す。", "😀👨‍👩‍👧", "é", "ﷺ"],
    ),
    row(ctx_a="A document<|endoftext|>", ctx_b="ends <|endoftext|>"),
    row(activity="", ctx_a="", ctx_b=""),
    row(activity="  ", ctx_a=" ", ctx_b=" "),
    row(activity="<|endoftext|>", ctx_a="Begins a document.", ctx_b=""),
    row(ctx_a="It goes on. " * 60),  # longer than the window: truncated on the left
    row(ctx_a="word " * 117, endings=["a", "b c d e f g h i", "c d e", "d"], label=3),  # some are
    row(ctx_a="tied " * 200, endings=["goes on", "is cut", "goes on", "is cut"], label=2),
    row(endings=["long " * 126, "short", "long " * 127, "long " * 60]),
    row(endings=["one", "two"], label=1),
    row(endings=list("abcdefg"), label=6),
    row(ctx_b="don't 's", endings=["'s late", "'ll go", " 't", "n't"], label=3),
    row(ctx_a="Numbers 1234567 3.14e-10", ctx_b="12", endings=["34", "5 6", "007", "x2"]),
]


def test_agrees_with_lm_eval_on_adversarial_rows(folder, model, write_rows):
    """So they are on empty, blank, tied, nested, truncated and foreign texts."""
    assert_same_as_lm_eval(folder, model, write_rows(ADVERSARIAL))


@pytest.mark.slow
def test_agrees_with_lm_eval_on_real_rows(folder, model, write_rows, shared_data):
    """So they are on 400 real rows. Where ctx_a and ctx_b are missing, ctx is split at its last
    sentence.
    """
    rows = []
    for line in (shared_data / "hellaswag_val_raw_400.jsonl").read_text().splitlines():
        found = json.loads(line)
        if "ctx_a" not in found:
            head, stop, tail = found["ctx"].rpartition(". ")
            lower = tail[:1].islower()
            found["ctx_a"] = (head + stop).strip() if lower else found["ctx"]
            found["ctx_b"] = tail if lower else ""
        rows.append({key: found[key] for key in ORIGINAL})
    assert len(rows) == 400
    assert_same_as_lm_eval(folder, model, write_rows(rows))


@torch.no_grad()
def build_nanogpt(theirs: GPT2LMHeadModel, row: dict) -> tuple[int, int]:
    """build-nanogpt's predictions: padded rows, loss over the endings' tokens."""
    context = encode(row["ctx"])
    endings = [encode(" " + ending) for ending in row["endings"]]
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


def test_raw_text_is_build_nanogpts(folder, model):
    """With raw text the predictions are those of four padded rows through transformers."""
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    task = find_task("hellaswag", data=str(ROWS), text="raw")
    records = score_all(task, model, task.load(BLOCK_SIZE))
    for found, record in zip(rows, records, strict=True):
        assert (record["pred"], record["pred_norm"]) == build_nanogpt(theirs, found)
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


def test_lambada_is_lm_evals(folder, model, write_rows):
    """The last word's log-probability, and whether it is the most likely, are lm-eval's."""
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.tensor([encode("Now the next word is")])
    with torch.no_grad():  # for a text that ends as the model would end it
        order = theirs(idx).logits[0, -1].argsort(descending=True).tolist()
    most_likely = get_tokenizer().decode([order[0]])
    rows = [{"text": text} for text in [*LAMBADA, "Now the next word is" + most_likely]]
    data = write_rows(rows)
    samples = lm_eval_samples(folder, "lambada_openai", data)
    task = find_task("lambada", data=data)
    records = score_all(task, model, task.load(BLOCK_SIZE))
    for sample, record in zip(samples, records, strict=True):
        assert record["log_probs"] == pytest.approx([sample["perplexity"]], abs=1e-4)
        assert record["greedy"] == sample["acc"]
    nats = [-sample["perplexity"] for sample in samples]
    error = 1.959964 * np.std(nats, ddof=1) / len(nats) ** 0.5
    metrics = task.compute_metrics(records)
    assert metrics["acc"]["value"] == np.mean([sample["acc"] for sample in samples]) > 0
    for key, expected in (("value", 0), ("low", -error), ("high", error)):
        assert metrics["perplexity"][key] == pytest.approx(np.exp(np.mean(nats) + expected), 1e-4)


def test_perplexity_is_lm_evals_rolling_likelihood(folder, model):
    """Windows that do not overlap are those of lm-eval's loglikelihood_rolling, for texts of any
    length.
    """
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    long_text = ROWS.read_text()[:3000] + "“Naïve café” — 日本語 😀\n\n"
    for text in ("a", long_text[:300], long_text[:900], long_text):
        (theirs,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        requests = list(split_into_windows(encode(text), BLOCK_SIZE, BLOCK_SIZE))
        assert sum(len(r.continuations[0]) for r in requests) == len(encode(text))
        ours = sum(s[0].log_prob for batch in score(model, requests, CPU) for _, s in batch)
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_interval_is_wilsons():
    """The interval of an accuracy is scipy's Wilson interval."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which lm-eval brings")
    for correct, n in ((0, 7), (3, 10), (3127, 10_042), (20, 20)):
        expected = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"ctx": "a"', "Expecting"),
        ("[1, 2]", "is not a JSON object"),
        ('{"ctx": "a", "label": 0}', "'endings' is missing"),
        ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label is 4"),
        ('{"ctx": "a", "label": "", "endings": ["a", "b", "c", "d"]}', "label is .*, expected 0"),
        ('{"ctx": "a", "label": 1.5, "endings": ["a", "b", "c", "d"]}', "label is .*, expected 0"),
        ('{"ctx": "a", "label": 0, "endings": ["a"]}', "at least two strings"),
        (
            '{"ctx": "a", "label": 0, "endings": ["a", null]}',
            "None.*, expected a list of",
        ),
        ('{"ctx": 7, "label": 0, "endings": ["a", "b"]}', "ctx is 7, expected a string"),
        ('{"ctx_a": "a", "label": 0, "endings": ["a", "b"]}', "'ctx_b' is missing"),
        (r'{"ctx": "\ud800", "label": 0, "endings": ["a", "b"]}', "surrogates"),
        (b"\xff\xfe", "decode"),
        (json.dumps({"ctx": "a", "label": 0, "endings": ["a", "b " * 200]}), "block_size 128"),
    ],
)
def test_bad_row_is_named(tmp_path, capsys, line, reason):
    """A bad row is an error with its line number, or is skipped with a line if that is allowed."""
    file = tmp_path / "rows.jsonl"
    good = ROWS.read_bytes().splitlines(keepends=True)
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(good[0] + b"\n" + line + b"\n" + good[1])
    with pytest.raises(ValueError, match=f"rows.jsonl line 3: .*{reason}"):
        find_task("hellaswag", data=str(file)).load(BLOCK_SIZE)
    examples = find_task("hellaswag", data=str(file), skip_bad_rows=True).load(BLOCK_SIZE)
    assert [example.record["row"] for example in examples] == [1, 4]
    assert "line 3" in capsys.readouterr().out


def test_damaged_files_are_named(tmp_path):
    """A file that is truncated, has no rows or is of another kind is an error that says so."""
    for name, content, reason in (
        ("cut.jsonl.gz", gzip.compress(ROWS.read_bytes())[:-50], "truncated or damaged"),
        ("empty.jsonl", b"\n", "contains nothing to evaluate on"),
        ("rows.csv", b"a", "rows.csv line 1: not JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            find_task("hellaswag", data=str(tmp_path / name)).load(BLOCK_SIZE)
    with pytest.raises(ValueError, match="needs data"):
        find_task("text").load(BLOCK_SIZE)
    file = tmp_path / "text.txt"
    file.write_text("")
    with pytest.raises(ValueError, match="contains nothing to evaluate on"):
        find_task("text", data=str(file)).load(BLOCK_SIZE)
    with pytest.raises(ValueError, match=f"stride is 1000, expected at most .* {BLOCK_SIZE}"):
        find_task("text", data=str(file), stride=1000).load(BLOCK_SIZE)


@pytest.mark.parametrize("task", ["hellaswag", "lambada"])
def test_rows_of_the_hub(task, monkeypatch, datasets, network):
    """Without a file the rows are those of the hub's validation or test split; without a network
    the error names the flags that avoid it.
    """
    row = json.loads(ROWS.read_text().splitlines()[0]) | {"text": "The last word"}
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda repo, **options: asked.append((repo, options)) or [row, row]
    )
    examples = find_task(task, limit=1).load(BLOCK_SIZE)
    assert [example.record["row"] for example in examples] == [1]
    ((repo, options),) = asked
    expected = {"hellaswag": ("Rowan/hellaswag", "validation"), "lambada": (HUB_LAMBADA, "test")}
    assert (repo, options["split"]) == expected[task]

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ConnectionError, match=rf"{repo}: no network.* data or hellaswag_data"):
        find_task(task).load(BLOCK_SIZE)


class Share(Distributed):
    """A rank that sees only its own share."""

    def all_gather(self, value: object) -> list:
        return [value]


def test_ranks_score_every_example_once(model):
    """The records of all ranks are those of one."""
    task = find_task("hellaswag", data=str(ROWS))
    examples = task.load(BLOCK_SIZE)
    shares = [Share(rank, 3, CPU.device) for rank in range(3)]
    found = [r for dist in shares for b in task.score_examples(model, examples, dist) for r in b]
    expected = score_all(task, model, examples)
    assert sorted(found, key=lambda record: record["row"]) == expected
    assert len(expected) == 20


def test_training_evaluates_a_task_by_name(model, write_rows):
    """Its metrics are those of its records, each under the names of task and metric."""
    lambada = write_rows([{"text": text} for text in LAMBADA])
    for name, data, keys in (
        ("hellaswag", str(ROWS), ["hellaswag_acc", "hellaswag_acc_norm"]),
        ("lambada", lambada, ["lambada_acc", "lambada_perplexity"]),
    ):
        task = find_task(name, data=data)
        examples = task.load(BLOCK_SIZE)
        metrics = task.compute_metrics(score_all(task, model, examples))
        logged = evaluate_task(name, model, examples, CPU)
        assert list(logged) == keys
        assert list(logged.values()) == [metric["value"] for metric in metrics.values()]


def test_unknown_tasks_and_settings_are_named():
    """A name that is no task, or a setting of another one, is an error: no task stands in."""
    with pytest.raises(ValueError, match="task is piqa, expected hellaswag or lambada or text"):
        find_task("piqa")
    with pytest.raises(ValueError, match="stride is not a setting of task lambada; omit --stride"):
        find_task("lambada", stride=3)


def test_perplexity_beyond_floats_is_infinite():
    """A perplexity too large for a float, or of no words at all, is inf."""
    assert perplexity(1e6) == perplexity(1.0, 0) == float("inf")
    assert perplexity(6.0, 3) == pytest.approx(np.exp(2.0))
