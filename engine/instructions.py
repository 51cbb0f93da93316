"""Examples for fine-tuning: recognize the form of rows, encode them, build batches."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
from tqdm import tqdm

from engine import chat
from engine.chat import ChatTemplate, Messages
from engine.config import Settings, flag
from engine.data import IGNORE_INDEX, Batch, TrainingData, epoch_order, pad_rows, round_up
from engine.files import sha256_text
from engine.rows import convert_rows, get_text, open_rows
from engine.tokenizer import Tokenizer

DEFAULT_DATA = "yahma/alpaca-cleaned"
PROGRESS_DELAY = 5  # seconds until a progress bar is shown on a terminal
PAD_MULTIPLE = 8  # tensor cores need sizes that are multiples of 8
MAX_GRAPHS = 8  # PyTorch warns if there are more
LENGTH_STEPS = 1000  # choose the batch lengths from this many steps
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
    template: str | None = None  # of its form; CHAT_TEMPLATE for any conversation, None for text


# Each form has keys, some with alternatives, and a chat template. If a row has several forms, the
# first one counts. prompt_column and completion_column are a form that comes before these.
FORMS: dict[tuple[tuple[str, ...], ...], str | None] = {
    (("messages", "conversations"),): chat.CHAT_TEMPLATE,
    (("instruction", "question"), ("output", "response", "answer")): chat.ALPACA_TEMPLATE,
    (("signature",), ("docstring",)): chat.DOCSTRING_TEMPLATE,  # stdlib
    (("text",),): None,
}
INPUT_KEYS = ("input", "context")  # optional in rows with ALPACA_TEMPLATE


@dataclass(frozen=True)
class RowSettings(Settings):
    """How rows are read. A resumed run may use other settings if they give the same examples."""

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


def find_form(row: dict, forms: dict) -> tuple[list[str], str | None]:
    """Return the keys of the first form that a row has, and its template. Prefer keys with a value,
    because in a table every row has every key. Raises ValueError if the row has none of the forms.
    """
    for keys in ({key for key, value in row.items() if value is not None}, row.keys()):
        for form, template in forms.items():
            chosen = [next((key for key in names if key in keys), "") for names in form]
            if all(chosen):
                return chosen, template
    expected = ", or ".join(" and ".join(map("/".join, form)) for form in forms)
    raise ValueError(
        f"its keys are {', '.join(row) or 'none'}; expected {expected}. For other names, set "
        "prompt_column and completion_column"
    )


def encode_pair(
    row: dict, keys: list[str], template: str | None, tokenizer: Tokenizer
) -> PromptCompletion:
    """Encode a prompt (if any) and its completion, which ends with an end-of-text token."""
    *prompts, completion = (get_text(row, key) for key in keys)
    if not completion.strip():
        raise ValueError("there is nothing to train on, expected a completion or text")
    message = {"role": "user", "content": "".join(prompts)}
    if template == chat.ALPACA_TEMPLATE:
        inputs = [get_text(row, key) for key in INPUT_KEYS if row.get(key) is not None]
        message["input"] = next(filter(str.strip, inputs), "")
    prompt = ChatTemplate(template or chat.PLAIN_TEMPLATE, tokenizer).render([message])
    prompt_ids, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(completion)
    if ids[-1] != tokenizer.end_of_text:
        ids.append(tokenizer.end_of_text)
    tokens, targets = np.array([prompt_ids + ids, [IGNORE_INDEX] * len(prompt_ids) + ids])
    return PromptCompletion(prompt, completion, tokens, targets, len(prompt_ids), template)


def parse_messages(row: dict, key: str) -> Messages:
    """Read a list of messages with role and content, or with from and value as in ShareGPT."""
    if not isinstance(row[key], list) or not all(isinstance(m, dict) for m in row[key]):
        raise ValueError(f"{key} is {row[key]!r:.80}, expected a list of messages")
    messages = []
    for message in row[key]:
        names = ("role", "content") if message.get("role") is not None else ("from", "value")
        if str(role := message[names[0]]) not in ROLES:
            raise ValueError(f"{names[0]} is {role!r:.80}, expected one of {', '.join(ROLES)}")
        if message.get("tool_calls") or message.get("function_call"):
            raise ValueError("a message calls a tool, expected only text")
        weight = {"weight": 0} if message.get("weight") == 0 else {}  # as in OpenAI's files
        messages.append({"role": ROLES[role], "content": get_text(message, names[1]), **weight})
    return messages


def find_answers(messages: Messages) -> list[int]:
    """Return the positions of the answers to train on: not of one that begins the conversation."""
    roles = [None if "weight" in message else message["role"] for message in messages]
    return [i for i, role in enumerate(roles) if role == "assistant" and i > 0]


def parse_conversation(row: dict, keys: list[str]) -> Messages:
    """Read a conversation up to its last answer to train on. Answers under the first of two keys
    are not trained on. Raises ValueError if there is no answer to train on, or if one is empty.
    """
    *given, last = (parse_messages(row, key) for key in keys)
    messages = [{**message, "weight": 0} for message in chain(*given)] + last
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    answers = find_answers(messages)
    if not all(messages[i]["content"].strip() for i in answers) or not answers:
        raise ValueError("an answer of the assistant is missing or empty")
    return messages[: answers[-1] + 1]


def encode_conversation(messages: Messages, template: ChatTemplate) -> PromptCompletion:
    """Encode a conversation that ends with an answer, to the ids of `apply_chat_template`. Answers
    and the text that ends them are predicted. Raises ValueError if later turns change how the
    template renders earlier ones.
    """
    text = template.render(messages)
    encoding = template.tokenizer.backend.encode(text, add_special_tokens=False)
    tokens = np.array(encoding.ids)
    ends = np.array([end for _, end in encoding.offsets])  # of each token in the text
    targets = np.full_like(tokens, IGNORE_INDEX)
    for i in find_answers(messages):
        prompt = template.render(messages[:i], add_generation_prompt=True)
        through = template.render(messages[: i + 1])
        if not (through.startswith(prompt) and text.startswith(through)):
            raise ValueError(
                "the chat template is not prefix-preserving: later turns change how earlier ones "
                "are rendered, so answers cannot be found; edit the template"
            )
        is_answer = (ends > len(prompt)) & (ends <= len(through))
        targets[is_answer] = tokens[is_answer]
    if (targets == IGNORE_INDEX).all():
        raise ValueError("the chat template renders no answer")
    texts, n_prompt = (prompt, messages[-1]["content"]), int((ends <= len(prompt)).sum())
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
    has_own_names = columns != (("prompt",), ("completion",))
    forms = {columns: chat.PLAIN_TEMPLATE} | ({} if has_own_names else FORMS)
    template = ChatTemplate(choose_template(chat.CHAT_TEMPLATE, tokenizer), tokenizer)
    counts: Counter[str] = Counter()  # of rows in each form, and of problems
    unused: dict[str, None] = {}  # a set that keeps the order of the keys

    def convert(row: dict) -> PromptCompletion:
        keys, form_template = find_form(row, forms)
        if form_template == chat.CHAT_TEMPLATE or isinstance(row[keys[0]], list):
            messages = parse_conversation(row, keys)
            kept = template.fit(messages, block_size + 1)
            counts["conversations without their oldest turns"] += len(kept) < len(messages)
            example = encode_conversation(kept, template)
        else:
            example = encode_pair(row, keys, form_template, tokenizer)
        counts[f"rows with {' and '.join(keys)}"] += 1
        optional = INPUT_KEYS if form_template == chat.ALPACA_TEMPLATE else ()
        unused.update(dict.fromkeys(key for key in row if key not in (*keys, *optional)))
        return example

    rows = open_rows(source, settings.dataset_config, settings.split)
    bar = tqdm(rows, unit=" rows", delay=PROGRESS_DELAY, leave=False, disable=None)
    skip = source == DEFAULT_DATA if settings.skip_bad_rows is None else settings.skip_bad_rows
    found = [example for _, example in convert_rows(bar, convert, skip)]
    fitting = [example for example in found if example.n_prompt <= block_size]
    excess = np.array([len(example.tokens) - block_size - 1 for example in fitting])
    counts[f"rows skipped (prompt over {block_size} tokens)"] = len(found) - len(fitting)
    counts["completions cut to fit"] = int((excess > 1).sum())
    counts["completions without their end"] = int((excess > 0).sum())
    summary = "; ".join(f"{n:,} {what}" for what, n in counts.items() if n)
    if not fitting:
        raise ValueError(f"{source} has no usable rows ({summary or 'it has none at all'})")
    print(f"{source}: {summary}{'; not used: ' if unused else ''}{', '.join(unused)}")
    end = block_size + 1
    return [replace(e, tokens=e.tokens[:end], targets=e.targets[:end]) for e in fitting]


def choose_template(ours: str, tokenizer: Tokenizer) -> str:
    """Return the chat template for rows whose form has the template `ours`. For conversations and
    plain prompts it is the base model's, if that tells the roles apart. Otherwise it is `ours`,
    after the special tokens that the tokenizer adds to a text, such as BOS.
    """
    base = tokenizer.chat_template or ""
    has_roles = base and not base.endswith((chat.PLAIN_TEMPLATE, chat.DOCSTRING_TEMPLATE))
    if has_roles and ours in (chat.CHAT_TEMPLATE, chat.PLAIN_TEMPLATE):
        return base
    return tokenizer.decode(tokenizer.encode("", add_special_tokens=True)) + ours


def set_chat_template(tokenizer: Tokenizer, examples: list[PromptCompletion]) -> None:
    """Give the tokenizer the chat template of most examples. Plain text has none."""
    (ours, _), *_ = Counter(example.template for example in examples).most_common()
    if ours:
        tokenizer.chat_template = choose_template(ours, tokenizer)


def split_examples(
    examples: list[PromptCompletion], val_fraction: float, seed: int
) -> tuple[list[PromptCompletion], list[PromptCompletion]]:
    """Split the examples at random into training and held-out ones, at least one of each."""
    if len(examples) < 2:
        raise ValueError("there is only 1 usable example, expected at least 2, one for validation")
    n_val = min(max(1, round(val_fraction * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[n_val:]], [examples[i] for i in order[:n_val]]


def choose_lengths(lengths: Iterable[int], n: int) -> list[int]:
    """Choose at most n lengths, including the largest, so that little padding is added if each of
    `lengths` is rounded up to the next chosen one. Greedily drops the length that adds the least.
    """
    counts = Counter(lengths)
    while len(counts) > n:
        pairs = pairwise(sorted(counts))
        shorter, longer = min(pairs, key=lambda pair: counts[pair[0]] * (pair[1] - pair[0]))
        counts[longer] += counts.pop(shorter)
    return sorted(counts)


def pad(examples: list[PromptCompletion], lengths: Sequence[int] = ()) -> Batch:
    """Build a batch with one example per row. Only answers are targets. Rows are padded on the
    right, so the causal mask hides the padding from real tokens.

        tokens    p p p c c c         n_prompt = 3
        idx       p p p c c 0 0 0     0: padding
        targets   - - c c c - - -     -: IGNORE_INDEX

    With `lengths`, in ascending order, rows are padded to the first that fits.
    """
    longest = round_up(max(len(e.tokens) - 1 for e in examples), PAD_MULTIPLE)
    rows = [(e.tokens[:-1], e.targets[1:]) for e in examples]
    return pad_rows(rows, next((n for n in lengths if n >= longest), longest))


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
        contents = []
        for e in examples:
            predicted = e.targets.tolist() if e.template == chat.CHAT_TEMPLATE else e.n_prompt
            contents.append(repr((predicted, e.tokens.tolist())))
        self.fingerprint = sha256_text("".join(contents))
        self.epoch_contents = (
            f"{len(examples):,} examples with {self.lengths.sum():,} tokens, "
            f"{count_targets(examples):,} of them predicted"
        )
        sizes = {"row_size": 1, "block_size": int(self.lengths.max())}
        super().__init__(len(examples), examples_per_step, **sizes, **options)

    def limit_lengths(self) -> None:
        """Pad batches to at most MAX_GRAPHS different lengths, so that each gets a CUDA graph."""
        steps = range(1, LENGTH_STEPS + 1)
        rows = self.lengths[[self.row_ids(step) for step in steps]].reshape(-1, self.batch_size)
        maxima = [*rows.max(axis=1).tolist(), self.block_size]
        self.graph_lengths = choose_lengths([round_up(n, PAD_MULTIPLE) for n in maxima], MAX_GRAPHS)

    def row_ids(self, step: int) -> list[int]:
        return sorted(super().row_ids(step), key=lambda i: (self.lengths[i], i))

    def read_batch(self, ids: list[int]) -> Batch:
        return pad([self.examples[i] for i in ids], self.graph_lengths)

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
    dummy = replace(examples[0], targets=np.full_like(examples[0].targets, IGNORE_INDEX))
    for first in range(0, len(examples), batch_size * world_size):
        start = first + rank * batch_size
        yield pad(examples[start : start + batch_size] or [dummy])
