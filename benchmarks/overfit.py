"""Does LoRA overfit less than full fine-tuning? Both train on a few hundred examples for 30 epochs.

    python benchmarks/overfit.py --model runs/demo   # 15 minutes; draws docs/overfit.png

The model is one that this project pretrained. The examples are Python functions and the first
paragraphs of their docstrings, or those of --data. LoRA has ten times full fine-tuning's learning
rate. The figure shows the training and validation losses of both.
"""

import json
import sys
import tempfile
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
from engine.report import plot_runs


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


def finetune(run: Path, rows: Path, config: OverfitBenchmarkConfig, **settings: object) -> None:
    shared: dict[str, Any] = {
        "model_name_or_path": config.model,
        "data": str(rows),
        "epochs": config.epochs,
    }
    shared |= {"val_fraction": config.val_fraction, "batch_size": 32, "examples_per_step": 32}
    shared |= {"eval_every": 20, "sample_every": 0, "save_every": 10_000, **settings}
    finetune_lora.main(finetune_lora.FinetuneConfig(out_dir=str(run), **shared))


def main(config: OverfitBenchmarkConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, lora_lr = Path(name), 10 * config.max_lr
        examples = read_examples(config.data, load_model(config.model).config.block_size)
        pairs = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
        rows = folder / "rows.jsonl"
        rows.write_text("\n".join(map(json.dumps, pairs[: config.n_examples])))
        full, lora = folder / f"full, rate {config.max_lr:g}", folder / f"lora, rate {lora_lr:g}"
        finetune(full, rows, config, use_lora=False, max_lr=config.max_lr)
        finetune(lora, rows, config, lora_dim=config.lora_dim, max_lr=lora_lr)
        plot_runs([full, lora], Path(config.plot))
        columns = "best val loss", "at step", "last val loss", "last train loss"
        harness.print_header("run", *columns)
        for run in (full, lora):
            evaluated = [r for r in read_metrics(run) if "val_loss" in r]
            best, last = min(evaluated, key=lambda r: r["val_loss"]), evaluated[-1]
            losses = f"{last['val_loss']:.3f}", f"{last['train_loss']:.3f}"
            harness.print_row(run.name, f"{best['val_loss']:.3f}", best["step"], *losses)


if __name__ == "__main__":
    run_command(main, OverfitBenchmarkConfig, __doc__)
