"""Compare this project with its peers on a GPU: training step, LoRA, HellaSwag, sampling.

    python benchmarks/gpu.py --peer ../nanoGPT --data hellaswag_val.jsonl
    python benchmarks/gpu.py --parts lora_139  # one part
    python benchmarks/gpu.py --dry_run         # on a CPU: 1 minute

Each part is one of the other benchmarks, in its own process. Compiling takes most of the time. So
we first run one round of every part that compiles, in parallel. This fills PyTorch's cache of
compiled code. Tables go to OUT_DIR/results.md. Measurements go to OUT_DIR/results.jsonl after each
contender, so stopping a part loses only the contender being measured.
"""

import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.config import flag, run_command

ROOT = Path(__file__).parents[1]
PART_SECONDS = 240  # a part that takes longer is stopped
LORA_NAMES = "'full none' 'lora light' 'summed light' 'peft none'"
ON_GPU = "--device cuda --precision bf16 --compile"
# train_step.py and hellaswag.py take pieces of names as --contenders; lora.py takes entire names.
PARTS = {
    "train_step_32": f"train_step.py --sizes 12x768:32x1024 {ON_GPU}",
    "train_step_64": f"train_step.py --sizes 12x768:64x1024 {ON_GPU} --contenders project compiled",
    "lora_139": f"lora.py --size 12x768:16x139 {ON_GPU} --graphs --contenders {LORA_NAMES}",
    "lora_1024": f"lora.py --size 12x768:16x1024 {ON_GPU} --graphs --contenders {LORA_NAMES}",
    "hellaswag": "hellaswag.py --rows 500 --rounds 2 --device cuda --precision bf16",
    "generate": "generate.py --rounds 3 --device cuda --compile",
}
# In a dry run these flags come last, so they override those above, except for lists.
DRY_RUN_FLAGS = "--device cpu --precision fp32 --one_by_one --rounds 1"
DRY_RUN_FLAGS_OF_SCRIPT = {
    "train_step.py": "--no-compile",
    "lora.py": "--no-compile",
    "hellaswag.py": "--rows 4 --n_layer 1 --contenders project loop",
    "generate.py": "--no-compile --new_tokens 3 --n_layer 1",
}


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    parts: list[str] = flag(list(PARTS), "what to measure: " + ", ".join(PARTS))
    out_dir: str = flag("results", "folder to write to; earlier results in it are kept")
    peer: str | None = flag(None, "checkout of nanoGPT, to compare training steps with")
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz (default: from the hub)")
    dry_run: bool = flag(False, "tiny sizes on a CPU, to check that everything works")


def make_command(part: str, config: GPUBenchmarkConfig) -> list[str]:
    """Return the script of a part, relative to ROOT, and its flags."""
    line = PARTS[part]
    if config.dry_run:
        line = re.sub(r"12x768:\d+x\d+", "1x64:2x32", line)
        line += f" {DRY_RUN_FLAGS} {DRY_RUN_FLAGS_OF_SCRIPT[line.split()[0]]}"
    script, *flags = shlex.split(line)
    if config.peer and part.startswith("train_step"):
        flags += ["--peer", config.peer]
    if config.data and part == "hellaswag":
        flags += ["--data", config.data]
    return [f"benchmarks/{script}", *flags]


def run(command: list[str], stdout: Any) -> str:
    """Run a command for at most PART_SECONDS. Return how it ended, such as "done, 93 s"."""
    started = time.perf_counter()
    script, *flags = command
    arguments = [sys.executable, str(ROOT / script), *flags]
    try:
        ended = subprocess.run(arguments, stdout=stdout, timeout=PART_SECONDS, check=False)
        result = f"exit code {ended.returncode}" if ended.returncode else "done"
    except subprocess.TimeoutExpired:
        result = "stopped"
    return f"{result}, {time.perf_counter() - started:.0f} s"


def main(config: GPUBenchmarkConfig) -> None:
    if unknown := set(config.parts) - PARTS.keys():
        raise ValueError(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is available; --dry_run runs on a CPU")
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    commands = {part: make_command(part, config) for part in config.parts}
    if not config.dry_run:  # fill the compiler's cache
        to_compile = [[*c, "--rounds", "1"] for c in commands.values() if "--compile" in c]
        with ThreadPoolExecutor(len(PARTS)) as threads:
            warmups = threads.map(lambda command: run(command, DEVNULL), to_compile)
        print(f"compiled: {'; '.join(warmups)}", flush=True)
    results = []
    with (out_dir / "results.md").open("a") as file:
        print(f"# {time.strftime('%Y-%m-%d %H:%M')}", file=file)
        if not config.peer:
            print("\nnanoGPT is missing: pass a checkout as --peer", file=file)
        for part, command in commands.items():
            print(f"\n## {part}\n\n```sh\npython {shlex.join(command)}\n```", file=file, flush=True)
            result = run([*command, "--json_file", str(out_dir / "results.jsonl")], file)
            print(f"\n{result}", file=file)
            print(f"{part}: {result}", flush=True)
            results.append(result)
    print((out_dir / "results.md").read_text())
    n_done = sum(result.startswith("done") for result in results)
    if n_done < len(commands):
        raise ValueError(f"only {n_done} of {len(commands)} parts finished")


if __name__ == "__main__":
    run_command(main, GPUBenchmarkConfig, __doc__)
