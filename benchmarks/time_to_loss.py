"""Tokens and seconds that a recipe needs to reach the loss at which another ends, on real text.

    python benchmarks/time_to_loss.py                   # Python's documentation: 1 hour
    python benchmarks/time_to_loss.py --data data/mine  # shards made by fineweb.py
    python benchmarks/time_to_loss.py --sweep           # how the recipes were tuned: 2 hours

A schedule has a fixed length, so every length of a recipe is a run of its own. What counts is the
shortest run that ends at or below the target, in the mean over the seeds. All runs of a seed take
turns, step by step, in one process. The seconds of a run are its steps times the median of those
steps that all runs did, without evaluation. The vocabulary is cut to the most frequent tokens of
the text, and all others become one, so that a small model does not spend all its time in the head.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import PretrainingData, validation_batches
from engine.distributed import Distributed
from engine.shards import TokenShards, write_manifest, write_shard
from engine.step import TrainingStep
from engine.tokenizer import END_OF_TEXT_ID
from engine.training import evaluate_loss
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig, zero_residual_projections

SHAPE = GPTConfig(block_size=128, vocab_size=4096, n_layer=4, n_head=4, n_embd=256)
BATCH_SIZE, EVAL_EVERY, EVAL_TOKENS, FIRST_SEED = 16, 15, 16_384, 1337
BASELINE, TUNED, FAST = "build-nanogpt's", "AdamW, tuned", "fast"
Recipes = dict[str, tuple[dict[str, Any], tuple[float, ...]]]  # settings; lengths / the baseline's
LINEAR: dict[str, Any] = {"schedule": "wsd", "decay_fraction": 1.0}
FAST_SETTINGS: dict[str, Any] = {"optimizer": "muon", "schedule": "wsd", "zero_residual": True}
FAST_SETTINGS |= {"max_lr": 8e-3, "decay_fraction": 0.7}  # from --sweep, for so small a model
RECIPES: Recipes = {
    BASELINE: ({"max_lr": 6e-4, "min_lr": 6e-5}, (1.0,)),
    TUNED: ({"max_lr": 1.5e-3, **LINEAR}, (1.0,)),  # from --sweep
    FAST: (FAST_SETTINGS, (0.2, 0.225, 0.25, 0.3)),
}
SCHEDULES = {"cosine": {}, "wsd": {"schedule": "wsd"}, "linear to 0": LINEAR}
SWEEP: Recipes = {
    f"AdamW {lr:g}, {name}": ({"max_lr": lr, "min_lr": lr / 10, **schedule}, (1.0,))
    for lr in (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
    for name, schedule in SCHEDULES.items()
} | {
    f"fast, {name} {value:g}": ({**FAST_SETTINGS, name: value}, (0.3,))
    for name, values in (
        ("muon_lr", (0.01, 0.02, 0.04)),
        ("max_lr", (2e-3, 4e-3, 16e-3)),
        ("decay_fraction", (0.4, 1.0)),
        ("zero_residual", (False,)),
    )
    for value in values
}


@dataclass(frozen=True)
class TimeToLossConfig:
    data: str = flag("stdlib", "stdlib, prepared if it is not there, or a folder of shards")
    sweep: bool = flag(False, "other settings of AdamW, and of the fast recipe at 0.3, one seed")
    steps: int = flag(300, "steps of the baseline")
    seeds: int = flag(3, "runs of each recipe, with other weights and another order of the data")
    plot: str = flag("docs/time_to_loss.png", "the figure to write")


class Run:
    """A recipe of a certain length, from a seed, on the shards of a folder."""

    def __init__(self, settings: dict[str, Any], steps: int, seed: int, folder: Path):
        self.steps, self.dist = steps, Distributed(rank=0, world_size=1, device=harness.CPU)
        settings = {"precision": "fp32", "compile": False, "seed": seed, **settings}
        config = PretrainConfig(max_steps=steps, warmup_steps=round(0.1 * steps), **settings)
        torch.manual_seed(seed)
        model, sizes = GPT(SHAPE), {"block_size": SHAPE.block_size, "batch_size": BATCH_SIZE}
        if config.zero_residual:
            zero_residual_projections(model)
        train, self.val = (TokenShards(folder, split) for split in ("train", "val"))
        self.sizes, total = sizes, BATCH_SIZE * SHAPE.block_size
        data = PretrainingData(train, total_batch_size=total, seed=seed, **sizes)
        self.step = TrainingStep(model, data, config, self.dist)
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []  # tokens, validation loss

    def advance(self, step: int) -> None:
        started = time.perf_counter()
        self.step(step)
        self.seconds.append(time.perf_counter() - started)
        if step % EVAL_EVERY == 0 or step == self.steps:
            batches = validation_batches(self.val, eval_tokens=EVAL_TOKENS, **self.sizes)
            with self.step.eval_mode(shapes_of_training=True):
                loss = evaluate_loss(self.step.summed_loss, batches, self.dist)
            self.curve.append((self.step.data.tokens_through(step), loss))


@dataclass
class Summary:
    """The runs of a recipe and a length, with all seeds."""

    recipe: str
    steps: int
    losses: list[float]  # at the end
    seconds: float
    curve: np.ndarray  # mean tokens and losses, (evaluations, 2)

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)


def train_all(recipes: Recipes, seeds: range, folder: Path, steps: int) -> list[Summary]:
    """Train each recipe at its lengths with each seed."""
    runs: dict[tuple[str, int], list[Run]] = {
        (name, round(length * steps)): []
        for name, (_, lengths) in recipes.items()
        for length in lengths
    }
    for seed in seeds:
        for (name, length), of_recipe in runs.items():
            of_recipe.append(Run(recipes[name][0], length, seed, folder))
        for step in tqdm(range(1, steps + 1), desc=f"seed {seed}", disable=None):
            for (_, length), of_recipe in runs.items():
                if step <= length:
                    of_recipe[-1].advance(step)
    summaries, common = [], min(length for _, length in runs)
    for (name, length), of_recipe in runs.items():
        step_seconds = statistics.mean(statistics.median(r.seconds[:common]) for r in of_recipe)
        losses = [run.curve[-1][1] for run in of_recipe]
        curve = np.mean([run.curve for run in of_recipe], axis=0)
        summaries.append(Summary(name, length, losses, step_seconds * length, curve))
    return summaries


def cut_vocabulary(source: Path, target: Path) -> None:
    """Write the shards of `source` with their most frequent tokens as 0, 1, 2, ... and all others
    as the last id.
    """
    shards = {split: TokenShards(source, split) for split in ("train", "val")}
    tokens = {split: one.read(0, len(one)) for split, one in shards.items()}
    counts = np.bincount(tokens["train"], minlength=END_OF_TEXT_ID + 1)
    frequent = np.argsort(-counts, kind="stable")[: SHAPE.vocab_size - 1]
    new_id = np.full(len(counts), SHAPE.vocab_size - 1)
    new_id[frequent] = np.arange(len(frequent))
    entries = [
        {**write_shard(target / f"x_{split}_000000.npy", new_id[ids]), "split": split}
        for split, ids in tokens.items()
    ]
    write_manifest(target, {"shards": entries})


def compare(summaries: list[Summary]) -> None:
    """Print the shares of tokens and seconds with which the fast recipe reaches others' losses."""
    fast = [s for s in summaries if s.recipe == FAST]
    for target in [s for s in summaries if s.recipe != FAST]:
        what = f"\n{FAST}: the loss of {target.recipe}, {target.loss:.3f}, is"
        reached = [s for s in fast if s.loss <= target.loss]
        if not reached:
            print(f"{what} not reached at these lengths")
            continue
        best = min(reached, key=lambda s: s.steps)
        tokens, seconds = best.steps / target.steps, best.seconds / target.seconds
        print(f"{what} reached with {tokens:.2f} of the tokens and {seconds:.2f} of the seconds")


def draw(summaries: list[Summary], file: str) -> None:
    """Mean curves over the seeds, all lengths of a recipe in one color."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, colors = figure.subplots(), {name: f"C{i}" for i, name in enumerate(RECIPES)}
    labels = {BASELINE: BASELINE, TUNED: TUNED, FAST: f"{FAST} (each length)"}
    for s in summaries:
        color, tokens, losses = colors[s.recipe], s.curve[:, 0] / 1e6, s.curve[:, 1]
        axes.plot(tokens, losses, color=color, label=labels.pop(s.recipe, None), linewidth=1)
        axes.plot(tokens[-1], losses[-1], "o", color=color, markersize=4)
        if s.recipe != FAST:
            axes.axhline(s.loss, color=color, linestyle=":", linewidth=1)
    top = float(summaries[0].curve[:2, 1].min())  # the first losses would hide the rest
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    axes.set_ylim(top=top)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"\nfigure in {file}")


def main(config: TimeToLossConfig) -> None:
    source = Path(config.data)
    if config.data == "stdlib":
        source = harness.ROOT / "data" / "stdlib"
        command = [sys.executable, str(harness.ROOT / "fineweb.py"), "--dataset", "stdlib"]
        subprocess.run([*command, "--out_dir", str(source)], check=True)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if config.sweep else config.seeds))
    with tempfile.TemporaryDirectory() as folder:
        cut_vocabulary(source, Path(folder))
        recipes = SWEEP if config.sweep else RECIPES
        summaries = train_all(recipes, seeds, Path(folder), config.steps)
    harness.print_header("recipe", "steps", "tokens", "loss at the end: mean, seeds", "seconds")
    for s in summaries:
        losses = f"{s.loss:.3f}: {', '.join(f'{loss:.3f}' for loss in s.losses)}"
        tokens = f"{s.curve[-1, 0]:,.0f}"
        harness.print_row(s.recipe, s.steps, tokens, losses, f"{s.seconds:.0f}")
    if not config.sweep:
        compare(summaries)
        draw(summaries, config.plot)


if __name__ == "__main__":
    run_command(main, TimeToLossConfig, __doc__)
