"""A file of its own because fine-tuning data are rows, not a stream: prompts with completions, from
files, the hub or Python itself, and the batches of a step.
"""

import ast
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Batch, in_epochs
from text import sha256, stdlib_definitions
from tokenizer import END_OF_TEXT_ID, IGNORE_INDEX, get_tokenizer

DEFAULT_DATA = "yahma/alpaca-cleaned"
# Stanford Alpaca's prompts, as its train.py has them.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
DOCSTRING_WORDS = range(5, 60)  # first paragraphs that say something, and not too much
PAD_MULTIPLE = 8  # tensor cores want whole tiles


@dataclass(frozen=True)
class Example:
    """A prompt, what should follow it, and both as tokens; `n_prompt` of them are the prompt's."""

    prompt: str
    completion: str
    tokens: np.ndarray
    n_prompt: int


def default_data() -> str:
    """The default data set, or stdlib where the hub does not give that."""
    try:
        _hub_rows(DEFAULT_DATA)
    except ConnectionError as error:
        print(f"{error}; going on with --data stdlib")
        return "stdlib"
    return DEFAULT_DATA


def read_examples(name: str, block_size: int) -> list[Example]:
    """The examples of a .json or .jsonl file, a hub data set, or "stdlib". A completion that does
    not fit block_size is cut; an example without completion, or whose prompt does not fit, is left
    out and counted. ValueError names a row of another form.
    """
    rows = _read_rows(name)
    examples, left_out, tokenizer = [], [], get_tokenizer()
    block_size = max(1, block_size // PAD_MULTIPLE) * PAD_MULTIPLE  # rows are padded to it
    for number, row in enumerate(rows, start=1):
        prompt, completion = _prompt_and_completion(row, f"{name} row {number}")
        prompt_ids = tokenizer.encode_ordinary(prompt) or [END_OF_TEXT_ID]
        ids = [*prompt_ids, *tokenizer.encode_ordinary(completion), END_OF_TEXT_ID]
        if not completion.strip() or len(prompt_ids) > block_size:
            left_out.append(number)
            continue
        tokens = np.array(ids[: block_size + 1])
        examples.append(Example(prompt, completion, tokens, len(prompt_ids)))
    if left_out:
        print(
            f"{name}: {len(left_out)} of {len(rows)} rows left out, which have no completion or a "
            f"prompt of more than {block_size} tokens (row {left_out[0]} is the first)"
        )
    if len(examples) < 2:
        raise ValueError(f"{name} has {len(examples)} usable examples, expected at least 2")
    return examples


def _read_rows(name: str) -> list[dict]:
    if name == "stdlib":
        return _docstring_rows()
    if not Path(name).exists():
        return list(_hub_rows(name))
    try:
        opener = gzip.open if name.endswith(".gz") else open
        with opener(name, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged or no text: {error}") from error
    if name.removesuffix(".gz").endswith(".json"):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{name} holds a {type(rows).__name__}, expected a list of rows")
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{name} line {number} is no JSON: {error}") from error
    return rows


def _hub_rows(name: str) -> Iterable[dict]:
    from datasets import load_dataset  # takes a second to import and is needed only here

    try:
        return load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{name} is no file here, and the Hugging Face hub did not give it: {reason} Name a "
            ".json or .jsonl file, or stdlib, which needs no network"
        ) from error


def _docstring_rows() -> list[dict]:
    """Python functions and the first paragraphs of their docstrings, each function once."""
    rows = {}
    for node, docstring in stdlib_definitions():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph.split()) in DOCSTRING_WORDS:
            rows[f"def {node.name}({ast.unparse(node.args)}):\n"] = paragraph
    return [{"prompt": p, "completion": rows[p]} for p in sorted(rows, key=sha256)]


def _prompt_and_completion(row: object, where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object")
    if {"instruction", "output"} <= row.keys():
        row = {**row, "input": "" if row.get("input") is None else row["input"]}
        fields: tuple[str, ...] = ("instruction", "input", "output")
    elif {"prompt", "completion"} <= row.keys():
        fields = ("prompt", "completion")
    else:
        raise ValueError(
            f"{where} has {', '.join(row) or 'nothing'}; expected instruction, input, output, or "
            "prompt, completion"
        )
    for field in fields:
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: {field} is {row[field]!r}, expected a string")
    if "prompt" in fields:
        return row["prompt"], row["completion"]
    template = PROMPT_WITH_INPUT if row["input"].strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row["input"]), row["output"]


def split_examples(
    examples: list[Example], val_fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, at least one of each, drawn by `seed`."""
    n_val = min(max(1, round(val_fraction * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def pad(examples: list[Example]) -> Batch:
    """One example a row, so that none sees another, filled up with <|endoftext|>, which no real
    token sees. Only completions are targets.
    """
    longest = max(len(e.tokens) - 1 for e in examples)
    shape = len(examples), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    idx = np.full(shape, END_OF_TEXT_ID, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.tokens) - 1
        idx[row, :end] = example.tokens[:-1]
        targets[row, example.n_prompt - 1 : end] = example.tokens[example.n_prompt :]
    return idx, targets


@dataclass(frozen=True)
class InstructionData:
    """The batches of fine-tuning. An epoch holds every example once, in an order of its own. The
    examples of a step are sorted by length before they are dealt out to micro-steps and ranks, so
    that rows of a batch need little padding.
    """

    examples: list[Example]
    batch_size: int
    examples_per_step: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        micro = self.batch_size * self.world_size
        if self.examples_per_step % micro:
            raise ValueError(
                f"examples_per_step {self.examples_per_step} is no multiple of batch_size "
                f"{self.batch_size} x {self.world_size} ranks = {micro}; choose one that divides it"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.n_prompt, example.tokens.tolist())).encode())
        return digest.hexdigest()

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that go into the model, of each example."""
        return np.array([len(example.tokens) - 1 for example in self.examples])

    @property
    def block_size(self) -> int:
        return int(self.lengths.max())

    @property
    def grad_accum_steps(self) -> int:
        return self.examples_per_step // (self.batch_size * self.world_size)

    def _in_step(self, step: int) -> list[Example]:
        first, count = (step - 1) * self.examples_per_step, self.examples_per_step
        ids = in_epochs(first, count, len(self.examples), self.seed)
        return [self.examples[i] for i in sorted(ids, key=lambda i: (self.lengths[i], i))]

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        first = ((micro_step - 1) * self.world_size + self.rank) * self.batch_size
        return pad(self._in_step(step)[first : first + self.batch_size])

    def targets_in_step(self, step: int) -> int:
        return sum(len(example.tokens) - example.n_prompt for example in self._in_step(step))

    def tokens_through(self, step: int) -> int:
        epochs, rest = divmod(step * self.examples_per_step, len(self.examples))
        ids = in_epochs(epochs * len(self.examples), rest, len(self.examples), self.seed)
        return int(epochs * self.lengths.sum() + self.lengths[ids].sum())

    def describe(self) -> str:
        n, tokens = len(self.examples), int(self.lengths.sum())
        predicted = sum(len(e.tokens) - e.n_prompt for e in self.examples)
        return (
            f"examples per step: {self.examples_per_step} = {self.batch_size} x {self.world_size} "
            f"ranks x grad_accum_steps {self.grad_accum_steps}\n"
            f"data: {n:,} examples with {tokens:,} tokens, {predicted:,} of them predicted; the "
            f"longest has {self.block_size}; an epoch is {n / self.examples_per_step:,.1f} steps"
        )


def held_out_batches(
    examples: list[Example], batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of the examples, by length. All ranks get the same number of batches, if
    need be with rows that predict nothing.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    for first in range(0, len(examples), batch_size * world_size):
        start = first + rank * batch_size
        mine = examples[start : start + batch_size]
        nothing = Example("", "", np.full(2, END_OF_TEXT_ID), 2)
        yield pad(mine or [nothing])
