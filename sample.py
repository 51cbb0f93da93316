"""Generate text with any model: from the hub, a folder, a checkpoint or a run.

Text goes to stdout as it is generated, everything else to stderr.
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream

from engine.checkpoint import latest_checkpoint, load_model
from engine.config import MAX_SEED, TOKENIZER_HELP, Settings, flag, run_command
from engine.decode import speed_up_decoding
from engine.distributed import Distributed, has_finite_weights
from engine.instructions import TEMPLATE_FILE, PromptTemplate, find_prompt_template
from engine.lora import lora_linears, merge_lora
from engine.pretrained import load_tokenizer
from engine.tokenizer import Tokenizer
from model import GPT

PROMPT_TOKENS, ANSWER_TOKENS = 50, 256  # maximum of a continuation, and of an answer


@dataclass(frozen=True)
class SampleConfig(Settings):
    model: str = flag("gpt2", "hub name, Hugging Face folder, checkpoint, or run folder")
    lora_load_path: str | None = flag(None, "adapter to load: a folder, a run or a lora.pt")
    tokenizer: str | None = flag(None, TOKENIZER_HELP)
    prompt: str | None = flag(None, "text to continue; may be empty (default: ask, or read stdin)")
    instruction: str | None = flag(
        None, "instruction to answer, in the prompt format of fine-tuning"
    )
    input: str | None = flag(None, "input of the instruction")
    num_return_sequences: int = flag(
        1, "continuations to generate; a single one is streamed", at_least=1, at_most=10_000
    )
    max_new_tokens: int = flag(None, "maximum new tokens (default: 50, for answers 256)")
    stop: list[str] = flag([], "strings that end a continuation and are not printed")
    temperature: float = flag(1.0, "0 takes the most likely token; higher is more varied")
    top_k: int | None = flag(50, "sample from the k most likely tokens (null: from all)")
    top_p: float | None = flag(None, "nucleus sampling: probability to keep", above=0, at_most=1)
    seed: int = flag(42, "random seed of the text", at_least=0, at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda or mps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop}, expected text that is not empty")
        if self.instruction is not None and self.prompt is not None:
            raise ValueError("instruction and prompt are both given, expected one of them")
        if self.instruction is None and self.input is not None:
            raise ValueError("input is given, which needs --instruction")


class Continuation:
    """The text of one continuation, up to the end of the document or the first stop text.

    Incomplete UTF-8 characters, and text that may turn out to be the start of a stop text, are held
    back until more tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # Special tokens decode to no text, so their ids are matched.
        self.ends = {tokenizer.end_of_text, *map(tokenizer.special_tokens.get, stop)}
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.held = ""
        self.text = ""
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain after this token, and was not before."""
        if self.done:
            return ""
        if token in self.ends:
            return self.finish()
        self.tokens.append(token)
        return self._add(self.decoder.step(self.tokenizer.backend, token) or "")

    def finish(self) -> str:
        """The rest of the text, as no more tokens follow."""
        if self.done:
            return ""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self._add(whole[len(self.text + self.held) :], is_last=True)

    def _add(self, text: str, *, is_last: bool = False) -> str:
        self.held += text
        self.done, split = is_last, len(self.held)
        # The stop text that ends first wins, however the text is split into tokens.
        if found := [(i + len(s), i) for s in self.stop if (i := self.held.find(s)) >= 0]:
            self.done, split = True, min(found)[1]
        elif not is_last:
            prefixes = [s[:n] for s in self.stop for n in range(1, len(s))]
            split -= max((len(p) for p in prefixes if self.held.endswith(p)), default=0)
        certain, self.held = self.held[:split], self.held[split:]
        self.text += certain
        return certain


@dataclass(frozen=True)
class Sampler:
    """Generates continuations of prompts, and prints them."""

    model: GPT
    tokenizer: Tokenizer
    config: SampleConfig
    generator: torch.Generator

    def print_continuations(self, prompt: str, *, is_answer: bool) -> None:
        """Print the prompt with its continuations, or answers alone; the speed goes to stderr."""
        tokenizer, config, ids = self.tokenizer, self.config, self.tokenizer.encode_prompt(prompt)
        if len(ids) > (seen := self.model.config.block_size):
            print(
                f"the prompt has {len(ids)} tokens, the model sees the last {seen}", file=sys.stderr
            )
        rows = [Continuation(tokenizer, config.stop) for _ in range(config.num_return_sequences)]
        prefix, max_new_tokens = ("", ANSWER_TOKENS) if is_answer else (prompt, PROMPT_TOKENS)

        def show(*texts: str) -> None:
            if len(rows) == 1:  # several are printed when all are complete
                print(*texts, sep="", end="", flush=True)

        started = time.perf_counter()
        show(prefix)
        for next_ids in self.model.stream(
            torch.tensor([ids] * len(rows), device=self.generator.device),
            config.max_new_tokens or max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos=tokenizer.end_of_text,
            suppress_tokens=tokenizer.unused_ids(self.model.config.vocab_size),
            generator=self.generator,
        ):
            show(*(row.add(i) for row, i in zip(rows, next_ids.flatten().tolist(), strict=True)))
            if all(row.done for row in rows):
                break
        seconds = time.perf_counter() - started
        show(*(row.finish() for row in rows), "\n")
        if len(rows) > 1:
            print(*(f"> {prefix}{row.text}\n" for row in rows), sep="\n", flush=True)
        n_tokens = sum(len(row.tokens) for row in rows)
        print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)

    def run_prompt_loop(self, template: PromptTemplate | None) -> None:
        """Ask for prompts, or for instructions if there is a template, until an empty one. Ctrl-C
        ends the text that is being generated.
        """
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # lets `input` edit the line and recall earlier ones
        print("Ctrl-C stops a text; an empty line or Ctrl-D quits", file=sys.stderr)
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
                f"{config.lora_load_path or config.model} has no {TEMPLATE_FILE} on this "
                "machine, as fine-tuned models have; give the full text as --prompt"
            )
        prompt = template.fill(config.instruction, config.input or "")
    elif prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")  # echo's
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
