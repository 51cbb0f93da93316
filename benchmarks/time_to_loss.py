"""Tokens and seconds that a recipe needs to reach the loss at which another one ends, on real text.

    python benchmarks/time_to_loss.py                       # Python's documentation, three seeds
    python benchmarks/time_to_loss.py --data data/mine      # shards made by fineweb.py
    python benchmarks/time_to_loss.py --sweep true          # how the recipes were tuned

Each recipe is a schedule of a certain length, so a shorter one is a run of its own: the recipes of
RECIPES run at several lengths, and what counts is the shortest that ends at or below the target in
the mean over the seeds. All runs of a seed take turns, step by step, in one process; a run's
seconds are its steps times the median of those that all did, without evaluation. The vocabulary is
cut to the commonest tokens of the text, all others being one, so that a small model's time is not
all in its head.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from data import PretrainingData, TokenShards, evaluation_batches, write_manifest, write_shard
from model import GPT, GPTConfig
from runtime import Distributed
from step import TrainingStep
from train_gpt2 import PretrainConfig, zero_residual_projections
from training import evaluate

ROOT = Path(__file__).parents[1]
BASELINE, TUNED, FAST = "build-nanogpt's", "AdamW, tuned", "fast"
Recipes = dict[str, tuple[dict, list[float]]]
RECIPES: Recipes = {  # settings of train_gpt2.py, and the lengths at which the recipe runs
    BASELINE: ({"max_lr": 6e-4, "min_lr": 6e-5}, [1.0]),
    TUNED: ({"max_lr": 1.5e-3, "schedule": "wsd", "decay_fraction": 1.0}, [1.0]),  # by --sweep
    FAST: (
        {
            "optimizer": "muon",
            "schedule": "wsd",
            "max_lr": 8e-3,  # this and the next by --sweep, for so small a model
            "decay_fraction": 0.7,
            "zero_residual": True,
        },
        [0.2, 0.225, 0.25, 0.3],
    ),
}


SCHEDULES: dict[str, dict] = {  # of AdamW in the sweep; a cosine goes to a tenth
    "cosine": {},
    "wsd": {"schedule": "wsd"},
    "line to 0": {"schedule": "wsd", "decay_fraction": 1.0},
}
ADAMW_SWEEP: Recipes = {
    f"AdamW {lr:g}, {name}": ({"max_lr": lr, "min_lr": lr / 10, **schedule}, [1.0])
    for lr in (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
    for name, schedule in SCHEDULES.items()
}
FAST_SWEEP: Recipes = {
    f"fast, {name} {value:g}": ({**RECIPES[FAST][0], name: value}, [0.3])
    for name, values in (
        ("muon_lr", (0.01, 0.02, 0.04)),
        ("max_lr", (2e-3, 4e-3, 16e-3)),
        ("decay_fraction", (0.4, 1.0)),
        ("zero_residual", (False,)),
    )
    for value in values
}


@dataclass(frozen=True)
class BenchmarkConfig:
    data: str = "stdlib"
    """stdlib, which is prepared when it is not there, or a folder of shards"""
    steps: int = 300
    """of the baseline"""
    seeds: int = 3
    """runs of each recipe, with different weights and order of the data"""
    sweep: bool = False
    """instead, other settings of AdamW at full length and of the fast recipe at 0.3, one seed"""
    first_seed: int = 1337
    """the others are the numbers after it"""
    vocab_size: int = 4096
    """tokens that the models know; 50257 is all"""
    n_layer: int = 4
    """of the models; heads are 64 wide"""
    n_embd: int = 256
    """of the models"""
    block_size: int = 128
    """tokens in a sequence"""
    total_batch_size: int = 2048
    """tokens in a step"""
    eval_every: int = 15
    """steps between evaluations"""
    eval_tokens: int = 16384
    """validation tokens"""
    out: str = "docs/time_to_loss.png"
    """where the curves are drawn"""


class Run:
    """A recipe at a length, from a seed."""

    def __init__(
        self,
        overrides: dict,
        share: float,
        seed: int,
        shards: dict[str, TokenShards],
        c: BenchmarkConfig,
    ):
        steps = round(share * c.steps)
        self.config = PretrainConfig(
            batch_size=c.total_batch_size // c.block_size,
            total_batch_size=c.total_batch_size,
            max_steps=steps,
            warmup_steps=round(0.1 * steps),
            precision="fp32",
            compile=False,
            seed=seed,
            **overrides,
        )
        torch.manual_seed(seed)
        shape = GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_embd // 64, c.n_embd)
        self.model = GPT(shape)
        if self.config.zero_residual:
            zero_residual_projections(self.model)
        sizes = c.block_size, self.config.batch_size
        data = PretrainingData(shards["train"], *sizes, c.total_batch_size, seed)
        self.dist = Distributed(0, 1, torch.device("cpu"))
        self.step = TrainingStep(self.model, data, self.config, self.dist)
        self.val = lambda: evaluation_batches(shards["val"], *sizes, c.eval_tokens)
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []

    def advance(self, step: int, eval_every: int) -> None:
        started = time.perf_counter()
        self.step(step)
        self.seconds.append(time.perf_counter() - started)
        if step % eval_every == 0 or step == self.config.max_steps:
            with self.step.raw():
                loss = evaluate(self.model, self.val(), self.dist)
            self.curve.append((step * self.config.total_batch_size, loss))


def both_splits(folder: Path) -> dict[str, TokenShards]:
    return {split: TokenShards(folder, split) for split in ("train", "val")}


def with_common_tokens(source: Path, target: Path, vocab_size: int) -> None:
    """Write the shards of `source` again with their commonest tokens as 0, 1, 2, ... and all others
    as the last id.
    """
    tokens = {split: shards.read(0, len(shards)) for split, shards in both_splits(source).items()}
    order = np.argsort(-np.bincount(tokens["train"], minlength=50257), kind="stable")
    new_id = np.full(50257, vocab_size - 1)
    new_id[order[: vocab_size - 1]] = np.arange(min(vocab_size - 1, 50257))
    entries = [
        {**write_shard(target / f"x_{split}_000000.npy", new_id[ids]), "split": split}
        for split, ids in tokens.items()
    ]
    write_manifest(target, {"shards": entries})


def run_all(recipes: dict, seed: int, folder: Path, c: BenchmarkConfig) -> dict[tuple, Run]:
    shards = both_splits(folder)
    runs = {
        (name, share): Run(overrides, share, seed, shards, c)
        for name, (overrides, shares) in recipes.items()
        for share in shares
    }
    for step in tqdm(range(1, c.steps + 1), desc=f"seed {seed}", disable=None):
        for run in runs.values():
            if step <= run.config.max_steps:
                run.advance(step, c.eval_every)
    return runs


def ending(runs: list[dict[tuple, Run]], key: tuple) -> list[float]:
    return [of_seed[key].curve[-1][1] for of_seed in runs]


def seconds(runs: list[dict[tuple, Run]], key: tuple) -> float:
    """Steps times the median of those steps that all runs did, side by side."""
    common = min(len(run.seconds) for run in runs[0].values())
    medians = [statistics.median(of_seed[key].seconds[:common]) for of_seed in runs]
    return statistics.mean(medians) * runs[0][key].config.max_steps


def print_endings(runs: list[dict[tuple, Run]], c: BenchmarkConfig) -> None:
    print("| recipe | steps | tokens | loss at the end, mean and seeds | seconds |")
    print("|---|---|---|---|---|")
    for key in runs[0]:
        losses = ending(runs, key)
        steps = runs[0][key].config.max_steps
        each = " ".join(f"{loss:.3f}" for loss in losses)
        print(
            f"| {key[0]} | {steps} | {steps * c.total_batch_size:,} | "
            f"{statistics.mean(losses):.3f} ({each}) | {seconds(runs, key):.0f} |"
        )


def compare(runs: list[dict[tuple, Run]], c: BenchmarkConfig) -> None:
    for target in (BASELINE, TUNED):
        goal = statistics.mean(ending(runs, (target, 1.0)))
        reached = [
            key for key in runs[0] if key[0] == FAST and statistics.mean(ending(runs, key)) <= goal
        ]
        if not reached:
            print(f"\n{FAST} does not get to {target} loss of {goal:.3f} in these lengths")
            continue
        key = min(reached, key=lambda key: key[1])
        tokens = runs[0][key].config.max_steps / c.steps
        time_share = seconds(runs, key) / seconds(runs, (target, 1.0))
        print(
            f"\n{FAST} gets to {target} loss of {goal:.3f} with {tokens:.2f} of the tokens and "
            f"{time_share:.2f} of the seconds"
        )


def draw(runs: list[dict[tuple, Run]], file: Path) -> None:
    """Mean curves over the seeds, a recipe's lengths in one colour."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = {name: f"C{i}" for i, name in enumerate(RECIPES)}
    labelled = set()
    for name, share in runs[0]:
        curves = [r[name, share].curve for r in runs]
        tokens = [t / 1e6 for t, _ in curves[0]]
        losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
        label = None if name in labelled else name + (" (each length)" if name == FAST else "")
        labelled.add(name)
        axes.plot(tokens, losses, color=colors[name], label=label, linewidth=1)
        axes.plot(tokens[-1], losses[-1], "o", color=colors[name], markersize=4)
    for target in (BASELINE, TUNED):
        goal = statistics.mean(ending(runs, (target, 1.0)))
        axes.axhline(goal, color=colors[target], linestyle=":", linewidth=1)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    axes.set_ylim(top=float(np.mean([r[BASELINE, 1.0].curve[1][1] for r in runs])))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main(config: BenchmarkConfig) -> None:
    source = Path(config.data)
    if config.data == "stdlib":
        source = ROOT / "data" / "stdlib"
        command = [sys.executable, str(ROOT / "fineweb.py"), "--dataset", "stdlib"]
        subprocess.run([*command, "--out_dir", str(source)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        with_common_tokens(source, Path(folder), config.vocab_size)
        recipes, seeds = RECIPES, config.seeds
        if config.sweep:
            recipes, seeds = ADAMW_SWEEP | FAST_SWEEP, 1
        runs = [run_all(recipes, config.first_seed + i, Path(folder), config) for i in range(seeds)]
    print_endings(runs, config)
    if config.sweep:
        return
    compare(runs, config)
    draw(runs, Path(config.out))
    print(f"\ncurves in {config.out}")


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, __doc__.splitlines()[0])
