"""Instruction data: read examples, fill prompt templates, build batches."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data import IGNORE_INDEX, Batch, TrainingData, epoch_order, make_batch, round_up
from engine.files import read_json, sha256_text, write_json
from engine.rows import STDLIB, convert_rows, get_text, open_rows
from engine.tokenizer import Tokenizer

DEFAULT_DATA = "yahma/alpaca-cleaned"
TEMPLATE_FILE = "prompt_template.json"
PAD_MULTIPLE = 8  # tensor cores need sizes that are multiples of 8


class PromptTemplate(NamedTuple):
    """Two prompt templates, for instructions without and with an input. `with_input` is None if
    there are no inputs.
    """

    without_input: str
    with_input: str | None = None

    def fill(self, instruction: str, input_text: str = "") -> str:
        template = self.with_input if input_text.strip() else self.without_input
        if template is None:
            raise ValueError(
                "the prompt template of this model has no place for an input; omit input"
            )
        values = {"instruction": instruction, "input": input_text}
        return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template)


ALPACA_TEMPLATE = PromptTemplate(  # the prompts of Stanford Alpaca's train.py
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)
PLAIN_TEMPLATE = PromptTemplate("{instruction}")  # for rows with a prompt and a completion
STDLIB_TEMPLATE = PromptTemplate("{instruction}\n")  # adds the newline that ends stdlib prompts


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, as text and as tokens. The first `n_prompt` tokens are the
    prompt.
    """

    prompt: str
    completion: str
    tokens: np.ndarray
    n_prompt: int
    template: PromptTemplate = PLAIN_TEMPLATE


def read_examples(name: str, tokenizer: Tokenizer, block_size: int) -> list[PromptCompletion]:
    """Read the examples of a .json or .jsonl file, a hub dataset, or "stdlib".

    Special tokens in the text are encoded as such. Completions end with an end-of-text token and
    are cut to fit block_size. Rows that have an empty completion or a prompt longer than block_size
    are skipped and counted. Raises ValueError if a row is not valid.
    """
    examples, skipped = [], []
    # Round down to a multiple of PAD_MULTIPLE, because `pad` rounds up, and rows have to fit.
    block_size = max(1, block_size // PAD_MULTIPLE) * PAD_MULTIPLE
    rows = convert_rows(name, open_rows(name), parse_row)
    for number, (prompt, completion, row_template) in rows:
        prompt_ids = tokenizer.encode_prompt(prompt)
        ids = prompt_ids + tokenizer.encode(completion)
        if ids[-1] != tokenizer.end_of_text:
            ids.append(tokenizer.end_of_text)
        if not completion.strip() or len(prompt_ids) > block_size:
            skipped.append(number)
            continue
        tokens = np.array(ids[: block_size + 1])
        # Rows of stdlib end their prompts with a newline. For what a user types when sampling, the
        # template has to add it.
        template = STDLIB_TEMPLATE if name == STDLIB else row_template
        examples.append(PromptCompletion(prompt, completion, tokens, len(prompt_ids), template))
    if skipped:
        print(
            f"{name}: skipped {len(skipped)} of {len(skipped) + len(examples)} rows "
            f"(no completion, or a prompt of over {block_size} tokens); first: row {skipped[0]}"
        )
    if len(examples) < 2:
        raise ValueError(f"{name} has {len(examples)} usable examples, expected at least 2")
    return examples


def parse_row(row: dict) -> tuple[str, str, PromptTemplate]:
    """Return the prompt and the completion of a row, and the template of its prompt."""
    if {"instruction", "output"} <= row.keys():
        input_text = "" if row.get("input") is None else get_text(row, "input")
        prompt = ALPACA_TEMPLATE.fill(get_text(row, "instruction"), input_text)
        return prompt, get_text(row, "output"), ALPACA_TEMPLATE
    if {"prompt", "completion"} <= row.keys():
        return get_text(row, "prompt"), get_text(row, "completion"), PLAIN_TEMPLATE
    raise ValueError(
        f"its keys are {', '.join(row) or 'none'}; expected instruction and output (input is "
        "optional), or prompt and completion"
    )


def save_prompt_template(examples: list[PromptCompletion], folder: Path) -> None:
    """Write prompt_template.json with the most common template of the examples."""
    template, _ = Counter(example.template for example in examples).most_common(1)[0]
    write_json(folder / TEMPLATE_FILE, template._asdict())


def find_prompt_template(path: Path) -> PromptTemplate | None:
    """Return the prompt template saved with a model, an adapter or a run, or None."""
    folder = (path if path.is_dir() else path.parent).absolute()
    if folder.parent.name == "checkpoints":  # RUN/checkpoints/STEP: the template is in RUN
        folder = folder.parents[1]
    file = folder / TEMPLATE_FILE
    if not path.exists() or not file.is_file():  # `path` may be a hub name
        return None
    values = read_json(file, remedy="delete it")
    template = PromptTemplate(values.get("without_input", ""), values.get("with_input"))
    if not all(isinstance(text, str | None) for text in template) or not template.without_input:
        raise ValueError(
            f"{file} is damaged, expected text as without_input and with_input; delete it"
        )
    return template


def split_examples(
    examples: list[PromptCompletion], val_fraction: float, seed: int
) -> tuple[list[PromptCompletion], list[PromptCompletion]]:
    """Split the examples at random into training and held-out ones, at least one of each."""
    n_val = min(max(1, round(val_fraction * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def pad(examples: list[PromptCompletion]) -> Batch:
    """Build a batch with one example per row. Only completions are targets. Rows are padded on the
    right, so the causal mask hides the padding from real tokens.

        tokens    p p p c c c         n_prompt = 3
        idx       p p p c c 0 0 0     0: padding
        targets   - - c c c - - -     -: IGNORE_INDEX
    """
    longest = max(len(e.tokens) - 1 for e in examples)
    shape = len(examples), round_up(longest, PAD_MULTIPLE)
    idx = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.tokens) - 1
        idx[row, :end] = example.tokens[:-1]
        targets[row, example.n_prompt - 1 : end] = example.tokens[example.n_prompt :]
    return make_batch(idx, targets)


class InstructionData(TrainingData):
    """The batches of instruction examples. The examples of a step are sorted by length before they
    are split into micro-batches, so that they need little padding.
    """

    has_fixed_shape = False
    step_size_flag = "examples_per_step"

    def __init__(self, examples: list[PromptCompletion], *, examples_per_step: int, **options: int):
        self.examples = examples
        # The input of the model is one token shorter than the example.
        self.lengths = np.array([len(example.tokens) - 1 for example in examples])
        contents = ((e.n_prompt, e.tokens.tolist()) for e in examples)
        self.fingerprint = sha256_text("".join(map(repr, contents)))
        self.epoch_contents = (
            f"{len(examples):,} examples with {self.lengths.sum():,} tokens, "
            f"{count_targets(examples):,} of them predicted"
        )
        sizes = {"row_size": 1, "block_size": int(self.lengths.max())}
        super().__init__(len(examples), examples_per_step, **sizes, **options)

    def row_ids(self, step: int) -> list[int]:
        return sorted(super().row_ids(step), key=lambda i: (self.lengths[i], i))

    def read_batch(self, ids: list[int]) -> Batch:
        return pad([self.examples[i] for i in ids])

    def targets_in_step(self, step: int) -> int:
        return count_targets([self.examples[i] for i in self.row_ids(step)])

    def tokens_through(self, step: int) -> int:
        epochs, rest = divmod(step * self.rows_per_step, self.n_rows)
        ids = epoch_order(self.seed, epochs, self.n_rows)[:rest]
        return int(epochs * self.lengths.sum() + self.lengths[ids].sum())


def count_targets(examples: list[PromptCompletion]) -> int:
    return sum(len(example.tokens) - example.n_prompt for example in examples)


def held_out_batches(
    examples: list[PromptCompletion], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield this rank's batches of the examples, shortest first. All ranks get the same number of
    batches; a rank with no examples left gets a batch without targets.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    dummy = PromptCompletion("", "", np.zeros(2, dtype=np.int64), n_prompt=2)  # has no completion
    for first in range(0, len(examples), batch_size * world_size):
        start = first + rank * batch_size
        yield pad(examples[start : start + batch_size] or [dummy])
