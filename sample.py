"""Generate text with a model from the hub, a folder, a checkpoint or a run.

Text goes to stdout as it is generated, everything else to stderr.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from engine.chat import ChatTemplate, Messages, find_chat_template
from engine.checkpoint import find_checkpoint, load_model
from engine.config import MAX_SEED, ModelSettings, flag, run_command
from engine.decode import force_prompts, penalize_repetition, speed_up_decoding
from engine.distributed import Distributed, has_finite_weights
from engine.files import decode_lines
from engine.lora import lora_linears, merge_lora
from engine.pretrained import load_tokenizer
from engine.tokenizer import Tokenizer
from model import GPT

CONTINUATION_TOKENS, ANSWER_TOKENS = 50, 256  # default max_new_tokens for each


@dataclass(frozen=True)
class SampleConfig(ModelSettings):
    prompt: list[str] = flag([], 'texts to continue; "" is valid (default: ask, or read stdin)')
    prompt_file: str | None = flag(None, "file of texts to continue, one per line")
    instruction: str | None = flag(None, "instruction to answer, in the model's chat template")
    input: str | None = flag(None, "input that goes with the instruction")
    num_return_sequences: int = flag(
        1, "continuations per prompt; a single one is streamed", at_least=1, at_most=10_000
    )
    max_new_tokens: int = flag(None, "maximum new tokens (default: 50, or 256 for an answer)")
    stop: list[str] = flag([], "strings that end a continuation and are not printed")
    temperature: float = flag(1.0, "0 takes the most likely token; higher is more varied")
    top_k: int | None = flag(50, "sample from the k most likely tokens (null: from all)")
    top_p: float | None = flag(None, "nucleus sampling: probability to keep", above=0, at_most=1)
    repetition_penalty: float = flag(1.0, "above 1: repeated tokens get less likely", at_least=0.01)
    seed: int = flag(42, "random seed for sampling", at_least=0, at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda or mps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop}, expected text that is not empty")
        if bool(self.prompt) + bool(self.prompt_file) + (self.instruction is not None) > 1:
            raise ValueError("expected only one of prompt, prompt_file and instruction")
        if self.instruction is None and self.input is not None:
            raise ValueError("input is given without an instruction; it needs --instruction")


class Continuation:
    """Decodes one continuation, token by token, until an end-of-text token, a stop string or
    `max_tokens`.

    Text that later tokens may still change is held back: an incomplete UTF-8 character, and an
    ending that may be the start of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str], max_tokens: int | None = None):
        self.tokenizer, self.stop, self.max_tokens = tokenizer, stop, max_tokens
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
        text = self._release(self.decoder.step(self.tokenizer.backend, token) or "")
        return text + self.finish() if len(self.tokens) == self.max_tokens else text

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
    max_new_tokens: int
    generator: torch.Generator

    def print_continuations(self, prompts: list[str], end: str | None = None) -> str:
        """Print each prompt and its continuations, until an end-of-text token or a stop string.
        With `end`, which may be "", print an answer up to there, without its prompt. A single
        continuation is streamed; several are printed when all are complete. The speed goes to
        stderr. Return the first continuation.
        """
        prompts = [prompt for prompt in prompts for _ in range(self.config.num_return_sequences)]
        stop, block_size = [*self.config.stop, *filter(None, [end])], self.model.config.block_size
        rows = [Continuation(self.tokenizer, stop, self.max_new_tokens) for _ in prompts]
        # The text of a chat template has all special tokens that it needs.
        encode = self.tokenizer.encode_prompt if end is None else self.tokenizer.encode
        prompt_ids = [encode(prompt) or [self.tokenizer.start_of_text] for prompt in prompts]
        if (longest := max(map(len, prompt_ids))) > block_size:
            warning = f"a prompt has {longest} tokens; the model sees only the last {block_size}"
            print(warning, file=sys.stderr)
        is_streamed = len(rows) == 1
        prefixes = prompts if end is None else [""] * len(rows)
        started = time.perf_counter()
        if is_streamed:
            print(*prefixes, end="", flush=True)
        for new_texts in self.generate([ids[-block_size:] for ids in prompt_ids], rows):
            if is_streamed:
                print(*new_texts, end="", flush=True)
        seconds = time.perf_counter() - started
        if is_streamed:
            print(flush=True)
        else:
            texts = [f"> {prefix}{row.text}\n" for prefix, row in zip(prefixes, rows, strict=True)]
            print(*texts, sep="\n", flush=True)
        n_tokens = sum(len(row.tokens) for row in rows)
        print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)
        return rows[0].text

    def generate(self, prompts: list[list[int]], rows: list[Continuation]) -> Iterator[list[str]]:
        """Continue the prompt of every row until all rows are done. Yield each row's new text."""

        def process_logits(idx: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if self.config.repetition_penalty != 1.0:
                logits = penalize_repetition(idx, logits, self.config.repetition_penalty)
            return force_prompts(idx, logits, prompts)

        lengths = [len(prompt) for prompt in prompts]
        shortest = min(lengths)
        stream = self.model.stream(
            torch.tensor([prompt[:shortest] for prompt in prompts], device=self.generator.device),
            max(lengths) - shortest + self.max_new_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            suppress_tokens=self.tokenizer.unused_ids(self.model.config.vocab_size),
            process_logits=process_logits,
            generator=self.generator,
        )
        for n_ids, next_ids in enumerate(stream, start=shortest + 1):
            new = zip(rows, lengths, next_ids.flatten().tolist(), strict=True)
            yield [row.add(i) if n_ids > n_prompt else "" for row, n_prompt, i in new]
            if all(row.done for row in rows):
                break

    def answer(self, chat: ChatTemplate, messages: Messages) -> str:
        """Print the answer to the last message and return it. Drops the oldest turns to leave room
        for max_new_tokens, or for half of the context if that is less.
        """
        block_size = self.model.config.block_size
        max_prompt = block_size - min(self.max_new_tokens, block_size // 2)
        messages = chat.fit(messages, max_prompt)
        prompt = chat.render(messages, add_generation_prompt=True)
        return self.print_continuations([prompt], end=chat.end_of_answer())

    def run_prompt_loop(self, chat: ChatTemplate | None) -> None:
        """Ask for prompts, or for instructions if there is a chat template, until an empty line.
        Ctrl-C stops the text that is being generated and drops that turn from the conversation.
        """
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  # lets `input` edit the line and recall earlier ones
        print("Ctrl-C stops generating; an empty line or Ctrl-D quits", file=sys.stderr)
        messages: Messages = []
        while True:
            try:
                text = input("instruction: " if chat else "prompt: ")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            if not text:
                return
            try:
                if chat:
                    asked = [*messages, {"role": "user", "content": text}]
                    messages = [*asked, {"role": "assistant", "content": self.answer(chat, asked)}]
                else:
                    self.print_continuations([text])
            except KeyboardInterrupt:
                print(flush=True)


def read_prompts(config: SampleConfig) -> list[str]:
    """Return the texts to continue; [] with an instruction, or if the user should be asked."""
    if config.prompt_file is not None:
        lines = decode_lines(Path(config.prompt_file))
        prompts = [line.rstrip("\r\n") for line in lines if not line.isspace()]
        if not prompts:
            raise ValueError(f"{config.prompt_file} has no prompts, expected one on each line")
        return prompts
    if config.prompt or config.instruction is not None or sys.stdin.isatty():
        return config.prompt
    # Piped text; `echo` adds a newline.
    return [sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")]


def main(config: SampleConfig) -> None:
    prompts = read_prompts(config)
    device = Distributed.start(config.device).device
    model = load_model(config.model, config.lora_load_path).to(device)
    tokenizer = load_tokenizer(model, config.tokenizer)
    path = find_checkpoint(config.lora_load_path or config.model, quiet=True)
    template = find_chat_template(path, tokenizer)
    chat = ChatTemplate(template, tokenizer) if template else None
    if not has_finite_weights(model):
        raise ValueError(f"{config.model} has weights that are not finite; choose another model")
    if lora_linears(model):
        merge_lora(model)
    speed_up_decoding(model)
    generator = torch.Generator(device).manual_seed(config.seed)
    default = CONTINUATION_TOKENS if prompts or chat is None else ANSWER_TOKENS
    sampler = Sampler(model, tokenizer, config, config.max_new_tokens or default, generator)
    if config.instruction is not None:
        if chat is None:
            raise ValueError(f"{path} has no chat template; pass the full text as --prompt")
        message = {"role": "user", "content": config.instruction}
        with_input = message | {"input": config.input}
        if config.input and chat.render([with_input]) == chat.render([message]):
            raise ValueError(f"the chat template of {path} has no place for an input; omit input")
        sampler.answer(chat, [with_input])
    elif prompts:
        sampler.print_continuations(prompts)
    else:
        sampler.run_prompt_loop(chat)


if __name__ == "__main__":
    run_command(main, SampleConfig, __doc__)
