"""Examples for fine-tuning: recognize the form of rows, encode them, build batches."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine import chat
from engine.chat import ChatTemplate, Messages
from engine.config import Settings, flag
from engine.data import IGNORE_INDEX, Batch, TrainingData, epoch_order, make_batch, round_up
from engine.files import sha256_text
from engine.rows import convert_rows, get_text, open_rows
from engine.tokenizer import Tokenizer

DEFAULT_DATA = "yahma/alpaca-cleaned"
PROGRESS_DELAY = 5  # seconds until a progress bar is shown on a terminal
PAD_MULTIPLE = 8  # tensor cores need sizes that are multiples of 8
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
ROLES |= {"human": "user", "gpt": "assistant"}  # in ShareGPT


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, as text and as tokens (T). Of a conversation, the last answer is
    the completion. `targets` (T) has the tokens that are predicted, and IGNORE_INDEX in place of
    the others.
    """

    prompt: str
    completion: str
    tokens: np.ndarray
    targets: np.ndarray
    n_prompt: int  # tokens of the prompt
    template: str | None = None  # our chat template for such prompts; None: there is none


def make_messages(prompt: str, completion: str, **others: str) -> Messages:
    user = {"role": "user", "content": prompt, **others}
    return [user, {"role": "assistant", "content": completion}]


def parse_messages(row: dict, key: str) -> Messages:
    """Read a list of messages with role and content, or with from and value as in ShareGPT."""
    if not isinstance(row[key], list) or not all(isinstance(m, dict) for m in row[key]):
        raise ValueError(f"{key} is {row[key]!r}, expected a list of messages")
    messages = []
    for message in row[key]:
        names = ("role", "content") if message.get("role") is not None else ("from", "value")
        if str(role := message[names[0]]) not in ROLES:
            raise ValueError(f"{names[0]} is {role!r}, expected one of {', '.join(ROLES)}")
        weight = {"weight": 0} if message.get("weight") == 0 else {}  # as in OpenAI's files
        messages.append({"role": ROLES[role], "content": get_text(message, names[1]), **weight})
    return messages


def parse_pair(row: dict, prompt: str, completion: str) -> Messages:
    """Read a prompt and a completion: strings, or lists of messages. Answers in the prompt are not
    predicted.
    """
    if isinstance(row[prompt], list):
        given = [{**message, "weight": 0} for message in parse_messages(row, prompt)]
        return given + parse_messages(row, completion)
    return make_messages(get_text(row, prompt), get_text(row, completion))


def parse_alpaca(row: dict, instruction: str, output: str) -> Messages:
    texts = get_text(row, instruction), get_text(row, output)
    inputs = [get_text(row, key) for key in ALPACA_INPUT if row.get(key) is not None]
    given = next(filter(str.strip, inputs), None)
    return make_messages(*texts, **({"input": given} if given else {}))


def parse_text(row: dict, text: str) -> Messages:
    return make_messages("", get_text(row, text))


class Form(NamedTuple):
    """A form of rows. A row has this form if it has one key of each group in `keys`. `parse` takes
    the row and these keys.
    """

    keys: tuple[tuple[str, ...], ...]
    parse: Callable[..., Messages]
    template: str | None  # the chat template, unless the row has lists of messages
    optional: tuple[str, ...] = ()


ALPACA_INPUT = ("input", "context")  # optional
ALPACA_KEYS = ("instruction", "question"), ("output", "response", "answer")
FORMS: tuple[Form, ...] = (  # if a row has several, the first one counts
    Form((("prompt",), ("completion",)), parse_pair, chat.PLAIN_TEMPLATE),
    Form((("messages", "conversations"),), parse_messages, None),
    Form(ALPACA_KEYS, parse_alpaca, chat.ALPACA_TEMPLATE, optional=ALPACA_INPUT),
    Form((("signature",), ("docstring",)), parse_pair, chat.DOCSTRING_TEMPLATE),  # stdlib
    Form((("text",),), parse_text, None),
)


@dataclass(frozen=True)
class RowSettings(Settings):
    """How rows are read. May change on resume, because the hash of the examples is compared."""

    data: str = flag(
        DEFAULT_DATA,
        "JSON, CSV or Parquet file, folder, glob, hub dataset, or stdlib (Python's docstrings)",
        group="data",
        may_change=True,
    )
    dataset_config: str | None = flag(None, "config (subset) of a hub dataset", may_change=True)
    split: str = flag("train", "split of a hub dataset or a saved DatasetDict", may_change=True)
    prompt_column: str = flag("prompt", "column with the prompt", may_change=True)
    completion_column: str = flag("completion", "column with the completion", may_change=True)
    skip_bad_rows: bool = flag(
        None, "skip null and empty rows (default: only in the default data)", may_change=True
    )


def find_form(row: dict, forms: tuple[Form, ...]) -> tuple[Form, list[str]]:
    """Return the first form that a row has, and its keys. Prefer keys with a value, because in a
    table every row has every key. Raises ValueError if the row has none of the forms.
    """
    for keys in ({key for key, value in row.items() if value is not None}, row.keys()):
        for form in forms:
            chosen = [next((key for key in group if key in keys), "") for group in form.keys]
            if all(chosen):
                return form, chosen
    expected = ", or ".join(" and ".join(map("/".join, form.keys)) for form in forms)
    raise ValueError(
        f"its keys are {', '.join(row) or 'none'}; expected {expected}. For other names, set "
        "prompt_column and completion_column"
    )


def encode_pair(messages: Messages, template: str | None, tokenizer: Tokenizer) -> PromptCompletion:
    """Encode a message of the user, and its completion, which ends with an end-of-text token."""
    *user, completion = messages
    if not completion["content"].strip():
        raise ValueError("there is nothing to train on, expected a completion or text")
    prompt = ChatTemplate(template or chat.PLAIN_TEMPLATE, tokenizer).render(user)
    prompt_ids, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(completion["content"])
    if ids[-1] != tokenizer.end_of_text:
        ids.append(tokenizer.end_of_text)
    tokens, targets = np.array([prompt_ids + ids, [IGNORE_INDEX] * len(prompt_ids) + ids])
    texts = prompt, completion["content"]
    return PromptCompletion(*texts, tokens, targets, len(prompt_ids), template)


def trim_messages(messages: Messages) -> Messages:
    """Return the messages up to the last answer to train on. Raises ValueError if there is no such
    answer, or if one is empty.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and "weight" not in m]
    if not all(messages[i]["content"].strip() for i in answers) or not answers:
        raise ValueError("an answer of the assistant is missing or empty")
    return messages[: answers[-1] + 1]


def encode_chat(messages: Messages, template: ChatTemplate) -> PromptCompletion:
    tokens, is_target, prompt, n_prompt = template.encode(messages)
    if not is_target.any():
        raise ValueError("the chat template renders no answer")
    targets = np.where(is_target, tokens, IGNORE_INDEX)
    texts = prompt, messages[-1]["content"]
    return PromptCompletion(*texts, tokens, targets, n_prompt, chat.CHAT_TEMPLATE)


def read_examples(
    source: str, tokenizer: Tokenizer, block_size: int, settings: RowSettings | None = None
) -> list[PromptCompletion]:
    """Read the examples of a file, a folder, a hub dataset or "stdlib". Print what was recognized.

    Special tokens in the text are encoded as such. Conversations drop their oldest turns; what
    still does not fit block_size is cut. Rows with a prompt longer than block_size are skipped and
    counted. Raises ValueError for a bad row, unless bad rows are skipped.
    """
    # Round down to a multiple of PAD_MULTIPLE, because `pad` rounds up, and rows have to fit.
    block_size = max(1, block_size // PAD_MULTIPLE) * PAD_MULTIPLE
    settings = settings or RowSettings()
    columns = (settings.prompt_column,), (settings.completion_column,)
    forms = FORMS if columns == FORMS[0].keys else (FORMS[0]._replace(keys=columns),)
    jinja = own_template(tokenizer) or chat.prepend_bos(chat.CHAT_TEMPLATE, tokenizer)
    template = ChatTemplate(jinja, tokenizer)
    forms_read: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    unused: dict[str, None] = {}  # a set that keeps the order of the keys

    def convert(row: dict) -> PromptCompletion:
        form, keys = find_form(row, forms)
        messages = form.parse(row, *keys)
        if isinstance(row[keys[0]], list):
            messages = trim_messages(messages)
            kept = template.fit(messages, block_size + 1)
            problems["conversations without their oldest turns"] += len(kept) < len(messages)
            example = encode_chat(kept, template)
        else:
            example = encode_pair(messages, form.template, tokenizer)
        forms_read[f"rows with {' and '.join(keys)}"] += 1
        unused.update(dict.fromkeys(key for key in row if key not in (*keys, *form.optional)))
        return example

    rows = open_rows(source, settings.dataset_config, settings.split)
    bar = tqdm(rows, unit=" rows", delay=PROGRESS_DELAY, leave=False, disable=None)
    skip = source == DEFAULT_DATA if settings.skip_bad_rows is None else settings.skip_bad_rows
    found = [example for _, example in convert_rows(bar, convert, skip)]
    fitting = [example for example in found if example.n_prompt <= block_size]
    excess = np.array([len(example.tokens) - block_size - 1 for example in fitting])
    problems[f"rows skipped (prompt over {block_size} tokens)"] = len(found) - len(fitting)
    problems["completions cut to fit"] = int((excess > 1).sum())
    problems["completions without their end"] = int((excess > 0).sum())
    if not fitting:
        raise ValueError(f"{source} has no usable rows")
    lines = [f"{n:,} {what}" for what, n in (forms_read | problems).items()]
    print(f"{source}: {'; '.join(lines)}{'; not used: ' if unused else ''}{', '.join(unused)}")
    end = block_size + 1
    return [replace(e, tokens=e.tokens[:end], targets=e.targets[:end]) for e in fitting]


def own_template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template of the base model, unless it does not tell who is speaking."""
    template = tokenizer.chat_template or ""
    has_roles = not template.endswith((chat.PLAIN_TEMPLATE, chat.DOCSTRING_TEMPLATE))
    return template if template and has_roles else None


def set_chat_template(tokenizer: Tokenizer, examples: list[PromptCompletion]) -> None:
    """Give the tokenizer the most common chat template of the examples. Conversations and plain
    prompts keep the one of the base model, if it has one.
    """
    (template, _), *_ = Counter(example.template for example in examples).most_common()
    keeps_base = template in (chat.CHAT_TEMPLATE, chat.PLAIN_TEMPLATE)
    if template and not (keeps_base and own_template(tokenizer)):
        tokenizer.chat_template = chat.prepend_bos(template, tokenizer)


def split_examples(
    examples: list[PromptCompletion], val_fraction: float, seed: int
) -> tuple[list[PromptCompletion], list[PromptCompletion]]:
    """Split the examples at random into training and held-out ones, at least one of each."""
    if len(examples) < 2:
        raise ValueError("there is only 1 usable example, expected at least 2, one for validation")
    n_val = min(max(1, round(val_fraction * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def pad(examples: list[PromptCompletion]) -> Batch:
    """Build a batch with one example per row. Only answers are targets. Rows are padded on the
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
        targets[row, :end] = example.targets[1:]
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
        contents = (
            (
                e.targets.tolist() if e.template == chat.CHAT_TEMPLATE else e.n_prompt,
                e.tokens.tolist(),
            )
            for e in examples
        )
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
    return sum(int((example.targets != IGNORE_INDEX).sum()) for example in examples)


def held_out_batches(
    examples: list[PromptCompletion], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield this rank's batches of the examples, shortest first. All ranks get the same number of
    batches; a rank with no examples left gets a batch without targets.
    """
    examples = sorted(examples, key=lambda example: len(example.tokens))
    nothing = np.zeros(2, dtype=np.int64), np.full(2, IGNORE_INDEX)
    dummy = PromptCompletion("", "", *nothing, n_prompt=2)
    for first in range(0, len(examples), batch_size * world_size):
        start = first + rank * batch_size
        yield pad(examples[start : start + batch_size] or [dummy])
