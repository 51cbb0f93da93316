"""How long a checkpoint of GPT-2 124M interrupts training: taking a snapshot, which a thread then
writes, beside waiting until it is saved. The two take turns in one process.

    python benchmarks/save.py   # 1 minute
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.checkpoint import BackgroundSave, RunState, save_checkpoint
from engine.config import flag, run_command


@dataclass(frozen=True)
class SaveBenchmarkConfig(harness.BenchmarkConfig):
    folder: str | None = flag(None, "where to write (default: a temporary folder)")
    n_layer: int = flag(12, "blocks of the model; its width is 768")


def main(config: SaveBenchmarkConfig) -> None:
    size = harness.Size(config.n_layer, 768, batch_size=1, T=64)
    training_step, background = harness.random_training_step(size, config), BackgroundSave()
    training_step(1)  # now the optimizer has its state
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:

        def take_snapshot(step: int) -> None:
            params, tensors = training_step.snapshot()
            state = RunState({"step": step, "val_loss": None}, tensors)
            model, run = training_step.model, Path(folder)
            save = partial(save_checkpoint, run, model, params, state, keep=1)
            background.start(save)

        def save_and_wait(step: int) -> None:
            take_snapshot(step)
            background.wait()

        contenders = {
            "save": save_and_wait,
            "snapshot": take_snapshot,
            "rest": lambda _: background.wait(),  # writing is not part of the next turn
        }
        results = harness.take_turns(contenders, range(1, config.rounds + 2))
    harness.print_header("training waits for", "s", "/ save")
    for name in ("save", "snapshot"):
        ratio = harness.ratio(results, name, "save")
        harness.print_row(name, f"{harness.median(results[name]):.2f}", ratio)


if __name__ == "__main__":
    run_command(main, SaveBenchmarkConfig, __doc__)
