"""How long a save holds up training at GPT-2 124M: taking the snapshot that a thread then writes,
against a save that training waits for.

    python benchmarks/save.py

The two take turns in one process; the medians over the rounds are compared.
"""

import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from benchmarks.data import random_shards
from checkpoint import BackgroundSave, save_checkpoint
from data import PretrainingData
from model import GPT, GPTConfig
from runtime import Distributed
from step import TrainingStep
from train_gpt2 import PretrainConfig


@dataclass(frozen=True)
class SaveConfig:
    rounds: int = 5
    """times that each way is measured"""
    folder: str = ""
    """where to write (default: a temporary folder)"""


def main(config: SaveConfig) -> None:
    folder = Path(tempfile.mkdtemp(dir=config.folder or None))
    model = GPT(GPTConfig())
    train_config = PretrainConfig(
        batch_size=1, total_batch_size=64, precision="fp32", compile=False
    )
    data = PretrainingData(random_shards(folder, 4096), 64, 1, 64, seed=0)
    step = TrainingStep(model, data, train_config, Distributed(0, 1, torch.device("cpu")))
    step(1)  # the optimizer has its state after a step
    background = BackgroundSave()
    waiting: dict[str, list[float]] = {"synchronous": [], "snapshot": []}
    for number in range(1, 2 * config.rounds + 1):
        way = "synchronous" if number % 2 else "snapshot"
        started = time.perf_counter()
        params, state = step.snapshot()
        progress = {"step": number, "val_loss": None}
        background.start(partial(save_checkpoint, folder, model, params, progress, state, 1))
        if way == "synchronous":
            background.wait()
        waiting[way].append(time.perf_counter() - started)
        background.wait()
    synchronous, snapshot = (statistics.median(times) for times in waiting.values())
    shutil.rmtree(folder)
    print(
        f"training waits {synchronous:.2f} s for a synchronous save of 124M, {snapshot:.2f} s for "
        f"the snapshot: {snapshot / synchronous:.0%}"
    )


if __name__ == "__main__":
    cli.run(main, SaveConfig, __doc__)
