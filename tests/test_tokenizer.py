import json
import random
import sys
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import GPT2_TOKENIZER, NASTY_TEXT, OPENAI_FILES, TIKTOKEN
from tokenizers import ByteLevelBPETokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from engine.tokenizer import CHECK_EVERY, BatchEncoder, Tokenizer


def test_known_ids():
    """A known sentence gets the ids of OpenAI's tokenizer."""
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert GPT2_TOKENIZER.encode("Hello, I'm a language model,") == ids
    found = (GPT2_TOKENIZER.name, GPT2_TOKENIZER.vocab_size, GPT2_TOKENIZER.end_of_text)
    assert found == ("gpt2", 50257, 50256)


def test_transformers_tokenizer_agrees(tmp_path):
    """With our files and with OpenAI's own, transformers gives the ids that we and tiktoken give.
    Our merges.txt is OpenAI's file byte for byte.
    """
    GPT2_TOKENIZER.save(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    openai = GPT2Tokenizer(str(OPENAI_FILES / "encoder.json"), str(OPENAI_FILES / "vocab.bpe"))
    text = NASTY_TEXT + Path(__file__).read_text()
    expected = TIKTOKEN.encode(text, allowed_special="all")
    assert ours.encode(text) == openai.encode(text) == GPT2_TOKENIZER.encode(text) == expected
    assert ours.decode(expected) == GPT2_TOKENIZER.decode(expected) == text
    assert (ours.eos_token_id, len(ours)) == (50256, 50257)
    assert (tmp_path / "merges.txt").read_bytes() == (OPENAI_FILES / "vocab.bpe").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"), [('"!": 0, "\\"": 1,', '"!": 1, "\\"": 0,'), ("Ġ t\nĠ a\n", "Ġ a\nĠ t\n")]
)
def test_altered_vocabulary_is_refused(tmp_path, monkeypatch, old, new):
    """If ids or the order of merges differ from OpenAI's, the error names the folder."""
    for name in ("encoder.json", "vocab.bpe"):
        content = (OPENAI_FILES / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(content.replace(old, new), encoding="utf-8")
    package = Mock(locate_file=lambda _: tmp_path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: package)
    with pytest.raises(ValueError, match=f"{tmp_path}.* OpenAI's"):
        Tokenizer.gpt2()


# Pieces on which pretokenizers differ: contractions, spaces of all kinds, digits of other scripts,
# marks that combine, characters of two UTF-16 units, and what looks like a special token.
HOSTILE = [
    *"aZ09'\u2019.-_/#\"\\(){}<|>~éßİıǅ日本語العربيةनमस्ते٣४²½Ⅷ😀\u0301\u200d\ufe0f\ufffd\ufeff\U0001f468",
    *" \t\n\r\v\f\x00\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000",
    *("'s", "'S", "'re", "'LL", "'d", "\u2019t", "  ", "\n\n", "\r\n", " \n", "   x", "don't"),
    *("the", " of", "HTTP", "x1", "1234567", "<|endoftext|>", "<|", "|>", "===", "def f(x):\n    "),
]


def encode_each(encoder: BatchEncoder, texts: list[str]) -> list[list[int]]:
    """Encode a batch of texts. Return the ids of each text."""
    tokens, lengths = encoder.encode(texts)
    assert lengths.sum() == len(tokens)
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_random_texts_match_tiktoken():
    """Each of 20,000 texts of random hostile pieces gets the same tokens as in tiktoken."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randrange(20))) for _ in range(20_000)]
    expected = TIKTOKEN.encode_ordinary_batch(texts)
    assert encode_each(BatchEncoder(GPT2_TOKENIZER), texts) == expected


def test_long_lines_match_tiktoken():
    """Lines of up to 3 million characters, next to empty texts, get the tokens of tiktoken."""
    lines = ("a" * 300_000, "ab, " * 750_000, "\0" * 300_000, "日本" * 150_000, "x" + " " * 300_000)
    texts = [text for line in lines for text in ("", line, "")]
    expected = TIKTOKEN.encode_ordinary_batch(texts)
    assert encode_each(BatchEncoder(GPT2_TOKENIZER), texts) == expected


def test_a_million_spaces_are_encoded():
    """A run of spaces too long for tiktoken's regex is encoded by gigatoken, the fast encoder."""
    text = " " * 1_000_000 + "x"
    tokens, _ = BatchEncoder(GPT2_TOKENIZER).encode([text])
    assert TIKTOKEN.decode(tokens.tolist()) == text
    assert np.array_equal(GPT2_TOKENIZER.encode_ordinary(text), tokens)


@pytest.mark.parametrize("missing", ["gigatoken", "awkward"])
def test_without_gigatoken_tiktoken_encodes(monkeypatch, capsys, missing):
    """Without gigatoken, or a package it needs, tiktoken encodes, and one line says so."""
    monkeypatch.setitem(sys.modules, missing, None)
    encoder = BatchEncoder(GPT2_TOKENIZER)
    assert "falling back to tiktoken" in capsys.readouterr().out
    texts = [NASTY_TEXT, "", " ", "<|endoftext|>"]
    assert encode_each(encoder, texts) == TIKTOKEN.encode_ordinary_batch(texts)


LETTERS, NUMBERS, SPACES = "the %s's text", "1%s2", " %s %s"


@pytest.mark.parametrize(
    "context", [LETTERS, *(pytest.param(c, marks=pytest.mark.slow) for c in (NUMBERS, SPACES))]
)
def test_all_of_unicode_matches_tiktoken(context):
    """Text with any character gets the same tokens as in tiktoken, although gigatoken uses a newer
    Unicode version. gigatoken encodes a text if Python knows all of its characters.
    """
    encoder = BatchEncoder(GPT2_TOKENIZER)
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    characters.sort(key=lambda c: unicodedata.category(c) == "Cn")  # unassigned ones come last
    found = [context.replace("%s", c) for c in characters]
    texts = ["\n".join(found[i : i + 500]) for i in range(0, len(found), 500)]
    assert encode_each(encoder, texts) == TIKTOKEN.encode_ordinary_batch(texts)
    assert not encoder.has_unassigned(texts[0] + "日本語 😀")
    assert encoder.has_unassigned("the \U000323b0's text")


class WrongAt:
    """Wraps gigatoken, but encodes text `number` wrongly."""

    def __init__(self, encoder: BatchEncoder, number: int):
        self.gigatoken, self.texts_left = encoder.gigatoken, number

    def encode_batch(self, texts: list[str]):
        if 0 <= self.texts_left < len(texts):
            texts = [*texts[: self.texts_left], "wrong", *texts[self.texts_left + 1 :]]
        self.texts_left -= len(texts)
        return self.gigatoken.encode_batch(texts)


@pytest.mark.parametrize("number", [0, 7, 2 * CHECK_EVERY])
def test_a_mismatch_with_tiktoken_is_an_error(number):
    """The first texts, and one in CHECK_EVERY, are compared to tiktoken. They must be equal."""
    encoder = BatchEncoder(GPT2_TOKENIZER)
    encoder.gigatoken = WrongAt(encoder, number)
    texts = [f"text {i}" for i in range(3 * CHECK_EVERY)]
    batches = [texts[first : first + 300] for first in range(0, len(texts), 300)]
    problem = rf"disagree on text {number + 1}, .* 'text {number}'; .*uninstall"
    with pytest.raises(ValueError, match=f"gigatoken and tiktoken {problem}"):
        _ = [encoder.encode(batch) for batch in batches]


def test_lengths_of_tokens():
    """The tokens of a text have as many bytes as the text in UTF-8. <|endoftext|> has none."""
    lengths = GPT2_TOKENIZER.token_bytes
    assert len(lengths) == 50_257
    ids = TIKTOKEN.encode_ordinary(NASTY_TEXT)
    assert lengths[ids].sum() == len(NASTY_TEXT.encode())
    assert lengths[50_256] == 0


LINES = Path(__file__).read_text().splitlines()
OWN = Tokenizer.train([LINES], 600, "own")


def save_trained(folder: Path) -> None:
    OWN.save(folder)


def save_vocabulary(folder: Path) -> None:
    """Save the files of early versions of transformers, with an added token."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(LINES, 500, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.save_model(str(folder))
    roles = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "added_tokens.json").write_text('{"covid19": 500}')


def save_normalized(folder: Path) -> None:
    """Save a byte-level BPE that lowercases texts and begins them with a space. The class in its
    tokenizer_config.json would do neither.
    """
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(LINES, trainer)
    backend.enable_truncation(5)
    (folder / "tokenizer.json").write_text(backend.to_str())
    config = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_unigram(folder: Path) -> None:
    """Save a tokenizer that is not byte-level and begins each text with </s>."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    backend.train_from_iterator(LINES, UnigramTrainer(vocab_size=300, **options))
    backend.post_processor = TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    roles = {"eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)


SAVERS = {  # (eos_token, vocab_size) of what each function saves
    save_trained: ("<|endoftext|>", 600),
    save_vocabulary: ("</s>", 501),
    save_normalized: ("<s>", 500),
    save_unigram: ("</s>", 300),
}


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_any_tokenizer_matches_transformers(tmp_path, save):
    """A tokenizer gives the ids and texts that transformers gives, before and after it is saved
    again. Special tokens in a text are recognized or, on request, encoded as ordinary text.
    """
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save(tmp_path)
    ours, saved = Tokenizer.from_folder(tmp_path), tmp_path / "saved"
    saved.mkdir()
    ours.save(saved, 64)
    theirs = AutoTokenizer.from_pretrained(saved)
    assert (theirs.model_max_length, theirs.eos_token, ours.vocab_size) == (64, *SAVERS[save])
    assert (ours.end_of_text, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert Tokenizer.from_folder(saved).sha256 == ours.sha256
    ordinary = Backend.from_str(theirs.backend_tokenizer.to_str())
    ordinary.encode_special_tokens = True
    ordinary.no_truncation()
    encoder = BatchEncoder(ours)
    for text in (NASTY_TEXT, " Hello", "a<s>b</s>c COVID19 covid19<|endoftext|>", *HOSTILE):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.encode_prompt(text) == theirs.encode(text)
        expected = ordinary.encode(text, add_special_tokens=False).ids
        assert encode_each(encoder, [text, ""]) == [expected, []]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    n_bytes = 0 if save is save_unigram else len(b"Hello 123")
    assert ours.token_bytes[ours.encode("Hello 123</s>")].sum() >= n_bytes
    assert (ours.tiktoken_encoding is not None) == (save is save_trained)


def test_tiktoken_encodes_only_if_it_gives_the_same_ids():
    """tiktoken is used for a byte-level BPE with GPT-2's pattern if it merges in order of the ids.
    If the merges have another order, or split a token differently, the tokenizers library is used.
    """
    spec = json.loads(OWN.backend.to_str())
    texts = ["".join(random.Random(i).choices(HOSTILE + LINES, k=9)) for i in range(300)]
    merges, known = spec["model"]["merges"], set(spec["model"]["vocab"])
    reordered = merges[1:] + merges[:1]
    # Find a token that could also be merged from two other tokens: its last character and the rest.
    pairs = [["".join(pair)[:-1], "".join(pair)[-1]] for pair in merges]
    i = next(i for i, pair in enumerate(pairs) if known.issuperset(pair) and pair != merges[i])
    split_differently = [*merges[:i], pairs[i], *merges[i + 1 :]]
    for variant, uses_tiktoken in ((merges, True), (reordered, False), (split_differently, False)):
        spec["model"]["merges"] = variant
        backend = Backend.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        expected = [backend.encode(text).ids for text in texts]
        tokenizer = Tokenizer(Backend.from_str(backend.to_str()), {}, "x")
        assert (tokenizer.tiktoken_encoding is not None) is uses_tiktoken
        assert encode_each(BatchEncoder(tokenizer), texts) == expected
        rows = [tokenizer.encode_ordinary(text).tolist() for text in texts]
        assert rows == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": "{"}, "EOF"),
        ({"tokenizer_config.json": "{}"}, "expected tokenizer.json, or vocab.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "no eos_token"),
        (
            {"tokenizer.json": OWN.backend.to_str(), "config.json": '{"eos_token_id": [1, 2]}'},
            "one id",
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path, files, expected):
    """If tokenizer files are damaged, incomplete or without an end-of-text token, the error names
    their folder. A folder without any such file has no tokenizer.
    """
    assert Tokenizer.from_folder(tmp_path) is None
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be used: .*{expected}"):
        Tokenizer.from_folder(tmp_path)
