import gzip
import json
from itertools import chain

import numpy as np
import pytest
import torch

import instructions
from instructions import (
    Example,
    InstructionData,
    default_data,
    held_out_batches,
    pad,
    read_examples,
    split_examples,
)
from tokenizer import END_OF_TEXT_ID, IGNORE_INDEX, get_tokenizer

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": "Translate.", "input": "Bonjour", "output": "Hello — 你好"},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "", "completion": "Once upon a time"},
]


@pytest.fixture
def write(tmp_path):
    def write(rows: list, name: str = "rows.jsonl"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(json.dumps(rows) if name.endswith(".json") else lines)
        return str(tmp_path / name)

    return write


@pytest.fixture
def examples(write):
    """50 examples of different lengths."""
    rows = [{"prompt": "word " * (i % 7 + 1), "completion": "x " * i} for i in range(1, 51)]
    return read_examples(write(rows), 1024)


def test_rows_become_prompts_and_completions(write):
    """Alpaca's rows get Alpaca's prompt, with and without input; prompts and completions are taken
    as they are. An example ends with <|endoftext|>; an empty prompt is one.
    """
    tokenizer = get_tokenizer()
    examples = read_examples(write(ROWS), 1024)
    texts = [tokenizer.decode(e.tokens.tolist()) for e in examples]
    task = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    long = f"{task}, paired with an input that provides further context. {end}"
    assert texts == [
        f"{task}. {end}Say hello.\n\n### Response:\nHello!<|endoftext|>",
        f"{long}Translate.\n\n### Input:\nBonjour\n\n### Response:\nHello — 你好<|endoftext|>",
        "2 + 2 = 4<|endoftext|>",
        "<|endoftext|>Once upon a time<|endoftext|>",
    ]
    for example in examples:
        completion = tokenizer.decode(example.tokens[example.n_prompt :].tolist())
        assert completion == example.completion + "<|endoftext|>"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_file_formats(write, tmp_path, name):
    """JSON, JSONL and gzip of it hold the same."""
    path = write(ROWS, name)
    if name.endswith(".gz"):
        with gzip.open(path, "wt") as file:
            file.write("\n".join(map(json.dumps, ROWS)) + "\n\n")
    prompts = [e.prompt for e in read_examples(path, 1024)]
    assert prompts == [e.prompt for e in read_examples(write(ROWS, "other.jsonl"), 1024)]


def test_line_separators_inside_strings(tmp_path):
    """Characters that Unicode counts as line ends do not end a line of JSONL."""
    rows = [{"prompt": f"a{c}b", "completion": "x"} for c in "\u2028\u2029\x85"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    assert [e.prompt for e in read_examples(str(tmp_path / "rows.jsonl"), 64)] == [
        row["prompt"] for row in rows
    ]


def test_rows_fit_any_window(write):
    """Padding to a multiple of 8 never makes a row longer than the model's window."""
    for block_size in (17, 60, 64):
        rows = [{"prompt": "a", "completion": " b" * n} for n in (5, 200)]
        examples = read_examples(write(rows), block_size)
        longest = max(examples, key=lambda example: len(example.tokens))
        assert block_size - 8 < pad([longest])[0].shape[1] <= block_size


def test_only_completions_are_targets(write):
    """The loss counts the completion and its end, each from the token before; no padding token is a
    target.
    """
    examples = read_examples(write(ROWS), 1024)
    idx, targets = pad(examples)
    assert idx.shape[1] % 8 == 0
    for row, example in enumerate(examples):
        (where,) = np.nonzero(targets[row] != IGNORE_INDEX)
        assert targets[row, where].tolist() == example.tokens[example.n_prompt :].tolist()
        assert idx[row, where].tolist() == example.tokens[example.n_prompt - 1 : -1].tolist()
        assert (idx[row, len(example.tokens) - 1 :] == END_OF_TEXT_ID).all()


def test_examples_do_not_see_each_other(write, tiny_model):
    """An example's loss is the same alone and in a batch with others, longer ones included."""
    examples = read_examples(write(ROWS), 1024)
    small = [Example("", "", e.tokens % 1000, e.n_prompt) for e in examples[2:]]
    small.append(Example("", "", np.arange(40), 3))

    def loss(batch: list[Example]) -> float:
        idx, targets = map(torch.from_numpy, pad(batch))
        return tiny_model.loss(idx % 1000, targets, "sum").item()

    assert loss(small) == pytest.approx(sum(loss([example]) for example in small), rel=1e-5)


def test_long_and_empty_rows(write, capsys):
    """A completion that does not fit is cut; a row without completion, or with too long a prompt,
    is left out and counted.
    """
    rows = [
        {"prompt": "a b c", "completion": " d" * 100},
        {"prompt": "a", "completion": " "},
        {"prompt": "a b" * 40, "completion": "c"},
        {"prompt": "a", "completion": "b"},
    ]
    examples = read_examples(write(rows), 16)
    assert [len(e.tokens) for e in examples] == [17, 3]
    assert "2 of 4 rows left out" in capsys.readouterr().out


def test_bad_rows_are_named(write, tmp_path):
    """A row of another form, a broken line and a file that is none are errors with their place."""
    for rows, match in (
        ([{"text": "x"}], "row 1 has text; expected instruction, input, output, or prompt"),
        ([*ROWS, "x"], "row 5 is a str, expected an object"),
        ([{"prompt": 5, "completion": "x"}], "row 1: prompt is 5, expected a string"),
        ([ROWS[0]], "has 1 usable examples, expected at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            read_examples(write(rows), 1024)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prom')
    with pytest.raises(ValueError, match=r"broken.jsonl line 2 is no JSON"):
        read_examples(str(tmp_path / "broken.jsonl"), 1024)
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a dict, expected a list of rows"):
        read_examples(str(tmp_path / "object.json"), 1024)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-4])
    with pytest.raises(ValueError, match="is damaged or no text"):
        read_examples(str(tmp_path / "cut.jsonl.gz"), 1024)


def test_without_a_hub(monkeypatch, capsys):
    """Without data named and without a hub, pairs from Python's own docstrings stand in, with a
    line that says so; a data set that was named is an error.
    """

    def unreachable(name):
        raise ConnectionError(f"the hub did not give {name}")

    monkeypatch.setattr(instructions, "_hub_rows", unreachable)
    assert default_data() == "stdlib"
    examples = read_examples("stdlib", 1024)
    assert "did not give yahma/alpaca-cleaned; going on with --data stdlib" in (
        capsys.readouterr().out
    )
    assert len(examples) > 1000
    assert any(e.prompt.startswith("def merge(*iterables, key=None, reverse") for e in examples)
    with pytest.raises(ConnectionError, match="did not give some/data"):
        read_examples("some/data", 1024)


def test_every_example_once_an_epoch(examples):
    """An epoch holds each example once; steps are the same set whatever ranks and batch size."""
    expected = None
    for world_size, batch_size in ((1, 10), (1, 5), (2, 5), (5, 2), (10, 1)):
        steps = []
        for step in range(1, 11):  # two epochs
            rows = []
            for rank in range(world_size):
                data = InstructionData(examples, batch_size, 10, 3, rank, world_size)
                for micro_step in range(1, data.grad_accum_steps + 1):
                    targets = data.micro_batch(step, micro_step)[1]
                    rows += [int((row != IGNORE_INDEX).sum()) for row in targets]
            assert sum(rows) == data.targets_in_step(step)
            steps.append(sorted(rows))
        assert expected in (None, steps)
        expected = steps
    lengths = sorted(len(e.tokens) - e.n_prompt for e in examples)
    assert sorted(chain(*expected[:5])) == sorted(chain(*expected[5:])) == lengths
    assert expected[:5] != expected[5:]
    assert data.tokens_through(5) == sum(len(e.tokens) - 1 for e in examples)
    assert data.tokens_through(10) == 2 * data.tokens_through(5)


def test_fingerprint_tells_data_apart(examples):
    """Other examples, another order or another border of the prompt have another fingerprint."""
    prints = {InstructionData(e, 1, 1, 0).fingerprint for e in (examples, examples[:-1])}
    prints.add(InstructionData(examples[::-1], 1, 1, 0).fingerprint)
    first = examples[0]
    moved = Example(first.prompt, first.completion, first.tokens, first.n_prompt + 1)
    prints.add(InstructionData([moved, *examples[1:]], 1, 1, 0).fingerprint)
    assert len(prints) == 4
    with pytest.raises(ValueError, match="examples_per_step 10 is no multiple of batch_size 4"):
        InstructionData(examples, 4, 10, 0)


def test_held_out(examples):
    """The split is disjoint, complete, and the seed's; evaluation covers each held-out example once
    over all ranks, with as many batches on each.
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
        batches = [list(held_out_batches(held_out, 3, r, world_size)) for r in range(world_size)]
        assert len({len(b) for b in batches}) == 1
        counts = [int((row != -100).sum()) for b in batches for _, t in b for row in t]
        assert sorted(c for c in counts if c) == expected
