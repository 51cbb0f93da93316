"""How time and memory of a training step grow with layers, width, sequence length and batch.

    python benchmarks/growth.py   # two CPU threads, fp32: 4 minutes; draws docs/growth.png

One of the four varies at a time, from a small base. Every size runs the real training step in a
process of its own. The time is compared with the FLOPs of the step, peak memory with the memory
model of scale.py. A slope is that of a least-squares line through the logarithms: 1 is
proportional, 2 quadratic. Most are below 1, because every size contains the table of 50,304 tokens.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Result, Size
from benchmarks.scale import Setup, predict_peak
from benchmarks.train_step import make_ours
from engine.config import flag, run_command

BASE = Size(n_layer=4, n_embd=256, batch_size=4, T=256)
VARIED = {
    "n_layer": (2, 4, 8, 16),
    "n_embd": (128, 256, 512, 1024),
    "T": (128, 256, 512, 1024),
    "batch_size": (2, 4, 8, 16),
}
TOLERANCE = 0.05  # of a measured slope over its formula's
PAIRS = (("seconds", "flops"), ("peak_bytes", "predicted"))  # measured figures and their formulas


@dataclass(frozen=True)
class GrowthBenchmarkConfig(BenchmarkConfig):
    n_values: int = flag(4, "values of each that varies, the smallest ones, 2 to 4")
    plot: str = flag("docs/growth.png", "the figure to write")


def measure(size: Size, config: BenchmarkConfig) -> Result:
    steps = harness.measure_in_workers({"ours": make_ours}, size, config)["ours"]
    setup = Setup(half=False, device_type="cpu", accumulate=False)
    predicted = predict_peak(size.gpt_config(), size.batch_size, setup)
    fastest = min(steps, key=lambda step: step["seconds"])
    return fastest | {"flops": size.flops, "predicted": predicted}


def fit_slope(results: dict[int, Result], key: str) -> float:
    values = [result[key] for result in results.values()]
    return float(np.polyfit(np.log(list(results)), np.log(values), 1)[0])


def draw(measured: dict[str, dict[int, Result]], file: str) -> None:
    """Time above, memory below, a column for each that varies; formulas are dashed."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(measured), sharey="row", sharex="col")
    for column, (name, results) in enumerate(measured.items()):
        values, last = list(results), list(results.values())[-1]
        flops_per_second = last["flops"] / last["seconds"]  # drawn through the largest size's time
        for row, key, style, label, unit in (
            (0, "seconds", "o-", "", 1.0),
            (0, "flops", "k--", "FLOPs, ", flops_per_second),
            (1, "peak_bytes", "o-", "", 1e9),
            (1, "predicted", "k--", "memory model, ", 1e9),
        ):
            slope = f"{label}slope {fit_slope(results, key):.2f}"
            scaled = [result[key] / unit for result in results.values()]
            axes[row, column].plot(values, scaled, style, label=slope)
        for panel in axes[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(values, list(map(str, values)))
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=8)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("step, s")
    axes[1, 0].set_ylabel("peak memory, GB")
    figure.suptitle(f"From {BASE} (layers x width, batch x tokens), one varied at a time")
    figure.savefig(file, dpi=110)
    print(f"\nfigure in {file}")


def main(config: GrowthBenchmarkConfig) -> None:
    known: dict[Size, Result] = {}
    measured: dict[str, dict[int, Result]] = {}
    harness.print_header("varied", "step, s", "GFLOP", "peak, GB", "predicted, GB")
    for name, values in VARIED.items():
        for value in values[: config.n_values]:
            size = replace(BASE, **{name: value})
            known[size] = r = known.get(size) or measure(size, config)
            measured.setdefault(name, {})[value] = r
            cells = [f"{r[key] / 1e9:.2f}" for key in ("peak_bytes", "predicted")]
            step = f"{r['seconds']:.2f}", f"{r['flops'] / 1e9:.0f}"
            harness.print_row(f"{name} {value}", *step, *cells)
    formulas = "time", "FLOPs", "memory", "memory model", "grows faster than its formula"
    harness.print_header("slope against", *formulas)
    for name, results in measured.items():
        slopes = [fit_slope(results, key) for pair in PAIRS for key in pair]
        time, flops, memory, model = slopes
        faster = ["time"] * (time > flops + TOLERANCE) + ["memory"] * (memory > model + TOLERANCE)
        cells = [f"{slope:.2f}" for slope in slopes]
        harness.print_row(name, *cells, ", ".join(faster) or "none")
    draw(measured, config.plot)


if __name__ == "__main__":
    run_command(main, GrowthBenchmarkConfig, __doc__)
