"""Does LoRA overfit less than full fine-tuning? Both on a few hundred examples for many epochs.

    python benchmarks/overfit.py [--model runs/demo] [--plot docs/overfit.png]

The examples are Python functions and the first paragraphs of their docstrings, or those of --data;
the model is one that this project pretrained. LoRA's learning rate is ten times full fine-tuning's.
The picture shows training and validation loss of both; the table its numbers, whatever they say.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import finetune_lora
from checkpoint import load_model, read_metrics
from instructions import read_examples
from plot import plot_runs


@dataclass(frozen=True)
class OverfitConfig:
    model: str = "runs/demo"
    """the pretrained model"""
    data: str = "stdlib"
    """examples, as finetune_lora.py takes them"""
    n_examples: int = 1000
    """the first so many of them"""
    val_fraction: float = 0.8
    """part of the examples that is held out; the rest is small on purpose"""
    epochs: int = 30
    """passes over the training examples"""
    max_lr: float = 5e-4
    """of full fine-tuning; LoRA has ten times as much"""
    lora_dim: int = 8
    """LoRA's rank"""
    plot: str = "docs/overfit.png"
    """the picture to write"""


def main(config: OverfitConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        examples = read_examples(config.data, load_model(config.model).config.block_size)
        rows.write_text(
            "\n".join(
                json.dumps({"prompt": e.prompt, "completion": e.completion})
                for e in examples[: config.n_examples]
            )
        )
        runs = {}
        for name, use_lora, factor in (("full", False, 1), ("lora", True, 10)):
            runs[name] = Path(folder) / f"{name}, rate {config.max_lr * factor:g}"
            finetune_lora.main(
                finetune_lora.FinetuneConfig(
                    out_dir=str(runs[name]),
                    model_name_or_path=config.model,
                    data=str(rows),
                    use_lora=use_lora,
                    lora_dim=config.lora_dim if use_lora else None,
                    max_lr=config.max_lr * factor,
                    epochs=config.epochs,
                    val_fraction=config.val_fraction,
                    batch_size=32,
                    examples_per_step=32,
                    eval_every=20,
                    sample_every=0,
                    save_every=10_000,
                )
            )
        plot_runs(list(runs.values()), Path(config.plot))
        print("\n| what | best val loss | at step | last val loss | last train loss |")
        print("|---|---|---|---|---|")
        for name, run in runs.items():
            records = read_metrics(run)
            losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
            best = min(losses, key=lambda step: losses[step])
            last = records[-1]
            print(
                f"| {name} | {losses[best]:.3f} | {best} | {last['val_loss']:.3f} "
                f"| {last['train_loss']:.3f} |"
            )


if __name__ == "__main__":
    cli.run(main, OverfitConfig, __doc__)
