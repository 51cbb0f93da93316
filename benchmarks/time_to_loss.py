"""Tokens and seconds that a recipe needs to reach the loss at which another ends, on real text.

    python benchmarks/time_to_loss.py                          # Python's documentation, four times
    python benchmarks/time_to_loss.py --data data/mine --size 6x384:32x128 --steps 1500
    python benchmarks/time_to_loss.py --data data/mine --sweep  # one setting at a time
    python benchmarks/time_to_loss.py --redraw docs/time_to_loss.jsonl --plot docs/time_to_loss.png

A schedule has a fixed length, so every length of a recipe is a run of its own, in a process of its
own; `--jobs` of them run at once, with one thread each. Between two lengths, losses are
interpolated over the logarithm of the tokens. The seconds of a step are measured afterwards, in
turns. OUT_DIR/runs.jsonl keeps finished runs, and a repeated command does only what is missing.

The vocabulary is cut to the most frequent tokens of the text, and all others become one, so that a
small model does not spend all its time in the head.
"""

import itertools
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import Precision, flag, run_command
from engine.data import PretrainingData, validation_batches
from engine.distributed import Distributed, default_precision, open_device
from engine.evaluation import eval_mode, evaluate_loss
from engine.files import JSONLinesLog, lock_folder
from engine.shards import TokenShards, write_manifest, write_shard
from engine.step import TrainingStep
from engine.tokenizer import END_OF_TEXT_ID
from train_gpt2 import PretrainConfig, new_model

VOCAB_SIZE = 4096
EVALUATIONS, EVAL_TOKENS, FIRST_SEED, TIMED_STEPS = 5, 65_536, 1337, 15
WARMUP_FRACTION = 0.1
LABEL_SPACE = 1.25  # the figure's width, of that of the curves

Settings = dict[str, Any]  # of PretrainConfig
BASELINE, TUNED, FORMER, FAST = "build-nanogpt's", "tuned AdamW", "former fast", "fast"
LINEAR: Settings = {"schedule": "wsd", "decay_fraction": 1.0}
FORMER_SETTINGS: Settings = {
    "optimizer": "muon",
    "max_lr": 8e-3,
    "schedule": "wsd",
    "decay_fraction": 0.7,
    "zero_residual": True,
}
FAST_CHANGES: Settings = {
    "muon_beta2": 0.95,
    "beta1": 0.8,
    "weight_decay": 0.0,
    "sinusoidal_wpe": 0.2,
}
RECIPES: dict[str, Settings] = {
    BASELINE: {"max_lr": 6e-4, "min_lr": 6e-5},
    TUNED: {"max_lr": 3e-3, "beta2": 0.99, "zero_residual": True, **LINEAR},
    FORMER: FORMER_SETTINGS,
    FAST: FORMER_SETTINGS | FAST_CHANGES,
}
LENGTHS = {FAST: (0.25, 0.5, 0.85, 1.0)}  # as shares of --steps; 1 for other recipes
# Other values of single settings, which --sweep tries.
SWEEP: dict[str, dict[str, tuple[Any, ...]]] = {
    TUNED: {
        "max_lr": (1.5e-3, 2e-3, 4e-3, 6e-3),
        "beta1": (0.8,),
        "beta2": (0.95,),
        "weight_decay": (0.0,),
        "decay_fraction": (0.7,),
        "zero_residual": (False,),
        "sinusoidal_wpe": (0.05, 0.2),
        "schedule": ("cosine",),
    },
    FAST: {
        "muon_beta2": (0.0,),
        "beta1": (0.9,),
        "weight_decay": (0.1,),
        "sinusoidal_wpe": (0.0, 0.1, 0.4),
        "muon_lr": (0.01, 0.04),
        "max_lr": (2e-3, 16e-3),
        "decay_fraction": (0.4, 1.0),
        "muon_weight_decay": (0.1,),
    },
}


@dataclass(frozen=True)
class TimeToLossConfig:
    data: str = flag("stdlib", "stdlib, prepared if it is not there, or a folder of shards")
    size: str = flag("4x256:32x128", "layers x width of the model, sequences x tokens of a step")
    steps: int = flag(600, "steps; fast also has shorter runs")
    seeds: int = flag(3, "runs of each recipe, with other weights and another order of the data")
    recipes: list[str] = flag(list(RECIPES), "recipes to run")
    sweep: bool = flag(False, "change one setting at a time; one seed, whatever --seeds says")
    out_dir: str = flag("runs/time_to_loss", "folder of finished runs")
    plot: str = flag("", "figure to write")
    redraw: str = flag("", "file of finished runs: draw those on its first text, train nothing")
    device: str = flag("cpu", "cpu or cuda")
    jobs: int = flag(os.cpu_count() or 1, "runs at once")


@dataclass(frozen=True)
class Run:
    """A recipe with a schedule of `steps`, from a seed."""

    data: str  # fingerprint
    size: str
    precision: Precision
    recipe: str
    settings: Settings
    steps: int
    seed: int

    def matches(self, record: dict) -> bool:
        """Whether the record is this run's."""
        return all(record.get(key) == value for key, value in asdict(self).items())


class Trainer:
    """Trains a model of a run on the shards of a folder."""

    def __init__(self, run: Run, folder: Path, device: torch.device):
        self.run, self.dist = run, Distributed(rank=0, world_size=1, device=device)
        config = PretrainConfig(
            max_steps=run.steps,
            warmup_steps=round(WARMUP_FRACTION * run.steps),
            precision=run.precision,
            compile=False,
            seed=run.seed,
            **run.settings,
        )
        size = harness.Size.parse(run.size)
        model = new_model(replace(size.gpt_config(), vocab_size=VOCAB_SIZE), config)
        train, self.val = (TokenShards(folder, split) for split in ("train", "val"))
        self.sizes: dict[str, Any] = {"block_size": size.T, "batch_size": size.batch_size}
        data = PretrainingData(train, total_batch_size=size.tokens, seed=run.seed, **self.sizes)
        self.step = TrainingStep(model.to(device), data, config, self.dist)

    def train(self) -> list[tuple[int, float]]:
        """The curve: steps and validation losses."""
        curve = []
        for step in range(1, self.run.steps + 1):
            self.step(step)
            if step * EVALUATIONS // self.run.steps > (step - 1) * EVALUATIONS // self.run.steps:
                curve.append((step, self.evaluate()))
        return curve

    def evaluate(self) -> float:
        batches = validation_batches(self.val, eval_tokens=EVAL_TOKENS, **self.sizes)
        with eval_mode(self.step.model, self.step.config, self.dist):
            return evaluate_loss(self.step.summed_loss, batches, self.dist)[0]


def train_run(run: Run, folder: Path, device: str) -> dict[str, Any]:
    """The record of a run. Runs in a process of its own."""
    torch.set_num_threads(1)
    curve = Trainer(run, folder, open_device(device, local_rank=0)).train()
    return {**asdict(run), "curve": curve, "loss": curve[-1][1]}


def train_missing(runs: list[Run], config: TimeToLossConfig, folder: Path) -> list[dict[str, Any]]:
    """The records of the runs, those of earlier commands included."""
    log = JSONLinesLog(Path(config.out_dir) / "runs.jsonl", "loss")
    records = list(log.records)
    missing = [run for run in runs if not any(map(run.matches, records))]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(config.jobs, context) as pool,
        tqdm(total=sum(run.steps for run in missing), unit="step", disable=None) as bar,
    ):
        longest_first = sorted(missing, key=lambda run: -run.steps)
        futures = [pool.submit(train_run, run, folder, config.device) for run in longest_first]
        try:
            for future in as_completed(futures):
                record = future.result()
                log.append(record)
                records.append(record)
                bar.update(record["steps"])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [next(filter(run.matches, records)) for run in runs]


def read_finished(config: TimeToLossConfig) -> list[dict[str, Any]]:
    """Those of the runs of `config` that are in the file `redraw`, on the text of its first run."""
    records = JSONLinesLog.read(Path(config.redraw), "loss")
    runs = [run for r in records[:1] for run in plan_runs(config, r["data"], r["precision"])]
    found = [record for run in runs for record in records if run.matches(record)]
    if not found:
        raise ValueError(
            f"{config.redraw} has no such runs; expected the runs.jsonl of an out_dir, and its "
            "--size, --steps, --seeds and --recipes"
        )
    return found


def plan_runs(config: TimeToLossConfig, data: str, precision: Precision) -> list[Run]:
    recipes = {name: RECIPES[name] for name in config.recipes}
    if config.sweep:
        recipes |= {
            f"{name}, {setting} {value}": {**recipes[name], setting: value}
            for name in recipes
            for setting, values in SWEEP.get(name, {}).items()
            for value in values
        }
    return [
        Run(data, config.size, precision, name, settings, round(length * config.steps), seed)
        for seed in range(FIRST_SEED, FIRST_SEED + (1 if config.sweep else config.seeds))
        for name, settings in recipes.items()
        for length in ((1.0,) if config.sweep else LENGTHS.get(name, (1.0,)))
    ]


def measure_steps(runs: list[Run], folder: Path, config: TimeToLossConfig) -> dict[str, float]:
    """The median seconds of a step of each recipe. The recipes take turns."""
    torch.set_num_threads(1)
    device = open_device(config.device, local_rank=0)

    def make_step(run: Run) -> Callable[[int], object]:
        trainer = Trainer(run, folder, device)

        def step(i: int) -> None:
            trainer.step(i)
            harness.read_clock(device)

        return step

    contenders = {name: make_step(run) for name, run in {run.recipe: run for run in runs}.items()}
    turns = harness.take_turns(contenders, range(1, TIMED_STEPS + 1), warmup=3)
    return {name: harness.median(of_recipe) for name, of_recipe in turns.items()}


def steps_to(target: float, losses: dict[int, float]) -> float:
    """The number of steps at which the loss is `target`, given the final losses of some numbers of
    steps: interpolated over the logarithm of the steps. Infinite where even the most are too few,
    minus infinity where even the fewest are too many.
    """
    for (short, high), (long, low) in itertools.pairwise(sorted(losses.items())):
        if low <= target <= high:
            return short * (long / short) ** ((high - target) / (high - low or 1))
    return math.inf if target < min(losses.values()) else -math.inf


def cut_vocabulary(source: Path, target: Path) -> str:
    """Write the shards of `source` with their most frequent tokens as 0, 1, 2, ... and all others
    as the last id. Return the fingerprint of the train split.
    """
    shards = {split: TokenShards(source, split) for split in ("train", "val")}
    tokens = {split: one.read(0, len(one)) for split, one in shards.items()}
    counts = np.bincount(tokens["train"], minlength=END_OF_TEXT_ID + 1)
    frequent = np.argsort(-counts, kind="stable")[: VOCAB_SIZE - 1]
    new_id = np.full(len(counts), VOCAB_SIZE - 1)
    new_id[frequent] = np.arange(len(frequent))
    entries = [
        {**write_shard(target / f"x_{split}_000000.npy", new_id[ids]), "split": split}
        for split, ids in tokens.items()
    ]
    write_manifest(target, {"shards": entries})
    return TokenShards(target, "train").fingerprint


def losses_by_recipe(records: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """The final losses of the seeds, in the seeds' order, by recipe and steps."""
    losses: dict[str, dict[int, list[float]]] = {}
    for record in sorted(records, key=lambda record: (record["steps"], record["seed"])):
        by_steps = losses.setdefault(record["recipe"], {})
        by_steps.setdefault(record["steps"], []).append(record["loss"])
    return losses


def print_losses(losses: dict[str, dict[int, list[float]]], seconds: dict[str, float]) -> None:
    harness.print_header("recipe", "steps", "final loss, mean", "by seed", "ms per step")
    for name, by_steps in losses.items():
        for steps, of_seeds in by_steps.items():
            each = ", ".join(f"{loss:.3f}" for loss in of_seeds)
            ms = f"{1e3 * seconds[name]:.0f}" if name in seconds else ""
            harness.print_row(name, steps, f"{statistics.mean(of_seeds):.3f}", each, ms)


def print_ratios(losses: dict[str, dict[int, list[float]]], seconds: dict[str, float]) -> None:
    """The shares of tokens and seconds with which the fast recipe reaches the others' losses: for
    the mean losses of the seeds, and the least and the most tokens of a single seed.
    """
    harness.print_header("to the loss of", "tokens", "least", "most", "seconds")
    fast = losses[FAST]
    means = {steps: statistics.mean(of_seeds) for steps, of_seeds in fast.items()}
    by_seed = [dict(zip(fast, final, strict=True)) for final in zip(*fast.values(), strict=True)]
    for name in (name for name in losses if name != FAST):
        ((steps, targets),) = losses[name].items()
        share = steps_to(statistics.mean(targets), means) / steps
        of_seeds = [steps_to(*pair) / steps for pair in zip(targets, by_seed, strict=True)]
        words = {
            math.inf: f"above {max(fast) / steps:.2f}",
            -math.inf: f"below {min(fast) / steps:.2f}",
        }
        cells = [words.get(x, f"{x:.2f}") for x in (share, min(of_seeds), max(of_seeds))]
        in_seconds = share * seconds[FAST] / seconds[name]
        harness.print_row(name, *cells, f"{in_seconds:.2f}" if math.isfinite(share) else "")


def draw(records: list[dict[str, Any]], file: str) -> None:
    """Write the figure."""
    figure = draw_curves(records)
    figure.savefig(file, dpi=150)
    print(f"\nfigure in {file}")


def draw_curves(records: list[dict[str, Any]]) -> Figure:
    """Mean curves over the seeds, lengths of a recipe in one color; the shares of tokens."""
    step_tokens = harness.Size.parse(records[0]["size"]).tokens
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, labelled = figure.subplots(), set()
    colors = {name: f"C{i}" for i, name in enumerate(RECIPES)}
    curves: dict[tuple[str, int], list[list[tuple[int, float]]]] = {}
    for record in records:
        curves.setdefault((record["recipe"], record["steps"]), []).append(record["curve"])
    for (name, _), of_seeds in curves.items():
        steps, losses = np.mean(of_seeds, axis=0).T
        label = None if name in labelled else name
        labelled.add(name)
        millions = steps * step_tokens / 1e6
        axes.plot(millions, losses, color=colors[name], label=label, linewidth=1)
        axes.plot(millions[-1], losses[-1], "o", color=colors[name], markersize=4)
    draw_shares(axes, losses_by_recipe(records), colors, step_tokens)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    axes.set_xlim(right=LABEL_SPACE * axes.dataLim.x1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_shares(
    axes: Axes, losses: dict[str, dict[int, list[float]]], colors: dict[str, str], step_tokens: int
) -> None:
    """Draw the losses of the fast recipe over its lengths, and arrows to them from the ends of the
    others, with the shares of tokens.
    """
    if FAST not in losses:
        return
    means = {steps: statistics.mean(of_seeds) for steps, of_seeds in losses[FAST].items()}
    steps = np.geomspace(min(means), max(means), 100)  # the same interpolation as of `steps_to`
    between = np.interp(np.log(steps), np.log(list(means)), list(means.values()))
    label = f"{FAST}, interpolated over lengths"
    axes.plot(steps * step_tokens / 1e6, between, ":", color=colors[FAST], linewidth=1, label=label)
    for name in (name for name in losses if name != FAST):
        ((steps_of_other, finals),) = losses[name].items()
        loss = statistics.mean(finals)
        share = steps_to(loss, means) / steps_of_other
        if not math.isfinite(share):
            continue
        end = steps_of_other * step_tokens / 1e6
        arrow = {"arrowstyle": "->", "color": colors[name], "shrinkA": 3, "shrinkB": 0}
        axes.annotate("", xy=(share * end, loss), xytext=(end, loss), arrowprops=arrow)
        axes.annotate(
            f"{share:.2f} of the tokens",
            xy=(end, loss),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=colors[name],
        )


def main(config: TimeToLossConfig) -> None:
    if unknown := set(config.recipes) - set(RECIPES):
        raise ValueError(f"no recipe {', '.join(unknown)}, expected some of {', '.join(RECIPES)}")
    for name, minimum in (("steps", 4), ("seeds", 1), ("jobs", 1)):
        if (value := getattr(config, name)) < minimum:
            raise ValueError(f"{name} is {value}, expected at least {minimum}")
    harness.Size.parse(config.size).gpt_config()  # so that a wrong size is seen before any run
    if config.sweep and config.plot:
        raise ValueError("plot shows the recipes without a sweep; leave out one of the flags")
    if config.redraw:
        draw(read_finished(config), config.plot or "time_to_loss.png")
        return
    source = Path(config.data)
    if config.data == "stdlib":
        source = harness.ROOT / "data" / "stdlib"
        command = [sys.executable, str(harness.ROOT / "fineweb.py"), "--dataset", "stdlib"]
        subprocess.run([*command, "--out_dir", str(source)], check=True)
    with tempfile.TemporaryDirectory() as name, lock_folder(Path(config.out_dir)):
        folder = Path(name)
        precision = default_precision(open_device(config.device, local_rank=0))
        runs = plan_runs(config, cut_vocabulary(source, folder), precision)
        records = train_missing(runs, config, folder)
        seconds = {} if config.sweep else measure_steps(runs, folder, config)
    losses = losses_by_recipe(records)
    print_losses(losses, seconds)
    if not config.sweep and FAST in losses:
        print_ratios(losses, seconds)
    if config.plot:
        draw(records, config.plot)


if __name__ == "__main__":
    run_command(main, TimeToLossConfig, __doc__)
