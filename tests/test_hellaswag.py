"""The scorer against lm-eval, run as a library, and transformers; and the command around it."""

import gzip
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs
from scipy.stats import binomtest
from test_commands import ROOT, run
from test_distributed import TORCHRUN
from transformers import GPT2LMHeadModel

from checkpoint import load_model, read_metrics
from hellaswag import EvalConfig, main, wilson
from lora import convert_linear_layer_to_lora, merge_lora, save_adapter
from model import GPT, GPTConfig
from plot import plot_runs
from scoring import Request, collate, encode, grow_tree, plan_batches, plant, score
from tasks import Example, count_hits, load_examples, predictions, windows
from tokenizer import get_tokenizer, save_tokenizer

CPU = torch.device("cpu")
BLOCK_SIZE = 128
ROWS = Path(__file__).parent / "hellaswag_rows.jsonl"
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
    """What lm-eval itself says of each row of a local file, by its own task, without a network."""
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


def scores_of(model: GPT, examples: list[Example]) -> list[tuple[list[float], list[bool]]]:
    found = dict(
        pair for batch in score(model, [e.request for e in examples], CPU) for pair in batch
    )
    return [tuple(map(list, zip(*found[i], strict=True))) for i in range(len(examples))]


def assert_same_as_lm_eval(folder: Path, model: GPT, data: str) -> None:
    """Every log-probability within 1e-4, and every prediction of both metrics the same. (lm-eval
    adds in fp32, whose last digit is worth more than that beyond 1000 nats.)
    """
    samples = lm_eval_samples(folder, "hellaswag", data)
    examples = load_examples("hellaswag", data, BLOCK_SIZE)
    assert len(samples) == len(examples) > 0
    for sample, example, (log_probs, _) in zip(
        samples, examples, scores_of(model, examples), strict=True
    ):
        theirs = np.array([response[0] for response in sample["filtered_resps"]])
        np.testing.assert_allclose(log_probs, theirs, atol=1e-4, rtol=2e-7)
        lengths = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert example.facts["lengths"] == lengths.tolist()
        with np.errstate(divide="ignore"):
            expected = int(np.argmax(theirs)), int(np.argmax(theirs / lengths))
        assert predictions(log_probs, example.facts["lengths"]) == expected
        hits = [prediction == example.facts["label"] for prediction in expected]
        assert hits == [sample["acc"], sample["acc_norm"]]


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
    row(),  # lm-eval itself wants no empty choice in the first
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
    row(ctx_a="It goes on. " * 60),  # longer than the window: cut on the left
    row(ctx_a="word " * 117, endings=["a", "b c d e f g h i", "c d e", "d"], label=3),  # some are
    row(ctx_a="tied " * 200, endings=["goes on", "is cut", "goes on", "is cut"], label=2),
    row(endings=["long " * 126, "short", "long " * 127, "long " * 60]),
    row(endings=["one", "two"], label=1),
    row(endings=list("abcdefg"), label=6),
    row(ctx_b="don't 's", endings=["'s late", "'ll go", " 't", "n't"], label=3),
    row(ctx_a="Numbers 1234567 3.14e-10", ctx_b="12", endings=["34", "5 6", "007", "x2"]),
]


def test_agrees_with_lm_eval_on_adversarial_rows(folder, model, write_rows):
    """So it does on empty, blank, tied, nested, cut and foreign texts."""
    assert_same_as_lm_eval(folder, model, write_rows(ADVERSARIAL))


@pytest.mark.slow
def test_agrees_with_lm_eval_on_real_rows(folder, model, write_rows, shared_data):
    """And on 400 real rows. Where the split of ctx is not known it is made at the last sentence."""
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
    """build-nanogpt's way, as published: four padded rows, loss over the endings' tokens."""
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
    """With --text raw the predictions are those of four padded rows through transformers."""
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    examples = load_examples("hellaswag", str(ROWS), BLOCK_SIZE, text="raw")
    for found, example, (log_probs, _) in zip(
        rows, examples, scores_of(model, examples), strict=True
    ):
        ours = predictions(log_probs, example.facts["lengths"])
        assert ours == build_nanogpt(theirs, found)


def test_tree_shows_each_token_its_own_past():
    """In a tree a token sees the context and its own continuation's beginning, at the positions
    that these have in a text of their own; each common beginning is there once.
    """
    context, continuations = [9, 8], [[1, 2, 3], [1, 2], [4], [1, 5, 6, 7], [1, 2]]
    tree = grow_tree(context, continuations)
    seen = [
        [tree.tokens[j] for j in range(i + 1) if i < tree.ends[j]] for i in range(len(tree.tokens))
    ]
    assert sorted(seen) == [[9], [9, 8], [9, 8, 1], [9, 8, 1, 2], [9, 8, 1, 5], [9, 8, 1, 5, 6]]
    assert [len(past) - 1 for past in seen] == tree.positions
    for ids, members in zip(continuations, tree.members, strict=True):
        assert [tree.targets[p] for p in members] == ids
        pasts = [seen[tree.parents[p]] for p in members]
        assert pasts == [context + ids[:i] for i in range(len(ids))]
    assert tree.members[1] == tree.members[4]
    assert len(set(zip(tree.parents, tree.targets, strict=True))) == len(tree.targets)


def random_requests(n: int) -> list[Request]:
    rng = np.random.default_rng(0)

    def ids(high: int) -> list[int]:
        return rng.integers(0, 50, rng.integers(1, high)).tolist()

    return [Request(ids(BLOCK_SIZE), [ids(40) for _ in range(4)]) for _ in range(n)]


@torch.no_grad()
def test_scores_equal_transformers_one_by_one(folder, model):
    """Packed or cut on the left, a continuation has the log-probability and the greediness that it
    has alone in transformers.
    """
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    requests = random_requests(12)
    likeliest = theirs(torch.tensor([requests[0].context])).logits[0, -1].argmax().item()
    requests[0].continuations[2:] = [[likeliest], [likeliest, 7]]  # all and some likeliest
    greedy = []
    for batch in score(model, requests, CPU):
        for i, scores in batch:
            for ids, found in zip(requests[i].continuations, scores, strict=True):
                text = (list(requests[i].context) + ids)[-BLOCK_SIZE - 1 :]
                logits = theirs(torch.tensor([text[:-1]])).logits[0, -len(ids) :]
                expected = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
                assert found.log_prob == pytest.approx(expected, abs=1e-4)
                assert found.greedy == (logits.argmax(-1).tolist() == ids)
                greedy.append(found.greedy)
    assert len(greedy) == 48
    assert sum(greedy) == 1


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_batches(model, world_size, monkeypatch):
    """Over ranks each request is scored once, to the same numbers, and every rank calls the model
    equally often.
    """
    requests = random_requests(10)
    calls = []
    original = GPT.log_probs
    monkeypatch.setattr(GPT, "log_probs", lambda *args: (calls.append(rank), original(*args))[1])
    rank = 0
    single = [pair for batch in score(model, requests, CPU) for pair in batch]
    calls.clear()
    shared = []
    for rank in range(world_size):
        shared += [p for batch in score(model, requests, CPU, rank, world_size) for p in batch]
    assert sorted(shared) == sorted(single)
    assert len(shared) == 10
    assert len({calls.count(r) for r in range(world_size)}) == 1


def test_batches_fit_and_are_sorted():
    """Batches hold each request once, the longest first, and no more tokens than asked for unless
    it is a single one.
    """
    requests = random_requests(200)
    batches = plan_batches(requests, BLOCK_SIZE, batch_tokens=1000, multiple=16)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    lengths = []
    for batch in batches:
        trees = [tree for i in batch for _, tree in plant(requests[i], BLOCK_SIZE)]
        idx = collate(trees, 16)[0]
        assert len(batch) == 1 or idx.size <= 1000
        lengths.append(idx.shape[1])
    assert lengths[0] > 2 * lengths[-1]
    # Lengths are planned before common beginnings are joined, which random texts have few of.
    assert all(a >= b - 16 for a, b in itertools.pairwise(lengths))


def test_padding_changes_nothing(model, monkeypatch):
    """Rows padded to a multiple, as on an accelerator, have the scores of rows as they are."""
    requests = random_requests(6)
    plain = sorted(pair for batch in score(model, requests, CPU) for pair in batch)
    monkeypatch.setattr("scoring.LENGTH_MULTIPLE", {"cpu": 32})
    monkeypatch.setattr("scoring.BATCH_TOKENS", {"cpu": 4096})
    padded = sorted(pair for batch in score(model, requests, CPU) for pair in batch)
    for (i, scores), (j, same) in zip(plain, padded, strict=True):
        assert i == j
        assert [s.log_prob for s in scores] == pytest.approx([s.log_prob for s in same], abs=1e-4)


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
    """The last word's log-probability, and whether it is the likeliest, are lm-eval's."""
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.tensor([encode("Now the next word is")])
    with torch.no_grad():  # a text whose last word is what the model itself would say
        order = theirs(idx).logits[0, -1].argsort(descending=True).tolist()
    likeliest = get_tokenizer().decode([order[0]])
    rows = [{"text": text} for text in [*LAMBADA, "Now the next word is" + likeliest]]
    data = write_rows(rows)
    samples = lm_eval_samples(folder, "lambada_openai", data)
    examples = load_examples("lambada", data, BLOCK_SIZE)
    for sample, (log_probs, greedy) in zip(samples, scores_of(model, examples), strict=True):
        assert log_probs == pytest.approx([sample["perplexity"]], abs=1e-4)
        assert greedy == [sample["acc"]]


TEXT = ROWS.read_text()[:3000] + "“Naïve café” — 日本語 😀\n\n"


@pytest.mark.parametrize("stride", [None, 50])
def test_perplexity_is_transformers(folder, tmp_path, stride):
    """Token and word perplexity and bits per byte are those of windows that slide through
    transformers' model, where each token of the text is predicted once.
    """
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    config = EvalConfig(
        str(folder), task="text", data=str(file), stride=stride, out_dir=str(tmp_path / "out")
    )
    main(config)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
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


def test_perplexity_is_lm_evals_rolling_likelihood(folder, model):
    """Without --stride the windows are those of lm-eval's loglikelihood_rolling, whatever the
    length of the text.
    """
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    for text in ("a", TEXT[:300], TEXT[:900], TEXT):
        (theirs,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        requests = list(windows(encode(text), BLOCK_SIZE, BLOCK_SIZE))
        assert sum(len(r.continuations[0]) for r in requests) == len(encode(text))
        ours = sum(s[0].log_prob for batch in score(model, requests, CPU) for _, s in batch)
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_perplexity_of_documents(folder, tmp_path, capsys):
    """Each document of a file starts anew; a bad row stops, unless it may be left out."""
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
    """Where there are more nats in a word than a float can raise e to, its perplexity is inf."""
    file = tmp_path / "word.txt"
    file.write_text("qzx" * 500)
    main(EvalConfig(str(folder), task="text", data=str(file)))
    assert re.search(r"word_perplexity +inf", capsys.readouterr().out)


def test_adapter_is_measured(folder, tmp_path):
    """With --lora_load_path the adapter takes part, without its dropout."""
    adapted = GPT.from_pretrained(folder)
    convert_linear_layer_to_lora(adapted, lora_dim=2, lora_dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if name.endswith("lora_B"):
                param.normal_()
    save_adapter(adapted, tmp_path / "adapter")
    out = tmp_path / "out"
    main(EvalConfig(str(folder), str(tmp_path / "adapter"), data=str(ROWS), out_dir=str(out)))
    examples = load_examples("hellaswag", str(ROWS), BLOCK_SIZE)
    expected = scores_of(merge_lora(adapted), examples)
    plain = scores_of(GPT.from_pretrained(folder), examples)
    for found, (log_probs, _), (others, _) in zip(lines(out), expected, plain, strict=True):
        assert found["log_probs"] == pytest.approx(log_probs, abs=1e-3)
        assert found["log_probs"] != pytest.approx(others, abs=1)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["row"])


def test_results_are_the_counts(folder, model, tmp_path, capsys):
    """The command prints and writes the shares of right predictions; gzip and plain files give the
    same, and ctx alone is said not to be quite lm-eval's text.
    """
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(ROWS.read_bytes()))
    config = EvalConfig(str(folder), data=str(packed), out_dir=str(tmp_path / "out"))
    main(config)
    found, rows = results(tmp_path / "out"), lines(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(1, 21))
    hits, hits_norm, n = count_hits(model, load_examples("hellaswag", str(ROWS), BLOCK_SIZE), CPU)
    assert (hits, hits_norm) == tuple(
        sum(row[key] == row["label"] for row in rows) for key in ("pred", "pred_norm")
    )
    assert (found["acc"]["value"], found["acc_norm"]["value"]) == (hits / n, hits_norm / n)
    assert f"acc_norm         {hits_norm / n:.4f}" in capsys.readouterr().out
    short = [{k: json.loads(line)[k] for k in ("ctx", "endings", "label")} for line in ROWS.open()]
    plain = tmp_path / "short.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in short))
    main(replace(config, data=str(plain), out_dir=None, limit=7))
    assert "7 of 7 rows have no ctx_a" in capsys.readouterr().out


def test_interval_is_wilsons():
    """The interval of an accuracy is scipy's Wilson interval."""
    for hits, n in ((0, 7), (3, 10), (3127, 10_042), (20, 20)):
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_killed_evaluation_goes_on(folder, tmp_path, monkeypatch):
    """What a killed evaluation has written is kept, the rest is computed, and all is as if nothing
    had happened.
    """
    monkeypatch.setattr("scoring.BATCH_TOKENS", {"cpu": 200})
    config = EvalConfig(str(folder), data=str(ROWS), out_dir=str(tmp_path / "whole"))
    main(config)
    n_calls, original, killed = 0, GPT.log_probs, replace(config, out_dir=str(tmp_path / "killed"))

    def log_probs(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(GPT, "log_probs", log_probs)
    with pytest.raises(KeyboardInterrupt):
        main(killed)
    file = tmp_path / "killed" / "rows.jsonl"
    written = file.read_text().splitlines(keepends=True)
    assert 3 <= len(written) < 20
    file.write_text("".join(written)[:-9])  # and the last line is cut short
    main(killed)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert len(file.read_text().splitlines()) == 20
    strip = [{**results(tmp_path / name), "config": 0} for name in ("whole", "killed")]
    assert strip[0] == strip[1]
    n_calls = 10
    main(killed)  # nothing is left to compute
    assert n_calls == 10


def test_results_of_something_else_are_not_mixed(folder, model, tmp_path, write_rows):
    """A folder with results of another model, other data or options is refused and untouched."""
    config = EvalConfig(str(folder), data=str(ROWS), out_dir=str(tmp_path / "out"))
    main(config)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    other = GPT.from_pretrained(folder)
    other.transformer.wpe.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    for changed, name in (
        ({"model": str(tmp_path / "other")}, "weights"),
        ({"data": write_rows([row()])}, "data"),
        ({"text": "raw"}, "text"),
        ({"limit": 3}, "limit"),
        ({"precision": "bf16"}, "precision"),
    ):
        with pytest.raises(ValueError, match=f"other {name}"):
            main(replace(config, **changed))
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"ctx": "a"', "Expecting"),
        ("[1, 2]", "is no row"),
        ('{"ctx": "a", "label": 0}', "lacks 'endings'"),
        ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label is 4"),
        ('{"ctx": "a", "label": "", "endings": ["a", "b", "c", "d"]}', "invalid literal"),
        ('{"ctx": "a", "label": 1.5, "endings": ["a", "b", "c", "d"]}', "invalid literal"),
        ('{"ctx": "a", "label": 0, "endings": ["a"]}', "two strings or more"),
        ('{"ctx": "a", "label": 0, "endings": ["a", null]}', "None where a string"),
        ('{"ctx": 7, "label": 0, "endings": ["a", "b"]}', "7 where a string"),
        ('{"ctx_a": "a", "label": 0, "endings": ["a", "b"]}', "lacks 'ctx_b'"),
        (r'{"ctx": "\ud800", "label": 0, "endings": ["a", "b"]}', "surrogates"),
        (b"\xff\xfe", "decode"),
        (json.dumps({"ctx": "a", "label": 0, "endings": ["a", "b " * 200]}), "window is 128"),
    ],
)
def test_broken_row_is_named(tmp_path, capsys, line, reason):
    """A broken row stops with its line number, or is left out where that is asked for."""
    file = tmp_path / "rows.jsonl"
    good = ROWS.read_bytes().splitlines(keepends=True)
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(good[0] + b"\n" + line + b"\n" + good[1])
    with pytest.raises(ValueError, match=f"rows.jsonl line 3: .*{reason}"):
        load_examples("hellaswag", str(file), BLOCK_SIZE)
    examples = load_examples("hellaswag", str(file), BLOCK_SIZE, skip_bad_rows=True)
    assert [example.facts["row"] for example in examples] == [1, 4]
    assert "line 3" in capsys.readouterr().out


def test_damaged_input_is_told(folder, tmp_path):
    """Files that are cut short, empty or of another kind, and a model that computes no numbers, end
    in a line that says so.
    """
    for name, content, reason in (
        ("cut.jsonl.gz", gzip.compress(ROWS.read_bytes())[:-50], "truncated or damaged"),
        ("empty.jsonl", b"\n", "holds no usable row"),
        ("rows.csv", b"a", "neither .jsonl nor"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load_examples("hellaswag", str(tmp_path / name), BLOCK_SIZE)
    with pytest.raises(ValueError, match="needs --data"):
        main(EvalConfig(str(folder), task="text"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        main(EvalConfig(str(folder), task="text", data=str(tmp_path / "empty.txt")))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match=f"stride is 1000, expected up to {BLOCK_SIZE}"):
        main(EvalConfig(str(folder), task="text", data=str(tmp_path / "text.txt"), stride=1000))
    for wrong in ({"stride": 5}, {"task": "lambada", "text": "raw"}, {"limit": 0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            EvalConfig(**wrong)
    broken = GPT.from_pretrained(folder)
    broken.transformer.wpe.weight.data[3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="the model is damaged"):
        main(EvalConfig(str(tmp_path / "broken"), data=str(ROWS)))


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
def test_training_measures_hellaswag_on_all_ranks(tmp_path):
    """With --hellaswag_every training logs what the command finds of its checkpoint, sharded over
    two ranks (FSDP) as on one device with a compiled step, and draws it.
    """
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    (tmp_path / "tiny.yaml").write_text(TRAINING + f"hellaswag_data: {ROWS}\n")
    assert (
        run("fineweb.py", "--dataset", "text.txt", "--val_tokens", 600, cwd=tmp_path).returncode
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
    hits, hits_norm, n = count_hits(model, load_examples("hellaswag", str(ROWS), 32), CPU)
    for log in logs:
        assert log[4]["hellaswag_acc"] == hits / n
        assert log[4]["hellaswag_acc_norm"] == hits_norm / n


def test_plot_has_hellaswag_below(tmp_path, monkeypatch):
    """A run that measured HellaSwag gets a second pair of axes, with the quoted figures under what
    they are; another one does not.
    """
    drawn = []
    monkeypatch.setattr("plot.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    (tmp_path / "config.yaml").write_text("data_dir: none\n")
    record = {"step": 1, "tokens": 10, "train_loss": 3.0, "val_loss": 3.0}
    for extra in ({}, {"hellaswag_acc_norm": 0.25, "hellaswag_acc": 0.25}):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record | extra) + "\n")
        plot_runs([tmp_path], tmp_path / "loss.png")
    assert [len(figure.axes) for figure in drawn] == [1, 2]
    labels = " ".join(text.get_text() for text in drawn[1].axes[1].get_legend().get_texts())
    for expected in (
        "acc_norm 0.2500",
        "acc_norm 0.3114",
        "0.2955",
        "GPT-3 Small, token-normalised",
    ):
        assert expected in labels
