"""Generate text with a model from the hub, a folder, a checkpoint or a run.

Text goes to stdout as it is generated, everything else to stderr.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream

from engine.checkpoint import latest_checkpoint, load_model
from engine.config import MAX_SEED, ModelSettings, flag, run_command
from engine.decode import speed_up_decoding
from engine.distributed import Distributed, has_finite_weights
from engine.instructions import TEMPLATE_FILE, PromptTemplate, find_prompt_template
from engine.lora import lora_linears, merge_lora
from engine.pretrained import load_tokenizer
from engine.tokenizer import Tokenizer
from model import GPT

CONTINUATION_TOKENS, ANSWER_TOKENS = 50, 256  # default max_new_tokens for each


@dataclass(frozen=True)
class SampleConfig(ModelSettings):
    prompt: str | None = flag(None, "text to continue; may be empty (default: ask, or read stdin)")
    instruction: str | None = flag(None, "instruction to answer, in the model's prompt template")
    input: str | None = flag(None, "input that goes with the instruction")
    num_return_sequences: int = flag(
        1, "continuations to generate; a single one is streamed", at_least=1, at_most=10_000
    )
    max_new_tokens: int = flag(None, "maximum new tokens (default: 50, or 256 for an answer)")
    stop: list[str] = flag([], "strings that end a continuation and are not printed")
    temperature: float = flag(1.0, "0 takes the most likely token; higher is more varied")
    top_k: int | None = flag(50, "sample from the k most likely tokens (null: from all)")
    top_p: float | None = flag(None, "nucleus sampling: probability to keep", above=0, at_most=1)
    seed: int = flag(42, "random seed for sampling", at_least=0, at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda or mps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop}, expected text that is not empty")
        if self.instruction is not None and self.prompt is not None:
            raise ValueError("instruction and prompt are both given, expected one of them")
        if self.instruction is None and self.input is not None:
            raise ValueError("input is given without an instruction; it needs --instruction")


class Continuation:
    """Decodes one continuation, token by token, until an end-of-text token or a stop string.

    Text that later tokens may still change is held back: an incomplete UTF-8 character, and an
    ending that may be the start of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # Special tokens decode to no text, so if a stop string is one, we compare its id.
        special = tokenizer.special_tokens
        self.end_ids = {tokenizer.end_of_text, *(special[s] for s in stop if s in special)}
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.held = ""
        self.text = ""
        self.done = False

    def add(self, token: int) -> str:
        """Add a token. Return the text that is final now and was not before."""
        if self.done:
            return ""
        if token in self.end_ids:
            return self.finish()
        self.tokens.append(token)
        return self._release(self.decoder.step(self.tokenizer.backend, token) or "")

    def finish(self) -> str:
        """End the continuation. Return the text that was still held back."""
        if self.done:
            return ""
        # The decoder may still hold an incomplete character.
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self._release(whole[len(self.text + self.held) :], is_last=True)

    def _release(self, new_text: str, *, is_last: bool = False) -> str:
        """Return all text that is final now, and hold back the rest."""
        self.held += new_text
        self.done = is_last
        split = len(self.held)
        # The stop string that ends first wins, so it does not matter how tokens split the text.
        matches = [(i + len(s), i) for s in self.stop if (i := self.held.find(s)) >= 0]
        if matches:
            _, split = min(matches)
            self.done = True
        elif not is_last:
            split -= partial_stop_length(self.held, self.stop)
        final, self.held = self.held[:split], self.held[split:]
        self.text += final
        return final


def partial_stop_length(text: str, stop: list[str]) -> int:
    """Return how many characters at the end of `text` may be the start of a stop string."""
    starts = [s[:n] for s in stop for n in range(1, len(s))]
    return max((len(start) for start in starts if text.endswith(start)), default=0)


@dataclass(frozen=True)
class Sampler:
    """Generates continuations of prompts and prints them."""

    model: GPT
    tokenizer: Tokenizer
    config: SampleConfig
    generator: torch.Generator

    def print_continuations(self, prompt: str, *, is_answer: bool) -> None:
        """Print the prompt and its continuations, or an answer without its prompt. A single
        continuation is streamed; several are printed when all are complete. The speed goes to
        stderr.
        """
        ids, block_size = self.tokenizer.encode_prompt(prompt), self.model.config.block_size
        if len(ids) > block_size:
            warning = f"the prompt has {len(ids)} tokens; the model sees only the last {block_size}"
            print(warning, file=sys.stderr)
        n_rows, stop = self.config.num_return_sequences, self.config.stop
        rows = [Continuation(self.tokenizer, stop) for _ in range(n_rows)]
        is_streamed = n_rows == 1
        prefix = "" if is_answer else prompt
        default = ANSWER_TOKENS if is_answer else CONTINUATION_TOKENS
        started = time.perf_counter()
        if is_streamed:
            print(prefix, end="", flush=True)
        for new_texts in self.generate(ids, rows, self.config.max_new_tokens or default):
            if is_streamed:
                print(*new_texts, end="", flush=True)
        seconds = time.perf_counter() - started
        if is_streamed:
            print(flush=True)
        else:
            print(*(f"> {prefix}{row.text}\n" for row in rows), sep="\n", flush=True)
        n_tokens = sum(len(row.tokens) for row in rows)
        print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)

    def generate(
        self, prompt_ids: list[int], rows: list[Continuation], max_new_tokens: int
    ) -> Iterator[list[str]]:
        """Continue the prompt in every row until all rows are done. Yield each row's new text."""
        for next_ids in self.model.stream(
            torch.tensor([prompt_ids] * len(rows), device=self.generator.device),
            max_new_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            eos=self.tokenizer.end_of_text,
            suppress_tokens=self.tokenizer.unused_ids(self.model.config.vocab_size),
            generator=self.generator,
        ):
            ids = next_ids.flatten().tolist()
            yield [row.add(i) for row, i in zip(rows, ids, strict=True)]
            if all(row.done for row in rows):
                break
        yield [row.finish() for row in rows]

    def run_prompt_loop(self, template: PromptTemplate | None) -> None:
        """Ask for prompts, or for instructions if there is a template, until an empty line. Ctrl-C
        ends the text that is being generated.
        """
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  # lets `input` edit the line and recall earlier ones
        print("Ctrl-C stops generating; an empty line or Ctrl-D quits", file=sys.stderr)
        while True:
            try:
                prompt = input("instruction: " if template else "prompt: ")
                if not prompt:
                    return
                if template:
                    prompt = template.fill(prompt, input("input: ") if template.with_input else "")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            try:
                self.print_continuations(prompt, is_answer=template is not None)
            except KeyboardInterrupt:
                print(flush=True)


def main(config: SampleConfig) -> None:
    template = find_prompt_template(latest_checkpoint(config.lora_load_path or config.model))
    prompt = config.prompt
    if config.instruction is not None:
        if template is None:
            raise ValueError(
                f"{config.lora_load_path or config.model} has no local {TEMPLATE_FILE} "
                "(models that are fine-tuned here do); pass the full text as --prompt"
            )
        prompt = template.fill(config.instruction, config.input or "")
    elif prompt is None and not sys.stdin.isatty():  # piped text; `echo` adds a newline
        prompt = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    device = Distributed.start(config.device).device
    model = load_model(config.model, config.lora_load_path).to(device)
    tokenizer = load_tokenizer(model, config.tokenizer)
    if not has_finite_weights(model):
        raise ValueError(f"{config.model} has weights that are not finite; choose another model")
    if lora_linears(model):
        merge_lora(model)
    speed_up_decoding(model)
    generator = torch.Generator(device).manual_seed(config.seed)
    sampler = Sampler(model, tokenizer, config, generator)
    if prompt is None:
        sampler.run_prompt_loop(template)
    else:
        sampler.print_continuations(prompt, is_answer=config.instruction is not None)


if __name__ == "__main__":
    run_command(main, SampleConfig, __doc__)
