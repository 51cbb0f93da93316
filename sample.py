"""Text out of any model the project can load: a hub name, a folder, a checkpoint or a run.

The text goes to stdout as its tokens come, everything else to stderr.
"""

import codecs
import sys
import time
from dataclasses import dataclass, field

import torch

import cli
from checkpoint import check_vocabulary, load_model
from model import GPT
from runtime import Distributed
from tokenizer import END_OF_TEXT_ID, get_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    model: str = "gpt2"
    """hub name, Hugging Face folder, checkpoint, or run folder (its newest checkpoint)"""
    lora_load_path: str | None = None
    """adapter for it: a PEFT folder, a run, or a lora.pt beside its adapter_config.json"""
    prompt: str | None = None
    """what to continue; empty begins a document (default: asked for on a terminal, else stdin)"""
    num_return_sequences: int = 1
    """continuations to draw: one is shown as it grows, several when all have ended"""
    max_new_tokens: int = 50
    """tokens in each"""
    stop: list[str] = field(
        default_factory=list,
        metadata={"help": "texts that end a continuation and are left out of it"},
    )
    temperature: float = 1.0
    """0 takes the likeliest token, higher is more varied"""
    top_k: int | None = 50
    """draw from the likeliest k tokens only (null: all)"""
    top_p: float | None = None
    """draw from the smallest set of tokens with this probability"""
    seed: int = 42
    """the same seed draws the same text on the same device"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "0 up to 2^63 - 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and up to 1, or null"),
            ("stop", is_texts(self.stop), "a list of texts that are not empty"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")


def is_texts(value: object) -> bool:
    """A list of texts with something in them; YAML can hold anything."""
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


class Continuation:
    """The text of one continuation, from its tokens as they come: up to the end of the document or
    to the first of the texts `stop`. Bytes of a character that is not whole yet, and what may be
    the beginning of a stop text, are held back until it is known what they are.
    """

    def __init__(self, stop: list[str]):
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.text = ""
        self.n_tokens = 0
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if self.done:
            return ""
        if token == END_OF_TEXT_ID:
            return self.finish()
        self.n_tokens += 1
        return self._add(self.decoder.decode(get_tokenizer().decode_single_token_bytes(token)))

    def finish(self) -> str:
        """The text that is left, because no more tokens come."""
        if self.done:
            return ""
        certain = self._add(self.decoder.decode(b"", final=True))
        if self.done:
            return certain
        rest, self.held, self.done = self.held, "", True
        self.text += rest
        return certain + rest

    def _add(self, text: str) -> str:
        self.held += text
        # The one that is complete first, so that the cut does not depend on how tokens split it.
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop]
        if found := [pair for pair in found if pair[1] >= 0]:
            self.done, split = True, min(found)[1]
        else:
            beginnings = (s[:n] for s in self.stop for n in range(1, len(s)))
            split = len(self.held) - max(
                (len(b) for b in beginnings if self.held.endswith(b)), default=0
            )
        certain, self.held = self.held[:split], self.held[split:]
        self.text += certain
        return certain


def write(model: GPT, prompt: str, config: SampleConfig, generator: torch.Generator) -> None:
    """Print the prompt with its continuations, and on stderr how fast they came."""
    ids = get_tokenizer().encode(prompt, disallowed_special=()) or [END_OF_TEXT_ID]
    rows = [Continuation(config.stop) for _ in range(config.num_return_sequences)]
    alone = len(rows) == 1
    started = time.perf_counter()
    steps = model.stream(
        torch.tensor([ids] * len(rows), device=generator.device),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos=END_OF_TEXT_ID,
        generator=generator,
    )
    if alone:
        print(prompt, end="", flush=True)
    for next_ids in steps:
        pieces = [row.add(i) for row, i in zip(rows, next_ids.flatten().tolist(), strict=True)]
        if alone:
            print(pieces[0], end="", flush=True)
        if all(row.done for row in rows):
            break
    seconds = time.perf_counter() - started
    rest = [row.finish() for row in rows]
    if alone:
        print(rest[0], flush=True)
    else:
        print(*(f"> {prompt}{row.text}\n" for row in rows), sep="\n", flush=True)
    n_tokens = sum(row.n_tokens for row in rows)
    print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def converse(model: GPT, config: SampleConfig, generator: torch.Generator) -> None:
    """Ask for prompts until there is none; Ctrl-C ends the text that is being written."""
    print("Ctrl-C stops a text; an empty line or Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            prompt = input("prompt: ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not prompt:
            return
        try:
            write(model, prompt, config, generator)
        except KeyboardInterrupt:
            print(flush=True)


def read_prompt() -> str:
    """The prompt on stdin, without the line end that `echo` adds."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text: {error}") from error


def main(config: SampleConfig) -> None:
    prompt = config.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = read_prompt()
    device = Distributed.start(config.device).device
    model = load_model(config.model, config.lora_load_path).to(device)
    check_vocabulary(model, config.model)
    if not all(param.isfinite().all() for param in model.parameters()):
        raise ValueError(f"{config.model} has weights that are no finite numbers; choose another")
    generator = torch.Generator(device).manual_seed(config.seed)
    if prompt is None:
        converse(model, config, generator)
    else:
        write(model, prompt, config, generator)


if __name__ == "__main__":
    cli.run(main, SampleConfig, __doc__)
