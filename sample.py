"""Generate text with any model: from the hub, a folder, a checkpoint or a run.

Text goes to stdout as it is generated, everything else to stderr.
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from engine.checkpoint import check_vocabulary, latest_checkpoint, load_model
from engine.config import MAX_SEED, Settings, flag, run_command
from engine.decode import speed_up_decoding
from engine.distributed import Distributed, has_finite_weights
from engine.instructions import TEMPLATE_FILE, PromptTemplate, find_prompt_template
from engine.lora import lora_linears, merge_lora
from engine.tokenizer import END_OF_TEXT_ID, get_tokenizer
from model import GPT

PROMPT_TOKENS, ANSWER_TOKENS = 50, 256  # maximum of a continuation, and of an answer


@dataclass(frozen=True)
class SampleConfig(Settings):
    model: str = flag("gpt2", "hub name, Hugging Face folder, checkpoint, or run folder")
    lora_load_path: str | None = flag(None, "adapter to load: a folder, a run or a lora.pt")
    prompt: str | None = flag(
        None, "text to continue; empty starts a document (default: ask on a terminal, else stdin)"
    )
    instruction: str | None = flag(
        None, "instruction to answer, in the prompt that the model was fine-tuned with"
    )
    input: str | None = flag(None, "input of the instruction")
    num_return_sequences: int = flag(
        1,
        "continuations to generate: one is streamed, several are printed when all are complete",
        at_least=1,
        at_most=10_000,
    )
    max_new_tokens: int = flag(
        None, "maximum tokens in each continuation (default: 50, in answers 256)"
    )
    stop: list[str] = flag([], "strings that end a continuation and are not printed")
    temperature: float = flag(1.0, "0 takes the most likely token; higher is more varied")
    top_k: int | None = flag(50, "sample from the k most likely tokens (null: from all)")
    top_p: float | None = flag(
        None, "sample from the smallest set with at least this probability", above=0, at_most=1
    )
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

    def __init__(self, stop: list[str]):
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.text = ""
        self.n_tokens = 0
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain after this token, and was not before."""
        if self.done:
            return ""
        if token == END_OF_TEXT_ID:
            return self.finish()
        self.n_tokens += 1
        return self._add(self.decoder.decode(get_tokenizer().decode_single_token_bytes(token)))

    def finish(self) -> str:
        """The rest of the text, as no more tokens follow."""
        if self.done:
            return ""
        certain = self._add(self.decoder.decode(b"", final=True))
        if not self.done:
            certain += self.held
            self.text += self.held
            self.done = True
        return certain

    def _add(self, text: str) -> str:
        self.held += text
        # The stop text that ends first wins, however the text is split into tokens.
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop]
        if found := [(end, start) for end, start in found if start >= 0]:
            self.done, split = True, min(found)[1]
        else:
            prefixes = [s[:n] for s in self.stop for n in range(1, len(s))]
            held_back = [len(p) for p in prefixes if self.held.endswith(p)]
            split = len(self.held) - max(held_back, default=0)
        certain, self.held = self.held[:split], self.held[split:]
        self.text += certain
        return certain


def print_continuations(
    model: GPT, prompt: str, config: SampleConfig, generator: torch.Generator, *, is_answer: bool
) -> None:
    """Print the prompt with its continuations, or answers alone; the speed goes to stderr."""
    ids = get_tokenizer().encode(prompt, disallowed_special=()) or [END_OF_TEXT_ID]
    if len(ids) > (seen := model.config.block_size):
        print(f"the prompt has {len(ids)} tokens, the model sees the last {seen}", file=sys.stderr)
    rows = [Continuation(config.stop) for _ in range(config.num_return_sequences)]
    streaming = len(rows) == 1
    shown, max_new_tokens = ("", ANSWER_TOKENS) if is_answer else (prompt, PROMPT_TOKENS)
    started = time.perf_counter()
    if streaming:
        print(shown, end="", flush=True)
    for next_ids in model.stream(
        torch.tensor([ids] * len(rows), device=generator.device),
        config.max_new_tokens or max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos=END_OF_TEXT_ID,
        generator=generator,
    ):
        texts = [row.add(i) for row, i in zip(rows, next_ids.flatten().tolist(), strict=True)]
        if streaming:
            print(texts[0], end="", flush=True)
        if all(row.done for row in rows):
            break
    seconds = time.perf_counter() - started
    texts = [row.finish() for row in rows]
    if streaming:
        print(texts[0], flush=True)
    else:
        print(*(f"> {shown}{row.text}\n" for row in rows), sep="\n", flush=True)
    n_tokens = sum(row.n_tokens for row in rows)
    print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def prompt_loop(
    model: GPT, config: SampleConfig, generator: torch.Generator, template: PromptTemplate | None
) -> None:
    """Ask for prompts, or for instructions if there is a template, until an empty one. Ctrl-C ends
    the text that is being generated.
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
            print_continuations(model, prompt, config, generator, is_answer=template is not None)
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
    check_vocabulary(model, config.model)
    if not has_finite_weights(model):
        raise ValueError(f"{config.model} has weights that are not finite; choose another model")
    if lora_linears(model):
        merge_lora(model)
    speed_up_decoding(model)
    generator = torch.Generator(device).manual_seed(config.seed)
    if prompt is None:
        prompt_loop(model, config, generator, template)
    else:
        is_answer = config.instruction is not None
        print_continuations(model, prompt, config, generator, is_answer=is_answer)


if __name__ == "__main__":
    run_command(main, SampleConfig, __doc__)
