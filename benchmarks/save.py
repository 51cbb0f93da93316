"""How long a checkpoint of GPT-2 124M interrupts training: taking a snapshot, which a thread then
writes, beside waiting until it is saved.

    python benchmarks/save.py   # 1 minute

The two take turns in one process.
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from engine.checkpoint import BackgroundSave, Resumed, save_checkpoint
from engine.config import flag, run_command


@dataclass(frozen=True)
class SaveBenchmarkConfig(harness.BenchmarkConfig):
    folder: str | None = flag(None, "where to write (default: a temporary folder)")
    n_layer: int = flag(12, "blocks of the model; its width is 768")


def main(config: SaveBenchmarkConfig) -> None:
    size = harness.Size(config.n_layer, 768, batch_size=1, T=64)
    training_step = harness.random_training_step(size, config)
    training_step(1)  # now the optimizer has its state
    background = BackgroundSave()
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        save = partial(save_checkpoint, Path(folder), training_step.model)

        def take_snapshot(step: int) -> None:
            params, state = training_step.snapshot()
            resumed = Resumed({"step": step, "val_loss": None}, state)
            background.start(partial(save, params, resumed, keep=1))

        def save_and_wait(step: int) -> None:
            take_snapshot(step)
            background.wait()

        contenders = {
            "wait": save_and_wait,
            "snapshot": take_snapshot,
            "rest": lambda _: background.wait(),  # the write is not part of the next turn
        }
        turns = harness.take_turns(contenders, range(1, config.rounds + 2))
    wait, snapshot = (harness.median_seconds(turns[name]) for name in ("wait", "snapshot"))
    print(
        f"training waits {snapshot:.2f} s for a snapshot, {snapshot / wait:.0%} of the {wait:.2f} s"
    )
    print("that it would wait for the complete save")


if __name__ == "__main__":
    run_command(main, SaveBenchmarkConfig, __doc__)
