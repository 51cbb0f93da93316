"""A file of its own because it is also a command, `python plot.py RUN ...`: the curves of runs."""

import itertools
from pathlib import Path

from jsonargparse import Namespace
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from checkpoint import read_metrics, read_run_config
from data import naming, read_manifest

# Validation loss of OpenAI's GPT-2 124M: on FineWeb as llm.c gives it, on FineWeb-Edu as
# build-nanogpt does. Two different sets, so a run is only compared on its own.
GPT2_FINEWEB, GPT2_FINEWEB_EDU = 3.4250, 3.2924
GPT2_VAL_LOSS = {
    "fineweb": GPT2_FINEWEB,
    "fineweb10B-gpt2": GPT2_FINEWEB,
    "fineweb100B-gpt2": GPT2_FINEWEB,
    "fineweb-edu": GPT2_FINEWEB_EDU,
    "finewebedu10B-gpt2": GPT2_FINEWEB_EDU,
}

# HellaSwag quoted, with what each number is: only the same definition compares. 124M and 125M.
HELLASWAG = (
    ("GPT-2 124M, lm-eval acc_norm 0.3114", 0.3114, "--"),
    ("GPT-2 124M, token-normalised 0.2955", 0.2955, ":"),
    ("GPT-3 Small, token-normalised 0.337", 0.337, "-."),
)

AXES = ("step", "tokens", "seconds")
PICTURES = (".png", ".svg", ".pdf")


def gpt2_val_loss(run: Path | str) -> float | None:
    """GPT-2 124M's loss on the validation set of a run, where it is known."""
    data_dir = read_run_config(run).get("data_dir", "")
    return GPT2_VAL_LOSS.get(read_manifest(Path(data_dir)).get("dataset", ""))


def points(records: list[dict], key: str, x: str) -> tuple[list[float], list[float]]:
    """Where a run has logged `key`: its steps, tokens, or seconds of training steps, and values."""
    seconds = itertools.accumulate(r.get("step_ms", 0) / 1e3 for r in records)
    places = seconds if x == "seconds" else [r[x] for r in records]
    found = [(at, r[key]) for at, r in zip(places, records, strict=True) if r.get(key) is not None]
    return [at for at, _ in found], [value for _, value in found]


def draw_runs(runs: list[Path], x: str = "step", more: dict[str, str] | None = None) -> Figure:
    """Draw training and validation loss of one or several runs over step, tokens or seconds, below
    them HellaSwag where it was measured, and what `more` names: a key of the log, and its label.
    """
    logs, more = [read_metrics(run) for run in runs], more or {}
    measured = any("hellaswag_acc_norm" in record for records in logs for record in records)
    panels = [5.0] + [4.0] * measured + [2.2] * len(more)  # inches
    figure = Figure(figsize=(9, sum(panels)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=panels)
    axes, *below = grid[:, 0]
    for i, (run, records) in enumerate(zip(runs, logs, strict=True)):
        for key, style in (
            ("train_loss", {"alpha": 0.4, "linewidth": 0.8}),
            ("val_loss", {"marker": "o", "markersize": 3}),
        ):
            at, values = points(records, key, x)
            if values:
                label = f"{Path(run).name} {key.removesuffix('_loss')} {values[-1]:.3f}"
                axes.plot(at, values, color=f"C{i}", label=label, **style)
        for panel, (key, label) in zip(below[measured:], more.items(), strict=True):
            panel.plot(*points(records, key, x), color=f"C{i}", linewidth=0.8)
            panel.set(ylabel=label, ylim=(0, None))
    for loss in {gpt2_val_loss(run) for run in runs} - {None}:
        axes.axhline(
            loss, color="gray", linestyle="--", label=f"GPT-2 124M val {loss:.3f} (quoted)"
        )
    if measured:
        plot_hellaswag(below[0], runs, logs, x)
    axes.set(ylabel="loss, nats per token")
    axes.legend()
    for panel in (axes, *below):
        panel.grid(alpha=0.3)
    grid[-1, 0].set_xlabel("seconds of training" if x == "seconds" else x)
    # Runs with steps of different size have no common second axis.
    tokens_per_step = {r["tokens"] / r["step"] for records in logs for r in records if r["step"]}
    if x == "step" and len(tokens_per_step) == 1:
        factor = tokens_per_step.pop() / 1e6
        top = axes.secondary_xaxis(
            "top", functions=(lambda step: step * factor, lambda tokens: tokens / factor)
        )
        top.set_xlabel("million tokens")
    return figure


def plot_runs(runs: list[Path], file: Path, x: str = "step") -> None:
    """Draw runs into a picture, of the kind that the name of `file` says."""
    figure = draw_runs(runs, x)
    with naming(file):
        figure.savefig(file, dpi=150)


def plot_hellaswag(axes: Axes, runs: list[Path], logs: list[list[dict]], x: str) -> None:
    """Draw the runs' lm-eval acc_norm, and the quoted accuracies under what they are."""
    for i, (run, records) in enumerate(zip(runs, logs, strict=True)):
        at, values = points(records, "hellaswag_acc_norm", x)
        if values:
            label = f"{Path(run).name}, lm-eval acc_norm {values[-1]:.4f}"
            axes.plot(at, values, color=f"C{i}", marker="o", label=label)
    for label, value, style in HELLASWAG:
        axes.axhline(value, color="gray", linestyle=style, label=f"{label} (quoted)")
    axes.set(ylabel="HellaSwag accuracy")
    axes.legend()


def main(args: Namespace) -> None:
    file = Path(args.out)
    if file.suffix.lower() not in PICTURES:
        raise ValueError(f"out is {file}, expected a name ending in {', '.join(PICTURES)}")
    plot_runs([Path(run) for run in args.runs], file, args.x)
    print(f"drawn into {file}")


if __name__ == "__main__":
    parser = cli.Parser(prog="plot.py", description="Draw the losses of runs into one picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", default="loss.png", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--x", choices=AXES, default="step", help="what the curves are drawn over")
    args = parser.parse_args()
    cli.tell_errors(lambda: main(args), args.debug)
