"""A file of its own because the command and the training loop measure the same: what a model is
asked, in HellaSwag, in LAMBADA and of a text, and which answers of HellaSwag are right.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from scoring import Request, encode, encode_request, score
from text import find_files, open_binary, read_file
from tokenizer import END_OF_TEXT_ID

# Where the rows come from when no file is named: repository, configuration and split.
HUB_ROWS = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
}


class Example(NamedTuple):
    """What to ask the model, and what else belongs into its line of rows.jsonl."""

    request: Request
    facts: dict


def string(value: object) -> str:
    """The value, if it is a text that can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a string is expected")
    value.encode()
    return value


def clean(text: str) -> str:
    """lm-eval's `preprocess` of HellaSwag: stripped once, then tags like [header] go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_example(row: dict, text: str) -> Example:
    """An example of a row of the original fields, or of ctx, endings and label alone. `lengths`
    normalise: characters of the cleaned endings (lm-eval), or tokens (raw, build-nanogpt).
    """
    endings, label = row["endings"], int(str(row["label"]))
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"endings is {endings!r}, expected a list of two strings or more")
    endings = [string(ending) for ending in endings]
    if not 0 <= label < len(endings):
        raise ValueError(f"label is {label}, expected 0 to {len(endings) - 1}")
    if text == "raw":
        request = Request(
            encode(string(row["ctx"])) or [END_OF_TEXT_ID],
            [encode(" " + ending) for ending in endings],
        )
        lengths = [len(ids) for ids in request.continuations]
    else:
        if "ctx_a" in row:
            context = f"{string(row['ctx_a'])} {string(row['ctx_b']).capitalize()}"
        else:
            context = string(row["ctx"])
        if "activity_label" in row:
            context = f"{string(row['activity_label'])}: {context}"
        choices = [clean(ending) for ending in endings]
        request = encode_request(clean(context), [" " + choice for choice in choices])
        lengths = [len(choice) for choice in choices]
    return Example(request, {"label": label, "lengths": lengths})


def lambada_example(row: dict) -> Example:
    """lm-eval's lambada_openai: the last word, split off at a space, after all before it."""
    *words, last = string(row["text"]).split(" ")
    return Example(encode_request(" ".join(words), [" " + last]), {})


def windows(ids: list[int], block_size: int, stride: int) -> Iterator[Request]:
    """A document's tokens after `<|endoftext|>`, each predicted once: the first `block_size` of
    them, then `stride` at a time after as many before as the window holds (lm-eval's rolling
    windows).
    """
    tokens = [END_OF_TEXT_ID, *ids]
    start = 1
    while start < len(tokens):
        end = min(start + (block_size if start == 1 else stride), len(tokens))
        yield Request(tokens[max(0, end - 1 - block_size) : start], [tokens[start:end]])
        start = end


def text_examples(
    data: str, block_size: int, stride: int, limit: int | None, skip_bad_rows: bool
) -> list[Example]:
    """The windows of the first `limit` documents. The first window of each has its words and bytes
    as lm-eval counts them.
    """
    documents: list[list[str]] = []
    problems: Counter = Counter()
    for file in find_files([data]):
        for piece, starts in read_file(file, "text", problems):
            if starts:
                documents.append([])
            documents[-1].append(piece)
    if problems and not skip_bad_rows:
        raise ValueError(f"{data} has {dict(problems)}; mend it, or add --skip_bad_rows true")
    examples: list[Example] = []
    for document, pieces in enumerate(documents[:limit], start=1):
        text = "".join(pieces)
        facts = {"words": len(re.split(r"\s+", text)), "bytes": len(text.encode())}
        for request in windows([i for p in pieces for i in encode(p)], block_size, stride):
            tokens = len(request.continuations[0])
            row = {"row": len(examples) + 1, "document": document, "tokens": tokens}
            examples.append(Example(request, {**row, **facts}))
            facts = {}
    if not examples:
        raise ValueError(f"{data} holds no text")
    return examples


def read_rows(task: str, data: str | None) -> Iterator[tuple[int, bytes | dict]]:
    """The rows of a file, as lines of JSON, or of the hub, with their numbers from 1."""
    if data is None:
        yield from enumerate(hub_rows(*HUB_ROWS[task]), start=1)
        return
    if not data.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{data} is neither .jsonl nor .jsonl.gz")
    try:
        with open_binary(Path(data)) as file:
            yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{data} is truncated or damaged: {error}") from error


def hub_rows(repo: str, name: str | None, split: str) -> Iterator[dict]:
    from datasets import load_dataset  # takes a second to import and is needed only here

    try:
        return load_dataset(repo, name, split=split)
    except OSError as error:
        raise ConnectionError(
            f"the Hugging Face hub does not give {repo}: {error}. Without a network, name a file "
            "of its rows with --data, or while training --hellaswag_data"
        ) from error


def row_example(task: str, row: object, text: str, block_size: int) -> Example:
    """The example of a row; ValueError or KeyError where it cannot be one."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no row")
    example = lambada_example(row) if task == "lambada" else hellaswag_example(row, text)
    longest = max(map(len, example.request.continuations))
    if longest > block_size:
        raise ValueError(f"{longest} tokens to predict, the model's window is {block_size}")
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
    """The first `limit` rows of a task, from the file `data` or the hub. ValueError with the
    line number of a row that is broken, or has a continuation too long for a model of `block_size`;
    with `skip_bad_rows` a line is printed instead.
    """
    if task == "text":
        if data is None:
            raise ValueError("--task text needs --data, a text to measure")
        if (stride or 1) > block_size:
            raise ValueError(f"stride is {stride}, expected up to {block_size}, the model's window")
        return text_examples(data, block_size, stride or block_size, limit, skip_bad_rows)
    source = data or HUB_ROWS[task][0]
    examples: list[Example] = []
    without_parts = 0
    for number, line in islice(read_rows(task, data), limit):
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
            request, facts = row_example(task, row, text, block_size)
        except (ValueError, KeyError) as error:
            where = f"{source} line {number}"
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            if not skip_bad_rows:
                raise ValueError(
                    f"{where}: {reason}. Mend it, or leave such rows out: --skip_bad_rows true"
                ) from error
            print(f"{where}: {reason}; left out")
        else:
            examples.append(Example(request, {"row": number, **facts}))
            without_parts += task == "hellaswag" and text == "lm-eval" and "ctx_a" not in row
    if not examples:
        raise ValueError(f"{source} holds no usable row")
    if without_parts:
        print(
            f"{without_parts} of {len(examples)} rows have no ctx_a and ctx_b; their ctx is taken "
            "as it is, so the figures are not quite lm-eval's of the original rows"
        )
    return examples


def predictions(log_probs: list[float], lengths: list[int]) -> tuple[int, int]:
    """The likeliest ending, and the likeliest a character or token; of equals the first. Without
    characters an ending is infinitely unlikely (lm-eval's division by 0).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return int(np.argmax(log_probs)), int(np.argmax(np.array(log_probs) / np.array(lengths)))


def count_hits(
    model: GPT, examples: list[Example], device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[int, int, int]:
    """Of this rank's share of HellaSwag's examples: how many are predicted right, how many so with
    normalisation, and how many there are. Every rank has to call it.
    """
    hits = hits_norm = n = 0
    for batch in score(model, [e.request for e in examples], device, rank, world_size):
        for i, scores in batch:
            facts = examples[i].facts
            pred, pred_norm = predictions([s.log_prob for s in scores], facts["lengths"])
            hits += pred == facts["label"]
            hits_norm += pred_norm == facts["label"]
            n += 1
    return hits, hits_norm, n
