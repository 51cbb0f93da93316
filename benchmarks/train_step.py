"""A training step beside transformers' GPT-2: tokens/s, its parts, peak memory.

    python benchmarks/train_step.py                    # two sizes, two CPU threads, fp32: 7 minutes
    python benchmarks/train_step.py --peer ../nanoGPT  # also beside a checkout of nanoGPT
    python benchmarks/train_step.py --precision bf16 --also_fp32
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --sizes 12x768:64x1024

This project runs its real training step; the others run build-nanogpt's loop: forward, backward,
clipping, fused AdamW. They take turns step by step, each in a process of its own with the memory
allocator that its users get. This project's loss computes its gradient in the forward pass, so
compare the sum of forward and backward; clipping counts as "optimizer". Peak memory is the highest
resident memory over that after a step of a tiny model. Peak FLOP/s are those of the fastest of the
blocks' matrix products, measured in one more process in every round.

On CUDA the contenders run one after another; peak FLOP/s are those of the GPU's data sheet, and
memory is the allocator's. With --compile this project and the peer are compiled, and transformers
runs both compiled and as it is.
"""

import importlib.util
import inspect
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Maker, Result, Size, Stopwatch
from engine.config import TrainConfig, flag, run_command
from engine.distributed import Distributed, keep_freed_memory
from engine.optim import parameter_groups
from engine.step import TrainingStep
from engine.throughput import peak_flops

PARTS = ("forward", "backward", "optimizer")
OURS, BASELINE = "this project", "transformers"


@dataclass(frozen=True)
class StepBenchmarkConfig(BenchmarkConfig):
    rounds: int = flag(7, "measured steps of each contender, after two that warm up")
    sizes: list[str] = flag(["12x768:2x512", "6x384:8x256"], "each LAYERSxWIDTH:BATCHxTOKENS")
    peer: str | None = flag(None, "folder of nanoGPT, or another with such a model.py")
    recompute: Literal["none", "light", "block"] = flag("none", "of this project's training step")
    compile: bool = flag(False, "torch.compile all; transformers also runs as it is")
    also_fp32: bool = flag(False, "the contenders in fp32, and besides them in --precision")


class TimedStep(TrainingStep):
    """The real training step, which notes when its parts begin."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.stopwatch = Stopwatch(self.dist.device)
        self.loss.register_forward_pre_hook(self.stopwatch.note)
        self.loss.register_forward_hook(self.stopwatch.note)

    def _clip_gradients(self) -> torch.Tensor:
        self.stopwatch.note()
        return super()._clip_gradients()


def make_ours(size: Size, config: BenchmarkConfig, **settings: Any) -> Callable[[], Result]:
    device, numbers = config.open_device(), itertools.count(1)
    keep_freed_memory(Distributed(rank=0, world_size=1, device=device))
    training_step = harness.random_training_step(size, config, TimedStep, **settings)

    def turn() -> Result:
        for _ in range(steps_per_turn(device)):
            training_step.stopwatch.times.clear()
            training_step(next(numbers))
            training_step.stopwatch.note()
        return dict(zip(PARTS, training_step.stopwatch.read(), strict=True))

    return turn


def steps_per_turn(device: torch.device) -> int:
    """On CUDA several, because training launches a step before the one before is done."""
    return 5 if device.type == "cuda" else 1


def make_transformers(
    size: Size, config: BenchmarkConfig, *, compiled: bool = False
) -> Callable[[], Result]:
    model = harness.transformers_gpt2(size.gpt_config())
    called = torch.compile(model) if compiled else model
    return make_loop(model, lambda idx: called(idx, labels=idx).loss, size, config)


def make_peer(
    size: Size, config: BenchmarkConfig, folder: str, *, compiled: bool = False
) -> Callable[[], Result]:
    """The GPT of the folder's model.py: `GPT(config)(idx, targets)` returns logits and loss."""
    spec = importlib.util.spec_from_file_location("peer_model", Path(folder) / "model.py")
    if spec is None or spec.loader is None:
        raise ValueError(f"peer is {folder}, expected a folder with a Python file model.py")
    module, shape = importlib.util.module_from_spec(spec), size.gpt_config()
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    fields = inspect.signature(module.GPTConfig).parameters.keys() & vars(shape).keys()
    values = {name: getattr(shape, name) for name in fields} | {"vocab_size": harness.VOCAB_SIZE}
    model = module.GPT(module.GPTConfig(**values))  # nanoGPT's default is no dropout
    called = torch.compile(model) if compiled else model
    return make_loop(model, lambda idx: called(idx, idx)[1], size, config)


def make_loop(
    model: Any, loss_of: Callable[[torch.Tensor], torch.Tensor], size: Size, config: BenchmarkConfig
) -> Callable[[], Result]:
    """The training step of build-nanogpt's loop."""
    device = config.open_device()
    groups = parameter_groups(model.train().to(device), weight_decay=0.1)
    betas = (TrainConfig.beta1, TrainConfig.beta2)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=betas, fused=True)
    if config.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # as this project's step does on CUDA

    stopwatch = Stopwatch(device)

    def step() -> None:
        stopwatch.times.clear()
        idx = size.random_ids(device)
        stopwatch.note()
        optimizer.zero_grad(set_to_none=True)
        with config.autocast():
            loss = loss_of(idx)
        stopwatch.note()
        loss.backward()
        stopwatch.note()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        stopwatch.note()

    def turn() -> Result:
        for _ in range(steps_per_turn(device)):
            step()
        return dict(zip(PARTS, stopwatch.read(), strict=True))

    return turn


def make_matmuls(size: Size, _: BenchmarkConfig) -> Callable[[], Result]:
    """FLOP/s of the fastest of the blocks' matrix products, and of a large square one."""
    rows, C = size.tokens, size.n_embd
    shapes = ((rows, C, 3 * C), (rows, C, 4 * C), (rows, 4 * C, C), (2048, 2048, 2048))
    operands = [(torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)) for m, k, n in shapes]

    def step() -> Result:
        best = 0.0
        for a, b, out in operands * 8:
            started = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            best = max(best, 2 * a.numel() * len(b) / (time.perf_counter() - started))
        return {"flops": best}

    return step


def list_makers(config: StepBenchmarkConfig) -> dict[str, Any]:
    ours = partial(make_ours, recompute=config.recompute, compile=config.compile)
    makers: dict[str, Any] = {OURS: ours, BASELINE: make_transformers}
    if config.compile:
        makers[f"{BASELINE}, compiled"] = partial(make_transformers, compiled=True)
    if config.peer:
        folder = Path(config.peer).resolve()
        if not (folder / "model.py").exists():
            raise ValueError(f"peer is {config.peer}, expected a folder with model.py")
        name = f"{folder.name}, compiled" if config.compile else folder.name
        makers[name] = partial(make_peer, folder=str(folder), compiled=config.compile)
    if config.also_fp32:
        in_16_bits = {f"{name}, {config.precision}": make for name, make in makers.items()}
        makers = {name: partial(make_in_fp32, make) for name, make in makers.items()} | in_16_bits
    if config.open_device().type == "cpu" and (config.also_fp32 or config.precision == "fp32"):
        makers["matmul"] = make_matmuls
    return makers


def make_in_fp32(make: Maker, size: Size, config: BenchmarkConfig) -> Callable[[], Result]:
    return make(size, replace(config, precision="fp32"))


def main(config: StepBenchmarkConfig) -> None:
    makers = list_makers(config)
    harness.print_device(config)
    columns = "tokens/s", f"/ {BASELINE}'", *(f"{part} ms" for part in PARTS)
    columns += "peak MB", f"/ {BASELINE}'", "of peak FLOP/s"
    for size in map(Size.parse, config.sizes):
        results = harness.measure(makers, size, config, warmup=2)  # one compiles
        matmul = results.pop("matmul", None)
        peak = harness.median(matmul, "flops") if matmul else peak_flops(config.open_device())
        harness.print_header(str(size), *columns)
        for name, steps in results.items():
            seconds = harness.median(steps) / steps_per_turn(config.open_device())
            harness.print_row(
                name,
                f"{size.tokens / seconds:,.0f}",
                harness.ratio(results, BASELINE, name),
                *(f"{harness.median(steps, part) * 1e3:.0f}" for part in PARTS),
                f"{harness.median(steps, 'peak_bytes') / 2**20:,.0f}",
                harness.ratio(results, name, BASELINE, "peak_bytes"),
                f"{size.flops / seconds / peak:.2f}" if peak else "",
            )


if __name__ == "__main__":
    run_command(main, StepBenchmarkConfig, __doc__)
