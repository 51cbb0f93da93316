"""HellaSwag examples a second at GPT-2 124M, side by side: this project, lm-evaluation-harness, and
build-nanogpt's loop, which is transformers' model in its hellaswag.py and its own in training.

    python benchmarks/hellaswag.py --data hellaswag_val.jsonl

Random weights, fp32 on a CPU. In each round all take turns on the same new rows, tokenisation
included; the medians over the rounds are compared, and all predictions.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from model import GPT, GPTConfig
from scoring import encode, score
from tasks import clean, hellaswag_example, predictions, read_rows
from tokenizer import save_tokenizer

Predictions = list[tuple[int, int]]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchmarkConfig:
    data: str | None = None
    """HellaSwag's rows, .jsonl or .jsonl.gz (default: the validation set from the hub)"""
    rounds: int = 3
    """times that each contender is measured"""
    rows: int = 30
    """examples in a round"""
    threads: int = 1
    """threads of the CPU"""
    seed: int = 0
    """which rows, in which order"""


def hellaswag_rows(data: str | None, limit: int | None = None) -> list[dict]:
    """The first `limit` rows, or all, of a file or of the hub."""
    rows = [row for _, row in islice(read_rows("hellaswag", data), limit)]
    return [json.loads(row) if isinstance(row, bytes) else row for row in rows]


def this_project(
    model: GPT, rows: list[dict], text: str = "lm-eval", device: torch.device = CPU
) -> Predictions:
    examples = [hellaswag_example(row, text) for row in rows]
    found = {}
    for batch in score(model, [e.request for e in examples], device):
        for i, scores in batch:
            found[i] = predictions([s.log_prob for s in scores], examples[i].facts["lengths"])
    return [found[i] for i in range(len(rows))]


def lm_evaluation_harness(lm: HFLM, rows: list[dict]) -> Predictions:
    requests, lengths = [], []
    for row in rows:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
        choices = [clean(ending) for ending in row["endings"]]
        query = clean(f"{row['activity_label']}: {context}")
        requests += [
            Instance("loglikelihood", {}, (query, f" {choice}"), i)
            for i, choice in enumerate(choices)
        ]
        lengths.append([len(choice) for choice in choices])
    answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
    return [predictions([next(answers)[0] for _ in each], each) for each in lengths]


@torch.no_grad()
def build_nanogpt(
    logits_of: Callable[[torch.Tensor], torch.Tensor], rows: list[dict]
) -> Predictions:
    """One example at a time as four padded rows, logits of all positions (its hellaswag.py)."""
    found = []
    for row in rows:
        context = encode(row["ctx"])
        endings = [encode(" " + ending) for ending in row["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, ending in enumerate(endings):
            n = len(context) + len(ending)
            tokens[i, :n] = torch.tensor(context + ending)
            mask[i, len(context) : n] = 1
        shift_logits = logits_of(tokens)[..., :-1, :].contiguous()
        shift_tokens = tokens[..., 1:].contiguous()
        losses = F.cross_entropy(
            shift_logits.view(-1, shift_logits.size(-1)), shift_tokens.view(-1), reduction="none"
        )
        shift_mask = mask[..., 1:]
        sums = (losses.view(4, -1) * shift_mask).sum(dim=1)
        found.append((int(sums.argmin()), int((sums / shift_mask.sum(dim=1)).argmin())))
    return found


def main(config: BenchmarkConfig) -> None:
    torch.set_num_threads(config.threads)
    found = hellaswag_rows(config.data)
    random.Random(config.seed).shuffle(found)
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_tokenizer(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        one, sixteen = (HFLM(pretrained=folder, device="cpu", batch_size=n) for n in (1, 16))
    contenders = {
        "this project": lambda rows: this_project(model, rows),
        "lm-eval, batch 1": lambda rows: lm_evaluation_harness(one, rows),
        "lm-eval, batch 16": lambda rows: lm_evaluation_harness(sixteen, rows),
        "this project, raw text": lambda rows: this_project(model, rows, "raw"),
        "build-nanogpt": lambda rows: build_nanogpt(lambda idx: theirs(idx).logits, rows),
        "same, with our model": lambda rows: build_nanogpt(model, rows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, Predictions] = {name: [] for name in contenders}
    rows = iter(found)
    for _ in tqdm(range(config.rounds), unit=" rounds", disable=None):
        chosen = list(islice(rows, config.rows))
        for name, contender in contenders.items():
            started = time.perf_counter()
            answers[name] += contender(chosen)
            speeds[name].append(len(chosen) / (time.perf_counter() - started))
    n = len(answers["this project"])
    print(f"{config.threads} threads, fp32, {n} rows in {config.rounds} rounds")
    print(f"{'':<24}examples/s   ours is   same predictions as ours (summed, normalised)")
    ours = ""
    for name, values in speeds.items():
        speed = statistics.median(values)
        ours = name if name.startswith("this project") else ours
        times = statistics.median(speeds[ours]) / speed
        same = [
            sum(a[i] == b[i] for a, b in zip(answers[name], answers[ours], strict=True))
            for i in range(2)
        ]
        print(f"{name:<24}{speed:>10.2f}{times:>8.2f} x   {same[0]} and {same[1]} of {n}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli.run(main, BenchmarkConfig, __doc__)
