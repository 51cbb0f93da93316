"""How time and memory of a training step grow with layers, width, T and batch, on a CPU.

    python benchmarks/growth.py    # two threads, fp32: 4 minutes; draws docs/growth.png

One of the four is varied at a time, from a small base; every size runs the real `TrainingStep` in a
process of its own, as the training commands run it. Beside the measured time stand the FLOPs of the
step, beside the measured peak what the memory model of `scale.py` says. A slope is that of a
straight line through the logarithms: 1 is proportional, 2 quadratic. The table over 50,304 tokens
is part of all sizes, so that most slopes are below 1.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from benchmarks.scale import meta, peak
from benchmarks.train_step import Contender, StepBenchmarkConfig
from model import GPTConfig
from report import flops_per_token

HEAD_SIZE = 64  # of all GPT-2s
GROWTH = {  # what is varied, and over which values
    "n_layer": (2, 4, 8, 16),
    "n_embd": (128, 256, 512, 1024),
    "T": (128, 256, 512, 1024),
    "batch_size": (2, 4, 8, 16),
}
TOLERANCE = 0.05  # of a measured slope over its formula's


@dataclass(frozen=True)
class GrowthConfig:
    rounds: int = 5
    """steps of each size that count; one more comes first"""
    threads: int = 2
    """CPU threads"""
    plot: str = "docs/growth.png"
    """the picture to write"""


@dataclass(frozen=True)
class Size:
    """The base, from which one field is varied at a time."""

    n_layer: int = 4
    n_embd: int = 256
    T: int = 256
    batch_size: int = 4

    @property
    def model(self) -> GPTConfig:
        n_head = self.n_embd // HEAD_SIZE
        return GPTConfig(self.T, n_layer=self.n_layer, n_head=n_head, n_embd=self.n_embd)


def measure(size: Size, config: GrowthConfig) -> dict[str, float]:
    """Seconds of the fastest step, FLOPs, peak and predicted peak in bytes."""
    shape = (size.n_layer, size.model.n_head, size.n_embd, size.batch_size, size.T)
    contender = Contender("ours", shape, StepBenchmarkConfig(threads=config.threads))
    try:
        steps = [contender.step() for _ in range(config.rounds + 1)][1:]
    finally:
        contender.stop()
    tokens = size.batch_size * size.T
    how = {"half": False, "device_type": "cpu", "accumulate": False}
    return {
        "seconds": min(step["step"] for step in steps),
        "flops": flops_per_token(meta(size.model), size.T) * tokens,
        "bytes": steps[-1]["mb"] * 2**20,
        "predicted": peak(size.model, size.batch_size, **how),
    }


def slope(values: tuple[int, ...], results: list[dict[str, float]], key: str) -> float:
    """Of a least-squares line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log([r[key] for r in results]), 1)[0])


def draw(measured: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Time above, memory below, a column for each that is varied; dashed what the formula says."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(GROWTH), sharey="row", sharex="col")
    for column, (name, values) in enumerate(GROWTH.items()):
        results = measured[name]
        for row, (key, formula, unit, label) in enumerate(
            (("seconds", "flops", 1.0, "step, s"), ("bytes", "predicted", 1e9, "peak memory, GB"))
        ):
            one = axes[row, column]
            # FLOPs have no unit in common with seconds: drawn through the largest size's time.
            per = results[-1]["flops"] / results[-1]["seconds"] if row == 0 else unit
            slopes = [slope(values, results, k) for k in (key, formula)]
            one.plot(values, [r[key] / unit for r in results], "o-", label=f"slope {slopes[0]:.2f}")
            name_of_formula = "FLOPs" if row == 0 else "memory model"
            dashed = [r[formula] / per for r in results]
            one.plot(values, dashed, "k--", label=f"{name_of_formula}, slope {slopes[1]:.2f}")
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.set_xticks(values, [str(value) for value in values])
            one.grid(alpha=0.3, which="both")
            one.legend(fontsize=8)
            if row == 1:
                one.set_xlabel(name)
            if column == 0:
                one.set_ylabel(label)
    base = Size()
    figure.suptitle(
        f"From {base.n_layer} layers x {base.n_embd}, {base.batch_size} x {base.T} tokens, "
        "one varied at a time"
    )
    figure.savefig(file, dpi=110)


def main(config: GrowthConfig) -> None:
    base = Size()
    known: dict[Size, dict[str, float]] = {}
    measured = {}
    print("| varied | step, s | GFLOP | peak, GB | predicted, GB |\n|---|---|---|---|---|")
    for name, values in GROWTH.items():
        for value in values:
            size = replace(base, **{name: value})
            known[size] = r = known.get(size) or measure(size, config)
            print(
                f"| {name} {value} | {r['seconds']:.2f} | {r['flops'] / 1e9:.0f} "
                f"| {r['bytes'] / 1e9:.2f} | {r['predicted'] / 1e9:.2f} |",
                flush=True,
            )
        measured[name] = [known[replace(base, **{name: value})] for value in values]
    keys = ("seconds", "flops", "bytes", "predicted")
    print("\n| slope against | time | FLOPs | memory | memory model | faster than its formula |")
    print("|---|---|---|---|---|---|")
    for name, values in GROWTH.items():
        time, flops, memory, model = (slope(values, measured[name], key) for key in keys)
        pairs = (("time", time, flops), ("memory", memory, model))
        over = ", ".join(what for what, own, formula in pairs if own > formula + TOLERANCE)
        cells = " | ".join(f"{number:.2f}" for number in (time, flops, memory, model))
        print(f"| {name} | {cells} | {over or 'none'} |", flush=True)
    draw(measured, Path(config.plot))
    print(f"\ndrawn into {config.plot}")


if __name__ == "__main__":
    cli.run(main, GrowthConfig, __doc__)
