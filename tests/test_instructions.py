import hashlib
import heapq
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2_TOKENIZER, TIKTOKEN

from engine.data import IGNORE_INDEX
from engine.instructions import (
    InstructionData,
    PromptCompletion,
    find_prompt_template,
    held_out_batches,
    pad,
    read_examples,
    save_prompt_template,
    split_examples,
)

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello — 你好"},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "", "completion": "Once upon a time"},
    {"prompt": "A<|endoftext|>", "completion": " b<|endoftext|>"},
]


@pytest.fixture
def examples(write_rows):
    """50 examples of different lengths."""
    rows = [{"prompt": "word " * (i % 7 + 1), "completion": "x " * i} for i in range(1, 51)]
    return read_examples(write_rows(rows), GPT2_TOKENIZER, 1024)


def test_filled_templates_equal_training_prompts(write_rows, tmp_path):
    """A run saves the template that most of its rows use. find_prompt_template finds it for the run
    folder, a checkpoint, or a file in a checkpoint. Filled in, it gives the training prompts.
    """
    examples = read_examples(write_rows(ROWS), GPT2_TOKENIZER, 1024)
    assert examples[0].template.fill("Say hello.") == examples[0].prompt
    assert examples[1].template.fill("Translate.", "Bonjour") == examples[1].prompt
    assert examples[2].template.fill("2 + 2 =") == examples[2].prompt
    assert "{input} and {instruction}\n" in examples[0].template.fill("{input} and {instruction}")
    with pytest.raises(ValueError, match="has no place for an input; omit input"):
        examples[2].template.fill("2 + 2 =", "x")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "lora.pt").touch()
    assert find_prompt_template(checkpoint) is None
    save_prompt_template([examples[0], examples[2], examples[1]], tmp_path / "run")
    for path in (tmp_path / "run", checkpoint, checkpoint / "lora.pt"):
        assert find_prompt_template(path) == examples[0].template
    assert find_prompt_template(tmp_path / "run" / "nowhere") is None
    for content in ('{"with_input": "x"}', '{"without_input": 1}', '{"prompt": "x"}', "[1]", "{"):
        (tmp_path / "run" / "prompt_template.json").write_text(content)
        with pytest.raises(ValueError, match=r"prompt_template.json is damaged"):
            find_prompt_template(checkpoint)


def test_rows_become_prompts_and_completions(write_rows):
    """Alpaca rows get Alpaca's prompt, with and without input; prompt-completion rows are used
    unchanged. Each example ends with one <|endoftext|>. An empty prompt becomes <|endoftext|>.
    """
    examples = read_examples(write_rows(ROWS), GPT2_TOKENIZER, 1024)
    texts = [TIKTOKEN.decode(e.tokens.tolist()) for e in examples]
    task = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    long = f"{task}, paired with an input that provides further context. {end}"
    assert texts == [
        f"{task}. {end}Say hello.\n\n### Response:\nHello!<|endoftext|>",
        f"{long}Translate.\n\n### Input:\nBonjour\n\n### Response:\nHello — 你好<|endoftext|>",
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
    small = [PromptCompletion("", "", e.tokens % 1000, e.n_prompt) for e in examples[2:]]
    small.append(PromptCompletion("", "", np.arange(40), 3))

    def loss(batch: list[PromptCompletion]) -> float:
        idx, targets, _ = pad(batch)
        logits = tiny_model(idx % 1000)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()

    assert loss(small) == pytest.approx(sum(loss([example]) for example in small), rel=1e-5)


def test_long_and_empty_rows(write_rows, capsys):
    """Long completions are cut. Rows with an empty completion or too long a prompt are skipped."""
    rows = [
        {"prompt": "a b c", "completion": " d" * 100},
        {"prompt": "a", "completion": " "},
        {"prompt": "a b" * 40, "completion": "c"},
        {"prompt": "a", "completion": "b"},
    ]
    examples = read_examples(write_rows(rows), GPT2_TOKENIZER, 16)
    assert [len(e.tokens) for e in examples] == [17, 3]
    assert "skipped 2 of 4 rows" in capsys.readouterr().out


def test_bad_rows_are_refused(write_rows):
    """The error for a malformed row has its line number. A single example is also an error."""
    for rows, match in (
        ([{"text": "x"}], "line 1: its keys are text; expected instruction and output"),
        ([{"prompt": 5, "completion": "x"}], "line 1: prompt is 5, expected a string"),
        ([ROWS[0]], "has 1 usable examples, expected at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            read_examples(write_rows(rows), GPT2_TOKENIZER, 1024)


def test_stdlib_examples_are_signatures_and_docstrings(tmp_path, monkeypatch):
    """With the data "stdlib", each prompt is the signature of a standard library function, and its
    completion is the first paragraph of the docstring. Only paragraphs of 5 to 59 words are used.
    Each prompt appears once, always in the same order.
    """
    monkeypatch.setattr("sysconfig.get_path", lambda _: tmp_path)  # the real one takes seconds
    monkeypatch.setattr("engine.rows.load_hub_rows", None)
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


def test_the_fingerprint_identifies_the_data(examples):
    """The fingerprint changes with the examples, their order, and where a prompt ends."""

    def make_data(examples: list[PromptCompletion], **sizes: int) -> InstructionData:
        sizes = {"batch_size": 1, "examples_per_step": 1, "seed": 0, **sizes}
        return InstructionData(examples, **sizes)

    first = examples[0]
    moved = PromptCompletion(first.prompt, first.completion, first.tokens, first.n_prompt + 1)
    variants = (examples, examples[:-1], examples[::-1], [moved, *examples[1:]])
    assert len({make_data(variant).fingerprint for variant in variants}) == 4
    with pytest.raises(ValueError, match="examples_per_step 10 is not a multiple of batch_size 4"):
        make_data(examples, batch_size=4, examples_per_step=10)


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
