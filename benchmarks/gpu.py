"""What one card does, in under 8 minutes: training steps, LoRA and HellaSwag at GPT-2 124M.

    python benchmarks/gpu.py --data hellaswag_val.jsonl
    python benchmarks/gpu.py --device cpu --tiny true  # whether it runs, in a minute

All under bf16 autocast, with random weights and random tokens, beside transformers in the same run.
Contenders take turns for HellaSwag alone: the others need the card's memory for themselves, so they
run one after another, and medians of their steps are compared. Ours is the real `TrainingStep`, raw
and compiled; transformers gets build-nanogpt's loop, raw: forward, backward, clipping, fused AdamW.
Memory is what the allocator says (on a CPU n/a, or benchmarks/lora.py's count); MFU is n/a where
the peak of the device is not known.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from benchmarks import hellaswag, lora
from benchmarks.data import random_shards
from data import PretrainingData
from model import GPT, GPTConfig
from report import flops_per_token
from runtime import Distributed, peak_flops, peak_memory
from step import TrainingStep, out_of_memory
from tokenizer import save_tokenizer
from train_gpt2 import PretrainConfig

WARM_UP = 2  # steps, of which the first compiles
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
COMPILED = "this project, compiled"
STEPS = ("transformers", "this project, raw", COMPILED)
LORA = {  # what is trained, what is recomputed, rank
    "full": ("full none", 0),
    **{f"rank {rank}": ("lora light", rank) for rank in (1, 8, 16, 32, 64)},
    "rank 8, nothing recomputed": ("lora none", 8),
    "merged, all frozen but wpe": ("merged none", 8),
    "transformers, full": ("transformers full", 0),
    "peft, rank 8": ("peft none", 8),
}
TINY: dict[str, Any] = {
    "batch_sizes": "1",
    "block_size": 16,
    "lora_batch_size": 1,
    "rounds": 1,
    "rows": 1,
}
TINY_ROW = {
    "activity_label": "Cooking",
    "ctx_a": "A cook cuts an onion.",
    "ctx_b": "then the cook",
    "ctx": "A cook cuts an onion. then the cook",
    "endings": ["fries it.", "eats the pan.", "sings to it.", "leaves."],
    "label": 0,
}
PARTS = ("steps", "lora", "hellaswag")
HELLASWAG_ROUNDS = 3  # after one that warms up

Result = TypeVar("Result")


@dataclass(frozen=True)
class GPUBenchmarkConfig:
    parts: str = ",".join(PARTS)
    """which tables to make"""
    data: str | None = None
    """HellaSwag's rows, .jsonl or .jsonl.gz (default: the validation set from the hub)"""
    batch_sizes: str = "8,16,32,64"
    """sequences in a training step, each measured"""
    block_size: int = 1024
    """tokens in a sequence of training and LoRA"""
    lora_batch_size: int = 16
    """sequences in a LoRA step"""
    rounds: int = 10
    """steps of each contender that count"""
    rows: int = 500
    """HellaSwag examples in a round"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: to see that it runs"""
    tiny: bool = False
    """one block and tiny batches, whatever else is said; without --data a made-up row"""

    def __post_init__(self) -> None:
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"parts has {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
        if not all(size.isdecimal() and int(size) for size in self.batch_sizes.split(",")):
            raise ValueError(f"batch_sizes is {self.batch_sizes}, expected numbers like 8,16")

    @property
    def n_layer(self) -> int:
        return 1 if self.tiny else 12


def header(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def lora_config(config: GPUBenchmarkConfig) -> lora.BenchmarkConfig:
    return lora.BenchmarkConfig(n_layer=config.n_layer, device=config.device, precision="bf16")


def measured(measure: Callable[[], Result], device: torch.device) -> Result | None:
    """What `measure` returns, None if it runs out of memory; the peak counts from its beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found: list[Result] = []
    failed = out_of_memory(lambda: found.append(measure()), device)
    return None if failed else found[0]


def transformers_step(batch_size: int, config: GPUBenchmarkConfig) -> Callable[[], float]:
    sizes = {"n_layer": config.n_layer, "n_positions": config.block_size, "use_cache": False}
    padded = GPTConfig().padded_vocab_size  # as ours has it
    model = GPT2LMHeadModel(GPT2Config(vocab_size=padded, **sizes, **NO_DROPOUT))
    settings = lora_config(config)
    contender = lora.Contender(model, settings)

    def step() -> float:
        loss = contender.loss(lora.random_ids(batch_size, config.block_size, settings))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(contender.trained, 1.0)
        contender.optimizer.step()
        contender.optimizer.zero_grad()
        return loss.item()

    return step


def our_step(
    data: PretrainingData, compiled: bool, config: GPUBenchmarkConfig, dist: Distributed
) -> Callable[[], float]:
    model = GPT(GPTConfig(block_size=config.block_size, n_layer=config.n_layer)).to(dist.device)
    train_config = PretrainConfig(
        batch_size=data.batch_size,
        total_batch_size=data.total_batch_size,
        precision="bf16",
        compile=compiled,
    )
    training_step = TrainingStep(model, data, train_config, dist)
    numbers = iter(range(1, WARM_UP + config.rounds + 1))

    def step() -> float:
        return training_step(next(numbers))[0].item()  # waits, so that all of the step is timed

    return step


def measure_step(
    name: str, data: PretrainingData, config: GPUBenchmarkConfig, dist: Distributed
) -> tuple[float, int]:
    """The median of its seconds, and the peak of its bytes."""
    if name == "transformers":
        step = transformers_step(data.batch_size, config)
    else:
        step = our_step(data, name == COMPILED, config, dist)
    times = []
    for _ in range(WARM_UP + config.rounds):
        started = time.perf_counter()
        step()  # ends with a number from the device, so it has been waited for
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:]), peak_memory(dist.device)


def steps_table(config: GPUBenchmarkConfig, dist: Distributed) -> None:
    T, peak = config.block_size, peak_flops(dist.device)
    with torch.device("meta"):
        flops = flops_per_token(GPT(GPTConfig(block_size=T, n_layer=config.n_layer)), T)
    header("training step", "contender", "tokens/s (to transformers)", "MFU", "peak memory GB")
    for batch_size in map(int, config.batch_sizes.split(",")):
        baseline = None
        with tempfile.TemporaryDirectory() as folder:
            shards = random_shards(folder, (WARM_UP + config.rounds) * batch_size * T + 1)
            data = PretrainingData(shards, T, batch_size, batch_size * T, seed=0)
            for name in STEPS:
                cells = f"{batch_size} x {T}", name
                found = measured(partial(measure_step, name, data, config, dist), dist.device)
                if found is None:
                    row(*cells, "out of memory", "", "")
                    continue
                speed = batch_size * T / found[0]
                baseline = speed if name == "transformers" else baseline
                ratio = f" ({speed / baseline:.2f} x)" if baseline else ""
                mfu = f"{flops * speed / peak:.3f}" if peak else "n/a"
                memory = f"{found[1] / 1e9:.2f}" if config.device == "cuda" else "n/a"
                row(*cells, f"{speed:,.0f}{ratio}", mfu, memory)


def measure_lora(kind: str, rank: int, config: GPUBenchmarkConfig) -> tuple[float, float, int]:
    """Median seconds of forward and backward, and the bytes at the peak of a step."""
    settings = lora_config(config)
    if kind.startswith(("transformers", "peft")):
        contender = lora.theirs(kind, settings)
    else:
        contender = lora.ours(kind, settings, rank)
    idx = lora.random_ids(config.lora_batch_size, config.block_size, settings)
    times = [contender.forward_backward(idx) for _ in range(WARM_UP + config.rounds)][WARM_UP:]
    forward, backward = map(statistics.median, zip(*times, strict=True))
    return forward, backward, contender.memory(idx)[0]


def lora_table(config: GPUBenchmarkConfig, dist: Distributed) -> None:
    sizes = f"{config.lora_batch_size} x {config.block_size}"
    header(f"LoRA, {sizes}", "forward ms", "backward ms", "sum", "to full", "memory GB")
    full = None
    for name, (kind, rank) in LORA.items():
        found = measured(partial(measure_lora, kind, rank, config), dist.device)
        if found is None:
            row(name, "out of memory", "", "", "", "")
            continue
        forward, backward, memory = found
        total = forward + backward
        full = total if name == "full" else full
        times = [f"{seconds * 1e3:.1f}" for seconds in (forward, backward, total)]
        row(name, *times, f"{total / full:.3f}" if full else "", f"{memory / 1e9:.2f}")


def build_nanogpt(model: GPT2LMHeadModel, rows: list[dict], device: torch.device) -> None:
    with device:  # where its loop makes its tensors
        hellaswag.build_nanogpt(lambda idx: model(idx).logits, rows)


def hellaswag_contenders(
    config: GPUBenchmarkConfig, device: torch.device
) -> dict[str, Callable[[list[dict]], object]]:
    model = GPT(GPTConfig(n_layer=config.n_layer)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_tokenizer(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval().to(device)
        lms = {
            f"lm-eval, batch {n}": HFLM(pretrained=folder, device=config.device, batch_size=n)
            for n in (16, 64)
        }
    model.to(device)
    return {
        "this project": partial(hellaswag.this_project, model, device=device),
        **{name: partial(hellaswag.lm_evaluation_harness, lm) for name, lm in lms.items()},
        "build-nanogpt's loop": partial(build_nanogpt, theirs, device=device),
    }


def examples_per_second(contender: Callable[[list[dict]], object], rows: list[dict]) -> float:
    started = time.perf_counter()
    contender(rows)
    return len(rows) / (time.perf_counter() - started)


def hellaswag_table(rows: list[dict], config: GPUBenchmarkConfig, dist: Distributed) -> None:
    contenders = hellaswag_contenders(config, dist.device)
    speeds: dict[str, list[float | None]] = {name: [] for name in contenders}
    for number in range(1 + HELLASWAG_ROUNDS):
        chosen = rows[number * config.rows : (number + 1) * config.rows]
        for name, contender in contenders.items():
            with torch.autocast(config.device, torch.bfloat16):
                speed = measured(partial(examples_per_second, contender, chosen), dist.device)
            if number:
                speeds[name].append(speed)
    header("HellaSwag", "examples/s", "ours is")
    ours = speeds["this project"]
    for name, values in speeds.items():
        fitting = [value for value in values if value is not None]
        if len(fitting) < len(values):
            row(name, "out of memory", "")
            continue
        times = [o / v for o, v in zip(ours, fitting, strict=True) if o]
        ratio = f"{statistics.median(times):.2f} x" if times else ""
        row(name, f"{statistics.median(fitting):.1f}", ratio)


def rows_to_score(config: GPUBenchmarkConfig) -> list[dict]:
    wanted = (1 + HELLASWAG_ROUNDS) * config.rows
    if config.tiny and config.data is None:
        return [TINY_ROW] * wanted
    found = hellaswag.hellaswag_rows(config.data, wanted)
    if len(found) < wanted:
        raise ValueError(f"data has {len(found)} rows, expected {wanted}; lower --rows")
    return found


def main(config: GPUBenchmarkConfig) -> None:
    if config.tiny:
        config = replace(config, **TINY)
    dist = Distributed.start(config.device)
    parts = config.parts.split(",")
    rows = rows_to_score(config) if "hellaswag" in parts else []
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the training step has it
    card = torch.cuda.get_device_name(dist.device) if config.device == "cuda" else "CPU"
    started = time.perf_counter()
    print(f"{card}, torch {torch.__version__}, bf16 autocast, n_layer {config.n_layer}")
    if "steps" in parts:
        steps_table(config, dist)
    if "lora" in parts:
        lora_table(config, dist)
    if "hellaswag" in parts:
        hellaswag_table(rows, config, dist)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    cli.run(main, GPUBenchmarkConfig, __doc__)
