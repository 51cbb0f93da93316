"""What one GPU does, in 8 minutes: training steps, LoRA and HellaSwag at GPT-2 124M under bf16.

    python benchmarks/gpu.py --data hellaswag_val.jsonl
    python benchmarks/gpu.py --device cpu --tiny   # whether it runs, in 4 minutes

Runs train_step.py, lora.py --table and, if rows are given, hellaswag.py at sizes for a GPU.
Contenders have the card for themselves; one that runs out of memory is reported.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import hellaswag, lora, train_step
from engine.config import flag, run_command
from engine.distributed import open_device


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz")
    rounds: int = flag(10, "measured steps of each contender")
    device: str = flag("cuda", "cuda; cpu, to see that it runs")
    tiny: bool = flag(False, "tiny sizes")


def main(config: GPUBenchmarkConfig) -> None:
    device, started = open_device(config.device, local_rank=0), time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16 autocast", flush=True)
    how: dict[str, Any] = {"device": config.device, "precision": "bf16"}
    how["rounds"] = 1 if config.tiny else config.rounds
    sizes = ["1x64:1x16"] if config.tiny else [f"12x768:{n}x1024" for n in (8, 16, 32, 64)]
    train_step.main(train_step.StepBenchmarkConfig(sizes=sizes, **how))
    lora.main(lora.LoRABenchmarkConfig(table=True, size=sizes[len(sizes) // 3], **how))
    if config.data:
        how |= {"rows": 1, "n_layer": 1} if config.tiny else {"rows": 500, "rounds": 3}
        hellaswag.main(hellaswag.HellaSwagBenchmarkConfig(data=config.data, **how))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_command(main, GPUBenchmarkConfig, __doc__)
