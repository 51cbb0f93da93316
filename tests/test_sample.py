import contextlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import GPT2_TOKENIZER, NASTY_TEXT, TIKTOKEN, small_transformers_gpt2
from processes import HANG_SECONDS, start_on_terminal
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from engine.chat import ChatTemplate
from engine.checkpoint import RunState, load_model, save_checkpoint
from engine.config import parse_flags
from engine.lora import LoRAConfig, convert_linear_layer_to_lora, get_lora_state_dict
from engine.tokenizer import ENDOFTEXT, Tokenizer, find_tokenizer
from model import GPT
from sample import Continuation, SampleConfig, Sampler, main


def add_all(tokens: list[int], stop: list[str]) -> list[str]:
    """Return the pieces of text that are shown after each token, and at the end."""
    continuation = Continuation(GPT2_TOKENIZER, stop)
    shown = [continuation.add(token) for token in tokens] + [continuation.finish()]
    assert "".join(shown) == continuation.text
    return shown


def make_tokens(kind: str) -> list[int]:
    """Encode NASTY_TEXT byte by byte or as tiktoken does, or draw ids whose bytes are not UTF-8."""
    if kind == "bytes":
        return [TIKTOKEN.encode_single_token(bytes([b])) for b in NASTY_TEXT.encode()]
    if kind == "tokens":
        return TIKTOKEN.encode(NASTY_TEXT, disallowed_special=())
    rng = random.Random(kind)
    return [rng.randrange(50256) for _ in range(200)]


@pytest.mark.parametrize("kind", ["bytes", "tokens", "random 1", "random 2"])
def test_streamed_text_is_the_decoded_text(kind):
    """The pieces add up to the text that tiktoken decodes, and none splits a character. A character
    is shown as soon as its last token is there.
    """
    tokens = make_tokens(kind)
    shown, complete = add_all(tokens, []), ""  # complete: the longest valid UTF-8 so far
    assert "".join(shown) == TIKTOKEN.decode(tokens)
    for n in range(0 if kind.startswith("random") else len(tokens)):
        with contextlib.suppress(UnicodeDecodeError):
            complete = TIKTOKEN.decode(tokens[: n + 1], errors="strict")
        assert "".join(shown[: n + 1]) == complete


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """Read `text` by characters until one completes a stop text. Return what is before it."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - len(max(ending, key=len))]
    return text


def test_stop_texts_cut_exactly_and_are_never_shown():
    """However tokens and stop texts overlap, the text ends before the first complete stop text."""
    rng, cut = random.Random(1), 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\né", k=rng.randrange(1, 14)))
        stop = ["".join(rng.choices("ab\né", k=rng.randrange(1, 5))) for _ in range(3)]
        stop = stop[: rng.randrange(4)]
        data, tokens = text.encode(), []
        while data:  # split in any way, not only as the tokenizer does
            n = rng.randrange(1, 4)
            try:
                tokens.append(TIKTOKEN.encode_single_token(data[:n]))
            except KeyError:
                continue
            data = data[n:]
        expected = cut_at_first_stop(text, stop)
        assert "".join(add_all(tokens, stop)) == expected
        cut += expected != text
    assert cut > 500
    assert len(TIKTOKEN.encode(" language")) == 1
    assert add_all(TIKTOKEN.encode(" language"), [" languag", "g"]) == [" lan", ""]
    # Shown at once, because it cannot be the beginning of the stop text.
    assert add_all(TIKTOKEN.encode("One. Two"), [". Three"])[0] == "One"


def test_an_incomplete_last_character():
    """Half a character is printed as the replacement character, and only at the end."""
    tokens = [TIKTOKEN.encode_single_token(bytes([b])) for b in b"a\xe6\x97"]
    assert add_all(tokens, []) == ["a", "", "", TIKTOKEN.decode(tokens[1:])]


def test_nothing_follows_the_end_of_a_document():
    """Tokens after <|endoftext|> are neither printed nor counted."""
    tokens = [*TIKTOKEN.encode("Done"), 50256, 50, 50256, 51]
    assert "".join(add_all(tokens, [])) == "Done"
    continuation = Continuation(GPT2_TOKENIZER, [])
    for token in tokens:
        continuation.add(token)
    assert len(continuation.tokens) == 1


def test_stream_equals_generate(gpt2_folder):
    """stream() yields the ids of generate(), and computes each only when it is requested."""
    model, idx = GPT.from_pretrained(gpt2_folder).eval(), torch.tensor([[1, 2], [3, 4]])
    passes, hidden = [], model.hidden
    model.hidden = lambda *args: passes.append(torch.is_grad_enabled()) or hidden(*args)
    stream = model.stream(idx, 100, generator=torch.Generator().manual_seed(3))
    ids = torch.cat([next(stream) for _ in range(5)], dim=1)
    assert passes == [False] * 5  # gradients are disabled within steps, and enabled between them
    assert torch.is_grad_enabled()
    expected = model.generate(idx, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([idx, ids], dim=1), expected)


def test_generation_ends_when_all_rows_stop(gpt2_folder, capsys):
    """Stop texts change nothing in a row before its first stop text. Once all rows have stopped, no
    more tokens are computed. Equal seeds give equal texts, different seeds different ones.
    """
    model = GPT.from_pretrained(gpt2_folder).eval()
    config = SampleConfig(num_return_sequences=3, stop=["e", "a"])

    def rows(seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        Sampler(model, GPT2_TOKENIZER, config, 10**6, generator).print_continuations(["Hello"])
        texts, speed = capsys.readouterr()
        assert "tokens/s" in speed
        return [row.rstrip("\n") for row in texts.split("> Hello")[1:]]

    idx = torch.tensor([TIKTOKEN.encode("Hello")] * 3)
    free = model.generate(idx, 100, top_k=50, generator=torch.Generator().manual_seed(5))
    uncut = [TIKTOKEN.decode(row[1:]) for row in free.tolist()]
    assert rows(5) == [cut_at_first_stop(text, config.stop).rstrip("\n") for text in uncut]
    assert rows(5) == rows(5) != rows(6)


def test_stdout_is_the_text_alone(gpt2_folder, monkeypatch, capfdbinary):
    """stdout has only the text. A piped prompt gives the same text. Bad UTF-8 is an error."""

    def sample(stdin: bytes, *prompts: str) -> tuple[bytes, bytes]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        main(SampleConfig(str(gpt2_folder), prompt=[*prompts], max_new_tokens=20, device="cpu"))
        return capfdbinary.readouterr()

    prompt = "Caf\u00e9 au\nlait"
    piped, speed = sample(f"{prompt}\n".encode())
    assert b"tokens/s" in speed
    assert piped.startswith(prompt.encode())
    assert len(piped) > len(prompt.encode()) + 5
    assert piped == sample(b"", prompt)[0]
    with pytest.raises(UnicodeDecodeError):
        sample(b"\xff\xfe")


@pytest.mark.parametrize("stop", ["[5]", "5", "the"])
def test_stop_in_a_config_file_must_be_a_list_of_texts(tmp_path, capsys, stop):
    """`stop` in a YAML file is an error unless it is a list of strings."""
    file = tmp_path / "sample.yaml"
    file.write_text(f"stop: {stop}\n")
    with pytest.raises(SystemExit):
        parse_flags(SampleConfig, "", ["--config", str(file)])
    assert f"stop is {stop}, expected a list of strings" in capsys.readouterr().err


def test_wrong_settings_are_refused():
    """The error for a setting out of range gives its value and the expected range."""
    wrong = {"stop": [""], "num_return_sequences": 0, "max_new_tokens": 0, "temperature": -0.1}
    wrong |= {"repetition_penalty": 0.0}
    for name, value in (wrong | {"top_k": 0, "top_p": 1.1, "seed": 2**63}).items():
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name} is {value}, expected ')}"):
            SampleConfig(**{name: value})


N_NEW = 8
GREEDY = {"max_new_tokens": N_NEW, "temperature": 0.0, "device": "cpu"}
# Tokens: 1, 8, 0, 3 with <|endoftext|>, 120 so that the new ones fill the context, and 128.
PROMPTS = ["The", "Once upon a time, in Pisa", "", "One<|endoftext|> two"]
PROMPTS += [" one two three" * 40, " one two three four" * 32]


def greedy_text(folder: Path, prompt: str, **options: object) -> str:
    """Return how transformers continues a prompt alone, up to <|endoftext|>."""
    ids = torch.tensor([TIKTOKEN.encode(prompt, allowed_special="all") or [50256]])
    model = GPT2LMHeadModel.from_pretrained(folder)
    out = model.generate(ids, max_new_tokens=N_NEW, do_sample=False, **options)
    return TIKTOKEN.decode(out[0, ids.size(1) :].tolist()).partition("<|endoftext|>")[0]


@pytest.fixture
def continue_greedily(gpt2_folder, capsys) -> Callable[..., tuple[str, str]]:
    """A function that continues prompts and returns what is printed to stdout and stderr."""
    model = load_model(gpt2_folder)

    def run(*prompts: str, **settings: object) -> tuple[str, str]:
        config = SampleConfig(**GREEDY, **settings)
        capsys.readouterr()
        sampler = Sampler(model, GPT2_TOKENIZER, config, N_NEW, torch.Generator())
        sampler.print_continuations([*prompts])
        return capsys.readouterr()

    return run


@pytest.mark.parametrize(("copies", "penalty"), [(1, 1.0), (2, 1.0), (1, 1.3)])
def test_prompts_in_a_batch(gpt2_folder, continue_greedily, copies, penalty):
    """Prompts of different lengths get greedily the same texts in one batch as each alone, and as
    from transformers, also with a repetition penalty. Each row gets max_new_tokens tokens.
    """
    alone = [continue_greedily(prompt, repetition_penalty=penalty)[0] for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS[:-1], alone, strict=False):  # the last exceeds the context
        expected = greedy_text(gpt2_folder, prompt, repetition_penalty=penalty)
        assert text == f"{prompt}{expected}\n"
    settings = {"num_return_sequences": copies, "repetition_penalty": penalty}
    texts, speed = continue_greedily(*PROMPTS, **settings)
    assert texts == "".join(f"> {text}\n" * copies for text in alone)
    assert speed.startswith(f"{N_NEW * copies * len(PROMPTS)} tokens, ")


def test_stop_texts_end_the_rows_of_a_batch_one_by_one(gpt2_folder, continue_greedily):
    """A stop text ends the rows that have it, wherever that is, and none of the others."""
    texts = [greedy_text(gpt2_folder, prompt) for prompt in PROMPTS[:4]]
    stop = [texts[0][5:8], texts[3][-3:]]
    expected = [cut_at_first_stop(text, stop) for text in texts]
    assert [a == b for a, b in zip(texts, expected, strict=True)] == [False, True, True, False]
    rows = zip(PROMPTS[:4], expected, strict=True)
    printed = "".join(f"> {prompt}{text}\n\n" for prompt, text in rows)
    assert continue_greedily(*PROMPTS[:4], stop=stop)[0] == printed


def test_only_one_source_of_prompts():
    """Two of the flags that give a text are an error, and so is an input without instruction."""
    given = {"prompt": [""], "prompt_file": "a", "instruction": ""}
    for left_out in given:
        two = {name: value for name, value in given.items() if name != left_out}
        with pytest.raises(ValueError, match="only one of prompt, prompt_file and instruction"):
            SampleConfig(**two)
    with pytest.raises(ValueError, match="input is given without an instruction"):
        SampleConfig(input="a")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
load_theirs = cache(AutoTokenizer.from_pretrained)
QUESTION = "Who wrote this?"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat_ids(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids with which transformers asks for an answer."""
    options = {"add_generation_prompt": True, "return_dict": False}
    return load_theirs(folder).apply_chat_template(messages, **options)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A model by transformers, with ChatML in its tokenizer_config.json. Its eos_token is
    <|endoftext|>. It ends its answer to QUESTION with <|im_end|> instead of the sixth token.
    """
    folder = tmp_path_factory.mktemp("chat")
    backend = Tokenizer.train([NASTY_TEXT.splitlines()], 400, "chat").backend
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=ENDOFTEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    end = tokenizer.eos_token_id
    shape = {"vocab_size": len(tokenizer), "n_positions": 128, "tie_word_embeddings": False}
    model = small_transformers_gpt2(**shape, eos_token_id=end)
    for param in model.parameters():
        param.data.mul_(8)  # so that greedy text varies
    ids = torch.tensor([chat_ids(folder, [message("user", QUESTION)])])
    sixth = model.generate(ids, max_new_tokens=6, do_sample=False)[0, -1]
    model.lm_head.weight.data[-1] = 1.01 * model.lm_head.weight.data[sixth]  # of <|im_end|>
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def fed(monkeypatch) -> list[list[int]]:
    """The ids of the prompts that models get."""
    prompts, stream = [], GPT.stream

    def record(model: GPT, idx: torch.Tensor, *args: object, **options: object):
        prompts.append(idx[0].tolist())
        return stream(model, idx, *args, **options)

    monkeypatch.setattr(GPT, "stream", record)
    return prompts


@pytest.fixture
def talk(monkeypatch, capsys) -> Callable[..., list[str]]:
    """A function that types lines to sample.py on a terminal and returns the answers."""

    def run(folder: Path, *typed: str, **settings: object) -> list[str]:
        lines, printed = iter([*typed, ""]), []

        def type_line(label: str) -> str:
            assert label == "instruction: "
            printed.append(capsys.readouterr().out.removesuffix("\n"))
            return next(lines)

        monkeypatch.setattr("builtins.input", type_line)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        main(SampleConfig(str(folder), **{**GREEDY, **settings}))
        return printed[1:]

    return run


def test_an_instruction_in_the_chat_template(chat_model, fed, capsys):
    """The model gets the ids of apply_chat_template. Its answer ends at the end token of the
    template, even if eos_token is another.
    """
    main(SampleConfig(str(chat_model), instruction=QUESTION, **GREEDY))
    ids = chat_ids(chat_model, [message("user", QUESTION)])
    assert fed == [ids]
    theirs, model = load_theirs(chat_model), GPT2LMHeadModel.from_pretrained(chat_model)
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    options = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": end}
    *answer, last = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert (len(answer), last) == (5, end)
    assert capsys.readouterr().out == theirs.decode(answer) + "\n"


def test_prompts_in_a_file(chat_model, tmp_path, capsys):
    """--prompt_file has a prompt on each line in UTF-8, except for blank lines. A missing file is
    an error, and so is one without prompts.
    """
    file = tmp_path / "prompts.txt"
    file.write_bytes("Caf\u00e9 \r\n\r\n \t\n  \u65e5\u672c\nlast".encode())
    for texts in ({"prompt_file": str(file)}, {"prompt": ["Caf\u00e9 ", "  \u65e5\u672c", "last"]}):
        main(SampleConfig(str(chat_model), **GREEDY, **texts))
    found = capsys.readouterr().out
    assert found.startswith("> Caf\u00e9 ")
    assert found[: len(found) // 2] * 2 == found
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        main(SampleConfig(prompt_file=str(tmp_path / "no.txt")))
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt has no prompts, expected one on each line"):
        main(SampleConfig(prompt_file=str(file)))


def test_a_conversation(chat_model, fed, talk):
    """Each turn sees the questions and answers before it. When the context has no room for an
    answer, the oldest turns are dropped.
    """
    questions = [QUESTION[:n] for n in range(1, 6)]
    answers, messages, kept = talk(chat_model, *questions, max_new_tokens=40), [], []
    for ids, question, answer in zip(fed, questions, answers, strict=True):
        messages.append(message("user", question))
        suffixes = [chat_ids(chat_model, messages[i:]) for i in range(0, len(messages), 2)]
        fitting = [suffix for suffix in suffixes if len(suffix) <= 128 - 40]
        assert ids == fitting[0]
        kept.append(len(fitting))
        messages.append(message("assistant", answer))
    assert kept[:2] == [1, 2]
    assert kept[-1] < 5


def test_a_full_context_keeps_the_system_message(chat_model, fed):
    """The system message stays when turns are dropped, and the last question does, too."""
    tokenizer, config = find_tokenizer(str(chat_model)), SampleConfig(**GREEDY)
    sampler = Sampler(load_model(chat_model), tokenizer, config, 1000, torch.Generator())
    system, question = message("system", "Be brief."), message("user", QUESTION)
    turns = [message("user", "Why? Why?"), message("assistant", "So.")] * 2
    sampler.answer(ChatTemplate(CHATML, tokenizer), [system, *turns, question])
    # Half of the context is left for the answer.
    assert 64 < len(chat_ids(chat_model, [system, *turns[2:], question])) <= 96
    assert fed == [chat_ids(chat_model, [system, question])]


def test_ctrl_c_drops_a_turn(chat_model, fed, talk, monkeypatch):
    """After Ctrl-C within an answer, the conversation goes on as if that turn had not been."""
    add = Continuation.add
    interrupt = [False] * 9 + [True]  # at the fourth token of the second answer

    def add_or_interrupt(continuation: Continuation, token: int) -> str:
        if interrupt and interrupt.pop(0):
            raise KeyboardInterrupt
        return add(continuation, token)

    monkeypatch.setattr(Continuation, "add", add_or_interrupt)
    first, cut, _ = talk(chat_model, QUESTION, "What?", "Why?")
    assert cut
    turn = [message("user", QUESTION), message("assistant", first)]
    asked = [message("user", "What?")], [message("user", "Why?")]
    assert fed[1:] == [chat_ids(chat_model, turn + question) for question in asked]


def test_an_adapter_has_its_own_chat_template(chat_model, fed, tmp_path):
    """The template in an adapter's checkpoint is used, or its base's if it has none."""
    model, tokenizer = load_model(chat_model), find_tokenizer(str(chat_model))
    tokenizer.chat_template = CHATML.replace("user", "human").replace("m.role", "m.role | upper")
    convert_linear_layer_to_lora(model, "h.", LoRAConfig(lora_dim=4))
    state = RunState({"step": 1}, {"moment": torch.zeros(1)})
    (tmp_path / "config.yaml").write_text("model_name_or_path: base\n")
    save_checkpoint(tmp_path, model, tokenizer, get_lora_state_dict(model), state, keep=1)
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    for path in (None, str(tmp_path), str(checkpoint / "lora.pt")):
        name = str(chat_model if path else tmp_path)
        main(SampleConfig(name, lora_load_path=path, instruction="Hi", **GREEDY))
    (checkpoint / "tokenizer.json").replace(tmp_path / "tokenizer.json")
    (checkpoint / "tokenizer_config.json").replace(tmp_path / "tokenizer_config.json")
    main(SampleConfig(str(tmp_path), instruction="Hi", **GREEDY))
    own, base = (chat_ids(path, [message("user", "Hi")]) for path in (tmp_path, chat_model))
    assert fed == [own] * 3 + [base]
    assert own != base


TASK_TEMPLATE = (
    "{% for m in messages %}Task: {{ m.content }}{% if m.input %}, {{ m.input }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
OLD_TEMPLATE = {"without_input": "Task: {instruction}\n", "with_input": None}
OLD_TEMPLATE_2 = {**OLD_TEMPLATE, "with_input": "Task: {instruction}, {input}\n"}


@pytest.mark.parametrize(
    ("file", "content", "has_input"),
    [
        ("tokenizer_config.json", {"chat_template": TASK_TEMPLATE}, True),
        ("prompt_template.json", OLD_TEMPLATE_2, True),
        ("prompt_template.json", OLD_TEMPLATE, False),
    ],
)
def test_instructions_in_templates(gpt2_folder, tmp_path, capsys, file, content, has_input):
    """An instruction and its input are filled into the template of the model, also that of earlier
    versions, and only the answer is printed. An input without a place in it is an error.
    """
    tuned = shutil.copytree(gpt2_folder, tmp_path / "tuned")
    others = json.loads((tuned / file).read_text()) if (tuned / file).exists() else {}
    (tuned / file).write_text(json.dumps(others | content))
    config = SampleConfig(str(tuned), instruction="{Say} hi", **GREEDY)
    main(config)
    assert capsys.readouterr().out == greedy_text(gpt2_folder, "Task: {Say} hi\n") + "\n"
    config = replace(config, input="Bonjour")
    if has_input:
        main(config)
        expected = greedy_text(gpt2_folder, "Task: {Say} hi, Bonjour\n") + "\n"
        assert capsys.readouterr().out == expected
    else:
        with pytest.raises(ValueError, match=r"tuned has no place for an input; omit input"):
            main(config)


def test_instructions_need_a_template(gpt2_folder):
    """An instruction for a model without a template is an error that says what to do."""
    with pytest.raises(ValueError, match=r"has no chat template; pass the full text as --prompt"):
        main(SampleConfig(str(gpt2_folder), instruction="Say hi", device="cpu"))


def test_a_long_prompt_is_cut_with_a_warning(gpt2_folder, capsys):
    """If the prompt is longer than the window, only its end is used, and a line says so."""
    block_size = load_model(gpt2_folder).config.block_size
    short = " the" * (block_size - 1) + " end"
    long = " a" * 7 + short
    main(SampleConfig(str(gpt2_folder), prompt=[long], **GREEDY))
    printed = capsys.readouterr()
    cut = f"a prompt has {block_size + 7} tokens; the model sees only the last {block_size}\n"
    assert printed.err.startswith(cut)
    continuation = printed.out.removeprefix(long)
    main(SampleConfig(str(gpt2_folder), prompt=[short], **GREEDY))
    printed = capsys.readouterr()
    assert "the model sees" not in printed.err
    assert printed.out == short + continuation


def test_prompts_on_a_terminal(gpt2_folder):
    """On a terminal, sample.py asks for a prompt if there is none. Ctrl-C ends the text but not the
    session, and an empty line ends the session with exit code 0.
    """
    # Background jobs of a shell ignore Ctrl-C; undo that.
    restore_sigint = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    flags = [f"--model={gpt2_folder}", "--max_new_tokens=1000000", "--device=cpu"]
    process, terminal = start_on_terminal(restore_sigint, "sample.py", *flags)
    seen = bytearray()

    def wait_for(text: bytes, retry: Callable[[], None] = lambda: None) -> None:
        """Read until `text` is printed; call `retry` every half minute."""
        start = len(seen)
        for _ in range(HANG_SECONDS // 30):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                if select.select([terminal], [], [], 1)[0]:
                    seen.extend(os.read(terminal, 4096))
                if text in seen[start:]:
                    return
            retry()
        pytest.fail(f"no {text!r} in {seen[-500:]!r}")

    try:
        wait_for(b"prompt: ")
        os.write(terminal, b"Hello\n")
        wait_for(b"\nHello")
        time.sleep(0.3)  # generate for a while
        process.send_signal(signal.SIGINT)
        # Python drops a Ctrl-C that arrives while an object is finalized. Press again, as users do.
        wait_for(b"prompt: ", retry=lambda: process.send_signal(signal.SIGINT))
        os.write(terminal, b"\x1b[A")  # the up arrow recalls the earlier prompt, to edit it
        wait_for(b"Hello")
        os.write(terminal, b"\x15\n")  # Ctrl-U deletes it
        assert process.wait(HANG_SECONDS) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert b"Traceback" not in seen
