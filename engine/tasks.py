"""Evaluation tasks: HellaSwag, LAMBADA and the perplexity of a text. A task turns its data into
requests to score, and the scores into metrics.

To add a task, write a subclass of `Task` and list it in `TASKS`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from engine.distributed import Distributed
from engine.documents import MAX_PIECE_CHARS, SUFFIXES, TextFormat, join_pieces, read_pieces
from engine.files import sha256_text
from engine.rows import convert_rows, find_files, find_row_files, get_text, open_rows
from engine.scoring import Request, Score, encode_request, score
from engine.tokenizer import Tokenizer
from model import GPT

HellaSwagText = Literal["lm-eval", "raw"]
# Remarks about rows. They are printed after "N of M rows".
NO_CTX_PARTS_REMARK = (
    "have no ctx_a or ctx_b; their ctx is cleaned but not capitalized, so results may differ "
    "slightly from those of lm-eval"
)
SPECIAL_TOKENS_REMARK = "contain special tokens; each is encoded as one id, as in lm-eval"
Z_95 = 1.959964  # normal quantile of a 95% interval
MAX_EXPONENT = 709  # math.exp overflows for larger ones


class Example(NamedTuple):
    """A request, what its record in rows.jsonl has before it is scored, and remarks on its row."""

    request: Request
    record: dict
    remarks: tuple[str, ...] = ()


class HubSplit(NamedTuple):
    """A split of a dataset on the hub."""

    repo: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """Base class of the tasks. The fields are flags of hellaswag.py; a subclass may add its own."""

    data: str | None = None  # a file or a hub dataset; None stands for `hub`
    limit: int | None = None  # evaluate only the first rows or documents
    sample: int | None = None  # evaluate only so many random ones
    skip_bad_rows: bool | None = None  # None if the command has no such flag

    name: ClassVar[str]
    unit: ClassVar[str] = "rows"  # what a record stands for
    hub: ClassVar[HubSplit] = HubSplit("", None, "")  # the task's own dataset, if it has one

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        """Convert a row. Raises ValueError or KeyError if the row is not valid."""
        raise NotImplementedError

    def make_record(self, example: Example, scores: list[Score]) -> dict:
        """Return the example's line of rows.jsonl."""
        return {**example.record, "log_probs": [score.log_prob for score in scores]}

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        """Return each metric's value, its 95% interval if rows are independent, and its meaning."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """The file or hub dataset that the rows come from."""
        if source := self.data or self.hub.repo:
            return source
        raise ValueError(f"task {self.name} needs data; name the file to evaluate on with --data")

    def find_files(self) -> list[Path]:
        """Return the local files that the rows come from, [] if they come from the hub."""
        return find_row_files(self.source, self.hub.split)

    def load(self, tokenizer: Tokenizer, block_size: int) -> list[Example]:
        """Return all examples. Raises ValueError at the first bad row. With
        `skip_bad_rows`, print and skip bad rows instead.
        """
        numbered = self.read_examples(tokenizer, block_size)
        examples = [e._replace(record={"row": n, **e.record}) for n, e in numbered]
        if not examples:
            raise ValueError(f"{self.source} contains nothing to evaluate on")
        for remark, n in Counter(remark for e in examples for remark in e.remarks).items():
            print(f"{n} of {len(examples)} {self.unit} {remark}")
        return examples

    def read_examples(self, tokenizer: Tokenizer, block_size: int) -> Iterator[tuple[int, Example]]:
        """Yield the number of each row, and the row as an example."""

        def convert(row: dict) -> Example:
            example = self.make_example(row, tokenizer)
            longest = max(map(len, example.request.continuations))
            if longest > block_size:
                raise ValueError(f"{longest} tokens to predict exceed block_size {block_size}")
            text = json.dumps(row, ensure_ascii=False)
            text.encode()  # lone surrogates raise UnicodeEncodeError, a ValueError
            if tokenizer.special_pattern.search(text):
                example = example._replace(remarks=(*example.remarks, SPECIAL_TOKENS_REMARK))
            return example

        rows = open_rows(self.source, self.hub.config, self.hub.split)
        return convert_rows(self.choose(rows), convert, self.skip_bad_rows)

    def choose(self, items: Iterable) -> list:
        """Return the first `limit` rows or documents, or a random `sample`, in order. It depends
        only on their number, so all models get the same ones.
        """
        items = list(islice(items, self.limit))
        shuffled = sorted(range(len(items)), key=lambda i: sha256_text(str(i)))
        return [items[i] for i in sorted(shuffled[: self.sample])]

    def score_examples(
        self, model: GPT, examples: list[Example], dist: Distributed, done: Container[int] = ()
    ) -> Iterator[list[dict]]:
        """Score the examples, and yield their records a batch at a time. The batches are split over
        the ranks. Each list has the records of one batch from every rank, and all ranks get the
        same list, so all ranks must call this. A batch is skipped if the indices of all its
        examples are in `done`.
        """
        for batch in score(model, [e.request for e in examples], dist, done):
            mine = [self.make_record(examples[i], scores) for i, scores in batch]
            yield [record for records in dist.all_gather(mine) for record in records]


@dataclass(frozen=True)
class HellaSwag(Task):
    """Choose the most likely of several endings.

    With `text` "lm-eval", texts are cleaned and scores are normalized by characters, as in lm-eval.
    With "raw", texts are left as they are and scores are normalized by tokens, as in build-nanogpt.
    """

    text: HellaSwagText = "lm-eval"

    name = "hellaswag"
    hub = HubSplit("Rowan/hellaswag", None, "validation")

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        """Convert a row of the HellaSwag dataset, or one with only ctx, endings and label."""
        endings, label = row["endings"], row["label"]
        is_list = isinstance(endings, list) and all(isinstance(ending, str) for ending in endings)
        if not is_list or len(endings) < 2:
            raise ValueError(f"endings is {endings!r}, expected a list of at least two strings")
        if str(label) not in map(str, range(len(endings))):  # an int, or an int as a string
            raise ValueError(f"label is {label!r}, expected 0 to {len(endings) - 1}")
        if self.text == "raw":
            context = tokenizer.encode(get_text(row, "ctx")) or [tokenizer.start_of_text]
            request = Request(context, [tokenizer.encode(" " + ending) for ending in endings])
            record = {"label": int(label), "lengths": list(map(len, request.continuations))}
            return Example(request, record)
        if has_parts := "ctx_a" in row:
            query = f"{get_text(row, 'ctx_a')} {get_text(row, 'ctx_b').capitalize()}"
        else:
            query = get_text(row, "ctx")
        if "activity_label" in row:
            query = f"{get_text(row, 'activity_label')}: {query}"
        endings = [clean(ending) for ending in endings]
        request = encode_request(tokenizer, clean(query), [" " + ending for ending in endings])
        record = {"label": int(label), "lengths": list(map(len, endings))}
        return Example(request, record, () if has_parts else (NO_CTX_PARTS_REMARK,))

    def make_record(self, example: Example, scores: list[Score]) -> dict:
        record = super().make_record(example, scores)
        record["pred"], record["pred_norm"] = predict(record["log_probs"], record["lengths"])
        return record

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        hits = [r["pred"] == r["label"] for r in records]
        hits_norm = [r["pred_norm"] == r["label"] for r in records]
        if self.text == "raw":
            return {
                "acc_raw": accuracy("build-nanogpt's acc: raw text, sum over tokens", hits),
                "acc_token_norm": accuracy("build-nanogpt's acc_norm: mean over tokens", hits_norm),
            }
        return {
            "acc": accuracy("lm-eval's acc: cleaned text, sum over tokens", hits),
            "acc_norm": accuracy("lm-eval's acc_norm: mean over characters", hits_norm),
        }


def clean(text: str) -> str:
    """Clean HellaSwag text like lm-eval's `preprocess`: strip, then drop tags such as [header]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def predict(log_probs: list[float], lengths: list[int]) -> tuple[int, int]:
    """Return the index of the most likely ending, without and with normalization by length. Ties go
    to the first. For an ending of length 0 we divide by 0, as lm-eval does, and get -inf.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        normalized = np.array(log_probs) / np.array(lengths)
    return int(np.argmax(log_probs)), int(np.argmax(normalized))


@dataclass(frozen=True)
class Lambada(Task):
    """Predict the last word, after the last space, as lambada_openai in lm-eval does."""

    name = "lambada"
    hub = HubSplit("EleutherAI/lambada_openai", "default", "test")

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        context, _, word = get_text(row, "text").rpartition(" ")
        return Example(encode_request(tokenizer, context, [" " + word]), {})

    def make_record(self, example: Example, scores: list[Score]) -> dict:
        return super().make_record(example, scores) | {"greedy": scores[0].greedy}

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        nats = [-record["log_probs"][0] for record in records]
        greedy = [record["greedy"] for record in records]
        value, low, high = map(perplexity, mean_interval(nats))
        meaning = "lm-eval's perplexity of the last word"
        return {
            "acc": accuracy("lm-eval's acc: greedy decoding gives the last word", greedy),
            "perplexity": make_metric(meaning, value, (low, high)),
        }


@dataclass(frozen=True)
class TextPerplexity(Task):
    """Predict every token of the documents in text files, in windows that advance by `stride`
    tokens. With None they advance by the model's block_size, so that they do not overlap.
    """

    stride: int | None = None

    name, unit = "perplexity", "windows"

    def find_files(self) -> list[Path]:
        return find_files([self.source], SUFFIXES)

    def read_examples(self, tokenizer: Tokenizer, block_size: int) -> Iterator[tuple[int, Example]]:
        """Yield an example for each window. The record of a document's first window also holds the
        number of words and bytes of the document, counted as in lm-eval. lm-eval counts one
        word for an empty document, which has no windows, so the first record includes its word.
        """
        stride = self.stride or block_size
        if stride > block_size:
            raise ValueError(f"stride is {stride}, expected at most block_size {block_size}")
        n_examples = 0
        documents = self.choose(enumerate(self.read_documents(), start=1))
        n_empty = sum(not text for _, text in documents)
        for document, text in documents:
            sizes = {"words": len(re.split(r"\s+", text)) + n_empty, "bytes": len(text.encode())}
            remarks = (SPECIAL_TOKENS_REMARK,) if tokenizer.special_pattern.search(text) else ()
            ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
            for request in split_into_windows(ids, block_size, stride):
                n_examples += 1
                record = {"document": document, "tokens": len(request.continuations[0])}
                yield n_examples, Example(request, record | sizes, remarks)
                sizes, remarks, n_empty = {}, (), 0  # for the document's other windows

    def read_documents(self) -> list[str]:
        """Return all documents. Raises ValueError if rows are bad or a file is damaged. With
        `skip_bad_rows`, leave these parts out instead.
        """
        problems: Counter = Counter()
        documents = []
        for file in self.find_files():
            documents += join_pieces(read_pieces(file, TextFormat(), problems, MAX_PIECE_CHARS))
        if problems and not self.skip_bad_rows:
            counts = ", ".join(f"{n} {problem}" for problem, n in problems.items())
            raise ValueError(f"{self.source} has {counts}; repair it, or set skip_bad_rows")
        return documents

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        nats = math.fsum(-record["log_probs"][0] for record in records)
        units = ("tokens", "words", "bytes")
        tokens, words, n_bytes = (sum(r.get(unit, 0) for r in records) for unit in units)
        bits_per_byte = nats / max(1, n_bytes) / math.log(2)
        n = len({record["document"] for record in records})
        size = f"{tokens:,} tokens, {n:,} document{'s' * (n > 1)}"
        return {
            "token_perplexity": make_metric(size, perplexity(nats, tokens)),
            "word_perplexity": make_metric(f"{words:,} words", perplexity(nats, words)),
            "bits_per_byte": make_metric(f"{n_bytes:,} bytes", bits_per_byte),
        }


def split_into_windows(tokens: list[int], block_size: int, stride: int) -> Iterator[Request]:
    """Yield requests that together predict every token but the first exactly once, like lm-eval's
    rolling windows. The first request predicts up to `block_size` tokens. Every later one predicts
    up to `stride` tokens, after as much context as fits. With block_size 4 and stride 2:

        token      0 1 2 3 4 5 6 7 8
        request 1  c p p p p            c: context, p: predicted
        request 2      c c c p p
        request 3          c c c p p
    """
    start = 1
    while start < len(tokens):
        end = min(start + (block_size if start == 1 else stride), len(tokens))
        yield Request(tokens[max(0, end - 1 - block_size) : start], [tokens[start:end]])
        start = end


TASKS = {task.name: task for task in (HellaSwag, Lambada, TextPerplexity)}


def make_task(name: str, **settings: Any) -> Task:
    """Return the task with these settings. Raises ValueError if there is no such task, or if it has
    no such setting.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name}, expected {' or '.join(TASKS)}")
    if unknown := settings.keys() - {f.name for f in fields(TASKS[name])}:
        setting = min(unknown)
        raise ValueError(f"{setting} is not a setting of task {name}; omit --{setting}")
    return TASKS[name](**settings)


def make_metric(meaning: str, value: float, interval: tuple | None = None) -> dict[str, Any]:
    """Return a metric as it is stored in results.json. `interval` is its 95% interval, if known."""
    low_high = {"low": interval[0], "high": interval[1]} if interval else {}
    return {"value": value, **low_high, "meaning": meaning}


def accuracy(meaning: str, correct: list[bool]) -> dict[str, Any]:
    """Return the fraction of correct answers, with its 95% interval, as a metric."""
    n, n_correct = len(correct), sum(correct)
    return make_metric(meaning, n_correct / n, wilson_interval(n_correct, n))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and its 95% interval by the normal approximation."""
    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / max(1, n - 1)
    half = Z_95 * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95% interval for a proportion."""
    p, z2 = correct / n, Z_95**2
    center = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)


def perplexity(nats: float, n: int = 1) -> float:
    """Return exp(nats / n), the perplexity of n tokens or words; inf if it overflows a float."""
    return math.exp(nats / n) if nats < MAX_EXPONENT * n else math.inf
