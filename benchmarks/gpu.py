"""What one GPU does, in 8 minutes: training steps, LoRA and HellaSwag at GPT-2 124M under bf16.

    python benchmarks/gpu.py --data hellaswag_val.jsonl
    python benchmarks/gpu.py --device cpu --tiny   # whether it runs, in 4 minutes

Runs train_step.py, lora.py --table and hellaswag.py at sizes for a GPU, where contenders have the
card for themselves and run one after another; one that runs out of memory is reported as such.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import hellaswag, lora, train_step
from engine.config import flag, run_command
from engine.distributed import open_device

PARTS = ("steps", "lora", "hellaswag")
TINY_ROW = {
    "activity_label": "Cooking",
    "ctx_a": "A cook cuts an onion.",
    "ctx_b": "then the cook",
    "ctx": "A cook cuts an onion. then the cook",
    "endings": ["fries it.", "eats the pan.", "sings to it.", "leaves."],
    "label": 0,
}


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    parts: list[str] = flag(list(PARTS), f"tables to make: {', '.join(PARTS)}")
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz (default: from the hub)")
    batch_sizes: list[str] = flag(["8", "16", "32", "64"], "sequences of 1024 in a training step")
    rounds: int = flag(10, "measured steps of each contender")
    rows: int = flag(500, "HellaSwag examples per round")
    device: str = flag("cuda", "cuda; cpu, to see that it runs")
    tiny: bool = flag(False, "one narrow block and tiny batches; without --data a made-up row")

    def __post_init__(self) -> None:
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"parts has {', '.join(unknown)}, expected some of {', '.join(PARTS)}")


def main(config: GPUBenchmarkConfig) -> None:
    device, started = open_device(config.device, 0), time.perf_counter()
    on_cuda, rounds = device.type == "cuda", 1 if config.tiny else config.rounds
    name = torch.cuda.get_device_name(device) if on_cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16 autocast", flush=True)
    how: dict[str, Any] = {"device": config.device, "precision": "bf16"}
    sizes = ["1x64:1x16"] if config.tiny else [f"12x768:{n}x1024" for n in config.batch_sizes]
    if "steps" in config.parts:
        train_step.main(train_step.StepBenchmarkConfig(sizes=sizes, rounds=rounds, **how))
    if "lora" in config.parts:
        size = sizes[0] if config.tiny else "12x768:16x1024"
        lora.main(lora.LoRABenchmarkConfig(table=True, size=size, rounds=rounds, **how))
    if "hellaswag" in config.parts:
        with tempfile.TemporaryDirectory() as folder:
            made_up = Path(folder) / "made_up.jsonl"
            made_up.write_text(2 * (json.dumps(TINY_ROW) + "\n"))
            tiny = {"data": config.data or str(made_up), "rows": 1, "rounds": 1, "n_layer": 1}
            settings = tiny if config.tiny else {"data": config.data, "rows": config.rows}
            hellaswag.main(hellaswag.HellaSwagBenchmarkConfig(**settings, **how))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_command(main, GPUBenchmarkConfig, __doc__)
