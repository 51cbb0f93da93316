"""loss.png: the curves of runs as a plot."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.files import naming_file
from engine.metrics import name_dataset, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Validation losses of OpenAI's GPT-2 124M, from llm.c (FineWeb) and build-nanogpt (FineWeb-Edu).
# The two sets differ, so a run is compared only with the loss on its own.
GPT2_VAL_LOSS = dict.fromkeys(("fineweb", "fineweb10B-gpt2", "fineweb100B-gpt2"), 3.4250)
GPT2_VAL_LOSS |= dict.fromkeys(("fineweb-edu", "finewebedu10B-gpt2"), 3.2924)
# Published HellaSwag accuracies with their metric, since only equal metrics compare. 124M and 125M.
HELLASWAG = [
    ("GPT-2 124M, lm-eval acc_norm 0.3114", 0.3114, "--"),
    ("GPT-2 124M, token-normalised 0.2955", 0.2955, ":"),
    ("GPT-3 Small, token-normalised 0.337", 0.337, "-."),
]
# The label and the style of a curve, by its key in the log.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train_loss": ("{} train {:.3f}", {"linewidth": 1.2}),
    "val_loss": ("{} val {:.3f}", {"marker": "o", "markersize": 4, "linestyle": "--"}),
    "hellaswag_acc_norm": ("{}, lm-eval acc_norm {:.4f}", {"marker": "o"}),
}
SMOOTHED, MIN_SMOOTHED = 0.02, 5  # share of the steps in the running mean of the training loss
X_AXES = ("step", "tokens", "seconds")
# Panels and the keys of the log that they show.
PANELS = {
    "loss, nats per token": ["train_loss", "val_loss"],
    "HellaSwag accuracy": ["hellaswag_acc_norm"],
}
MORE_PANELS = {
    "learning rate": ["lr"],
    "gradient norm": ["grad_norm"],
    "tokens/s": ["tokens_per_s"],
}
WIDTH, HEIGHT, SMALL_HEIGHT = 9.0, 4.5, 2.2  # of a panel, in inches


def curve_points(records: list[dict], key: str, x: str) -> tuple[list[float], list[float]]:
    """The steps, tokens or seconds of training (`x`) at which `key` was logged, and its values."""
    seconds = itertools.accumulate(r.get("step_ms", 0) / 1e3 for r in records)
    positions = seconds if x == "seconds" else (r[x] for r in records)
    values = [r.get(key) for r in records]
    points = [(p, v) for p, v in zip(positions, values, strict=True) if v is not None]
    return [position for position, _ in points], [value for _, value in points]


def plot_runs(runs: list[Path], path: Path, x: str = "step") -> None:
    """Draw the runs into an image, whose format follows from the name of `path`."""
    figure = draw_runs(runs, x)
    with naming_file(path):
        figure.savefig(path, dpi=150)


def draw_runs(runs: list[Path], x: str = "step", *, has_all_panels: bool = False) -> "Figure":
    """Draw the losses of the runs over one of X_AXES, HellaSwag accuracy if it was logged and, if
    asked for, MORE_PANELS.
    """
    from matplotlib.figure import Figure

    logs = [(printable(Path(run).name), read_metrics(run)) for run in runs]
    logged = {"val_loss"}.union(*(record for _, log in logs for record in log))
    panels = PANELS | MORE_PANELS if has_all_panels else PANELS
    panels = {label: keys for label, keys in panels.items() if logged.intersection(keys)}
    heights = [HEIGHT if label in PANELS else SMALL_HEIGHT for label in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    gpt2 = {loss for run in runs if (loss := GPT2_VAL_LOSS.get(name_dataset(run)))}
    quoted = {"val_loss": [(f"GPT-2 124M val {loss:.3f}", loss, "--") for loss in sorted(gpt2)]}
    quoted["hellaswag_acc_norm"] = HELLASWAG
    for axes, (panel, keys) in zip(grid, panels.items(), strict=True):
        for (i, (name, log)), key in itertools.product(enumerate(logs), keys):
            plot_curve(axes, name, log, key, x=x, color=f"C{i}")
        axes.set_ylabel(panel)
        axes.grid(alpha=0.3)
        if panel in MORE_PANELS:
            axes.set_ylim(0, None)
            continue
        for label, value, style in quoted[keys[-1]]:
            axes.axhline(value, color="gray", linestyle=style, label=f"{label} (quoted)")
        axes.legend()
    grid[-1].set_xlabel("seconds of training" if x == "seconds" else x)
    return figure


def printable(name: str) -> str:
    """The name as a label of matplotlib."""
    shown = name.replace("$", r"\$")  # formulas are between dollars
    return f" {shown}" if shown.startswith("_") else shown  # it would be missing in the legend


def plot_curve(axes: "Axes", name: str, log: list[dict], key: str, *, x: str, color: str) -> None:
    """Draw what a run logged under the key, with the last value in the label. The training loss is
    drawn as it is, in a light color, and as its running mean.
    """
    positions, values = curve_points(log, key, x)
    if not values:
        return
    label, style = CURVES.get(key, ("", {"linewidth": 0.8}))
    if key == "train_loss":
        axes.plot(positions, values, color=color, alpha=0.3, linewidth=0.8)
        n = min(len(values), max(MIN_SMOOTHED, round(SMOOTHED * len(values))))
        values = running_mean(values, n).tolist()
        label += f", mean of {n} step{'s' * (n > 1)}"
    label = label.format(name, values[-1])
    axes.plot(positions, values, color=color, gid=key, label=label, **style)


def running_mean(values: list[float], n: int) -> np.ndarray:
    """The mean of each value and up to n - 1 values before it."""
    sums = np.cumsum(values)
    sums[n:] = sums[n:] - sums[:-n]
    return sums / np.minimum(np.arange(len(sums)) + 1, n)
