"""Prompt-completion rows from files, the hub or Python itself, and the batches of a step."""

import ast
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data import IGNORE_INDEX, Batch, epoch_entries, epoch_order, make_batch
from engine.documents import stdlib_definitions
from engine.errors import parse
from engine.files import read_json, read_lines, sha256_text, write_json
from engine.hub import check_hub_name, load_hub_rows
from engine.tokenizer import END_OF_TEXT_ID, get_tokenizer

DEFAULT_DATA = "yahma/alpaca-cleaned"
TEMPLATE_FILE = "prompt_template.json"
DOCSTRING_WORDS = range(5, 60)  # longer or shorter first paragraphs are left out
PAD_MULTIPLE = 8  # tensor cores need sizes that are multiples of 8


class PromptTemplate(NamedTuple):
    """How an instruction becomes a prompt, without and with an input (None: it takes none)."""

    without_input: str
    with_input: str | None = None

    def fill(self, instruction: str, input_text: str = "") -> str:
        template, values = self.without_input, {"instruction": instruction, "input": input_text}
        if input_text.strip():
            if self.with_input is None:
                raise ValueError("the model was fine-tuned without inputs; omit --input")
            template = self.with_input
        return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template)


ALPACA = PromptTemplate(  # the prompts of Stanford Alpaca's train.py
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)
PROMPT = PromptTemplate("{instruction}")  # rows of prompt and completion
FUNCTION = PromptTemplate("{instruction}\n")  # of stdlib, whose prompts are "def name(...):\n"


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, as text and as tokens, `n_prompt` of them the prompt's."""

    prompt: str
    completion: str
    tokens: np.ndarray
    n_prompt: int
    template: PromptTemplate = PROMPT


def read_examples(name: str, block_size: int) -> list[PromptCompletion]:
    """The examples of a .json or .jsonl file, a hub dataset, or "stdlib". Completions are cut to
    fit block_size; rows without a completion, or with a prompt too long, are skipped and counted.
    ValueError names a row of another form.
    """
    rows = list(read_rows(name))
    examples, skipped, tokenizer = [], [], get_tokenizer()
    block_size = max(1, block_size // PAD_MULTIPLE) * PAD_MULTIPLE  # batches are padded to it
    for number, row in enumerate(rows, start=1):
        prompt, completion, template = parse_row(row, f"{name} row {number}")
        if name == "stdlib":
            template = FUNCTION
        prompt_ids = tokenizer.encode_ordinary(prompt) or [END_OF_TEXT_ID]
        ids = [*prompt_ids, *tokenizer.encode_ordinary(completion), END_OF_TEXT_ID]
        if not completion.strip() or len(prompt_ids) > block_size:
            skipped.append(number)
            continue
        tokens = np.array(ids[: block_size + 1])
        examples.append(PromptCompletion(prompt, completion, tokens, len(prompt_ids), template))
    if skipped:
        print(
            f"{name}: skipped {len(skipped)} of {len(rows)} rows, which have no completion or a "
            f"prompt of more than {block_size} tokens; the first is row {skipped[0]}"
        )
    if len(examples) < 2:
        raise ValueError(f"{name} has {len(examples)} usable examples, expected at least 2")
    return examples


def check_data_name(name: str) -> None:
    """FileNotFoundError if there is no such file and the name cannot be one of the hub."""
    if name != "stdlib" and not Path(name).exists():
        check_hub_name(name, "a .json or .jsonl file, a hub name, or stdlib")


def read_rows(name: str) -> Iterable:
    check_data_name(name)
    if name == "stdlib":
        return stdlib_rows()
    if not Path(name).exists():
        return load_hub_rows(name, remedy="It is not a file either; --data stdlib needs no network")
    lines = read_lines(Path(name))
    if not name.removesuffix(".gz").endswith(".json"):
        return [parse_json(line, f"{name} line {number}") for number, line in lines]
    rows = parse_json(b"".join(line for _, line in lines), name)
    if not isinstance(rows, list):
        raise ValueError(f"{name} holds a {type(rows).__name__}, expected a list of rows")
    return rows


def parse_json(text: bytes, where: str) -> object:
    try:
        return parse(json.loads, text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def stdlib_rows() -> list[dict]:
    """Python functions and the first paragraphs of their docstrings, each function once."""
    rows = {}
    for node, docstring in stdlib_definitions():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph.split()) in DOCSTRING_WORDS:
            rows[f"def {node.name}({ast.unparse(node.args)}):\n"] = paragraph
    return [{"prompt": p, "completion": rows[p]} for p in sorted(rows, key=sha256_text)]


def parse_row(row: object, where: str) -> tuple[str, str, PromptTemplate]:
    """A row's prompt and completion, and the template of the prompt."""
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
        return row["prompt"], row["completion"], PROMPT
    return ALPACA.fill(row["instruction"], row["input"]), row["output"], ALPACA


def save_prompt_template(examples: list[PromptCompletion], folder: Path) -> None:
    """Write prompt_template.json: the template of most examples."""
    ((template, _),) = Counter(example.template for example in examples).most_common(1)
    write_json(folder / TEMPLATE_FILE, template._asdict())


def find_prompt_template(path: Path) -> PromptTemplate | None:
    """The template of a model, an adapter or a run; None if there is none."""
    folder = (path if path.is_dir() else path.parent).absolute()
    if folder.parent.name == "checkpoints":
        folder = folder.parents[1]
    file = folder / TEMPLATE_FILE
    if not path.exists() or not file.is_file():
        return None
    try:
        template = PromptTemplate(**read_json(file, "delete it"))
        if not all(isinstance(text, str | None) for text in template) or not template.without_input:
            raise TypeError("expected strings")
    except TypeError as error:
        raise ValueError(f"{file} is damaged: {error}; delete it") from error
    return template


def split_examples(
    examples: list[PromptCompletion], val_fraction: float, seed: int
) -> tuple[list[PromptCompletion], list[PromptCompletion]]:
    """A random split into training and held-out examples, at least one of each."""
    n_val = min(max(1, round(val_fraction * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def pad(examples: list[PromptCompletion]) -> Batch:
    """A batch of one example a row, padded on the right with <|endoftext|>, which the causal mask
    hides from real tokens. Only completions are targets.
    """
    longest = max(len(e.tokens) - 1 for e in examples)
    shape = len(examples), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    idx = np.full(shape, END_OF_TEXT_ID, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.tokens) - 1
        idx[row, :end] = example.tokens[:-1]
        targets[row, example.n_prompt - 1 : end] = example.tokens[example.n_prompt :]
    return make_batch(idx, targets)


@dataclass(frozen=True)
class InstructionData:
    """Batches of examples, as `TrainingData` describes. Every epoch has its own seeded order. The
    examples of a step are sorted by length before they are dealt out to micro-steps and ranks, so
    that the rows of a batch need little padding.
    """

    examples: list[PromptCompletion]
    _: KW_ONLY
    batch_size: int
    examples_per_step: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        micro = self.batch_size * self.world_size
        if self.examples_per_step % micro:
            raise ValueError(
                f"examples_per_step {self.examples_per_step} is not a multiple of batch_size "
                f"{self.batch_size} x {self.world_size} ranks = {micro}; --examples_per_step "
                f"{-(-self.examples_per_step // micro) * micro} is"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.n_prompt, example.tokens.tolist())).encode())
        return digest.hexdigest()

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Input tokens of each example."""
        return np.array([len(example.tokens) - 1 for example in self.examples])

    @property
    def block_size(self) -> int:
        return int(self.lengths.max())

    @property
    def has_one_shape(self) -> bool:
        return False

    @property
    def grad_accum_steps(self) -> int:
        return self.examples_per_step // (self.batch_size * self.world_size)

    def _examples_in_step(self, step: int) -> list[PromptCompletion]:
        n = self.examples_per_step
        ids = epoch_entries((step - 1) * n, n, len(self.examples), self.seed)
        return [self.examples[i] for i in sorted(ids, key=lambda i: (self.lengths[i], i))]

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        first = ((micro_step - 1) * self.world_size + self.rank) * self.batch_size
        return pad(self._examples_in_step(step)[first : first + self.batch_size])

    def targets_in_step(self, step: int) -> int:
        return count_targets(self._examples_in_step(step))

    def tokens_through(self, step: int) -> int:
        n = len(self.examples)
        epochs, rest = divmod(step * self.examples_per_step, n)
        ids = epoch_order(self.seed, epochs, n)[:rest]
        return int(epochs * self.lengths.sum() + self.lengths[ids].sum())

    @property
    def epoch_size(self) -> str:
        return f"{len(self.examples):,} examples"

    @property
    def steps_per_epoch(self) -> float:
        return len(self.examples) / self.examples_per_step

    def summary(self) -> str:
        return (
            f"examples per step: {self.examples_per_step} = {self.batch_size} x {self.world_size} "
            f"ranks x grad_accum_steps {self.grad_accum_steps}\n"
            f"data: {self.epoch_size} with {self.lengths.sum():,} tokens, "
            f"{count_targets(self.examples):,} of them predicted; the longest has "
            f"{self.block_size}; an epoch is {self.steps_per_epoch:,.1f} steps"
        )


def count_targets(examples: list[PromptCompletion]) -> int:
    return sum(len(example.tokens) - example.n_prompt for example in examples)


def held_out_batches(
    examples: list[PromptCompletion], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of the examples, by length. All ranks get equally many batches, some with
    a row that predicts nothing.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    nothing = PromptCompletion("", "", np.full(2, END_OF_TEXT_ID), n_prompt=2)
    for first in range(0, len(examples), batch_size * world_size):
        start = first + rank * batch_size
        yield pad(examples[start : start + batch_size] or [nothing])
