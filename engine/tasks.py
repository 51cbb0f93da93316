"""HellaSwag, LAMBADA and the perplexity of a text: what they ask a model, and their metrics.

To add a task: write a subclass of `Task` and list it in `TASKS`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from engine.distributed import Distributed
from engine.documents import MAX_PIECE_CHARS, TextFormat, find_files, read_pieces
from engine.rows import convert_rows, get_text, open_rows
from engine.scoring import Request, Score, encode_request, score
from engine.tokenizer import Tokenizer
from model import GPT

HellaSwagText = Literal["lm-eval", "raw"]
UNJOINED = (
    "have no ctx_a or ctx_b; their ctx is cleaned but not capitalized, so results differ slightly "
    "from lm-eval's"
)
HAS_SPECIAL_TOKENS = "contain special tokens; each is encoded as one id, as in lm-eval"
Z_95 = 1.959964  # normal quantile of a 95% interval
MAX_EXPONENT = 709  # e to a higher power overflows a float


class Example(NamedTuple):
    """A request, the first fields of its record in rows.jsonl, and what to report of its row."""

    request: Request
    record: dict
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a task asks a model, and its metrics. Its fields are settings of the command; a subclass
    may add its own.
    """

    data: str | None = None  # None: the rows of the hub
    limit: int | None = None  # evaluate only the first rows or documents
    skip_bad_rows: bool | None = None  # None: the command has no such flag

    name: ClassVar[str]
    hub: ClassVar[tuple[str, str | None, str]] = ("", None, "")  # repository, configuration, split

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        """The example of a row; ValueError or KeyError if the row is not valid."""
        raise NotImplementedError

    def make_record(self, example: Example, scores: list[Score]) -> dict:
        """The example's line of rows.jsonl."""
        return {**example.record, "log_probs": [score.log_prob for score in scores]}

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        """Each metric's value and meaning, and its 95% interval where rows are independent."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Where the rows come from: a file, or a name of the hub."""
        if source := self.data or self.hub[0]:
            return source
        raise ValueError(f"task {self.name} needs data, the text or rows to evaluate on")

    def find_files(self) -> list[Path]:
        """The files of the rows, if they are not from the hub."""
        return [Path(self.source)] if Path(self.source).exists() else []

    def load(self, tokenizer: Tokenizer, block_size: int) -> list[Example]:
        """The examples. ValueError names the first bad row; `skip_bad_rows` prints and skips them
        instead.
        """
        found = self.read_examples(tokenizer, block_size)
        examples = [e._replace(record={"row": n, **e.record}) for n, e in found]
        if not examples:
            raise ValueError(f"{self.source} contains nothing to evaluate on")
        for remark, n in Counter(remark for e in examples for remark in e.remarks).items():
            print(f"{n} of {len(examples)} rows {remark}")
        return examples

    def read_examples(self, tokenizer: Tokenizer, block_size: int) -> Iterator[tuple[int, Example]]:
        """The examples, with the numbers of their rows."""

        def convert(row: dict) -> Example:
            example = self.make_example(row, tokenizer)
            longest = max(map(len, example.request.continuations))
            if longest > block_size:
                raise ValueError(f"{longest} tokens to predict exceed block_size {block_size}")
            text = json.dumps(row, ensure_ascii=False)
            text.encode()  # UnicodeEncodeError, a ValueError, for lone surrogates
            found = tokenizer.special_pattern.search(text)
            return (
                example._replace(remarks=(*example.remarks, HAS_SPECIAL_TOKENS))
                if found
                else example
            )

        rows = open_rows(self.source, *self.hub[1:])
        return convert_rows(self.source, islice(rows, self.limit), convert, self.skip_bad_rows)

    def score_examples(
        self, model: GPT, examples: list[Example], dist: Distributed, done: Container[int] = ()
    ) -> Iterator[list[dict]]:
        """Yield the records of the examples, which the ranks share out, a batch of every rank at a
        time. Batches whose examples are all `done`, by index, are skipped. All ranks must call it.
        """
        for batch in score(model, [e.request for e in examples], dist, done):
            mine = [self.make_record(examples[i], scores) for i, scores in batch]
            yield [record for records in dist.all_gather(mine) for record in records]


@dataclass(frozen=True)
class HellaSwag(Task):
    """The most likely of several endings. `text` is cleaned as in lm-eval, or raw as in
    build-nanogpt; it decides whether `lengths`, for normalization, are characters or tokens.
    """

    text: HellaSwagText = "lm-eval"

    name = "hellaswag"
    hub = ("Rowan/hellaswag", None, "validation")

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        """From an original row, or from one with only ctx, endings and label."""
        endings, label = row["endings"], row["label"]
        is_list = isinstance(endings, list) and all(isinstance(ending, str) for ending in endings)
        if not is_list or len(endings) < 2:
            raise ValueError(f"endings is {endings!r}, expected a list of at least two strings")
        if str(label) not in map(str, range(len(endings))):  # a number, or a string of one
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
        return Example(request, record, () if has_parts else (UNJOINED,))

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
            "acc_norm": accuracy("lm-eval's acc_norm: divided by characters", hits_norm),
        }


def clean(text: str) -> str:
    """lm-eval's `preprocess` of HellaSwag: strip, then remove tags such as [header]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def predict(log_probs: list[float], lengths: list[int]) -> tuple[int, int]:
    """The most likely ending, without and with normalization by length; ties go to the first. An
    ending of length 0 has normalized log-probability -inf (lm-eval divides by 0).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(log_probs)), int(np.argmax(np.array(log_probs) / np.array(lengths)))


@dataclass(frozen=True)
class Lambada(Task):
    """lm-eval's lambada_openai: the last word, which follows the last space."""

    name = "lambada"
    hub = ("EleutherAI/lambada_openai", "default", "test")

    def make_example(self, row: dict, tokenizer: Tokenizer) -> Example:
        context, _, word = get_text(row, "text").rpartition(" ")
        return Example(encode_request(tokenizer, context, [" " + word]), {})

    def make_record(self, example: Example, scores: list[Score]) -> dict:
        return super().make_record(example, scores) | {"greedy": scores[0].greedy}

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        nats = [-record["log_probs"][0] for record in records]
        n, mean = len(nats), math.fsum(nats) / len(nats)
        variance = math.fsum((x - mean) ** 2 for x in nats) / max(1, n - 1)
        half = Z_95 * math.sqrt(variance / n)
        perplexities = [perplexity(nats) for nats in (mean, mean - half, mean + half)]
        return {
            "acc": accuracy("lm-eval's acc: last word most likely", [r["greedy"] for r in records]),
            "perplexity": metric("lm-eval's perplexity of the last word", *perplexities),
        }


@dataclass(frozen=True)
class TextPerplexity(Task):
    """The perplexity of the documents of text files. Windows advance by `stride` tokens (None: the
    model's block_size, so that they do not overlap).
    """

    stride: int | None = None

    name = "text"

    def find_files(self) -> list[Path]:
        return find_files([self.source])

    def read_examples(self, tokenizer: Tokenizer, block_size: int) -> Iterator[tuple[int, Example]]:
        """The record of a document's first window has its words and bytes, as lm-eval counts."""
        stride = self.stride or block_size
        if stride > block_size:
            raise ValueError(f"stride is {stride}, expected at most block_size {block_size}")
        n_examples = 0
        for document, text in enumerate(self.read_documents()[: self.limit], start=1):
            sizes = {"words": len(re.split(r"\s+", text)), "bytes": len(text.encode())}
            remarks = (HAS_SPECIAL_TOKENS,) if tokenizer.special_pattern.search(text) else ()
            ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
            for request in split_into_windows(ids, block_size, stride):
                n_examples += 1
                record = {"document": document, "tokens": len(request.continuations[0])}
                yield n_examples, Example(request, record | sizes, remarks)
                sizes, remarks = {}, ()

    def read_documents(self) -> list[str]:
        documents: list[str] = []
        problems: Counter = Counter()
        for file in self.find_files():
            for piece in read_pieces(file, TextFormat(), problems, MAX_PIECE_CHARS):
                if piece.starts:
                    documents.append("")
                documents[-1] += piece.text
        if problems and not self.skip_bad_rows:
            found = ", ".join(f"{n} {problem}" for problem, n in problems.items())
            raise ValueError(f"{self.source} has {found}; repair it, or set skip_bad_rows")
        return documents

    def compute_metrics(self, records: list[dict]) -> dict[str, dict]:
        total = math.fsum(-record["log_probs"][0] for record in records)
        units = ("tokens", "words", "bytes")
        tokens, words, n_bytes = (sum(r.get(unit, 0) for r in records) for unit in units)
        bits = total / max(1, n_bytes) / math.log(2)
        return {
            "token_perplexity": metric(f"{tokens:,} tokens", perplexity(total, tokens)),
            "word_perplexity": metric(f"{words:,} words", perplexity(total, words)),
            "bits_per_byte": metric(f"{n_bytes:,} bytes", bits),
        }


def split_into_windows(tokens: list[int], block_size: int, stride: int) -> Iterator[Request]:
    """Requests that predict each token but the first once: the first `block_size` of them, then
    `stride` at a time after as much context as fits (lm-eval's rolling windows).
    """
    start = 1
    while start < len(tokens):
        end = min(start + (block_size if start == 1 else stride), len(tokens))
        yield Request(tokens[max(0, end - 1 - block_size) : start], [tokens[start:end]])
        start = end


TASKS = {task.name: task for task in (HellaSwag, Lambada, TextPerplexity)}


def find_task(name: str, **settings: Any) -> Task:
    """The task of that name; ValueError if there is none, or it has no such setting."""
    if name not in TASKS:
        raise ValueError(f"task is {name}, expected {' or '.join(TASKS)}")
    for setting in {*settings} - {f.name for f in fields(TASKS[name])}:
        raise ValueError(f"{setting} is not a setting of task {name}; omit --{setting}")
    return TASKS[name](**settings)


def metric(meaning: str, *values: float) -> dict:
    """The value, and where there is a 95% interval its ends."""
    return dict(zip(("value", "low", "high"), values, strict=False)) | {"meaning": meaning}


def accuracy(meaning: str, correct: list[bool]) -> dict:
    n, total = len(correct), sum(correct)
    return metric(meaning, total / n, *wilson_interval(total, n))


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    p, z2 = correct / n, Z_95**2
    center = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)


def perplexity(nats: float, n: int = 1) -> float:
    return math.exp(nats / n) if nats < MAX_EXPONENT * n else math.inf
