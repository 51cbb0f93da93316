"""Tokens and seconds that a recipe needs to reach the loss at which another ends, on real text.

    python benchmarks/time_to_loss.py                   # Python's documentation, three seeds: 1 hour
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

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import flag, run_command
from engine.data import (
    PretrainingData,
    TokenShards,
    validation_batches,
    write_manifest,
    write_shard,
)
from engine.distributed import Distributed
from engine.step import TrainingStep
from engine.tokenizer import END_OF_TEXT_ID
from engine.training import evaluate_loss
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig, zero_residual_projections

BASELINE, TUNED, FAST = "build-nanogpt's", "AdamW, tuned", "fast"
Recipes = dict[str, tuple[dict, list[float]]]  # settings, and lengths over that of the baseline
FAST_SETTINGS = {
    "optimizer": "muon",
    "schedule": "wsd",
    "max_lr": 8e-3,  # this and decay_fraction from --sweep, for so small a model
    "decay_fraction": 0.7,
    "zero_residual": True,
}
RECIPES: Recipes = {
    BASELINE: ({"max_lr": 6e-4, "min_lr": 6e-5}, [1.0]),
    TUNED: ({"max_lr": 1.5e-3, "schedule": "wsd", "decay_fraction": 1.0}, [1.0]),  # from --sweep
    FAST: (FAST_SETTINGS, [0.2, 0.225, 0.25, 0.3]),
}
SCHEDULES: dict[str, dict] = {
    "cosine": {},
    "wsd": {"schedule": "wsd"},
    "linear to 0": {"schedule": "wsd", "decay_fraction": 1.0},
}
SWEEP: Recipes = {
    f"AdamW {lr:g}, {name}": ({"max_lr": lr, "min_lr": lr / 10, **schedule}, [1.0])
    for lr in (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
    for name, schedule in SCHEDULES.items()
} | {
    f"fast, {name} {value:g}": ({**FAST_SETTINGS, name: value}, [0.3])
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
    first_seed: int = flag(1337, "the others are the numbers after it")
    vocab_size: int = flag(4096, "tokens of the vocabulary; 50257 is all")
    n_layer: int = flag(4, "blocks of the models")
    n_embd: int = flag(256, "width of the models; heads are 64 wide")
    block_size: int = flag(128, "tokens per sequence")
    total_batch_size: int = flag(2048, "tokens per step")
    eval_every: int = flag(15, "steps between evaluations")
    eval_tokens: int = flag(16384, "validation tokens")
    plot: str = flag("docs/time_to_loss.png", "the figure to write")


class Run:
    """A recipe of a certain length, from a seed."""

    def __init__(self, settings: dict, length: float, seed: int, folder: Path, c: TimeToLossConfig):
        steps, batch_size = round(length * c.steps), c.total_batch_size // c.block_size
        self.config = PretrainConfig(
            max_steps=steps,
            warmup_steps=round(0.1 * steps),
            precision="fp32",
            compile=False,
            seed=seed,
            **settings,
        )
        torch.manual_seed(seed)
        n_head = c.n_embd // harness.HEAD_SIZE
        self.model = GPT(GPTConfig(c.block_size, c.vocab_size, c.n_layer, n_head, c.n_embd))
        if self.config.zero_residual:
            zero_residual_projections(self.model)
        self.dist = Distributed(rank=0, world_size=1, device=harness.CPU)
        sizes = {"block_size": c.block_size, "batch_size": batch_size}
        shards, total = TokenShards(folder, "train"), c.total_batch_size
        data = PretrainingData(shards, total_batch_size=total, seed=seed, **sizes)
        self.step = TrainingStep(self.model, data, self.config, self.dist)
        val = TokenShards(folder, "val")
        self.val = lambda: validation_batches(val, eval_tokens=c.eval_tokens, **sizes)
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []  # tokens, loss

    def advance(self, step: int, c: TimeToLossConfig) -> None:
        started = time.perf_counter()
        self.step(step)
        self.seconds.append(time.perf_counter() - started)
        if step % c.eval_every == 0 or step == self.config.max_steps:
            with self.step.eval_mode():
                loss = evaluate_loss(self.model, self.val(), self.dist)
            self.curve.append((step * c.total_batch_size, loss))


def cut_vocabulary(source: Path, target: Path, vocab_size: int) -> None:
    """Write the shards of `source` with their most frequent tokens as 0, 1, 2, ... and all others
    as the last id.
    """
    shards = {split: TokenShards(source, split) for split in ("train", "val")}
    tokens = {split: one.read(0, len(one)) for split, one in shards.items()}
    n = END_OF_TEXT_ID + 1
    order = np.argsort(-np.bincount(tokens["train"], minlength=n), kind="stable")
    new_id = np.full(n, vocab_size - 1)
    new_id[order[: vocab_size - 1]] = np.arange(min(vocab_size - 1, n))
    entries = [
        {**write_shard(target / f"x_{split}_000000.npy", new_id[ids]), "split": split}
        for split, ids in tokens.items()
    ]
    write_manifest(target, {"shards": entries})


Key = tuple[str, float]  # recipe and length


def train_all(recipes: Recipes, seed: int, folder: Path, c: TimeToLossConfig) -> dict[Key, Run]:
    runs = {
        (name, length): Run(settings, length, seed, folder, c)
        for name, (settings, lengths) in recipes.items()
        for length in lengths
    }
    for step in tqdm(range(1, c.steps + 1), desc=f"seed {seed}", disable=None):
        for run in runs.values():
            if step <= run.config.max_steps:
                run.advance(step, c)
    return runs


@dataclass
class Summary:
    """The runs of a recipe and a length with all seeds."""

    steps: int
    losses: list[float]  # at the end
    seconds: float  # mean
    curve: np.ndarray  # mean of (tokens, loss), (evaluations, 2)

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)


def summarize(seeds: list[dict[Key, Run]]) -> dict[Key, Summary]:
    common = min(len(run.seconds) for run in seeds[0].values())
    summaries = {}
    for key in seeds[0]:
        runs = [runs[key] for runs in seeds]
        steps = runs[0].config.max_steps
        seconds = statistics.mean(statistics.median(run.seconds[:common]) for run in runs) * steps
        losses = [run.curve[-1][1] for run in runs]
        curve = np.mean([run.curve for run in runs], axis=0)
        summaries[key] = Summary(steps, losses, seconds, curve)
    return summaries


def print_summaries(summaries: dict[Key, Summary], c: TimeToLossConfig) -> None:
    harness.print_header("recipe", "steps", "tokens", "loss at the end: mean, seeds", "seconds")
    for (name, _), s in summaries.items():
        losses = f"{s.loss:.3f}: {', '.join(f'{loss:.3f}' for loss in s.losses)}"
        tokens = f"{s.steps * c.total_batch_size:,}"
        harness.print_row(name, s.steps, tokens, losses, f"{s.seconds:.0f}")


def compare(summaries: dict[Key, Summary], c: TimeToLossConfig) -> None:
    """Print with which shares of tokens and seconds the fast recipe reaches the others' losses."""
    for name in (BASELINE, TUNED):
        target = summaries[name, 1.0]
        fast = [s for key, s in summaries.items() if key[0] == FAST and s.loss <= target.loss]
        if not fast:
            print(f"\n{FAST} does not reach {name} loss of {target.loss:.3f} at these lengths")
            continue
        best = min(fast, key=lambda s: s.steps)
        print(
            f"\n{FAST} reaches {name} loss of {target.loss:.3f} with {best.steps / c.steps:.2f} of "
            f"the tokens and {best.seconds / target.seconds:.2f} of the seconds"
        )


def draw(summaries: dict[Key, Summary], file: Path) -> None:
    """Mean curves over the seeds, all lengths of a recipe in one color."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = {name: f"C{i}" for i, name in enumerate(RECIPES)}
    for (name, length), s in summaries.items():
        is_first = length == RECIPES[name][1][0]
        label = f"{name} (each length)" if name == FAST else name
        tokens, losses = s.curve[:, 0] / 1e6, s.curve[:, 1]
        label = label if is_first else "_"
        axes.plot(tokens, losses, color=colors[name], label=label, linewidth=1)
        axes.plot(tokens[-1], losses[-1], "o", color=colors[name], markersize=4)
        if name != FAST:
            axes.axhline(s.loss, color=colors[name], linestyle=":", linewidth=1)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    axes.set_ylim(top=float(summaries[BASELINE, 1.0].curve[1, 1]))
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
    recipes, n_seeds = (SWEEP, 1) if config.sweep else (RECIPES, config.seeds)
    with tempfile.TemporaryDirectory() as folder:
        cut_vocabulary(source, Path(folder), config.vocab_size)
        seeds = range(config.first_seed, config.first_seed + n_seeds)
        summaries = summarize([train_all(recipes, seed, Path(folder), config) for seed in seeds])
    print_summaries(summaries, config)
    if not config.sweep:
        compare(summaries, config)
        draw(summaries, Path(config.plot))


if __name__ == "__main__":
    run_command(main, TimeToLossConfig, __doc__)
