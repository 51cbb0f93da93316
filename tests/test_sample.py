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
from pathlib import Path

import pytest
import torch
from conftest import GPT2_TOKENIZER, NASTY_TEXT, TIKTOKEN
from processes import HANG_SECONDS, start_on_terminal

from engine.checkpoint import load_model
from engine.config import parse_flags
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
    config = SampleConfig(num_return_sequences=3, max_new_tokens=10**6, stop=["e", "a"])

    def rows(seed: int) -> list[str]:
        sampler = Sampler(model, GPT2_TOKENIZER, config, torch.Generator().manual_seed(seed))
        sampler.print_continuations("Hello", is_answer=False)
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

    def sample(stdin: bytes, prompt: str | None = None) -> tuple[bytes, bytes]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        main(SampleConfig(str(gpt2_folder), prompt=prompt, max_new_tokens=20, device="cpu"))
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
    for name, value in (wrong | {"top_k": 0, "top_p": 1.1, "seed": 2**63}).items():
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name} is {value}, expected ')}"):
            SampleConfig(**{name: value})


@pytest.fixture
def tuned(gpt2_folder, tmp_path) -> Path:
    """A model with a prompt template, as --merge_out writes it."""
    shutil.copytree(gpt2_folder, tmp_path / "tuned")
    texts = {"without_input": "Task: {instruction}\n", "with_input": "{instruction}, {input}\n"}
    (tmp_path / "tuned" / "prompt_template.json").write_text(json.dumps(texts))
    return tmp_path / "tuned"


def greedy_text(folder: Path, prompt: str, n_tokens: int) -> str:
    idx = torch.tensor([TIKTOKEN.encode(prompt)])
    out = GPT.from_pretrained(folder).eval().generate(idx, n_tokens, temperature=0)
    return TIKTOKEN.decode(out[0, idx.size(1) :].tolist())


def test_instructions_are_filled_into_the_template(tuned, gpt2_folder, capsys):
    """An instruction is filled into the template of the model, and only the answer is printed."""
    settings = {"model": str(tuned), "temperature": 0.0, "max_new_tokens": 9, "device": "cpu"}
    for instruction, input_text, prompt in (
        ("Say hi", None, "Task: Say hi\n"),
        ("Translate", "Bonjour", "Translate, Bonjour\n"),
    ):
        main(SampleConfig(**settings, instruction=instruction, input=input_text))
        assert capsys.readouterr().out == greedy_text(tuned, prompt, 9) + "\n"
    with pytest.raises(ValueError, match=r"has no local prompt_template.json.*pass .* as --prompt"):
        main(SampleConfig(**{**settings, "model": str(gpt2_folder)}, instruction="Say hi"))
    for wrong in ({"prompt": "a", "instruction": "b"}, {"input": "a"}):
        with pytest.raises(ValueError, match=r"expected one of them|needs --instruction"):
            SampleConfig(**wrong)


def test_a_long_prompt_is_cut_with_a_warning(gpt2_folder, capsys):
    """If the prompt is longer than the window, only its end is used, and a line says so."""
    block_size = load_model(gpt2_folder).config.block_size
    settings = {"model": str(gpt2_folder), "temperature": 0.0, "max_new_tokens": 5, "device": "cpu"}
    main(SampleConfig(**settings, prompt=" the" * (block_size + 7)))
    long = capsys.readouterr()
    cut = f"the prompt has {block_size + 7} tokens; the model sees only the last {block_size}\n"
    assert long.err.startswith(cut)
    main(SampleConfig(**settings, prompt=" the" * block_size))
    short = capsys.readouterr()
    assert "the model sees" not in short.err
    assert long.out.replace(" the", "") == short.out.replace(" the", "")


def test_instructions_on_a_terminal(tuned, monkeypatch, capsys):
    """On a terminal, a fine-tuned model asks for instructions and inputs until an empty line."""
    asked, typed = [], iter(["Say hi", "", "Translate", "Bonjour", ""])
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    main(SampleConfig(str(tuned), temperature=0.0, max_new_tokens=9, device="cpu"))
    assert asked == ["instruction: ", "input: "] * 2 + ["instruction: "]
    answers = [greedy_text(tuned, p, 9) for p in ("Task: Say hi\n", "Translate, Bonjour\n")]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


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
