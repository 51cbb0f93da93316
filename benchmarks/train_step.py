"""A training step compared with transformers: tokens/s, time of each part, peak memory.

    python benchmarks/train_step.py                    # two sizes, two CPU threads, fp32: 7 minutes
    python benchmarks/train_step.py --peer ../nanoGPT  # compare with a checkout of nanoGPT, too
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --sizes 12x768:64x1024

This project runs its real training step, with the allocator settings of train_gpt2.py. The others
run build-nanogpt's loop: forward, backward, clipping, fused AdamW. Our loss computes its gradient
in the forward pass, so compare the sum of forward and backward. Clipping counts as "optimizer".
--compile compiles this project and the peer, and transformers runs both compiled and uncompiled.
Peak FLOP/s come from the GPU's data sheet.
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

LossFunction = Callable[[torch.Tensor], torch.Tensor]  # from idx (inputs and targets) to loss
PARTS = ("forward", "backward", "optimizer")
OURS, BASELINE = "this project", "transformers"
COMPILED = ", compiled"  # suffix of the names of compiled peers
SHAPE = "block_size", "n_layer", "n_head", "n_embd"  # named as in nanoGPT
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}  # on CUDA, steps overlap: one is launched while another runs


@dataclass(frozen=True)
class StepBenchmarkConfig(BenchmarkConfig):
    rounds: int = flag(7, "measured turns of each contender, after two for warmup")
    sizes: list[str] = flag(["12x768:2x512", "6x384:8x256"], "each LAYERSxWIDTH:BATCHxTOKENS")
    peer: str | None = flag(None, "checkout of nanoGPT")
    compile: bool = flag(False, "compile all contenders; transformers also runs uncompiled")


class HookedStep(TrainingStep):
    """The real training step. Calls `on_boundary` before and after forward, and after backward."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.on_boundary: Callable[[], None] = lambda: None
        self.loss.register_forward_pre_hook(lambda *_: self.on_boundary())
        self.loss.register_forward_hook(lambda *_: self.on_boundary())

    def _clip_gradients(self) -> torch.Tensor:
        self.on_boundary()
        return super()._clip_gradients()


class PeerStep:
    """The training step of build-nanogpt. Calls `on_boundary` where `HookedStep` does."""

    def __init__(self, model: Any, loss: LossFunction, size: Size, config: BenchmarkConfig):
        self.model, self.loss, self.size, self.config = model, loss, size, config
        self.device = config.init_device()
        groups = parameter_groups(model.train().to(self.device), weight_decay=0.1)
        betas = (TrainConfig.beta1, TrainConfig.beta2)
        self.optimizers = [torch.optim.AdamW(groups, lr=1e-6, betas=betas, fused=True)]
        self.on_boundary: Callable[[], None] = lambda: None
        if config.precision != "fp32":
            torch.set_float32_matmul_precision("high")  # as this project's step does on CUDA

    def __call__(self, _step: int) -> None:
        (optimizer,) = self.optimizers
        optimizer.zero_grad(set_to_none=True)
        idx = self.size.random_ids(self.device)
        self.on_boundary()
        with self.config.autocast():
            loss = self.loss(idx)
        self.on_boundary()
        loss.backward()
        self.on_boundary()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()


def time_parts(training_step: HookedStep | PeerStep, config: BenchmarkConfig) -> Contender:
    """Make a contender that returns the seconds of each of PARTS in the last step of a turn."""
    device = config.init_device()
    times: list[Any] = []  # floats on a CPU, events on CUDA
    n_steps = STEPS_PER_TURN[device.type]

    def record_time() -> None:
        if device.type == "cpu":
            times.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # read later, so the CPU need not wait
        event.record()
        times.append(event)

    def take_turn(i: int) -> Result:
        for step in range(i * n_steps, (i + 1) * n_steps):
            times.clear()
            training_step(step + 1)  # records three times
            record_time()  # after the optimizer
        harness.wait_and_read_clock(device)  # until the last event has happened
        seconds = [
            end - start if device.type == "cpu" else start.elapsed_time(end) / 1e3
            for start, end in itertools.pairwise(times)
        ]
        return dict(zip(PARTS, seconds, strict=True))

    training_step.on_boundary = record_time
    return take_turn


def make_contender(name: str, size: Size, config: StepBenchmarkConfig) -> Contender:
    gpt_config = size.gpt_config()
    if name == OURS:
        keep_freed_memory(Distributed(rank=0, world_size=1, device=config.init_device()))
        model = GPT(gpt_config)
        step = harness.random_training_step(model, size, config, HookedStep, compile=config.compile)
        return time_parts(step, config)
    is_hf = name.startswith(BASELINE)
    peer = harness.transformers_gpt2(gpt_config) if is_hf else make_peer(gpt_config, config)
    forward: Any = torch.compile(peer) if name.endswith(COMPILED) else peer

    def loss(idx: torch.Tensor) -> torch.Tensor:
        return forward(idx, labels=idx).loss if is_hf else forward(idx, idx)[1]

    return time_parts(PeerStep(peer, loss, size, config), config)


def make_peer(gpt_config: GPTConfig, config: StepBenchmarkConfig) -> Any:
    """Make a model with the GPT class in the checkout `peer`. It returns (logits, loss)."""
    loader = SourceFileLoader("peer_model", str(Path(config.peer or "") / "model.py"))
    module: Any = ModuleType(loader.name)
    sys.modules[loader.name] = module  # @dataclass looks its module up there
    loader.exec_module(module)
    shape = {name: getattr(gpt_config, name) for name in SHAPE}
    return module.GPT(module.GPTConfig(vocab_size=harness.PADDED_VOCAB_SIZE, **shape))  # no dropout


def list_contenders(config: StepBenchmarkConfig) -> list[str]:
    names = [OURS, BASELINE]
    if config.compile:
        names.append(BASELINE + COMPILED)
    if config.peer:
        names.append(Path(config.peer).resolve().name + (COMPILED if config.compile else ""))
    return names


def list_cells(name: str, results: Results, size: Size, device: torch.device) -> list[str]:
    steps, peak, model = results[name], peak_flops(device), harness.meta_model(size.gpt_config())
    speed = size.tokens * STEPS_PER_TURN[device.type] / harness.median(steps)
    return [
        name,
        f"{speed:,.0f}",
        harness.ratio(results, BASELINE, name),  # of seconds, so swapped to compare speeds
        *(f"{harness.median(steps, part) * 1e3:.0f}" for part in PARTS),
        f"{harness.median(steps, 'peak_bytes') / 2**20:,.0f}",
        harness.ratio(results, name, BASELINE, "peak_bytes"),
        f"{flops_per_token(model, size.T) * speed / peak:.2f}" if peak else "",
    ]


def main(config: StepBenchmarkConfig) -> None:
    names, device = list_contenders(config), config.init_device()
    columns = ["tokens/s", f"/ {BASELINE}", *(f"{part} ms" for part in PARTS)]
    columns += ["peak MB", f"/ {BASELINE}", "of peak FLOP/s"]
    for size in map(Size.parse, config.sizes):
        # Two warmup rounds, because the first one compiles.
        results = harness.measure(make_contender, names, size, config, warmup=2)
        rows = [list_cells(name, results, size, device) for name in results]
        harness.print_table([str(size), *columns], rows)


if __name__ == "__main__":
    run_command(main, StepBenchmarkConfig, __doc__)
