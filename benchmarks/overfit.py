"""How LoRA and full fine-tuning overfit a small set of examples: three seeds, two rates each.

    python benchmarks/overfit.py --model runs/demo   # 25 minutes on one core

The model is a small one that this project pretrained. The examples are Python functions and the
first paragraphs of their docstrings, or those of --data. The figure shows the validation losses, as
means over the seeds and as the range between them. Runs stay in --out_dir: the same command again
continues, or draws the figure.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune_lora
from benchmarks import harness
from engine.checkpoint import load_model
from engine.config import flag, run_command
from engine.instructions import read_examples
from engine.metrics import read_metrics

Curve = dict[int, float]
N_EXAMPLES, VAL_FRACTION = 500, 0.6  # few examples remain for training, on purpose
RATES = 5e-4, 2.5e-4  # of full fine-tuning; LoRA has ten times these


@dataclass(frozen=True)
class OverfitBenchmarkConfig:
    model: str = flag("runs/demo", "the pretrained model")
    data: str = flag("stdlib", "examples, as for finetune_lora.py")
    epochs: int = flag(12, "passes over the training examples")
    seeds: int = flag(3, "of the split, the order and the adapter")
    out_dir: str = flag("runs/overfit", "folder of the runs")
    plot: str = flag("docs/overfit.png", "the figure to write")


def finetune(run: Path, rows: Path, config: OverfitBenchmarkConfig, **settings: Any) -> Curve:
    """The validation losses of a run by step."""
    finetune_config = finetune_lora.FinetuneConfig(
        model_name_or_path=config.model,
        data=str(rows),
        out_dir=str(run),
        epochs=config.epochs,
        val_fraction=VAL_FRACTION,
        batch_size=32,
        examples_per_step=32,
        eval_every=15,
        sample_every=0,
        save_every=10_000,
        **settings,
    )
    finetune_lora.main(finetune_config)
    return {r["step"]: r["val_loss"] for r in read_metrics(run) if "val_loss" in r}


def plot_curves(curves: dict[str, list[Curve]], file: str) -> None:
    """Draw the mean of each contender's curves, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, runs in curves.items():
        steps = list(runs[0])
        losses = [[run[step] for run in runs] for step in steps]
        style = "-" if name.startswith("LoRA") else "--"
        axes.plot(steps, [statistics.mean(values) for values in losses], style, label=name)
        axes.fill_between(steps, [*map(min, losses)], [*map(max, losses)], alpha=0.2)
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend()
    figure.savefig(file, dpi=120)


def main(config: OverfitBenchmarkConfig) -> None:
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    examples = read_examples(config.data, load_model(config.model).config.block_size)
    pairs = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, pairs[:N_EXAMPLES])))
    curves: dict[str, list[Curve]] = {}
    for seed in range(config.seeds):
        for rate in RATES:
            for use_lora in (False, True):
                kind, max_lr = ("LoRA", 10 * rate) if use_lora else ("full", rate)
                run = folder / f"{kind.lower()}_{max_lr:g}_{seed}"
                settings = {"seed": seed, "use_lora": use_lora, "max_lr": max_lr}
                curve = finetune(run, rows, config, **settings)
                curves.setdefault(f"{kind}, rate {max_lr:g}", []).append(curve)
    plot_curves(curves, config.plot)
    table = []
    for name, runs in curves.items():
        means = {step: statistics.mean(run[step] for run in runs) for step in runs[0]}
        best, last = min(means, key=lambda step: means[step]), max(means)
        final = [run[last] for run in runs]
        rest = (f"{loss:.3f}" for loss in (means[last], min(final), max(final)))
        table.append([name, f"{means[best]:.3f}", best, *rest])
    columns = "best val loss", "at step", "last val loss", "lowest seed", "highest seed"
    harness.print_table(["run", *columns], table)


if __name__ == "__main__":
    run_command(main, OverfitBenchmarkConfig, __doc__)
