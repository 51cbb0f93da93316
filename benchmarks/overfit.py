"""Does LoRA overfit less than full fine-tuning? Both train on a few hundred examples for 30 epochs.

    python benchmarks/overfit.py --model runs/demo   # 15 minutes; draws docs/overfit.png

The model is one that this project pretrained. The examples are Python functions and the first
paragraphs of their docstrings, or those of --data. LoRA has ten times full fine-tuning's learning
rate. The figure shows the training and validation losses of both, the table their numbers.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune_lora
from benchmarks.harness import print_header, print_row
from engine.checkpoint import load_model
from engine.config import flag, run_command
from engine.instructions import read_examples
from engine.metrics import read_metrics
from engine.report import plot_runs

LORA_RATE = 10  # LoRA's learning rate over full fine-tuning's


@dataclass(frozen=True)
class OverfitBenchmarkConfig:
    model: str = flag("runs/demo", "the pretrained model")
    data: str = flag("stdlib", "examples, as for finetune_lora.py")
    n_examples: int = flag(1000, "examples to use, the first ones")
    val_fraction: float = flag(0.8, "fraction held out; few examples remain, on purpose")
    epochs: int = flag(30, "passes over the training examples")
    max_lr: float = flag(5e-4, "of full fine-tuning; LoRA has ten times as much")
    lora_dim: int = flag(8, "LoRA's rank")
    plot: str = flag("docs/overfit.png", "the figure to write")


def main(config: OverfitBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        block_size = load_model(config.model).config.block_size
        with rows.open("w") as file:
            for e in read_examples(config.data, block_size)[: config.n_examples]:
                print(json.dumps({"prompt": e.prompt, "completion": e.completion}), file=file)
        runs = [
            finetune(config, rows, use_lora=use_lora, max_lr=max_lr)
            for use_lora, max_lr in ((False, config.max_lr), (True, config.max_lr * LORA_RATE))
        ]
        plot_runs(runs, Path(config.plot))
        print()
        print_header("run", "best val loss", "at step", "last val loss", "last train loss")
        for run in runs:
            records = read_metrics(run)
            losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
            best = min(losses, key=lambda step: losses[step])
            last = records[-1]["val_loss"], records[-1]["train_loss"]
            print_row(run.name, f"{losses[best]:.3f}", best, *(f"{loss:.3f}" for loss in last))


def finetune(config: OverfitBenchmarkConfig, rows: Path, *, use_lora: bool, max_lr: float) -> Path:
    """Fine-tune in a new run folder beside the rows, and return it."""
    run = rows.parent / f"{'lora' if use_lora else 'full'}, rate {max_lr:g}"
    finetune_lora.main(
        finetune_lora.FinetuneConfig(
            out_dir=str(run),
            model_name_or_path=config.model,
            data=str(rows),
            use_lora=use_lora,
            lora_dim=config.lora_dim if use_lora else None,
            max_lr=max_lr,
            epochs=config.epochs,
            val_fraction=config.val_fraction,
            batch_size=32,
            examples_per_step=32,
            eval_every=20,
            sample_every=0,
            save_every=10_000,
        )
    )
    return run


if __name__ == "__main__":
    run_command(main, OverfitBenchmarkConfig, __doc__)
