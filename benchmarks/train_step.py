"""A training step beside transformers' GPT-2: tokens/s, its parts, peak memory.

    python benchmarks/train_step.py                    # two sizes, two CPU threads, fp32: 7 minutes
    python benchmarks/train_step.py --peer ../nanoGPT  # also beside a checkout of nanoGPT
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --sizes 12x768:64x1024

This project runs its real training step; the others run build-nanogpt's loop: forward, backward,
clipping, fused AdamW. Each has the memory allocator that its users get. This project's loss
computes its gradient in the forward pass, so compare the sum of forward and backward; clipping
counts as "optimizer". With --compile this project and the peer are compiled, and transformers runs
both compiled and as it is. Peak FLOP/s are those of the GPU's data sheet.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Contender, Result, Results, Size
from engine.config import TrainConfig, flag, run_command
from engine.distributed import Distributed, keep_freed_memory
from engine.optim import parameter_groups
from engine.step import TrainingStep
from engine.throughput import flops_per_token, peak_flops
from model import GPT, GPTConfig

LossOf = Callable[[torch.Tensor], torch.Tensor]  # the loss of idx as inputs and targets
PARTS = ("forward", "backward", "optimizer")
OURS, BASELINE = "this project", "transformers"
SHAPE = "block_size", "n_layer", "n_head", "n_embd"  # also nanoGPT's names
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}  # training launches a step before the one before is done


@dataclass(frozen=True)
class StepBenchmarkConfig(BenchmarkConfig):
    rounds: int = flag(7, "measured steps of each contender, after two that warm up")
    sizes: list[str] = flag(["12x768:2x512", "6x384:8x256"], "each LAYERSxWIDTH:BATCHxTOKENS")
    peer: str | None = flag(None, "folder of nanoGPT")
    compile: bool = flag(False, "torch.compile all; transformers also runs as it is")


class TimedStep(TrainingStep):
    """The real training step, which calls `note` when one of its parts begins or ends."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.note: Callable[[], None]
        self.loss.register_forward_pre_hook(lambda *_: self.note())
        self.loss.register_forward_hook(lambda *_: self.note())

    def _clip_gradients(self) -> torch.Tensor:
        self.note()
        return super()._clip_gradients()


class LoopStep:
    """The training step of build-nanogpt's loop, which calls `note` as `TimedStep` does."""

    def __init__(self, model: Any, loss_of: LossOf, size: Size, config: BenchmarkConfig):
        self.model, self.loss_of, self.size, self.config = model, loss_of, size, config
        self.device = config.open_device()
        groups = parameter_groups(model.train().to(self.device), weight_decay=0.1)
        betas = (TrainConfig.beta1, TrainConfig.beta2)
        self.optimizers = [torch.optim.AdamW(groups, lr=1e-6, betas=betas, fused=True)]
        self.note: Callable[[], None]
        if config.precision != "fp32":
            torch.set_float32_matmul_precision("high")  # as this project's step does on CUDA

    def __call__(self, _step: int) -> None:
        (optimizer,) = self.optimizers
        optimizer.zero_grad(set_to_none=True)
        idx = self.size.random_ids(self.device)
        self.note()
        with self.config.autocast():
            loss = self.loss_of(idx)
        self.note()
        loss.backward()
        self.note()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()


def time_parts(training_step: TimedStep | LoopStep, config: BenchmarkConfig) -> Contender:
    """Does the steps of a turn; returns the seconds of the parts of the last."""
    device, times = config.open_device(), list[Any]()
    n_steps = STEPS_PER_TURN[device.type]

    def note() -> None:
        if device.type == "cpu":
            times.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # so that launching never waits
        event.record()
        times.append(event)

    def turn(i: int) -> Result:
        for step in range(i * n_steps, (i + 1) * n_steps):
            times.clear()
            training_step(step + 1)
            note()
        harness.read_clock(device)  # waits for the last event
        seconds = [
            end - start if device.type == "cpu" else start.elapsed_time(end) / 1e3
            for start, end in itertools.pairwise(times)
        ]
        return dict(zip(PARTS, seconds[-3:], strict=True))

    training_step.note = note
    return turn


def make_contender(name: str, size: Size, config: StepBenchmarkConfig) -> Contender:
    if name.startswith(OURS):
        keep_freed_memory(Distributed(rank=0, world_size=1, device=config.open_device()))
        step = harness.random_training_step(
            GPT(size.gpt_config()), size, config, TimedStep, compile=config.compile
        )
        return time_parts(step, config)
    gpt_config, is_baseline = size.gpt_config(), name.startswith(BASELINE)
    peer = harness.transformers_gpt2(gpt_config) if is_baseline else make_peer(gpt_config, config)
    called: Any = torch.compile(peer) if ", compiled" in name else peer

    def loss_of(idx: torch.Tensor) -> torch.Tensor:
        return called(idx, labels=idx).loss if is_baseline else called(idx, idx)[1]

    return time_parts(LoopStep(peer, loss_of, size, config), config)


def make_peer(gpt_config: GPTConfig, config: StepBenchmarkConfig) -> Any:
    """nanoGPT's GPT, which returns logits and loss."""
    loader = SourceFileLoader("peer_model", str(Path(config.peer or "") / "model.py"))
    module: Any = ModuleType(loader.name)
    sys.modules[loader.name] = module  # dataclasses look themselves up
    loader.exec_module(module)
    shape = {name: getattr(gpt_config, name) for name in SHAPE}
    # Its default is no dropout.
    return module.GPT(module.GPTConfig(vocab_size=harness.VOCAB_SIZE, **shape))


def list_contenders(config: StepBenchmarkConfig) -> list[str]:
    compiled, names = ", compiled" if config.compile else "", [OURS, BASELINE]
    if config.compile:
        names.append(f"{BASELINE}{compiled}")
    if config.peer:
        names.append(f"{Path(config.peer).resolve().name}{compiled}")
    return names


def list_cells(name: str, results: Results, size: Size, device: torch.device) -> list[str]:
    steps, peak, model = results[name], peak_flops(device), harness.meta_model(size.gpt_config())
    speed = size.tokens * STEPS_PER_TURN[device.type] / harness.median(steps)
    return [
        name,
        f"{speed:,.0f}",
        harness.ratio(results, BASELINE, name),
        *(f"{harness.median(steps, part) * 1e3:.0f}" for part in PARTS),
        f"{harness.median(steps, 'peak_bytes') / 2**20:,.0f}",
        harness.ratio(results, name, BASELINE, "peak_bytes"),
        f"{flops_per_token(model, size.T) * speed / peak:.2f}" if peak else "",
    ]


def main(config: StepBenchmarkConfig) -> None:
    names, device = list_contenders(config), config.open_device()
    columns = ["tokens/s", f"/ {BASELINE}'", *(f"{part} ms" for part in PARTS)]
    columns += ["peak MB", f"/ {BASELINE}'", "of peak FLOP/s"]
    for size in map(Size.parse, config.sizes):
        # Two rounds warm up, because one compiles.
        results = harness.measure(make_contender, names, size, config, warmup=2)
        rows = [list_cells(name, results, size, device) for name in results]
        harness.print_table([str(size), *columns], rows)


if __name__ == "__main__":
    run_command(main, StepBenchmarkConfig, __doc__)
