"""How long a checkpoint of GPT-2 124M blocks training: with a thread that writes it in the
background, so that training waits only for a snapshot, and without one, until all is written.

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
from engine.tokenizer import Tokenizer
from model import GPT


@dataclass(frozen=True)
class SaveBenchmarkConfig(harness.BenchmarkConfig):  # uses its rounds, device, precision
    folder: str | None = flag(None, "where to write (default: a temporary folder)")
    n_layer: int = flag(12, "blocks of the model; its width is 768")


def main(config: SaveBenchmarkConfig) -> None:
    size = harness.Size(config.n_layer, 768, batch_size=1, T=64)
    model, tokenizer, background = GPT(size.gpt_config()), Tokenizer.gpt2(), BackgroundSave()
    training_step = harness.random_training_step(model, size, config)
    training_step(1)  # creates the state of the optimizer
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:

        def start_save(i: int) -> None:
            params, tensors = training_step.snapshot()
            state = RunState({"step": i + 1, "val_loss": None}, tensors)
            run = Path(folder)
            background.start(partial(save_checkpoint, run, model, tokenizer, params, state, keep=1))

        def save_and_wait(i: int) -> None:
            start_save(i)
            background.wait()

        contenders = {
            "save": save_and_wait,
            "snapshot": start_save,
            "rest": lambda _: background.wait(),  # not reported: finish before the next turn
        }
        results = harness.take_turns(contenders, config.rounds)
    rows = [
        [name, f"{harness.median(results[name]):.2f}", harness.ratio(results, name, "save")]
        for name in ("save", "snapshot")
    ]
    harness.print_table(["training waits for", "s", "/ save"], rows)


if __name__ == "__main__":
    run_command(main, SaveBenchmarkConfig, __doc__)
