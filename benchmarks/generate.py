"""Milliseconds a generated token at GPT-2 124M, side by side: this project, transformers with its
cache, and recomputing the prefix for each token as nanoGPT does.

    python benchmarks/generate.py [--device cuda]

Random weights, greedy, fp32; the three take turns, and the medians over the rounds are compared.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from model import GPT, GPTConfig


@dataclass(frozen=True)
class BenchmarkConfig:
    rounds: int = 5
    """times that each contender is measured"""
    new_tokens: int = 100
    """tokens to generate"""
    prompt_tokens: int = 32
    """length of the prompt"""
    device: str = "cpu"
    """cpu or cuda"""


@torch.no_grad()
def recompute(model: GPT, idx: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """nanoGPT's way: all positions for every token, but logits for the last one only."""
    for _ in range(new_tokens):
        logits = model.lm_head(model.hidden(idx)[:, -1])[:, : model.config.vocab_size]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx


def main(config: BenchmarkConfig) -> None:
    torch.manual_seed(0)
    ours = GPT(GPTConfig()).to(config.device)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval().to(config.device)
    n = config.new_tokens
    contenders = {
        "this project": lambda idx: ours.generate(idx, n, temperature=0),
        "transformers, cached": lambda idx: theirs.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=50256,
        ),
        "prefix recomputed": lambda idx: recompute(ours, idx, n),
    }
    print(
        f"{torch.get_num_threads()} threads, {config.device}, {config.prompt_tokens} + {n} tokens"
    )
    for batch_size in (1, 5):
        idx = torch.randint(0, 50257, (batch_size, config.prompt_tokens), device=config.device)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        outs = {}
        for _ in range(config.rounds):
            for name, generate in contenders.items():
                started = time.perf_counter()
                outs[name] = generate(idx).cpu()
                times[name].append((time.perf_counter() - started) / n * 1e3)
        ours_ms = statistics.median(times["this project"])
        print(f"\nbatch {batch_size}              ms a token   times ours   same tokens as ours")
        for name, values in times.items():
            ms = statistics.median(values)
            same = (outs[name] == outs["this project"]).float().mean().item()
            print(f"{name:<22}{ms:>9.1f}{ms / ours_ms:>13.2f}{same:>20.0%}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, __doc__)
