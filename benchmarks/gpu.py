"""What a GPU shows of this project beside its peers: training step, LoRA, HellaSwag, sampling.

    python benchmarks/gpu.py --peer ../nanoGPT --data hellaswag_val.jsonl
    python benchmarks/gpu.py --parts lora   # one part
    python benchmarks/gpu.py --dry_run      # on a CPU: 1 minute

Each part is one of the other benchmarks, in a process of its own. At first all parts run at once
for a step, because compiling takes most of the time; the measured runs then find the compiled code
in PyTorch's cache. OUT_DIR/results.md gets the tables; OUT_DIR/results.jsonl gets the figures of
each contender as soon as it is done, so a part that is stopped loses only the one that was running.
A contender whose package is missing is named and left out.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.config import flag, run_command

FOLDER = Path(__file__).parent
PART_SECONDS = 240  # after which a part is stopped
ON_GPU = "--device cuda --precision bf16 --compile"
DRY = "--device cpu --one_by_one --rounds 1"
LORA = "lora.py --table --contenders full 'rank 8' autograd peft"
# What runs for each part: on a GPU, and in a dry run.
PARTS = {
    "train_step_16": (
        f"train_step.py --sizes 12x768:16x1024 {ON_GPU}",
        f"train_step.py --sizes 1x64:2x32 {DRY}",
    ),
    "train_step_64": (
        f"train_step.py --sizes 12x768:64x1024 {ON_GPU} --contenders project compiled",
        f"train_step.py --sizes 1x64:4x32 {DRY} --contenders project",
    ),
    "lora": (f"{LORA} --size 12x768:16x512 {ON_GPU}", f"{LORA} --size 1x64:2x32 {DRY}"),
    "lora_lengths": (
        f"{LORA} --size 12x768:16x512 {ON_GPU} --varying",
        f"{LORA} --size 1x64:2x32 {DRY} --varying",
    ),
    "hellaswag": (
        "hellaswag.py --rows 500 --rounds 2 --device cuda --precision bf16",
        f"hellaswag.py --rows 4 --n_layer 1 {DRY} --contenders project loop",
    ),
    "generate": (
        "generate.py --rounds 3 --device cuda --compile",
        f"generate.py --new_tokens 3 --n_layer 1 {DRY}",
    ),
}


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    parts: list[str] = flag(list(PARTS), "what to measure: " + ", ".join(PARTS))
    out_dir: str = flag("results", "folder to write to; earlier results in it are kept")
    peer: str | None = flag(None, "folder of nanoGPT, for the training step")
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz (default: from the hub)")
    dry_run: bool = flag(False, "tiny sizes on a CPU, to see that everything works")


def make_command(part: str, config: GPUBenchmarkConfig) -> list[str]:
    script, *args = shlex.split(PARTS[part][config.dry_run])
    if config.peer and part.startswith("train_step"):
        args += ["--peer", config.peer]
    if config.data and part == "hellaswag":
        args += ["--data", config.data]
    return [sys.executable, str(FOLDER / script), *args]


def compile_all(commands: Iterable[list[str]]) -> None:
    """Run a step of all parts at once, to fill the compiler's cache."""
    started, processes = time.perf_counter(), []
    for command in commands:
        step = [*command, "--rounds", "1"]
        processes.append(subprocess.Popen(step, stdout=DEVNULL, stderr=DEVNULL))
    for process in processes:
        try:
            process.wait(PART_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)


def run_part(part: str, command: list[str], out_dir: Path) -> bool:
    """Append the part's tables and figures to the results; return whether it ran to its end."""
    started, results = time.perf_counter(), out_dir / "results.md"
    with results.open("a") as file:
        shown = shlex.join(["python", f"benchmarks/{Path(command[1]).name}", *command[2:]])
        print(f"\n## {part}\n\n```sh\n{shown}\n```", file=file, flush=True)
        command = [*command, "--json_file", str(out_dir / "results.jsonl")]
        try:
            ended = subprocess.run(command, stdout=file, timeout=PART_SECONDS, check=False)
            problem = f"exit code {ended.returncode}" if ended.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {PART_SECONDS} s"
        seconds = f"{time.perf_counter() - started:.0f} s"
        print(f"\n{problem or 'done'}, {seconds}", file=file)
    print(f"{part}: {problem or 'done'}, {seconds}", flush=True)
    return not problem


def main(config: GPUBenchmarkConfig) -> None:
    unknown = set(config.parts) - PARTS.keys()
    if unknown:
        raise ValueError(f"parts has {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if not config.dry_run and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is available; --dry_run runs on a CPU")
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    device = "CPU" if config.dry_run else torch.cuda.get_device_name()
    heading = f"# {device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    if not config.peer:
        heading += "\n\nnanoGPT is missing: give its folder as --peer"
    with (out_dir / "results.md").open("a") as file:
        print(heading, file=file)
    commands = {part: make_command(part, config) for part in config.parts}
    if not config.dry_run:
        compile_all(command for command in commands.values() if "--compile" in command)
    done = [run_part(part, command, out_dir) for part, command in commands.items()]
    print((out_dir / "results.md").read_text())
    if not all(done):
        raise ValueError(f"only {sum(done)} of {len(done)} parts ran to their end")


if __name__ == "__main__":
    run_command(main, GPUBenchmarkConfig, __doc__)
