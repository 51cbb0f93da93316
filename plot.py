"""A file of its own because it is also a command, `python plot.py RUN ...`: the curves of runs."""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from checkpoint import read_metrics, read_run_config
from data import read_manifest

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


def gpt2_val_loss(run: Path | str) -> float | None:
    """GPT-2 124M's loss on the validation set of a run, where it is known."""
    data_dir = read_run_config(run).get("data_dir", "")
    return GPT2_VAL_LOSS.get(read_manifest(Path(data_dir)).get("dataset"))


def plot_runs(runs: list[Path], file: Path) -> None:
    """Draw training and validation loss of one or several runs over steps and tokens, and below
    them HellaSwag where it was measured.
    """
    logs = [read_metrics(run) for run in runs]
    measured = any("hellaswag_acc_norm" in record for records in logs for record in records)
    figure = Figure(figsize=(9, 9 if measured else 5), layout="constrained")
    axes, *below = figure.subplots(2 if measured else 1, sharex=True, squeeze=False)[:, 0]
    tokens_per_step = set()
    for i, (run, records) in enumerate(zip(runs, logs, strict=True)):
        for key, style in (
            ("train_loss", {"alpha": 0.4, "linewidth": 0.8}),
            ("val_loss", {"marker": "o", "markersize": 3}),
        ):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                label = f"{Path(run).name} {key.removesuffix('_loss')} {points[-1][1]:.3f}"
                axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, **style)
        tokens_per_step |= {r["tokens"] / r["step"] for r in records if r["step"]}
    for loss in {gpt2_val_loss(run) for run in runs} - {None}:
        axes.axhline(
            loss, color="gray", linestyle="--", label=f"GPT-2 124M val {loss:.3f} (quoted)"
        )
    if measured:
        plot_hellaswag(below[0], runs, logs)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    if len(tokens_per_step) == 1:  # runs with steps of different size have no common second axis
        factor = tokens_per_step.pop() / 1e6
        top = axes.secondary_xaxis(
            "top", functions=(lambda step: step * factor, lambda tokens: tokens / factor)
        )
        top.set_xlabel("million tokens")
    figure.savefig(file, dpi=150)


def plot_hellaswag(axes: Axes, runs: list[Path], logs: list[list[dict]]) -> None:
    """Draw the runs' lm-eval acc_norm, and the quoted accuracies under what they are."""
    for i, (run, records) in enumerate(zip(runs, logs, strict=True)):
        key = "hellaswag_acc_norm"
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            label = f"{Path(run).name}, lm-eval acc_norm {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", label=label)
    for label, value, style in HELLASWAG:
        axes.axhline(value, color="gray", linestyle=style, label=f"{label} (quoted)")
    axes.set(xlabel="step", ylabel="HellaSwag accuracy")
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    runs = sys.argv[1:]
    if not runs or any(run.startswith("-") for run in runs):
        print("usage: python plot.py RUN [RUN ...]   draws the runs' losses into loss.png")
        sys.exit(0 if {"-h", "--help"} & set(runs) else cli.BAD_INPUT)
    plot_runs([Path(run) for run in runs], Path("loss.png"))
    print("drawn into loss.png")


if __name__ == "__main__":
    cli.tell_errors(main)
