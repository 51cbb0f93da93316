"""Milliseconds per generated token at GPT-2 124M: this project, transformers with its KV cache, and
recomputing the prefix for every token as nanoGPT does.

    python benchmarks/generate.py   # two CPU threads, fp32: 4 minutes
    python benchmarks/generate.py --device cuda --compile

All decode greedily with the same random weights. --compile also times compiled transformers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Contender, Result, Size
from engine.config import flag, run_command
from engine.decode import speed_up_decoding
from model import GPT

OURS, PREFIX = "this project", "prefix recomputed"
TRANSFORMERS, STATIC = "transformers, cached", "transformers, static cache, compiled"
BLOCK_SIZE = 1024


@dataclass(frozen=True)
class GenerateBenchmarkConfig(BenchmarkConfig):
    new_tokens: int = flag(100, "tokens to generate")
    prompt_tokens: int = flag(32, "prompt length in tokens")
    n_layer: int = flag(12, "blocks of the model; its width is 768")
    compile: bool = flag(False, "also time transformers with a static cache, compiled")


def make_contender(name: str, size: Size, config: GenerateBenchmarkConfig) -> Contender:
    """Make a contender that continues random prompts of `size.T` tokens."""
    n = config.new_tokens
    idx = size.random_ids(config.init_device())
    model: Any = GPT(size.gpt_config(BLOCK_SIZE)).eval()
    if name in (TRANSFORMERS, STATIC):
        model = harness.transformers_copy(model)
    model.to(idx.device)
    if name == OURS:
        speed_up_decoding(model)  # as sample.py does

    @torch.no_grad()
    def step(_: int) -> Result:
        with config.autocast():
            if name == OURS:
                out = model.generate(idx, n, temperature=0)
            elif name == PREFIX:
                out = idx
                for _ in range(n):
                    next_id = model.logits(model.hidden(out)[:, -1]).argmax(-1, keepdim=True)
                    out = torch.cat([out, next_id], dim=1)
            else:
                out = model.generate(
                    idx,
                    attention_mask=torch.ones_like(idx),
                    pad_token_id=0,
                    max_new_tokens=n,
                    min_new_tokens=n,
                    do_sample=False,
                    cache_implementation="static" if name == STATIC else None,  # static: compiled
                )
        return {"tokens": out[:, idx.size(1) :].flatten().tolist()}

    return step


def main(config: GenerateBenchmarkConfig) -> None:
    n, names = config.new_tokens, [OURS, TRANSFORMERS, PREFIX]
    if config.compile:
        names.insert(2, STATIC)
    for batch_size in (1, 5):
        size = Size(config.n_layer, 768, batch_size, config.prompt_tokens)
        results = harness.measure(make_contender, names, size, config)
        rows = []
        for name, turns in results.items():
            ours = results.get(OURS, turns)[0]["tokens"]  # --contenders may leave ours out
            matches = sum(a == b for a, b in zip(turns[0]["tokens"], ours, strict=True))
            equal = f"{matches / len(ours):.0%}" if OURS in results else ""
            ms, ratio = harness.median(turns) / n * 1e3, harness.ratio(results, name, OURS)
            rows.append([name, f"{ms:.1f}", ratio, equal])
        title = f"{batch_size} x {size.T} + {n} tokens"
        harness.print_table([title, "ms per token", "/ ours", "tokens equal to ours"], rows)


if __name__ == "__main__":
    run_command(main, GenerateBenchmarkConfig, __doc__)
