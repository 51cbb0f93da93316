"""loss.png: the curves of runs."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint import read_run_config
from engine.files import naming_file
from engine.metrics import read_metrics
from engine.shards import read_manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Logs = list[tuple[str, list[dict]]]  # the names of runs, and their records

# Validation losses of OpenAI's GPT-2 124M, from llm.c (FineWeb) and build-nanogpt (FineWeb-Edu).
# The two sets differ, so a run is compared only with the loss on its own.
GPT2_VAL_LOSS = dict.fromkeys(("fineweb", "fineweb10B-gpt2", "fineweb100B-gpt2"), 3.4250)
GPT2_VAL_LOSS |= dict.fromkeys(("fineweb-edu", "finewebedu10B-gpt2"), 3.2924)
# Published HellaSwag accuracies with their metric, since only equal metrics compare. 124M and 125M.
HELLASWAG = (
    ("GPT-2 124M, lm-eval acc_norm 0.3114", 0.3114, "--"),
    ("GPT-2 124M, token-normalised 0.2955", 0.2955, ":"),
    ("GPT-3 Small, token-normalised 0.337", 0.337, "-."),
)
# The label and the style of a curve, by its key in the log.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train_loss": ("{} train {:.3f}", {"linewidth": 1.2}),
    "val_loss": ("{} val {:.3f}", {"marker": "o", "markersize": 4, "linestyle": "--"}),
    "hellaswag_acc_norm": ("{}, lm-eval acc_norm {:.4f}", {"marker": "o"}),
}
SMOOTHED, MIN_SMOOTHED = 0.02, 5  # share of the steps in the running mean of the training loss
X_AXES = ("step", "tokens", "seconds")
LOSS_HEIGHT, HELLASWAG_HEIGHT, EXTRA_HEIGHT, WIDTH = 5.0, 4.0, 2.2, 9.0  # of panels, in inches


def curve_points(records: list[dict], key: str, x: str) -> tuple[list[float], list[float]]:
    """The steps, tokens or seconds of training (`x`) at which `key` was logged, and its values."""
    seconds = itertools.accumulate(r.get("step_ms", 0) / 1e3 for r in records)
    positions = seconds if x == "seconds" else [r[x] for r in records]
    pairs = zip(positions, [r.get(key) for r in records], strict=True)
    points = [(position, value) for position, value in pairs if value is not None]
    return [position for position, _ in points], [value for _, value in points]


def plot_runs(runs: list[Path], path: Path, x: str = "step") -> None:
    """Draw the runs into an image, whose format follows from the name of `path`."""
    figure = draw_runs(runs, x)
    with naming_file(path):
        figure.savefig(path, dpi=150)


def draw_runs(runs: list[Path], x: str = "step", more: dict[str, str] | None = None) -> "Figure":
    """Draw the losses of the runs over one of X_AXES. Panels below show HellaSwag accuracy, if it
    was logged, and each key of `more`, which maps keys of the log to labels.
    """
    from matplotlib.figure import Figure

    more = more or {}
    logs = [(printable(Path(run).name), read_metrics(run)) for run in runs]
    has_hellaswag = any("hellaswag_acc_norm" in record for _, log in logs for record in log)
    heights = [LOSS_HEIGHT] + [HELLASWAG_HEIGHT] * has_hellaswag + [EXTRA_HEIGHT] * len(more)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    losses, *below = grid[:, 0]
    plot_curves(losses, logs, ("train_loss", "val_loss"), x=x)
    gpt2 = sorted({loss for run in runs if (loss := find_gpt2_loss(run)) is not None})
    plot_quoted(losses, [(f"GPT-2 124M val {loss:.3f}", loss, "--") for loss in gpt2])
    losses.set_ylabel("loss, nats per token")
    if has_hellaswag:
        plot_curves(below[0], logs, ("hellaswag_acc_norm",), x=x)
        plot_quoted(below[0], HELLASWAG)
        below[0].set_ylabel("HellaSwag accuracy")
    for panel, (key, label) in zip(below[has_hellaswag:], more.items(), strict=True):
        plot_curves(panel, logs, (key,), x=x)
        panel.set(ylabel=label, ylim=(0, None))
    for panel in (losses, *below):
        panel.grid(alpha=0.3)
    grid[-1, 0].set_xlabel("seconds of training" if x == "seconds" else x)
    # A second axis needs steps of one size.
    tokens_per_step = {r["tokens"] / r["step"] for _, log in logs for r in log if r["step"]}
    if x == "step" and len(tokens_per_step) == 1:
        factor = tokens_per_step.pop() / 1e6
        convert = (lambda step: step * factor, lambda tokens: tokens / factor)
        losses.secondary_xaxis("top", functions=convert).set_xlabel("million tokens")
    return figure


def printable(name: str) -> str:
    """The name as a label of matplotlib, with escapes for characters that its font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    shown = "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in name)
    shown = shown.replace("$", r"\$")  # formulas are between dollars
    return f" {shown}" if shown.startswith("_") else shown  # it would be missing in the legend


def plot_curves(axes: "Axes", logs: Logs, keys: Iterable[str], *, x: str) -> None:
    """Draw what the runs logged under the keys, with the last values in the labels. The training
    loss is drawn as it is, in a light color, and as its running mean.
    """
    for i, (name, log) in enumerate(logs):
        for key in keys:
            label, style = CURVES.get(key, ("", {"linewidth": 0.8}))
            positions, values = curve_points(log, key, x)
            if not values:
                continue
            if key == "train_loss":
                axes.plot(positions, values, color=f"C{i}", alpha=0.3, linewidth=0.8)
                n = min(len(values), max(MIN_SMOOTHED, round(SMOOTHED * len(values))))
                values = running_mean(values, n)
                label += f", mean of {n} step{'s' * (n > 1)}"
            label = label.format(name, values[-1])
            axes.plot(positions, values, color=f"C{i}", label=label, gid=key, **style)


def running_mean(values: list[float], n: int) -> list[float]:
    """The mean of each value and up to n - 1 values before it."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - n, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def plot_quoted(axes: "Axes", quoted: Iterable[tuple[str, float, str]]) -> None:
    """Draw published values as horizontal lines, and the legend."""
    for label, value, style in quoted:
        axes.axhline(value, color="gray", linestyle=style, label=f"{label} (quoted)")
    axes.legend()


def find_gpt2_loss(run: Path | str) -> float | None:
    """The validation loss of GPT-2 124M on the run's data, where it is published."""
    data_dir = read_run_config(run).get("data_dir", "")
    return GPT2_VAL_LOSS.get(read_manifest(Path(data_dir)).get("dataset", ""))
