import hashlib
import heapq
import re
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2_TOKENIZER, TIKTOKEN
from test_chat import END, LONG, PAIR, TASK, make_chat, mark_predicted, unmark

from engine.chat import ChatTemplate
from engine.data import IGNORE_INDEX
from engine.instructions import (
    DEFAULT_DATA,
    InstructionData,
    PromptCompletion,
    RowSettings,
    choose_lengths,
    held_out_batches,
    pad,
    read_examples,
    split_examples,
)

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello — 你好"},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "", "completion": "Once upon a time"},
    {"prompt": "A<|endoftext|>", "completion": " b<|endoftext|>"},
]
# Texts in Alpaca's form. ⟦⟧ mark what is predicted.
SUM = f"{LONG}Add.\n\n### Input:\n1, 2\n\n### Response:\n⟦3<|endoftext|>⟧"
PLAIN_SUM = f"{TASK}. {END}Add.\n\n### Response:\n⟦3<|endoftext|>⟧"


def message(role: object, content: object) -> dict:
    return {"role": role, "content": content}


# A conversation, and its text in our own chat template.
CHAT = make_chat("Hi", "Hello", "Bye", "Ciao", system="Be brief.")
_, HI, HELLO, BYE, CIAO = CHAT
CHAT_TEXT = (
    "Be brief.\n\n### User:\nHi\n\n### Assistant:\n⟦Hello<|endoftext|>⟧"
    "### User:\nBye\n\n### Assistant:\n⟦Ciao<|endoftext|>⟧"
)
ONLY_CIAO = CHAT_TEXT.replace("⟦Hello<|endoftext|>⟧", "Hello<|endoftext|>")
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in CHAT]
OTHER_WEIGHTS = [*CHAT[:4], CIAO | {"weight": 1}, HI, HELLO | {"weight": 0}]
QA = "question and answer"
OWN_NAMES = RowSettings(prompt_column="q", completion_column="a")
# Rows in all forms: the row, its text, the keys that are printed as used, and other settings.
FORMS = [
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, SUM, "instruction and output"),
    ({"instruction": "Add.", "context": "1, 2", "response": "3"}, SUM, "instruction and response"),
    ({"instruction": "Add.", "input": " ", "output": "3"}, PLAIN_SUM, "instruction and output"),
    ({"instruction": "Add.", "input": None, "output": "3"}, PLAIN_SUM, "instruction and output"),
    ({"question": "Add.", "answer": "3"}, PLAIN_SUM, QA),
    ({"question": "Add.", "input": "", "context": "1, 2", "answer": "3"}, SUM, QA),
    ({"prompt": "A ", "completion": " b "}, "A ⟦ b <|endoftext|>⟧", "prompt and completion"),
    ({"signature": "A", "docstring": "b"}, "A\n⟦b<|endoftext|>⟧", "signature and docstring"),
    ({"text": "A\n"}, "<|endoftext|>⟦A\n<|endoftext|>⟧", "text"),
    ({"messages": CHAT}, CHAT_TEXT, "messages"),
    ({"conversations": CHAT}, CHAT_TEXT, "conversations"),
    ({"conversations": SHAREGPT}, CHAT_TEXT, "conversations"),
    ({"messages": CHAT[1:]}, CHAT_TEXT.removeprefix("Be brief.\n\n"), "messages"),
    ({"messages": [*CHAT, HI]}, CHAT_TEXT, "messages"),
    (
        {"conversations": CHAT[2:]},
        "Hello<|endoftext|>### User:\nBye\n\n### Assistant:\n⟦Ciao<|endoftext|>⟧",
        "conversations",
    ),
    ({"messages": [CHAT[0] | {"content": " "}, *CHAT[1:]]}, CHAT_TEXT[11:], "messages"),
    ({"messages": [*CHAT[:2], HELLO | {"weight": 0}, BYE, CIAO]}, ONLY_CIAO, "messages"),
    ({"messages": OTHER_WEIGHTS}, CHAT_TEXT, "messages"),
    ({"prompt": CHAT[:4], "completion": CHAT[4:]}, ONLY_CIAO, "prompt and completion"),
    ({"q": "A", "prompt": "B", "a": "c"}, "A⟦c<|endoftext|>⟧", "q and a", OWN_NAMES),
    ({"q": CHAT[:4], "a": CHAT[4:]}, ONLY_CIAO, "q and a", OWN_NAMES),
]


def mark(example: PromptCompletion) -> str:
    """Return the text of an example, with ⟦⟧ around what is predicted."""
    return mark_predicted(example.tokens, example.targets, TIKTOKEN.decode)


def make_example(tokens: np.ndarray, n_prompt: int) -> PromptCompletion:
    targets = np.where(np.arange(len(tokens)) < n_prompt, IGNORE_INDEX, tokens)
    return PromptCompletion("", "", tokens, targets, n_prompt)


@pytest.fixture
def examples(write_rows):
    """50 examples of different lengths."""
    rows = [{"prompt": "word " * (i % 7 + 1), "completion": "x " * i} for i in range(1, 51)]
    return read_examples(write_rows(rows), GPT2_TOKENIZER, 1024)


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_all_forms(write_rows, capsys, form):
    """A row in each of the forms becomes the expected text, and only the answers and what ends them
    are predicted. The text before the last answer is the prompt. A line says which keys were used.
    """
    row, text, keys, *settings = form
    source = write_rows([row])
    (example,) = read_examples(source, GPT2_TOKENIZER, 1024, *settings)
    assert mark(example) == text
    assert re.match(f"{source}: 1 rows with {keys}[;\n]", capsys.readouterr().out)
    prompt, _, completion = text.rpartition("⟦")
    assert TIKTOKEN.decode(example.tokens[: example.n_prompt].tolist()) == unmark(prompt)
    assert example.prompt == ("" if "text" in row else unmark(prompt))
    assert f"{example.completion}<|endoftext|>⟧" == completion


def test_forms_in_a_table(tmp_path, write_parquet, capsys):
    """In a table, every row has the columns of all forms. Each row has the form whose columns are
    not null. Lists of messages are read from Parquet too.
    """
    forms = [form for form in FORMS if len(form) == 3 and form[0].get("prompt") != CHAT[:4]]
    columns = list(dict.fromkeys(key for row, *_ in forms for key in row))
    table = {key: [row.get(key) for row, *_ in forms] for key in columns}
    write_parquet(table, tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet"), GPT2_TOKENIZER, 1024)
    assert [mark(example) for example in examples] == [text for _, text, _ in forms]


QUESTION = {"id": 1, "question": "Add.", "answer": "3"}
PAIRS = "rows with prompt and completion"


@pytest.mark.parametrize(
    ("rows", "settings", "printed"),
    [
        ([PAIR, QUESTION, PAIR], {}, f"2 {PAIRS}; 1 rows with question and answer; not used: id"),
        (
            [PAIR | QUESTION, PAIR],
            {},
            f"2 {PAIRS}; not used: id, question, answer",
        ),
        (
            [{"messages": CHAT, "text": "A"}],
            {},
            "1 rows with messages; not used: text",
        ),
        ([PAIR | {"input": "1, 2"}], {}, f"1 {PAIRS}; not used: input"),
        (
            [QUESTION],
            {"prompt_column": "question", "completion_column": "answer"},
            "1 rows with question and answer; not used: id",
        ),
    ],
)
def test_what_is_printed_of_forms(write_rows, capsys, rows, settings, printed):
    """The number of rows in each form is printed. So is the form that was taken if a row has two,
    and every key that is not used.
    """
    source = write_rows(rows)
    read_examples(source, GPT2_TOKENIZER, 1024, RowSettings(**settings))
    assert capsys.readouterr().out == f"{source}: {printed}\n"


def test_templates_give_the_training_prompts(write_rows):
    """The template of an example gives its prompt. What looks like a template in a row is text."""
    rows = [*ROWS, {"instruction": "{input} {{ m.input }} {% if %}", "output": "a"}]
    rows += [{"signature": "def f():", "docstring": "d"}]
    examples = read_examples(write_rows(rows), GPT2_TOKENIZER, 1024)
    for row, example in zip(rows, examples, strict=True):
        content = next(row[key] for key in ("instruction", "prompt", "signature") if key in row)
        question = {"role": "user", "content": content, "input": row.get("input")}
        assert ChatTemplate(example.template, GPT2_TOKENIZER).render([question]) == example.prompt
    assert "\n{input} {{ m.input }} {% if %}\n" in examples[-2].prompt


def test_rows_become_prompts_and_completions(write_rows):
    """Alpaca rows get Alpaca's prompt, with and without input; prompt-completion rows are used
    unchanged. Each example ends with one <|endoftext|>. An empty prompt becomes <|endoftext|>.
    """
    examples = read_examples(write_rows(ROWS), GPT2_TOKENIZER, 1024)
    texts = [TIKTOKEN.decode(e.tokens.tolist()) for e in examples]
    assert texts == [
        f"{TASK}. {END}Say hello.\n\n### Response:\nHello!<|endoftext|>",
        f"{LONG}Translate.\n\n### Input:\nBonjour\n\n### Response:\nHello — 你好<|endoftext|>",
        "2 + 2 = 4<|endoftext|>",
        "<|endoftext|>Once upon a time<|endoftext|>",
        "A<|endoftext|> b<|endoftext|>",
    ]
    for example, text in zip(examples, texts, strict=True):
        completion = TIKTOKEN.decode(example.tokens[example.n_prompt :].tolist())
        assert completion == example.completion.removesuffix("<|endoftext|>") + "<|endoftext|>"
        assert np.sum(example.tokens == 50256) == text.count("<|endoftext|>")


def test_rows_fit_any_window(write_rows):
    """Padding to a multiple of 8 never makes a row longer than block_size."""
    for block_size in (17, 60, 64):
        rows = [{"prompt": "a", "completion": " b" * n} for n in (5, 200)]
        examples = read_examples(write_rows(rows), GPT2_TOKENIZER, block_size)
        longest = max(examples, key=lambda example: len(example.tokens))
        assert block_size - 8 < pad([longest]).idx.shape[1] <= block_size


def test_only_completions_are_targets(write_rows):
    """The targets are the completion and its <|endoftext|>, each predicted from the token before
    it. Padding is never a target. `target_positions` lists exactly the targets.
    """
    examples = read_examples(write_rows(ROWS), GPT2_TOKENIZER, 1024)
    idx, targets, positions = pad(examples)
    assert torch.equal(positions, (targets.flatten() != IGNORE_INDEX).nonzero().flatten())
    assert idx.shape[1] % 8 == 0
    for row, example in enumerate(examples):
        (where,) = torch.nonzero(targets[row] != IGNORE_INDEX, as_tuple=True)
        assert targets[row, where].tolist() == example.tokens[example.n_prompt :].tolist()
        assert idx[row, where].tolist() == example.tokens[example.n_prompt - 1 : -1].tolist()
        assert (idx[row, len(example.tokens) - 1 :] == 0).all()


def test_examples_do_not_see_each_other(write_rows, tiny_model):
    """An example has the same loss alone and in a batch with others, even with longer ones."""
    examples = read_examples(write_rows(ROWS), GPT2_TOKENIZER, 1024)
    small = [make_example(e.tokens % 1000, e.n_prompt) for e in examples[2:]]
    small.append(make_example(np.arange(40), 3))

    def loss(batch: list[PromptCompletion]) -> float:
        idx, targets, _ = pad(batch)
        logits = tiny_model(idx % 1000)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()

    assert loss(small) == pytest.approx(sum(loss([example]) for example in small), rel=1e-5)


def test_long_rows(write_rows, capsys):
    """Long completions are cut. Rows with too long a prompt are skipped. Both are counted."""
    rows = [
        {"prompt": "a b c", "completion": " d" * 100},
        {"prompt": "a", "completion": " d" * 16},
        {"prompt": "a b" * 40, "completion": "c"},
        {"prompt": "a", "completion": "b"},
    ]
    source = write_rows(rows)
    examples = read_examples(source, GPT2_TOKENIZER, 16)
    assert [len(e.tokens) for e in examples] == [len(e.targets) for e in examples] == [17, 17, 3]
    assert mark(examples[1]) == f"a⟦{' d' * 16}⟧"
    assert capsys.readouterr().out == (
        f"{source}: 4 {PAIRS}; 1 rows skipped (prompt over 16 tokens); "
        "1 completions cut to fit; 2 completions without their end\n"
    )
    with pytest.raises(ValueError, match=r"has no usable rows"):
        read_examples(write_rows(rows[2:3]), GPT2_TOKENIZER, 16)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"x": "y"}, "its keys are x; expected prompt and completion, or .*, set prompt_column"),
        ({}, "its keys are none; expected"),
        ({"prompt": None, "completion": "x"}, "prompt is None, expected a string"),
        ({"prompt": 5, "completion": "x"}, "prompt is 5, expected a string"),
        ({"prompt": "x", "completion": " \n"}, "there is nothing to train on"),
        ({"instruction": "x", "output": ""}, "there is nothing to train on"),
        ({"instruction": "x", "output": None}, "output is None, expected a string"),
        ({"instruction": "x", "input": 5, "output": "x"}, "input is 5, expected a string"),
        ({"text": ""}, "there is nothing to train on"),
        ({"messages": "Hi"}, "messages is 'Hi', expected a list of messages"),
        ({"messages": ["Hi"]}, r"messages is \['Hi'\], expected a list of messages"),
        ({"messages": None}, "messages is None, expected a list of messages"),
        ({"messages": [message("tool", "x")]}, "role is 'tool', expected one of system, user"),
        ({"messages": [message(["user"], "x")]}, r"role is \['user'\], expected one of system"),
        ({"messages": [HI, message("assistant", None)]}, "content is None, expected a string"),
        ({"messages": [{"role": "user"}, HELLO]}, "'content' is missing"),
        ({"messages": [HI, HELLO | {"tool_calls": [{"id": 1}]}]}, "a message calls a tool"),
        ({"messages": [HELLO]}, "an answer of the assistant is missing"),
        ({"messages": []}, "an answer of the assistant is missing"),
        ({"messages": CHAT[:2]}, "an answer of the assistant is missing"),
        ({"messages": [HI, HELLO | {"weight": 0}]}, "an answer of the assistant is missing"),
        (
            {"messages": [HI, message("assistant", " "), BYE, CIAO]},
            "an answer of the assistant is .* empty",
        ),
        ({"prompt": [HI], "completion": "x"}, "completion is 'x', expected a list of messages"),
        ({"prompt": "x", "completion": [HELLO]}, r"completion is \[.*, expected a string"),
        ({"prompt": [HI, HELLO], "completion": [BYE]}, "an answer of the assistant is missing"),
    ],
)
def test_bad_rows_are_refused_or_skipped(write_rows, capsys, row, problem):
    """The error for a bad row has its line number and the remedy. With skip_bad_rows, the row is
    skipped and printed.
    """
    source = write_rows([PAIR, row, PAIR])
    with pytest.raises(ValueError, match=f"line 2: {problem}.*; repair it, or set skip_bad_rows$"):
        read_examples(source, GPT2_TOKENIZER, 1024)
    examples = read_examples(source, GPT2_TOKENIZER, 1024, RowSettings(skip_bad_rows=True))
    assert [mark(example) for example in examples] == ["A⟦b<|endoftext|>⟧"] * 2
    bad, summary = capsys.readouterr().out.splitlines()
    assert re.search(f"line 2: {problem}.*; skipped$", bad)
    assert summary == f"{source}: 2 {PAIRS}"


def test_only_the_default_data_skips_bad_rows_by_default(monkeypatch, capsys):
    """Bad rows of the default data are skipped and counted. For other data, and if the setting says
    so, a bad row is an error.
    """
    monkeypatch.setattr("engine.rows.load_hub_rows", lambda *_, **__: [PAIR, {}, {}, PAIR])
    assert len(read_examples(DEFAULT_DATA, GPT2_TOKENIZER, 1024)) == 2
    assert "skipped 2 bad rows in all" in capsys.readouterr().out
    for source, skip in ((DEFAULT_DATA, False), ("me/mine", None)):
        with pytest.raises(ValueError, match=f"{source} row 2: its keys are none"):
            read_examples(source, GPT2_TOKENIZER, 1024, RowSettings(skip_bad_rows=skip))
    assert len(read_examples("me/mine", GPT2_TOKENIZER, 64, RowSettings(skip_bad_rows=True))) == 2


def test_a_single_example_cannot_be_split(write_rows):
    """One example is enough to read, but not to hold one out."""
    examples = read_examples(write_rows(ROWS[:1]), GPT2_TOKENIZER, 1024)
    with pytest.raises(ValueError, match="only 1 usable example, expected at least 2"):
        split_examples(examples, 0.1, seed=0)


def test_lone_surrogates(write_rows):
    """Lone surrogates, which JSON can hold, become U+FFFD in every text. A pair is a character."""
    bad, good = "a\ud800b\udc00", "a\ufffdb\ufffd"
    rows = [{"prompt": bad, "completion": bad + "\ud83d\ude00"}]
    rows += [{"instruction": bad, "input": bad, "output": bad}]
    rows += [{"messages": [message("user", bad), message("assistant", bad)]}]
    pair, alpaca, chat = read_examples(write_rows(rows), GPT2_TOKENIZER, 1024)
    assert (pair.prompt, pair.completion) == (good, f"{good}😀")
    assert mark(pair) == f"{good}⟦{good}😀<|endoftext|>⟧"
    end = f"{good}\n\n### Input:\n{good}\n\n### Response:\n⟦{good}<|endoftext|>⟧"
    assert mark(alpaca).endswith(end)
    assert mark(chat) == f"### User:\n{good}\n\n### Assistant:\n⟦{good}<|endoftext|>⟧"


def test_stdlib_examples_are_signatures_and_docstrings(tmp_path, monkeypatch):
    """With the data "stdlib", each prompt is the signature of a standard library function, and its
    completion is the first paragraph of the docstring. Only paragraphs of 5 to 59 words are used.
    Each prompt appears once, always in the same order.
    """
    monkeypatch.setattr("sysconfig.get_path", lambda _: tmp_path)  # the real one takes seconds
    monkeypatch.setattr("engine.rows.load_hub_rows", pytest.fail)
    for name in ("heapq.py", "copy.py"):
        shutil.copy(heapq.__file__, tmp_path / name)
    functions = [f"def words{n}(): '{'word ' * n}\\n\\nMore.'\n" for n in (4, 5, 59, 60)]
    (tmp_path / "words.py").write_text("".join(functions))
    examples = read_examples("stdlib", GPT2_TOKENIZER, 1024)
    (merge,) = (e for e in examples if e.prompt.startswith("def merge(*iterables, key=None, rev"))
    assert merge.completion == "Merge multiple sorted inputs into a single sorted output."
    prompts = [e.prompt for e in examples]
    assert prompts == sorted(set(prompts), key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    assert {p for p in prompts if "words" in p} == {"def words5():\n", "def words59():\n"}


def test_every_example_once_an_epoch(examples):
    """Each epoch has every example once. Ranks and batch size do not change a step's examples."""
    expected = None
    for world_size, batch_size in ((1, 10), (1, 5), (2, 5), (5, 2), (10, 1)):
        steps = []
        for step in range(1, 11):  # two epochs
            n_targets = []  # of each example; the examples have different lengths
            for rank in range(world_size):
                sizes = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
                data = InstructionData(examples, examples_per_step=10, seed=3, **sizes)
                for micro_step in range(1, data.grad_accum_steps + 1):
                    targets = data.micro_batch(step, micro_step).targets
                    n_targets += [int((row != IGNORE_INDEX).sum()) for row in targets]
            assert sum(n_targets) == data.targets_in_step(step)
            steps.append(sorted(n_targets))
        assert expected in (None, steps)
        expected = steps
    lengths = sorted(len(e.tokens) - e.n_prompt for e in examples)
    assert sorted(chain(*expected[:5])) == sorted(chain(*expected[5:])) == lengths
    assert expected[:5] != expected[5:]
    assert data.tokens_through(5) == sum(len(e.tokens) - 1 for e in examples)
    assert data.tokens_through(10) == 2 * data.tokens_through(5)


def test_batches_with_graphs_have_few_lengths():
    """With CUDA graphs, batches have at most eight lengths, all of them listed. Rows keep all of
    their tokens, and get less padding than if all had the largest length.
    """
    examples = [make_example(np.arange(1, 3 * i), 2) for i in range(1, 51)]
    sizes = {"examples_per_step": 10, "batch_size": 2, "seed": 3}
    plain, rounded = (InstructionData(examples, **sizes) for _ in range(2))
    rounded.limit_lengths()
    assert plain.graph_lengths == ()
    widths, real_widths = [], []
    for step in range(1, 21):  # four epochs
        for micro_step in range(1, 6):
            batch, padded = (data.micro_batch(step, micro_step) for data in (plain, rounded))
            T = batch.idx.size(1)
            assert torch.equal(padded.idx[:, :T], batch.idx)
            assert torch.equal(padded.targets[:, :T], batch.targets)
            assert (padded.targets[:, T:] == IGNORE_INDEX).all()
            widths.append(padded.idx.size(1))
            real_widths.append(T)
    assert set(widths) <= set(rounded.graph_lengths)
    assert len(rounded.graph_lengths) <= 8 < len(set(real_widths))
    assert max(widths) == max(real_widths)
    assert sum(widths) < 1.1 * sum(real_widths)


def test_lengths_are_chosen_for_little_padding():
    """Of many equal lengths and a few outliers, the common ones stay, and the largest does."""
    assert choose_lengths([8] * 50 + [16] + [24] * 50 + [64] * 2 + [72], 3) == [8, 24, 72]
    assert choose_lengths([8, 16], 3) == [8, 16]


def test_the_fingerprint_identifies_the_data(examples, write_rows):
    """The fingerprint changes with the examples, their order, and where a prompt ends. For prompts
    and completions it is what it always was, so that old runs resume.
    """

    def make_data(examples: list[PromptCompletion], **sizes: int) -> InstructionData:
        sizes = {"batch_size": 1, "examples_per_step": 1, "seed": 0, **sizes}
        return InstructionData(examples, **sizes)

    first = examples[0]
    moved = make_example(first.tokens, first.n_prompt + 1)
    variants = (examples, examples[:-1], examples[::-1], [moved, *examples[1:]])
    assert len({make_data(variant).fingerprint for variant in variants}) == 4
    for variant in (examples, read_examples(write_rows(ROWS), GPT2_TOKENIZER, 64)):
        contents = "".join(repr((e.n_prompt, e.tokens.tolist())) for e in variant)
        assert make_data(variant).fingerprint == hashlib.sha256(contents.encode()).hexdigest()
    with pytest.raises(ValueError, match="examples_per_step 10 is not a multiple of batch_size 4"):
        make_data(examples, batch_size=4, examples_per_step=10)


def test_the_fingerprint_sees_which_answers_are_predicted(write_rows):
    """Conversations with the same tokens, of which other answers are predicted, are other data."""
    fingerprints = set()
    for hello in (HELLO, HELLO | {"weight": 0}, HELLO | {"weight": 1}):
        source = write_rows([{"messages": [HI, hello, BYE, CIAO]}])
        examples = read_examples(source, GPT2_TOKENIZER, 1024)
        data = InstructionData(examples, batch_size=1, examples_per_step=1, seed=0)
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2


def test_summary(examples):
    """The summary gives the sizes of a step and of the data."""
    data = InstructionData(examples, batch_size=5, examples_per_step=20, seed=0, world_size=2)
    tokens = sum(len(e.tokens) - 1 for e in examples)
    predicted = sum(len(e.tokens) - e.n_prompt for e in examples)
    assert data.summary() == (
        f"{data.tokens_through(1):,} tokens in the first step: 5 rows of up to {data.block_size} "
        "tokens x 2 ranks x grad_accum_steps 2\n"
        f"data: 50 examples with {tokens:,} tokens, {predicted:,} of them predicted; an epoch is "
        "2.5 steps"
    )


def test_held_out(examples):
    """The split is disjoint, complete and seeded. Together the ranks evaluate each held-out example
    once, and every rank gets the same number of batches.
    """
    train, held_out = split_examples(examples, 0.2, seed=1)
    assert (len(train), len(held_out)) == (40, 10)
    assert {id(e) for e in [*train, *held_out]} == {id(e) for e in examples}
    again = split_examples(examples, 0.2, seed=1)[1]
    assert [id(e) for e in held_out] == [id(e) for e in again]
    assert [id(e) for e in held_out] != [id(e) for e in split_examples(examples, 0.2, 2)[1]]
    assert len(split_examples(examples, 0.001, 1)[1]) == 1
    assert len(split_examples(examples, 0.999, 1)[0]) == 1
    expected = sorted(len(e.tokens) - e.n_prompt for e in held_out)
    for world_size in (1, 2, 3, 4):
        batches = [
            list(held_out_batches(held_out, batch_size=3, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert len({len(b) for b in batches}) == 1
        counts = [int((row != -100).sum()) for b in batches for batch in b for row in batch.targets]
        assert sorted(c for c in counts if c) == expected
