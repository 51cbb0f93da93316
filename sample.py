"""Text out of any model the project can load: a hub name, a folder, a checkpoint or a run."""

import time
from dataclasses import dataclass

import torch

import cli
from checkpoint import check_vocabulary, load_model
from runtime import Distributed
from tokenizer import END_OF_TEXT_ID, get_tokenizer


@dataclass(frozen=True)
class SampleConfig:
    model: str = "gpt2"
    """hub name, Hugging Face folder, checkpoint, or run folder (its newest checkpoint)"""
    lora_load_path: str | None = None
    """adapter for it: a PEFT folder, a run, or a lora.pt beside its adapter_config.json"""
    prompt: str = "Hello, I'm a language model,"
    """what to continue; empty begins a document"""
    num_return_sequences: int = 5
    """continuations to draw"""
    max_new_tokens: int = 50
    """tokens in each"""
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

    def __post_init__(self):
        for name, fits, expected in (
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "0 up to 2^63 - 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and up to 1, or null"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")


def main(config: SampleConfig) -> None:
    device = Distributed.start(config.device).device
    model = load_model(config.model, config.lora_load_path).to(device)
    tokenizer = get_tokenizer()
    check_vocabulary(model, config.model)
    prompt = tokenizer.encode(config.prompt, disallowed_special=()) or [END_OF_TEXT_ID]
    started = time.perf_counter()
    out = model.generate(
        torch.tensor([prompt] * config.num_return_sequences, device=device),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos=END_OF_TEXT_ID,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    seconds = time.perf_counter() - started
    n_tokens = 0
    for row in out.tolist():
        new = row[len(prompt) :]
        if END_OF_TEXT_ID in new:  # from there on the row is only filled up
            new = new[: new.index(END_OF_TEXT_ID)]
        n_tokens += len(new)
        print(f"> {config.prompt}{tokenizer.decode(new)}\n")
    print(f"{n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    cli.run(main, SampleConfig, __doc__)
