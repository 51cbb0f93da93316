"""What a GPU shows of this project beside its peers: training step, LoRA, HellaSwag, sampling.

    python benchmarks/gpu.py --peer ../nanoGPT --data hellaswag_val.jsonl
    python benchmarks/gpu.py --parts lora   # one part
    python benchmarks/gpu.py --dry_run      # on a CPU: 1 minute

Each part is one of the other benchmarks, in a process of its own. At first all parts run at once
for a step, because compiling takes most of the time; the measured runs then find the compiled code
in PyTorch's cache. OUT_DIR/results.md gets the tables; OUT_DIR/results.jsonl gets the figures of
each contender as soon as it is done, so a part that is stopped loses only the one that was running.
"""

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
PART_SECONDS = 240  # after which a part is stopped
LORA = "'full none' 'lora light' 'summed light' 'autograd none' 'peft none'"
ON_GPU = "--device cuda --precision bf16 --compile"
PARTS = {
    "train_step_16": f"train_step.py --sizes 12x768:16x1024 {ON_GPU}",
    "train_step_64": f"train_step.py --sizes 12x768:64x1024 {ON_GPU} --contenders project compiled",
    "lora": f"lora.py --size 12x768:16x512 {ON_GPU} --contenders {LORA} 'peft compiled'",
    "hellaswag": "hellaswag.py --rows 500 --rounds 2 --device cuda --precision bf16",
    "generate": "generate.py --rounds 3 --device cuda --compile",
}
# Flags that come last in a dry run, so they count.
DRY = "--device cpu --precision fp32 --one_by_one --rounds 1"
DRY_SIZES = {
    "train_step.py": "--no-compile --sizes 1x64:2x32",
    "lora.py": f"--no-compile --size 1x64:2x32 --contenders {LORA}",
    "hellaswag.py": "--rows 4 --n_layer 1 --contenders project loop",
    "generate.py": "--no-compile --new_tokens 3 --n_layer 1",
}


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    parts: list[str] = flag(list(PARTS), "what to measure: " + ", ".join(PARTS))
    out_dir: str = flag("results", "folder to write to; earlier results in it are kept")
    peer: str | None = flag(None, "folder of nanoGPT, for the training step")
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz (default: from the hub)")
    dry_run: bool = flag(False, "tiny sizes on a CPU, to see that everything works")


def make_command(part: str, config: GPUBenchmarkConfig) -> list[str]:
    script, *flags = shlex.split(PARTS[part])
    if config.dry_run:
        flags += shlex.split(f"{DRY} {DRY_SIZES[script]}")
    command = ["python", f"benchmarks/{script}", *flags]
    if config.peer and part.startswith("train_step"):
        command += ["--peer", config.peer]
    if config.data and part == "hellaswag":
        command += ["--data", config.data]
    return command


def run(command: list[str], stdout: Any) -> str:
    """Run a command for at most PART_SECONDS; return how it ended."""
    started = time.perf_counter()
    try:
        script = [sys.executable, str(ROOT / command[1]), *command[2:]]
        ended = subprocess.run(script, stdout=stdout, timeout=PART_SECONDS, check=False)
        result = f"exit code {ended.returncode}" if ended.returncode else "done"
    except subprocess.TimeoutExpired:
        result = "stopped"
    return f"{result}, {time.perf_counter() - started:.0f} s"


def main(config: GPUBenchmarkConfig) -> None:
    if unknown := set(config.parts) - PARTS.keys():
        raise ValueError(f"parts has {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is available; --dry_run runs on a CPU")
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    commands = {part: make_command(part, config) for part in config.parts}
    if not config.dry_run:  # a step of all at once fills the compiler's cache
        compiled = [command for command in commands.values() if "--compile" in command]
        with ThreadPoolExecutor(len(PARTS)) as threads:
            steps = threads.map(lambda command: run([*command, "--rounds", "1"], DEVNULL), compiled)
        print(f"compiled: {'; '.join(steps)}", flush=True)
    ends = []
    with (out_dir / "results.md").open("a") as file:
        print(f"# {time.strftime('%Y-%m-%d %H:%M')}", file=file)
        if not config.peer:
            print("\nnanoGPT is missing: give its folder as --peer", file=file)
        for part, command in commands.items():
            print(f"\n## {part}\n\n```sh\n{shlex.join(command)}\n```", file=file, flush=True)
            ends.append(run([*command, "--json_file", str(out_dir / "results.jsonl")], file))
            print(f"\n{ends[-1]}", file=file)
            print(f"{part}: {ends[-1]}", flush=True)
    print((out_dir / "results.md").read_text())
    done = sum(end.startswith("done") for end in ends)
    if done < len(commands):
        raise ValueError(f"only {done} of {len(commands)} parts ran to their end")


if __name__ == "__main__":
    run_command(main, GPUBenchmarkConfig, __doc__)
