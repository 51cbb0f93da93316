"""How time and memory of a training step grow with layers, width, sequence length and batch.

    python benchmarks/growth.py   # on two CPU threads, fp32: 4 minutes; draws docs/growth.png

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

from benchmarks.harness import Size, print_header, print_row, take_turns_in_workers
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
TOLERANCE = 0.05  # of a measured slope over that of its formula
# A row of the figure: what is measured, its formula, what that is called, the unit, the label.
ROWS = (
    ("seconds", "flops", "FLOPs", 1.0, "step, s"),
    ("bytes", "predicted", "memory model", 1e9, "peak memory, GB"),
)
Measured = dict[str, float]  # seconds, flops, bytes, predicted


@dataclass(frozen=True)
class GrowthBenchmarkConfig:
    rounds: int = flag(5, "measured steps of each size, after one that warms up")
    threads: int = flag(2, "CPU threads")
    values: int = flag(4, "values of each that varies, the first ones, 2 to 4")
    plot: str = flag("docs/growth.png", "the figure to write")


def measure(size: Size, config: GrowthBenchmarkConfig) -> Measured:
    """Seconds of the fastest step, its FLOPs, peak and predicted peak in bytes."""
    steps = take_turns_in_workers(
        {"ours": make_ours}, size, rounds=config.rounds, warmup=1, threads=config.threads
    )["ours"]
    setup = Setup(half=False, device_type="cpu")
    return {
        "seconds": min(step["step"] for step in steps),
        "flops": size.flops,
        "bytes": steps[-1]["peak_bytes"],
        "predicted": predict_peak(size.config, size.batch_size, setup, accumulate=False),
    }


def fit_slope(results: dict[int, Measured], key: str) -> float:
    values = [r[key] for r in results.values()]
    return float(np.polyfit(np.log(list(results)), np.log(values), 1)[0])


def draw(measured: dict[str, dict[int, Measured]], file: Path) -> None:
    """Time above, memory below, a column for each that varies; formulas are dashed."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(measured), sharey="row", sharex="col")
    for column, (name, results) in enumerate(measured.items()):
        last = list(results.values())[-1]
        for row, (key, formula, formula_name, unit, label) in enumerate(ROWS):
            panel = axes[row, column]
            # FLOPs are drawn through the time of the largest size.
            scale = last["flops"] / last["seconds"] if formula == "flops" else unit
            slopes = [fit_slope(results, k) for k in (key, formula)]
            values = [r[key] / unit for r in results.values()]
            panel.plot(list(results), values, "o-", label=f"slope {slopes[0]:.2f}")
            values = [r[formula] / scale for r in results.values()]
            panel.plot(list(results), values, "k--", label=f"{formula_name}, slope {slopes[1]:.2f}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(list(results), [str(value) for value in results])
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=8)
            if column == 0:
                panel.set_ylabel(label)
        axes[-1, column].set_xlabel(name)
    figure.suptitle(f"From {BASE} (layers x width, batch x tokens), one varied at a time")
    figure.savefig(file, dpi=110)


def main(config: GrowthBenchmarkConfig) -> None:
    known: dict[Size, Measured] = {}
    measured: dict[str, dict[int, Measured]] = {}
    print_header("varied", "step, s", "GFLOP", "peak, GB", "predicted, GB")
    for name, values in VARIED.items():
        measured[name] = {}
        for value in values[: config.values]:
            size = replace(BASE, **{name: value})
            known[size] = r = known.get(size) or measure(size, config)
            measured[name][value] = r
            gigabytes = [f"{r[key] / 1e9:.2f}" for key in ("bytes", "predicted")]
            print_row(
                f"{name} {value}", f"{r['seconds']:.2f}", f"{r['flops'] / 1e9:.0f}", *gigabytes
            )
    print()
    columns = "time", "FLOPs", "memory", "memory model", "grows faster than its formula"
    print_header("slope against", *columns)
    for name, results in measured.items():
        slopes = [fit_slope(results, key) for row in ROWS for key in row[:2]]
        pairs = ("time", *slopes[:2]), ("memory", *slopes[2:])
        faster = [what for what, own, formula in pairs if own > formula + TOLERANCE]
        print_row(name, *(f"{slope:.2f}" for slope in slopes), ", ".join(faster) or "none")
    draw(measured, Path(config.plot))
    print(f"\nfigure in {config.plot}")


if __name__ == "__main__":
    run_command(main, GrowthBenchmarkConfig, __doc__)
