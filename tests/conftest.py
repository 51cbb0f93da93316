"""Fixtures shared by the tests: real text that is always there, tiny models, tiny data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import write_manifest, write_shard
from model import GPT, GPTConfig

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

NASTY_TEXT = (
    "Hello, I'm a language model,\n\n\n  naïve café — “quotes” … 日本語 العربية ﷺ 😀👨‍👩‍👧‍👦 \n"
    "\tdef f(x):\n        return x ** 2  # don't\r\n\r\n   \n"
    "1234567 3.14e-10 <|endoftext|> they'll we've I'd   'S  \x00\x1c\x85 \u2028\u00a0\u3000end   "
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of larger real texts that not every machine has."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    return SHARED_DATA


def talkative_model(block_size: int) -> GPT:
    """A small GPT-2 with the real vocabulary, and weights so large that greedy text varies."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    for param in model.parameters():
        param.data.mul_(8)
    return model


@pytest.fixture
def tiny_config() -> GPTConfig:
    """A GPT-2 of two layers whose vocabulary of 1000 is padded to 1024."""
    return GPTConfig(block_size=48, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config)


@pytest.fixture
def make_shards(tmp_path: Path):
    """Write shards of the given lengths, whose stream is tokens 0, 1, 2, ... modulo 50,000."""

    def make(*lengths: int, split: str = "train", folder: Path = tmp_path / "shards") -> Path:
        folder.mkdir(exist_ok=True)
        stream = np.arange(sum(lengths)) % 50_000
        pieces = np.split(stream, np.cumsum(lengths)[:-1])
        entries = [write_shard(folder / f"x_{split}_{i:06d}.npy", p) for i, p in enumerate(pieces)]
        write_manifest(folder, {"shards": [{**e, "split": split} for e in entries]})
        return folder

    return make
