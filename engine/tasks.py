"""HellaSwag, LAMBADA and the perplexity of a text: what they ask a model, and their metrics.

To add a task: name its rows in `HUB_ROWS` and the task in `EvalConfig` (hellaswag.py), make an
`Example` of a row in `make_example`, and add its scores to `make_record` and `compute_metrics`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.documents import (
    MAX_PIECE_CHARS,
    TextFormat,
    find_files,
    read_pieces,
    report_problem,
)
from engine.errors import parse
from engine.files import read_lines
from engine.hub import load_hub_rows
from engine.scoring import Request, Score, encode, encode_request, score
from engine.tokenizer import END_OF_TEXT_ID
from model import GPT

# Where rows come from without a file: repository, configuration and split.
HUB_ROWS = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
}
# The metrics of HellaSwag's two kinds of text, without and with length normalization.
HELLASWAG_METRICS = {
    "lm-eval": {
        "acc": "lm-eval's acc: cleaned text, sum over tokens",
        "acc_norm": "lm-eval's acc_norm: divided by characters",
    },
    "raw": {
        "acc_raw": "build-nanogpt's acc: raw text, sum over tokens",
        "acc_token_norm": "build-nanogpt's acc_norm: mean over tokens",
    },
}
Z_95 = 1.959964  # normal quantile of a 95% interval
MAX_EXPONENT = 709  # e to a higher power overflows a float


class Example(NamedTuple):
    """A request, and the first fields of its record in rows.jsonl."""

    request: Request
    record: dict


def check_text(value: object) -> str:
    """The value; ValueError if it is not a string, or cannot be encoded as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a string is expected")
    value.encode()
    return value


def clean(text: str) -> str:
    """lm-eval's `preprocess` of HellaSwag: strip, then remove tags such as [header]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def make_hellaswag_example(row: dict, text: str) -> Example:
    """The example of an original row, or of one with ctx, endings and label alone. `lengths`, for
    normalization, are characters of the cleaned endings (lm-eval) or tokens (raw).
    """
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"endings is {endings!r}, expected a list of at least two strings")
    endings = [check_text(ending) for ending in endings]
    if str(row["label"]) not in map(str, range(len(endings))):  # a number, or a string of one
        raise ValueError(f"label is {row['label']!r}, expected 0 to {len(endings) - 1}")
    label = int(row["label"])
    if text == "raw":
        context = encode(check_text(row["ctx"])) or [END_OF_TEXT_ID]
        request = Request(context, [encode(" " + ending) for ending in endings])
        return Example(request, {"label": label, "lengths": list(map(len, request.continuations))})
    if "ctx_a" in row:
        query = f"{check_text(row['ctx_a'])} {check_text(row['ctx_b']).capitalize()}"
    else:
        query = check_text(row["ctx"])
    if "activity_label" in row:
        query = f"{check_text(row['activity_label'])}: {query}"
    endings = [clean(ending) for ending in endings]
    request = encode_request(clean(query), [" " + ending for ending in endings])
    return Example(request, {"label": label, "lengths": list(map(len, endings))})


def make_lambada_example(row: dict) -> Example:
    """lm-eval's lambada_openai: predict what follows the last space."""
    context, _, word = check_text(row["text"]).rpartition(" ")
    return Example(encode_request(context, [" " + word]), {})


def split_into_windows(ids: list[int], block_size: int, stride: int) -> Iterator[Request]:
    """Requests that predict each token of a document once, after `<|endoftext|>`: the first
    `block_size`, then `stride` at a time after as much context as fits (lm-eval's rolling windows).
    """
    tokens = [END_OF_TEXT_ID, *ids]
    start = 1
    while start < len(tokens):
        end = min(start + (block_size if start == 1 else stride), len(tokens))
        yield Request(tokens[max(0, end - 1 - block_size) : start], [tokens[start:end]])
        start = end


def load_text(
    data: str | None, block_size: int, stride: int, limit: int | None, skip_bad_rows: bool
) -> list[Example]:
    """The windows of the first `limit` documents. A document's first window has its number of words
    and bytes, as lm-eval counts them.
    """
    if data is None:
        raise ValueError("--task text needs --data, the text to evaluate on")
    if stride > block_size:
        raise ValueError(
            f"stride is {stride}, expected at most the model's block_size {block_size}"
        )
    documents: list[list[str]] = []
    problems: Counter = Counter()
    report = partial(report_problem, problems)
    for file in find_files([data]):
        for piece in read_pieces(file, TextFormat(), report, MAX_PIECE_CHARS):
            if piece.starts:
                documents.append([])
            documents[-1].append(piece.text)
    if problems and not skip_bad_rows:
        found = ", ".join(f"{n} {problem}" for problem, n in problems.items())
        raise ValueError(f"{data} has {found}; repair it, or add --skip_bad_rows")
    examples: list[Example] = []
    for document, pieces in enumerate(documents[:limit], start=1):
        text = "".join(pieces)
        sizes = {"words": len(re.split(r"\s+", text)), "bytes": len(text.encode())}
        ids = [i for piece in pieces for i in encode(piece)]
        for request in split_into_windows(ids, block_size, stride):
            tokens = len(request.continuations[0])
            record = {"row": len(examples) + 1, "document": document, "tokens": tokens}
            examples.append(Example(request, record | sizes))
            sizes = {}
    if not examples:
        raise ValueError(f"{data} contains no text")
    return examples


def read_rows(task: str, data: str | None) -> Iterator[tuple[int, bytes | dict]]:
    """The rows of a file, as lines of JSON, or of the hub, with their numbers from 1."""
    if data is None:
        remedy = "Without a network, use a file of its rows: --data, in training --hellaswag_data"
        yield from enumerate(load_hub_rows(*HUB_ROWS[task], remedy=remedy), start=1)
    elif data.endswith((".jsonl", ".jsonl.gz")):
        yield from read_lines(Path(data))
    else:
        raise ValueError(f"{data} is not a .jsonl or .jsonl.gz file")


def make_example(task: str, row: object, text: str, block_size: int) -> Example:
    """The example of a row; ValueError or KeyError if the row is not valid."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is not a JSON object")
    example = make_lambada_example(row) if task == "lambada" else make_hellaswag_example(row, text)
    longest = max(map(len, example.request.continuations))
    if longest > block_size:
        raise ValueError(f"{longest} tokens to predict exceed the model's block_size {block_size}")
    return example


def load_examples(
    task: str,
    data: str | None,
    block_size: int,
    *,
    text: str = "lm-eval",
    limit: int | None = None,
    stride: int | None = None,
    skip_bad_rows: bool = False,
) -> list[Example]:
    """The examples of a task's first `limit` rows or documents, from `data` or the hub. ValueError
    names the first bad row; `skip_bad_rows` prints and skips them instead.
    """
    if task == "text":
        return load_text(data, block_size, stride or block_size, limit, skip_bad_rows)
    source = data or HUB_ROWS[task][0]
    examples = []
    n_joined = 0  # rows with ctx, but without the parts that lm-eval joins
    for number, line in islice(read_rows(task, data), limit):
        try:
            row = parse(json.loads, line) if isinstance(line, bytes) else line
            request, record = make_example(task, row, text, block_size)
        except (ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            problem = f"{source} line {number}: {reason}"
            if not skip_bad_rows:
                raise ValueError(f"{problem}; repair it, or add --skip_bad_rows") from error
            print(f"{problem}; skipped")
        else:
            examples.append(Example(request, {"row": number, **record}))
            n_joined += task == "hellaswag" and text == "lm-eval" and "ctx_a" not in row
    if not examples:
        raise ValueError(f"{source} contains no valid row")
    if n_joined:
        print(
            f"{n_joined} of {len(examples)} rows have no ctx_a and ctx_b; their ctx is used "
            "unchanged, so results differ slightly from lm-eval's"
        )
    return examples


def make_record(task: str, example: Example, scores: list[Score]) -> dict:
    """The example's line of rows.jsonl."""
    log_probs = [score.log_prob for score in scores]
    record = {**example.record, "log_probs": log_probs}
    if task == "hellaswag":
        record["pred"], record["pred_norm"] = predict(log_probs, record["lengths"])
    elif task == "lambada":
        record["greedy"] = scores[0].greedy
    return record


def predict(log_probs: list[float], lengths: list[int]) -> tuple[int, int]:
    """The most likely ending, without and with normalization by length; ties go to the first. An
    ending of length 0 has normalized log-probability -inf (lm-eval divides by 0).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(log_probs)), int(np.argmax(np.array(log_probs) / np.array(lengths)))


def is_correct(records: list[dict], prediction: str) -> list[bool]:
    return [record[prediction] == record["label"] for record in records]


def count_correct(
    model: GPT, examples: list[Example], device: torch.device, *, rank: int = 0, world_size: int = 1
) -> tuple[int, int, int]:
    """In this rank's share of HellaSwag: correct predictions, correct ones with normalization, and
    examples. All ranks must call it.
    """
    requests = [example.request for example in examples]
    batches = score(model, requests, device, rank=rank, world_size=world_size)
    scored = [pair for batch in batches for pair in batch]
    records = [make_record("hellaswag", examples[i], scores) for i, scores in scored]
    return sum(is_correct(records, "pred")), sum(is_correct(records, "pred_norm")), len(records)


def compute_metrics(task: str, text: str, records: list[dict]) -> dict[str, dict]:
    """Each metric's value and meaning, and its 95% interval where rows are independent."""
    if task == "hellaswag":
        (acc, meaning), (acc_norm, meaning_norm) = HELLASWAG_METRICS[text].items()
        return {
            acc: accuracy(is_correct(records, "pred"), meaning),
            acc_norm: accuracy(is_correct(records, "pred_norm"), meaning_norm),
        }
    nats = [-record["log_probs"][0] for record in records]
    total, n = math.fsum(nats), len(nats)
    if task == "lambada":
        variance = math.fsum((x - total / n) ** 2 for x in nats) / max(1, n - 1)
        half = Z_95 * math.sqrt(variance / n)
        return {
            "acc": accuracy([r["greedy"] for r in records], "lm-eval's acc: last word most likely"),
            "perplexity": {
                "value": perplexity(total, n),
                "low": perplexity(total / n - half),
                "high": perplexity(total / n + half),
                "meaning": "lm-eval's perplexity of the last word",
            },
        }
    tokens, words, n_bytes = (
        sum(record.get(unit, 0) for record in records) for unit in ("tokens", "words", "bytes")
    )
    bits = total / max(1, n_bytes) / math.log(2)
    return {
        "token_perplexity": {"value": perplexity(total, tokens), "meaning": f"{tokens:,} tokens"},
        "word_perplexity": {"value": perplexity(total, words), "meaning": f"{words:,} words"},
        "bits_per_byte": {"value": bits, "meaning": f"{n_bytes:,} bytes"},
    }


def accuracy(correct: list[bool], meaning: str) -> dict:
    low, high = wilson_interval(sum(correct), len(correct))
    return {"value": sum(correct) / len(correct), "low": low, "high": high, "meaning": meaning}


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    p, z2 = correct / n, Z_95**2
    center = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)


def perplexity(nats: float, n: int = 1) -> float:
    return math.exp(nats / n) if nats < MAX_EXPONENT * n else math.inf
