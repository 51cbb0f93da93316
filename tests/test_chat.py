"""Chat templates: masks, ids and files, compared to transformers and to text written by hand."""

import json
import random
from collections.abc import Callable
from copy import copy
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2_TOKENIZER, HELLASWAG_ROWS, TIKTOKEN
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import NFKC, Normalizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine import chat
from engine.chat import ChatTemplate, Messages, find_chat_template
from engine.data import IGNORE_INDEX
from engine.instructions import RowSettings, encode_conversation, read_examples, set_chat_template
from engine.tokenizer import Tokenizer

CHATML = (  # as in many models on the hub
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OURS = {"plain": chat.PLAIN_TEMPLATE, "docstring": chat.DOCSTRING_TEMPLATE}
OURS |= {"chat": chat.CHAT_TEMPLATE, "alpaca": chat.ALPACA_TEMPLATE}
# The prompts in Stanford Alpaca's train.py, without and with an input.
TASK = "Below is an instruction that describes a task"
END = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
LONG = f"{TASK}, paired with an input that provides further context. {END}"
ALPACA = {"instruction": "Add.", "input": "1, 2", "output": "3"}
PAIR = {"prompt": "A", "completion": "b"}
OPTIONS = {"add_generation_prompt": True, "return_dict": False}  # ids of a prompt


def make_chat(*contents: str, system: str = "") -> Messages:
    """Make a conversation of user and assistant."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + messages


TURNS = make_chat("Hi", " Hello\n 世界😀 ", "Bye?", "Ciao!", system="Be brief.")


def mark_predicted(tokens: np.ndarray, targets: np.ndarray, decode: Callable) -> str:
    """Return the text of tokens, with ⟦⟧ around what is predicted."""
    assert set(targets[targets != tokens].tolist()) <= {IGNORE_INDEX}
    groups = groupby(zip(tokens.tolist(), targets.tolist(), strict=True), lambda pair: pair[1] >= 0)
    texts = [(is_target, decode([token for token, _ in pairs])) for is_target, pairs in groups]
    return "".join(f"⟦{text}⟧" if is_target else text for is_target, text in texts)


def unmark(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def gpt2_with(template: str | None) -> Tokenizer:
    """Return GPT-2's tokenizer with a chat template."""
    tokenizer = copy(GPT2_TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


@cache
def train_backend() -> str:
    """Train a small tokenizer, because GPT-2's takes a second to load. Return its JSON."""
    backend = Tokenizer.train([HELLASWAG_ROWS.read_text().splitlines()], 600, "small").backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    return backend.to_str()


def make_chatml(
    template: object = CHATML, normalizer: Normalizer | None = None, **config: str
) -> Tokenizer:
    """Make a tokenizer with the special tokens of ChatML."""
    backend = Backend.from_str(train_backend())
    if normalizer:
        backend.normalizer = normalizer
    config = {"eos_token": "<|im_end|>", "chat_template": template, **config}
    return Tokenizer(backend, {"tokenizer_config.json": json.dumps(config).encode()}, "chatml")


def save_and_load(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer. Return what transformers loads."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode(messages: Messages, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, and those that are predicted."""
    example = encode_conversation(messages, ChatTemplate(tokenizer.chat_template, tokenizer))
    return example.tokens, example.targets


def test_answers_and_their_ends_are_predicted():
    """Of a conversation, exactly the assistant's turns and what ends them are predicted. The prompt
    is the text before the last answer.
    """
    text = (
        "Be brief.\n\n### User:\nHi\n\n### Assistant:\n⟦Hello\n 世界😀<|endoftext|>⟧"
        "### User:\nBye?\n\n### Assistant:\n⟦Ciao!<|endoftext|>⟧"
    )
    assert mark_predicted(*encode(TURNS, gpt2_with(chat.CHAT_TEMPLATE)), TIKTOKEN.decode) == text
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦ Hello\n 世界😀 <|im_end|>\n⟧<|im_start|>user\nBye?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Ciao!<|im_end|>\n⟧"
    )
    tokenizer = make_chatml()
    assert mark_predicted(*encode(TURNS, tokenizer), tokenizer.decode) == text
    e = encode_conversation(TURNS, ChatTemplate(CHATML, tokenizer))
    ids, prompt, n_prompt = e.tokens, e.prompt, e.n_prompt
    assert prompt == unmark(text).removesuffix("Ciao!<|im_end|>\n")
    assert tokenizer.decode(ids[:n_prompt].tolist()) == prompt


PIECES = ["Hi", " the", "  ", "\n", "\n\n", "\t", "日本", "😀👨‍👩", "e\u0301", "\ufb01", "½", "'s"]
PIECES += ["12", "def f():\n    ", "###", "### User:\n", "<|", "\x00", "\u2028", "\u3000", ".", "ß"]
STARTS = ("", " ", "  ", "\n", "\n\n ", "\u3000")  # some of them join the last token of the prompt


@pytest.fixture(scope="module")
def transformers_gpt2(tmp_path_factory) -> PreTrainedTokenizerFast:
    return save_and_load(GPT2_TOKENIZER, tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("name", [*OURS, "chatml", "nfkc"])
def test_masks_agree_with_transformers(tmp_path, transformers_gpt2, name):
    """For random conversations, ids and predicted tokens are those of transformers, for the same
    template with {% generation %} around the answers and what ends them.
    """
    if name in OURS:
        template, answer = OURS[name], "{{ m.content | trim }}{{ eos_token }}"
        tokenizer, theirs = gpt2_with(template), transformers_gpt2
        reference = f"{{% generation %}}{answer}{{% endgeneration %}}".join(template.split(answer))
    else:
        tokenizer = make_chatml(normalizer=NFKC() if name == "nfkc" else None)
        theirs = save_and_load(tokenizer, tmp_path)
        reference = (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
            "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
            "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
            "{% endfor %}"
        )
    rng = random.Random(0)
    for _ in range(60):
        texts = ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(9)]
        texts[1::2] = [rng.choice(STARTS) + rng.choice("aé世'1") + text for text in texts[1::2]]
        messages = make_chat(*texts[: 2 * rng.randint(1, 4)], system=texts[8] * rng.randrange(2))
        ids, targets = encode(messages, tokenizer)
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, chat_template=reference, **options)
        assert ids.tolist() == expected["input_ids"]
        assert (targets != IGNORE_INDEX).astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", [*OURS, "chatml"])
def test_a_saved_tokenizer_builds_the_training_ids(tmp_path, name):
    """transformers reads the template in a saved folder, and gives the ids of training, and those
    of the prompt for a new answer.
    """
    tokenizer = gpt2_with(OURS[name]) if name == "alpaca" else make_chatml(OURS.get(name, CHATML))
    theirs = save_and_load(tokenizer, tmp_path)
    ids = theirs.apply_chat_template(TURNS, return_dict=False)
    assert encode(TURNS, tokenizer)[0].tolist() == ids
    messages = [*TURNS, {"role": "user", "content": "Add.", "input": "1, 2"}]
    prompt = ChatTemplate(tokenizer.chat_template, tokenizer).render(
        messages, add_generation_prompt=True
    )
    assert tokenizer.encode(prompt) == theirs.apply_chat_template(messages, **OPTIONS)


def read_template(folder: Path) -> tuple[object, bytes | None]:
    """Return the chat template in tokenizer_config.json, and the file chat_template.jinja."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "chat_template.jinja"
    return config.get("chat_template"), file.read_bytes() if file.exists() else None


@pytest.mark.parametrize("place", ["file", "config", "list"])
def test_templates_of_a_base(tmp_path, write_rows, place):
    """A base's own chat template is kept byte for byte by conversations, prompts with completions,
    and text. Rows in Alpaca's form replace it.
    """
    base = tmp_path / "base"
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    theirs = save_and_load(make_chatml(several if place == "list" else CHATML), base)
    if place == "file":
        theirs.save_pretrained(base)
        assert read_template(base) == (None, CHATML.encode())
    for i, rows in enumerate(([{"messages": TURNS}], [PAIR, PAIR, ALPACA], [{"text": "A"}])):
        tokenizer = Tokenizer.from_folder(base)
        examples = read_examples(write_rows(rows), tokenizer, 128)
        set_chat_template(tokenizer, examples)
        ids = save_and_load(tokenizer, tmp_path / f"{i}").apply_chat_template(
            TURNS, return_dict=False
        )
        assert ids == theirs.apply_chat_template(TURNS, chat_template=CHATML, return_dict=False)
        assert read_template(tmp_path / f"{i}") == read_template(base)
        assert i > 0 or examples[0].tokens.tolist() == ids
    rows = [ALPACA, {"messages": TURNS}, ALPACA]
    set_chat_template(tokenizer, read_examples(write_rows(rows), tokenizer, 128))
    assert save_and_load(tokenizer, tmp_path / "new").chat_template == chat.ALPACA_TEMPLATE
    assert read_template(tmp_path / "new") == (chat.ALPACA_TEMPLATE, None)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": TURNS}], chat.CHAT_TEMPLATE),
        ([ALPACA, PAIR, PAIR], chat.PLAIN_TEMPLATE),
        ([PAIR, ALPACA, ALPACA], chat.ALPACA_TEMPLATE),
        ([{"signature": "def f():", "docstring": "d"}], chat.DOCSTRING_TEMPLATE),
        ([{"text": "A"}], None),
    ],
)
def test_the_template_of_most_rows_is_saved(write_rows, rows, expected):
    """A base without a chat template gets the one of most rows. Plain text has none."""
    tokenizer = make_chatml(None)
    set_chat_template(tokenizer, read_examples(write_rows(rows), tokenizer, 128))
    assert tokenizer.chat_template == expected


@pytest.mark.parametrize("config", [{"bos_token": "<s>"}, {}])
@pytest.mark.parametrize(
    "row",
    [PAIR, ALPACA, {"signature": "f():", "docstring": "d"}, {"messages": make_chat("Add.", "3")}],
)
def test_a_tokenizer_with_a_start_token(tmp_path, write_rows, row, config):
    """If the tokenizer puts a token before a text, prompts in training start with one, and so do
    those that transformers builds with the saved chat template.
    """
    tokenizer = make_chatml(None, **config)
    start = tokenizer.vocab["<s>"]
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.backend.post_processor = processor
    (example,) = read_examples(write_rows([row]), tokenizer, 128)
    set_chat_template(tokenizer, [example])
    content = row.get("prompt") or row.get("signature") or "Add."
    question = {"role": "user", "content": content, "input": row.get("input")}
    ids = save_and_load(tokenizer, tmp_path / "saved").apply_chat_template([question], **OPTIONS)
    assert example.tokens[: example.n_prompt].tolist() == ids
    assert [i for i, token in enumerate(ids) if token == start] == [0]


@pytest.mark.parametrize("instruction", ["Add.", " \nAdd:\n", "{{ m.input }}{% if %}{input}"])
def test_alpaca_template(instruction):
    """The Alpaca template gives the prompts of Stanford Alpaca. What looks like Jinja is text."""
    for given in ("", None, "1, 2", "\n {{ 1 }} "):
        middle = f"\n\n### Input:\n{given}" if given else ""
        expected = f"{LONG if given else f'{TASK}. {END}'}{instruction}{middle}\n\n### Response:\n"
        messages = [{"role": "user", "content": instruction, "input": given}]
        assert ChatTemplate(chat.ALPACA_TEMPLATE, GPT2_TOKENIZER).render(messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "(m['content'] if loop.last else '')"),
        CHATML + "{% if not add_generation_prompt %}The end.{% endif %}",
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
    ],
    ids=["drops_answers", "appends", "starts_answers"],
)
def test_templates_in_which_answers_cannot_be_found(write_rows, template):
    """A template whose text for the beginning of a conversation is not the beginning of its text
    is refused, because the wrong tokens would be predicted.
    """
    source = write_rows([{"messages": TURNS}])
    with pytest.raises(ValueError, match=r"line 1: the chat template .* edit the template"):
        read_examples(source, make_chatml(template), 128)


@pytest.mark.parametrize(
    "template",
    [
        "{{''.__class__.__mro__[1].__subclasses__()}}",
        "{{cycler.__init__.__globals__.os.system('touch\tHERE')}}",
        "{{messages.clear()}}",
        "{{raise_exception('roles_must_alternate')}}",
        "{{messages[9].content}}",
        "{%if%}",
        "{{none+1}}",
        "{{1/0}}",
        "{%for\ti\tin\trange(999999999)%}x{%endfor%}",
        "{{'{}{}'.format(1)}}",
        "{%macro\tf()%}{{f()}}{%endmacro%}{{f()}}",
        "{{''}}",
    ],
)
def test_templates_that_fail(tmp_path, monkeypatch, write_rows, capsys, template):
    """A template cannot run code. If it fails, or refuses a conversation, that is the row's error,
    which skip_bad_rows skips.
    """
    monkeypatch.chdir(tmp_path)
    source, tokenizer = write_rows([{"messages": TURNS}] * 2 + [PAIR]), make_chatml(template)
    with pytest.raises(ValueError, match="line 1: the chat template "):
        read_examples(source, tokenizer, 128)
    assert len(read_examples(source, tokenizer, 128, RowSettings(skip_bad_rows=True))) == 1
    assert "skipped 2 bad rows in all" in capsys.readouterr().out
    assert not (tmp_path / "HERE").exists()


def test_long_conversations_drop_their_oldest_turns(write_rows, capsys):
    """Of a conversation that does not fit, the system message and as many of the last turns as fit
    are left. If the last turn does not fit, it is cut, which is counted.
    """
    pairs = [(f"Question {i}?", f"Answer {i}" + " so" * (9 * i + 1)) for i in range(5)]
    source = write_rows([{"messages": make_chat(*chain(*pairs), system="Be brief.")}])
    turn = "### User:\n{}\n\n### Assistant:\n⟦{}<|endoftext|>⟧"
    turns = [turn.format(*pair) for pair in pairs]
    lefts = set()
    for block_size in range(32, 208, 8):
        for n_left in (5, 4, 3, 2, 1):
            expected = "Be brief.\n\n" + "".join(turns[-n_left:])
            ids = TIKTOKEN.encode(unmark(expected), allowed_special="all")
            if len(ids) <= block_size + 1:
                break
        (example,) = read_examples(source, GPT2_TOKENIZER, block_size)
        assert example.tokens.tolist() == ids[: block_size + 1]
        if is_cut := len(ids) > block_size + 1:
            expected = f"{TIKTOKEN.decode(ids[: block_size + 1])}⟧".replace("Answer", "⟦Answer")
        assert mark_predicted(example.tokens, example.targets, TIKTOKEN.decode) == expected
        printed = capsys.readouterr().out
        assert ("1 completions without their end" in printed) == is_cut
        assert ("1 completions cut to fit" in printed) == (len(ids) > block_size + 2)
        assert ("1 conversations without their oldest turns" in printed) == (n_left < 5)
        lefts.add((n_left, is_cut))
    assert lefts == {(1, True), (1, False), (2, False), (3, False), (4, False), (5, False)}
    source = write_rows([{"messages": make_chat("Hi", "Hello", "so " * 99, "a")}, PAIR])
    assert len(read_examples(source, GPT2_TOKENIZER, 64)) == 1
    assert "1 rows skipped (prompt over 64 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plain", "docstring"])
def test_conversations_replace_a_template_without_roles(write_rows, name):
    """If the template of the base does not tell who is speaking, conversations get ours."""
    tokenizer = Tokenizer.gpt2()
    tokenizer.chat_template = OURS[name]
    examples = read_examples(write_rows([{"messages": make_chat("Hi", "Hello")}]), tokenizer, 64)
    assert examples[0].prompt == "### User:\nHi\n\n### Assistant:\n"
    set_chat_template(tokenizer, examples)
    assert tokenizer.chat_template == chat.CHAT_TEMPLATE


def test_a_prompt_leaves_room_for_its_answer():
    """When sampling, the conversation ends with a question, which stays. The prompt for an answer
    is what has to fit.
    """
    conversation = ChatTemplate(CHATML, make_chatml())
    messages = make_chat("one", "two", "three", "four", "five", system="Be brief.")
    kept = [messages, messages[:1] + messages[3:], messages[:1] + messages[5:]]
    prompts = [conversation.render(m, add_generation_prompt=True) for m in kept]
    for i, n_tokens in enumerate(len(conversation.tokenizer.encode(p)) for p in prompts):
        assert conversation.fit(messages, n_tokens) == kept[i]
        assert conversation.fit(messages, n_tokens - 1) == kept[min(i + 1, 2)]
    assert conversation.fit(messages[1:], n_tokens - 1) == messages[5:]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The folder of an adapter in a run."""
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    (folder / "lora.pt").touch()
    return folder


def test_templates_are_found(checkpoint):
    """The chat template of an adapter is in its checkpoint folder, also if a file in it is given.
    Otherwise it is the tokenizer's.
    """
    base, run = gpt2_with(CHATML), checkpoint.parents[1]
    paths = (checkpoint, checkpoint / "lora.pt", checkpoint / "missing.pt", run, Path("me/mine"))
    assert [find_chat_template(path, base) for path in paths] == [CHATML] * 5
    assert find_chat_template(checkpoint, gpt2_with(None)) is None
    for template, write in (
        (chat.ALPACA_TEMPLATE, lambda: gpt2_with(chat.ALPACA_TEMPLATE).save(checkpoint)),
        ("a file", lambda: (checkpoint / "chat_template.jinja").write_text("a file")),
    ):
        write()
        found = [find_chat_template(path, base) for path in paths]
        assert found == [template] * 2 + [CHATML] * 3


def test_templates_of_old_runs(checkpoint):
    """For a run of an earlier version, prompts are the same as in prompt_template.json."""
    file = checkpoint.parents[1] / "prompt_template.json"
    file.write_text('{"without_input": "Task:\\n{instruction}\\n\\nAnswer:\\n"}')
    for path in (file.parent, checkpoint, checkpoint / "lora.pt"):
        tokenizer = gpt2_with(find_chat_template(path, gpt2_with(CHATML)))
        prompt = ChatTemplate(tokenizer.chat_template, tokenizer).render(
            make_chat("{instruction} {{ 1 }}")
        )
        assert prompt == "Task:\n{instruction} {{ 1 }}\n\nAnswer:\n"
        text = mark_predicted(*encode(make_chat("A", "b"), tokenizer), TIKTOKEN.decode)
        assert text == "Task:\nA\n\nAnswer:\n⟦b<|endoftext|>⟧"
    assert find_chat_template(file.parent / "nowhere", gpt2_with(CHATML)) == CHATML


@pytest.mark.parametrize(
    "content", ['{"with_input": "x"}', '{"without_input": 1}', '{"prompt": "x"}', "[1]", "{"]
)
def test_damaged_templates_of_old_runs(checkpoint, content):
    """A prompt_template.json that is damaged is an error that names it."""
    (checkpoint.parents[1] / "prompt_template.json").write_text(content)
    with pytest.raises(ValueError, match=r"prompt_template.json is damaged"):
        find_chat_template(checkpoint, GPT2_TOKENIZER)


USERS = {"plain": "{{ .Content }}", "docstring": "{{ .Content }}\n"}
USERS |= {"chat": "### User:\n{{ .Content }}\n\n### Assistant:\n"}
USERS |= {"alpaca": f"{TASK}. {END}{{{{ .Content }}}}\n\n### Response:\n"}


@pytest.mark.parametrize("name", USERS)
def test_modelfiles(name):
    """Ollama's template for one of ours has the same text. Others, Ollama recognizes itself."""
    expected = (
        'FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}'
        '{{ .Content }}\n\n{{ else if eq .Role "assistant" }}{{ .Content }}END{{ else }}'
        f'{USERS[name]}{{{{ end }}}}{{{{ end }}}}"""\n'
    )
    for tokenizer, end in ((GPT2_TOKENIZER, "<|endoftext|>"), (make_chatml(), "<|im_end|>")):
        for start in ("", "<s>"):
            found = ChatTemplate(start + OURS[name], tokenizer).modelfile()
            assert found == expected.replace("END", end).replace('E """', f'E """{start}')
    assert ChatTemplate(CHATML, make_chatml()).modelfile() == "FROM ./model.gguf\n"


def test_end_of_answer():
    """The text that ends an answer is found, without the space around it."""
    templates = dict.fromkeys([*OURS.values(), CHATML], "<|im_end|>")
    templates["{% for m in messages %}{{ m.content }} </s>\n{% endfor %}"] = "</s>"
    templates["{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"] = ""
    found = [ChatTemplate(template, make_chatml()).end_of_answer() for template in templates]
    assert found == [*templates.values()]
