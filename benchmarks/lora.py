"""LoRA at GPT-2 124M beside full fine-tuning and PEFT: time and memory of a step.

    python benchmarks/lora.py           # the comparison, one CPU thread, fp32: 25 minutes
    python benchmarks/lora.py --table   # ranks 1 to 64 in both forms, and others: 10 minutes
    python benchmarks/lora.py --table --device cuda --precision bf16 --compile --size 12x768:16x1024

`lora` computes x W' + s (x A') B', `summed` x (W + s B A)' with a sum that is built once per step,
and `autograd` the same as PyTorch does it by itself, with the gradient of the sum. `bf16` is `lora`
with the base in bf16; `frozen` trains nothing but wpe. With --compile this project's contenders are
compiled, and PEFT runs both compiled and as it is. Contenders take turns, each in a process of its
own; on CUDA they run one after another. Compare the sum of forward and backward, because this
project's loss computes its gradient in the forward pass. Memory on a CPU is that of all live
tensors, counted at every operation of one more step; on CUDA it is the allocator's figure.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Result, Size, Stopwatch
from engine import lora
from engine.config import TrainConfig, flag, run_command
from engine.data import Batch
from engine.distributed import autocast_dtype
from engine.loss import SummedLoss
from engine.step import apply_recompute
from model import GPT

RANK, RANKS = 8, (1, 8, 16, 32, 64)
# Contenders: what is trained, and what is recomputed. transformers' model trains all weights.
OWN = "full none", "full light", "lora none", "lora light"
BLOCK, PEERS = ("full block", "lora block"), ("transformers none", "peft none")
COMPARED = (  # batch size, length, contenders; all at once, 16 x 139 would need 24 GB
    (4, 128, (*OWN, *BLOCK, "peft none")),
    (2, 512, ("frozen none", *OWN)),
    (16, 139, (*OWN, *BLOCK, "bf16 light", "bf16 block")),
    (16, 139, ("full none", *PEERS, "peft checkpointing")),
)


@dataclass(frozen=True)
class LoRABenchmarkConfig(BenchmarkConfig):
    table: bool = flag(False, "measure ranks 1 to 64, in both forms, instead")
    size: str = flag("12x768:4x128", "LAYERSxWIDTH:BATCHxTOKENS; the batch counts with --table")
    recompute: Literal["none", "light", "block"] = flag("light", "of LoRA, with --table")
    rounds: int = flag(3, "measured steps of each contender, after one that warms up")
    threads: int = flag(1, "CPU threads of each contender")
    compile: bool = flag(False, "torch.compile; with --table PEFT also runs as it is")
    varying: bool = flag(False, "a step has each of eight lengths up to T, one after another")


class AutogradLoRA(lora.LoRALinear):
    """x (W + s B A)' by autograd alone: the sum and its gradient are computed at every call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._matrix() + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, weight, self.bias)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors `before` and of all that operations make while it is on, as
    long as they live.
    """

    def __init__(self, before: list[torch.Tensor]):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self._count(before)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(out if isinstance(out, list | tuple) else [out])
        return out

    def _count(self, values: list | tuple) -> None:
        for tensor in values:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and storage.nbytes():
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def make_model(kind: str, size: Size, rank: int) -> Any:
    what, recompute = kind.split()
    rank = min(rank, size.n_embd)  # of the tiny model
    if what == "transformers":
        return harness.transformers_gpt2(size.gpt_config())
    if what == "peft":
        model = make_peft(size, rank, checkpointing=recompute == "checkpointing")
        return torch.compile(model) if recompute == "compiled" else model
    model = GPT(size.gpt_config())
    if what != "full":
        lora_config = lora.LoRAConfig(lora_dim=rank, lora_alpha=2 * rank)
        lora.convert_linear_layer_to_lora(model, config=lora_config)
        lora.only_optimize_lora_parameters(model)
    if what == "frozen":  # wpe lets gradients flow through all blocks
        lora.merge_lora(model)
        model.transformer.wpe.weight.requires_grad_()
    if what == "bf16":
        lora.cast_frozen_weights(model, torch.bfloat16)
    for linear in lora.lora_linears(model).values():
        linear.sums_weight = what == "summed"
        if what == "autograd":
            linear.__class__ = AutogradLoRA
    apply_recompute(model, recompute)
    return model


def make_peft(size: Size, rank: int, *, checkpointing: bool) -> Any:
    import peft

    model = harness.transformers_gpt2(size.gpt_config())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    targets = ["c_attn", "c_proj", "c_fc"]
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **options))


def make_contender(
    size: Size, config: LoRABenchmarkConfig, kind: str, rank: int = RANK
) -> Callable[[], Result]:
    device = config.open_device()
    model = make_model(kind, size, rank).train().to(device)
    lengths = range(size.T // 8, size.T + 1, size.T // 8) if config.varying else [size.T]
    *_, longest = batches = [replace(size, T=T).random_ids(device) for T in lengths]
    if isinstance(model, GPT):
        summed_loss = SummedLoss(model, compile_trunk=config.compile, compile_head=config.compile)
    summing = [linear for linear in lora.lora_linears(model).values() if linear.sums_weight]
    summed_weights = partial(lora.summed_weights, summing, autocast_dtype(config.precision))
    params = [p for p in model.parameters() if p.requires_grad]
    betas = (TrainConfig.beta1, TrainConfig.beta2)
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=betas, fused=True)

    def compute_loss(idx: torch.Tensor) -> torch.Tensor:
        with config.autocast():
            if isinstance(model, GPT):
                return summed_loss(Batch(idx, idx)) / idx.numel()
            return model(idx, labels=idx).loss

    def update(live_bytes: Callable[[], int]) -> int:
        """Do a step; return the bytes that its forward pass keeps for the backward pass."""
        before = live_bytes()
        with summed_weights():
            loss = compute_loss(longest)
            kept = live_bytes() - before
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return kept

    update(lambda: 0)  # now the optimizer has its state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        kept = update(torch.cuda.memory_allocated)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        states = [t for state in optimizer.state.values() for t in state.values()]
        with LiveBytes([*model.parameters(), *model.buffers(), *states]) as live:
            kept = update(lambda: live.now)
        peak = live.peak
    memory = {"peak": peak / 1e9, "kept": kept / longest.numel() / 1e3}

    stopwatch = Stopwatch(device)

    def step() -> Result:
        stopwatch.times.clear()
        for idx in batches:
            optimizer.zero_grad()
            stopwatch.note()
            with summed_weights():
                loss = compute_loss(idx)
                stopwatch.note()
                loss.backward()
        stopwatch.note()
        times = stopwatch.read()
        return {"forward": sum(times[::2]), "backward": sum(times[1::2]), **memory}

    return step


def compare(makers: dict[str, Any], size: Size, config: LoRABenchmarkConfig) -> None:
    """Measure the contenders; those called "full ..." are what the others are compared with."""
    results = harness.measure(makers, size, config)
    times = "forward ms", "backward ms", "sum", "/ full", "/ full with the same recomputation"
    title = f"{size}, eight lengths" if config.varying else str(size)
    harness.print_header(title, *times, "peak memory, GB", "kept for backward, kB per token")
    for step in [step for steps in results.values() for step in steps]:
        step["sum"] = step["forward"] + step["backward"]
    for name, steps in results.items():
        seconds = [harness.median(steps, part) for part in ("forward", "backward", "sum")]
        references = "full none", f"full {name.split()[1].strip(',')}"
        harness.print_row(
            name,
            *(f"{value * 1e3:.0f}" for value in seconds),
            *(harness.ratio(results, name, reference, "sum") for reference in references),
            f"{steps[0]['peak']:.2f}",
            f"{steps[0]['kept']:.0f}",
        )


def main(config: LoRABenchmarkConfig) -> None:
    size = Size.parse(config.size)
    if config.table:
        others = ["full none", "autograd none", "frozen none", f"bf16 {config.recompute}", *PEERS]
        if config.compile:
            others.append("peft compiled")
        makers = {kind: partial(make_contender, kind=kind) for kind in others}
        for form in ("lora", "summed"):
            kind = f"{form} {config.recompute}"
            makers |= {
                f"{kind}, rank {r}": partial(make_contender, kind=kind, rank=r) for r in RANKS
            }
        compare(makers, size, config)
        return
    for batch_size, T, kinds in COMPARED:
        makers = {kind: partial(make_contender, kind=kind) for kind in kinds}
        compare(makers, replace(size, batch_size=batch_size, T=T), config)


if __name__ == "__main__":
    run_command(main, LoRABenchmarkConfig, __doc__)
