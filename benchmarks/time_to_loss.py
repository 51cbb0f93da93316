"""Tokens and seconds that a recipe needs to reach the final loss of another, on real text.

    python fineweb.py --dataset stdlib && python benchmarks/time_to_loss.py   # Python's own docs
    python benchmarks/time_to_loss.py --data data/mine --size 6x384:32x128 --steps 1500
    python benchmarks/time_to_loss.py --data data/mine --recipes fast --sweep sinusoidal_wpe=0.1
    python benchmarks/time_to_loss.py --redraw docs/time_to_loss.jsonl --plot docs/time_to_loss.png

Learning-rate schedules depend on the length of a run, so we train a separate run for each length.
Up to `--jobs` runs train in parallel, one thread each. Finished runs stay in OUT_DIR/runs.jsonl, so
a repeated command trains only what is missing. Then we time steps, with the recipes taking turns.
The vocabulary is cut to the most frequent tokens of the text, and all others become one token, so
that a small model does not spend all its time in the head.
"""

import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.config import Precision, flag, parse_flags, run_command
from engine.data import PretrainingData, validation_batches
from engine.distributed import Distributed, default_precision, init_device
from engine.evaluation import eval_mode, evaluate_loss
from engine.files import JSONLinesLog, lock_folder
from engine.shards import TokenShards, write_manifest, write_shard
from engine.step import TrainingStep
from model import GPTConfig
from train_gpt2 import PretrainConfig, new_model

VOCAB_SIZE = 4096
EVALUATIONS, EVAL_TOKENS, FIRST_SEED, TIMED_STEPS = 5, 65_536, 1337, 15
WARMUP_FRACTION = 0.1
LABEL_SPACE = 1.25  # the x axis is this much longer than the curves, to leave room for labels

Settings = dict[str, Any]  # of PretrainConfig
Record = dict[str, Any]  # a finished run: the fields of `Run`, its curve and final loss
Losses = dict[str, dict[int, list[float]]]  # recipe -> steps -> final loss of each seed
BASELINE, TUNED, FORMER, FAST = "build-nanogpt's", "tuned AdamW", "former fast", "fast"
LINEAR: Settings = {"schedule": "wsd", "decay_fraction": 1.0}
MUON: Settings = {"optimizer": "muon", "max_lr": 8e-3, "schedule": "wsd", "decay_fraction": 0.7}
FAST_CHANGES: Settings = {"muon_beta2": 0.95, "beta1": 0.8, "weight_decay": 0.0}
RECIPES: dict[str, Settings] = {
    BASELINE: {"max_lr": 6e-4, "min_lr": 6e-5},
    TUNED: {"max_lr": 3e-3, "beta2": 0.99, "zero_residual": True, **LINEAR},
    FORMER: {**MUON, "zero_residual": True},  # the fast recipe before FAST_CHANGES and sinusoids
    FAST: {**MUON, "zero_residual": True, **FAST_CHANGES, "sinusoidal_wpe": 0.2},
}
LENGTHS = {FAST: (0.25, 0.5, 0.85, 1.0)}  # as fractions of --steps; all others run only at 1.0


@dataclass(frozen=True)
class TimeToLossConfig:
    data: str = flag("data/stdlib", "folder of shards, as fineweb.py writes them")
    size: str = flag("4x256:32x128", "LAYERSxWIDTH:BATCHxTOKENS of a step")
    steps: int = flag(600, "steps of a run; the fast recipe also has shorter runs")
    seeds: int = flag(3, "runs of each recipe; the seed sets initial weights and data order")
    recipes: list[str] = flag(list(RECIPES), "recipes to run")
    sweep: list[str] = flag([], "SETTING=VALUE: also run each recipe with this one change")
    out_dir: str = flag("runs/time_to_loss", "folder for the finished runs, runs.jsonl")
    plot: str = flag("", "figure to write")
    redraw: str = flag("", "a runs.jsonl to plot without training (only runs on one text)")
    device: str = flag("cpu", "cpu or cuda")
    jobs: int = flag(os.cpu_count() or 1, "runs to train at once")


@dataclass(frozen=True)
class Run:
    """One training run. Its fields are keys of runs.jsonl."""

    data: str  # the fingerprint of the train split
    size: str
    precision: Precision
    recipe: str
    settings: Settings
    steps: int
    seed: int

    def matches(self, record: Record) -> bool:
        return all(record.get(key) == value for key, value in asdict(self).items())


def make_step(run: Run, folder: Path, device: torch.device) -> TrainingStep:
    """Return the training step of a new model, on the shards of a folder."""
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
    sizes = {"block_size": size.T, "batch_size": size.batch_size, "total_batch_size": size.tokens}
    data = PretrainingData(TokenShards(folder, "train"), seed=run.seed, **sizes)
    dist = Distributed(rank=0, world_size=1, device=device)
    return TrainingStep(model.to(device), data, config, dist)


def train_run(run: Run, folder: Path, device: str) -> Record:
    """Train and evaluate one run in a worker process. Return its record."""
    torch.set_num_threads(1)
    step = make_step(run, folder, init_device(device, local_rank=0))
    size, val, curve = harness.Size.parse(run.size), TokenShards(folder, "val"), []
    shape: dict[str, Any] = {"block_size": size.T, "batch_size": size.batch_size}
    no_bytes = np.zeros(VOCAB_SIZE)  # bytes per token matter only for bits per byte, unused here
    eval_steps = {math.ceil(run.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    for i in range(1, run.steps + 1):
        step(i)
        if i in eval_steps:
            with eval_mode(step.model, step.config, step.dist):
                batches = validation_batches(val, eval_tokens=EVAL_TOKENS, **shape)
                loss, _ = evaluate_loss(step.summed_loss, batches, no_bytes, step.dist)
                curve.append((i, loss))
    return {**asdict(run), "curve": curve, "loss": curve[-1][1]}


def train_missing(runs: list[Run], config: TimeToLossConfig, folder: Path) -> list[Record]:
    """Train the runs that runs.jsonl lacks. Return the records of all `runs`."""
    log = JSONLinesLog(Path(config.out_dir) / "runs.jsonl", key="loss")
    records = list(log.records)
    missing = [run for run in runs if not any(map(run.matches, records))]
    longest_first = sorted(missing, key=lambda run: -run.steps)
    pool = ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(train_run, run, folder, config.device) for run in longest_first]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=None):
            records.append(future.result())
            log.append(records[-1])
    finally:
        pool.shutdown(cancel_futures=True)
    return [next(filter(run.matches, records)) for run in runs]


def read_finished(config: TimeToLossConfig) -> list[Record]:
    """Return the records in the file `redraw` that match the flags and its first record's data."""
    records = JSONLinesLog.read(Path(config.redraw), key="loss")
    runs = plan_runs(config, records[0]["data"], records[0]["precision"]) if records else []
    found = [record for run in runs for record in records if run.matches(record)]
    if not found:
        raise ValueError(f"{config.redraw} has no runs with these flags; pass its runs' flags")
    return found


def plan_runs(config: TimeToLossConfig, data: str, precision: Precision) -> list[Run]:
    recipes = {name: RECIPES[name] for name in config.recipes}
    for name in config.recipes:
        for change in config.sweep:
            changes, _debug = parse_flags(PretrainConfig, doc="", argv=[f"--{change}"])
            ((setting, value),) = changes.items()
            recipes[f"{name}, {setting} {value}"] = {**RECIPES[name], setting: value}
    return [
        Run(data, config.size, precision, name, settings, round(length * config.steps), seed)
        for seed in range(FIRST_SEED, FIRST_SEED + config.seeds)
        for name, settings in recipes.items()
        for length in LENGTHS.get(name, (1.0,))
    ]


def measure_steps(runs: list[Run], folder: Path, config: TimeToLossConfig) -> dict[str, float]:
    """Return the median seconds of a step of each recipe. The recipes take turns."""
    torch.set_num_threads(1)
    device = init_device(config.device, local_rank=0)

    def do_step(step: TrainingStep, i: int) -> None:
        step(i + 1)
        harness.wait_and_read_clock(device)

    any_run = {run.recipe: run for run in runs}  # the steps of a recipe are alike in all runs
    training_steps = {name: make_step(run, folder, device) for name, run in any_run.items()}
    contenders = {name: partial(do_step, step) for name, step in training_steps.items()}
    turns = harness.take_turns(contenders, TIMED_STEPS, warmup=3)
    return {name: harness.median(results) for name, results in turns.items()}


def steps_to(target: float, losses: dict[int, float]) -> float:
    """Return the length in steps of a run that ends at the loss `target`. `losses` has the final
    loss of each length; in between, we interpolate linearly in log(steps). Return inf if even the
    longest run ends above the target, -inf if even the shortest ends below it.
    """
    for (short, high), (long, low) in itertools.pairwise(sorted(losses.items())):
        if low <= target <= high:
            fraction = (high - target) / (high - low or 1)  # from short to long; avoid 0 / 0
            return short * (long / short) ** fraction
    return math.inf if target < min(losses.values()) else -math.inf


def cut_vocabulary(source: Path, target: Path) -> str:
    """Write the shards of `source` with their most frequent tokens as 0, 1, 2, ... and all others
    as the last id. Return the fingerprint of the train split.
    """
    shards = {split: TokenShards(source, split) for split in ("train", "val")}
    tokens = {split: stored.read(0, len(stored)) for split, stored in shards.items()}
    counts = np.bincount(tokens["train"], minlength=GPTConfig.vocab_size)
    frequent = np.argsort(-counts, kind="stable")[: VOCAB_SIZE - 1]
    new_id = np.full(len(counts), VOCAB_SIZE - 1)
    new_id[frequent] = np.arange(len(frequent))
    entries = [
        {**write_shard(target / f"x_{split}_000000.npy", new_id[ids]), "split": split}
        for split, ids in tokens.items()
    ]
    write_manifest(target, {"shards": entries})
    return TokenShards(target, "train").fingerprint


def losses_by_recipe(records: list[Record]) -> Losses:
    """Group the final losses by recipe and steps, in the order of the seeds."""
    losses: Losses = {}
    for record in sorted(records, key=lambda record: (record["steps"], record["seed"])):
        by_steps = losses.setdefault(record["recipe"], {})
        by_steps.setdefault(record["steps"], []).append(record["loss"])
    return losses


def mean_losses(by_steps: dict[int, list[float]]) -> dict[int, float]:
    return {steps: statistics.mean(finals) for steps, finals in by_steps.items()}


def find_shares(losses: Losses) -> dict[str, tuple[float, list[float]]]:
    """For each recipe except the fast one, return the share of its tokens that the fast one needs
    to reach the same final loss: for the mean loss over the seeds, and for each seed.
    """
    fast = losses[FAST]
    # Turn {steps: [loss of each seed]} into a list with one {steps: loss} per seed.
    by_seed = [dict(zip(fast, final, strict=True)) for final in zip(*fast.values(), strict=True)]
    shares = {}
    for name in [name for name in losses if name != FAST]:
        ((steps, targets),) = losses[name].items()  # only the fast recipe has several lengths
        mean_share = steps_to(statistics.mean(targets), mean_losses(fast)) / steps
        pairs = zip(targets, by_seed, strict=True)
        shares[name] = mean_share, [steps_to(target, finals) / steps for target, finals in pairs]
    return shares


def print_losses(losses: Losses, seconds: dict[str, float]) -> None:
    rows = []
    for name, by_steps in losses.items():
        for steps, finals in by_steps.items():
            mean, *each = (f"{loss:.3f}" for loss in (statistics.mean(finals), *finals))
            rows.append([name, steps, mean, ", ".join(each), f"{1e3 * seconds[name]:.0f}"])
    columns = "recipe", "steps", "final loss, mean", "by seed", "ms per step"
    harness.print_table(columns, rows)


def print_ratios(losses: Losses, seconds: dict[str, float]) -> None:
    """Print the shares of tokens from `find_shares` (mean, lowest and highest), and of seconds."""
    rows = []
    for name, (share, by_seed) in find_shares(losses).items():
        ((steps, _),) = losses[name].items()
        out_of_range = {  # if the loss is not between those of the shortest and longest fast run
            math.inf: f"above {max(losses[FAST]) / steps:.2f}",
            -math.inf: f"below {min(losses[FAST]) / steps:.2f}",
        }
        cells = [out_of_range.get(x, f"{x:.2f}") for x in (share, min(by_seed), max(by_seed))]
        in_seconds = share * seconds[FAST] / seconds[name]
        rows.append([name, *cells, f"{in_seconds:.2f}" if math.isfinite(share) else ""])
    harness.print_table(["baseline", "token ratio", "lowest", "highest", "time ratio"], rows)


def draw_curves(records: list[Record]) -> Figure:
    """Draw the mean curves over the seeds, with one color per recipe, and the shares of tokens."""
    step_tokens = harness.Size.parse(records[0]["size"]).tokens
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(record["recipe"] for record in records)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    curves: dict[tuple[str, int], list[list[tuple[int, float]]]] = {}
    for record in records:
        curves.setdefault((record["recipe"], record["steps"]), []).append(record["curve"])
    for (name, length), by_seed in curves.items():
        eval_steps, losses = np.mean(by_seed, axis=0).T
        millions, color = eval_steps * step_tokens / 1e6, colors[name]
        is_longest = length == max(steps for recipe, steps in curves if recipe == name)
        axes.plot(millions, losses, color=color, label=name if is_longest else None, linewidth=1)
        axes.plot(millions[-1], losses[-1], "o", color=color, markersize=4)
    if FAST in names:
        draw_shares(axes, losses_by_recipe(records), colors, step_tokens)
    axes.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    axes.set_xlim(right=LABEL_SPACE * axes.dataLim.x1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_shares(axes: Axes, losses: Losses, colors: dict[str, str], step_tokens: int) -> None:
    """Draw the fast recipe's final loss against the length of the run. Draw an arrow to that line
    from the end of every other curve, labeled with the share of tokens.
    """
    means = mean_losses(losses[FAST])
    lengths = np.geomspace(min(means), max(means), 100)
    finals = np.interp(np.log(lengths), np.log(list(means)), list(means.values()))  # as `steps_to`
    label, millions = f"{FAST}, interpolated over lengths", lengths * step_tokens / 1e6
    axes.plot(millions, finals, ":", color=colors[FAST], linewidth=1, label=label)
    for name, (share, _) in find_shares(losses).items():
        if not math.isfinite(share):
            continue
        ((steps, loss),) = mean_losses(losses[name]).items()
        end = steps * step_tokens / 1e6
        arrow = {"arrowstyle": "->", "color": colors[name], "shrinkA": 3, "shrinkB": 0}
        axes.annotate("", xy=(share * end, loss), xytext=(end, loss), arrowprops=arrow)
        style: dict[str, Any] = {"verticalalignment": "center", "color": colors[name]}
        text = f"{share:.2f} of the tokens"
        axes.annotate(text, xy=(end, loss), xytext=(8, 0), textcoords="offset points", **style)


def main(config: TimeToLossConfig) -> None:
    if unknown := set(config.recipes) - set(RECIPES):
        raise ValueError(f"no recipe {', '.join(unknown)}; choose from {', '.join(RECIPES)}")
    records = read_finished(config) if config.redraw else train_and_report(config)
    if plot := config.plot or (config.redraw and "time_to_loss.png"):
        draw_curves(records).savefig(plot, dpi=150)
        print(f"\nfigure in {plot}")


def train_and_report(config: TimeToLossConfig) -> list[Record]:
    """Train what is missing and print the tables. Return the records of all runs."""
    with tempfile.TemporaryDirectory() as name, lock_folder(Path(config.out_dir)):
        folder = Path(name)
        precision = default_precision(init_device(config.device, local_rank=0))
        runs = plan_runs(config, cut_vocabulary(Path(config.data), folder), precision)
        records = train_missing(runs, config, folder)
        seconds = measure_steps(runs, folder, config)
    losses = losses_by_recipe(records)
    print_losses(losses, seconds)
    if FAST in losses:
        print_ratios(losses, seconds)
    return records


if __name__ == "__main__":
    run_command(main, TimeToLossConfig, __doc__)
