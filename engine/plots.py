"""Plot the curves of runs, for loss.png and report.html."""

import itertools
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint import read_run_config
from engine.config import TrainConfig, fixed_settings
from engine.files import adding_path_to_errors
from engine.metrics import name_dataset, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Validation losses of OpenAI's GPT-2 124M, from llm.c (FineWeb) and build-nanogpt (FineWeb-Edu).
# These are different datasets, so a run is compared only with the loss on its own dataset.
GPT2_VAL_LOSS = dict.fromkeys(("fineweb", "fineweb10B-gpt2", "fineweb100B-gpt2"), 3.4250)
GPT2_VAL_LOSS |= dict.fromkeys(("fineweb-edu", "finewebedu10B-gpt2"), 3.2924)
# Published HellaSwag accuracies. The labels name the metric, because different metrics are not
# comparable. GPT-3 Small has 125M parameters.
PUBLISHED_HELLASWAG = [
    ("GPT-2 124M, lm-eval acc_norm 0.3114", 0.3114, "--"),
    ("GPT-2 124M, token-normalized 0.2955", 0.2955, ":"),
    ("GPT-3 Small, token-normalized 0.337", 0.337, "-."),
]
# Label and style of the curves, by their keys in the log.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train_loss": ("{} train {:.3f}", {"linewidth": 1.2}),
    "val_loss": ("{} val {:.3f}", {"marker": "o", "markersize": 4, "linestyle": "--"}),
    "hellaswag_acc_norm": ("{}, lm-eval acc_norm {:.4f}", {"marker": "o"}),
}
# Window of the running mean of the training loss: a fraction of its steps, but at least so many.
SMOOTHED_FRACTION, MIN_SMOOTHED_STEPS = 0.02, 5
X_AXES = ("step", "tokens", "seconds")
# Panels, and the keys of the log that they show.
LOSS_PANEL, HELLASWAG_PANEL = "loss, nats per token", "HellaSwag accuracy"
PANELS = {LOSS_PANEL: ["train_loss", "val_loss"], HELLASWAG_PANEL: ["hellaswag_acc_norm"]}
MORE_PANELS = {
    "learning rate": ["lr"],
    "gradient norm": ["grad_norm"],
    "tokens/s": ["tokens_per_s"],
}
WIDTH, HEIGHT, SMALL_HEIGHT = 9.0, 4.5, 2.2  # of a panel, in inches


def curve_points(records: list[dict], key: str, x: str) -> dict[int, tuple[float, float]]:
    """Return, for each step at which `key` was logged, the x value (step, tokens or seconds of
    training) and the logged value.
    """
    seconds = itertools.accumulate(r.get("step_ms", 0) / 1e3 for r in records)
    positions = seconds if x == "seconds" else (r[x] for r in records)
    pairs = zip(positions, records, strict=True)
    return {r["step"]: (p, r[key]) for p, r in pairs if r.get(key) is not None}


def group_runs(runs: list[Path]) -> list[list[Path]]:
    """Group the runs that differ only in the seed and in settings that may change on resume."""
    ignored = {f.name for f in fields(TrainConfig)} - fixed_settings(TrainConfig)
    ignored |= {"seed", "merge_out"}
    groups: dict[str, list[Path]] = {}
    for run in runs:
        kept = [item for item in sorted(read_run_config(run).items()) if item[0] not in ignored]
        groups.setdefault(repr(kept), []).append(run)
    return list(groups.values())


def plot_runs(runs: list[Path], path: Path, x: str = "step", mean: bool = False) -> None:
    """Draw the runs and save the image. The suffix of `path` sets the format."""
    figure = draw_runs(runs, x, mean=mean)
    with adding_path_to_errors(path):
        figure.savefig(path, dpi=150)


def draw_runs(
    runs: list[Path], x: str = "step", *, all_panels: bool = False, mean: bool = False
) -> "Figure":
    """Draw the losses of the runs over `x`, one of X_AXES, and HellaSwag accuracy if it was logged.
    With `all_panels`, draw MORE_PANELS as well. With `mean`, draw runs that differ only in the seed
    as one curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    groups = group_runs(runs) if mean else [[run] for run in runs]
    logs = {run: read_metrics(run) for run in runs}
    # There is always a panel for the loss.
    logged = {"val_loss", *(key for log in logs.values() for record in log for key in record)}
    panels = PANELS | MORE_PANELS if all_panels else PANELS
    panels = {label: keys for label, keys in panels.items() if logged.intersection(keys)}
    heights = [HEIGHT if label in PANELS else SMALL_HEIGHT for label in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    gpt2 = {loss for run in runs if (loss := GPT2_VAL_LOSS.get(name_dataset(run)))}
    published = {HELLASWAG_PANEL: PUBLISHED_HELLASWAG}
    published[LOSS_PANEL] = [(f"GPT-2 124M val {loss:.3f}", loss, "--") for loss in sorted(gpt2)]
    for axes, (panel, keys) in zip(grid, panels.items(), strict=True):
        for i, group in enumerate(groups):
            for key in keys:
                curves = [curve_points(logs[run], key, x) for run in group]
                plot_curves(axes, make_label(group), curves, key, color=f"C{i}")
        axes.set_ylabel(panel)
        axes.grid(alpha=0.3)
        if panel in MORE_PANELS:
            axes.set_ylim(0, None)
            continue
        for label, value, style in published[panel]:
            axes.axhline(value, color="gray", linestyle=style, label=f"{label} (published)")
        axes.legend()
    grid[-1].set_xlabel("seconds of training" if x == "seconds" else x)
    if x == "tokens":
        grid[-1].xaxis.set_major_formatter(EngFormatter(sep=""))  # 10M instead of 1e7
    return figure


def make_label(runs: list[Path]) -> str:
    """Return the name of a run or a group, escaped so that matplotlib shows it unchanged."""
    name = Path(runs[0]).name
    if len(runs) > 1:
        name += f" … {runs[-1].name}, mean of {len(runs)} seeds (band: min to max),"
    label = name.replace("$", r"\$")  # text between dollars would be a formula
    return f" {label}" if label.startswith("_") else label  # a leading _ would hide it


def plot_curves(axes: "Axes", name: str, curves: list[dict], key: str, *, color: str) -> None:
    """Draw what runs logged under `key`, with the last value in the label. The training loss is
    drawn twice: as logged, in a light color, and as a running mean. For several runs, draw their
    mean at the steps that they share, and a band from the minimum to the maximum.
    """
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return
    points = np.array([[curve[step] for step in steps] for curve in curves])  # (runs, steps, 2)
    positions, values = points[..., 0].mean(0), points[..., 1]
    label, style = CURVES.get(key, ("", {"linewidth": 0.8}))
    if key == "train_loss":
        axes.plot(positions, values.mean(0), color=color, alpha=0.3, linewidth=0.8)
        n = min(len(steps), max(MIN_SMOOTHED_STEPS, round(SMOOTHED_FRACTION * len(steps))))
        values = np.array([running_mean(run, n) for run in values])
        label += f", mean of {n} step{'s' * (n > 1)}"
    mean = values.mean(0)
    label = label.format(name, mean[-1])
    axes.plot(positions, mean, color=color, gid=key, label=label, **style)  # gid: for report.py
    if len(curves) > 1:
        axes.fill_between(positions, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)


def running_mean(values: np.ndarray, n: int) -> np.ndarray:
    """Return the running mean over the last n values, or fewer at the start."""
    sums = np.cumsum(values)
    sums[n:] = sums[n:] - sums[:-n]
    return sums / np.minimum(np.arange(len(sums)) + 1, n)
