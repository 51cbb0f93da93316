"""LoRA at GPT-2 124M beside full fine-tuning and PEFT: time and memory of a step.

    python benchmarks/lora.py   # four contenders, one CPU thread, fp32: 5 minutes
    python benchmarks/lora.py --size 12x768:2x512 --contenders "full none" "summed light 64"
    python benchmarks/lora.py --device cuda --precision bf16 --compile --size 12x768:16x1024

Contenders: what is trained, what is recomputed, and the rank, 8 if there is none. `lora` computes
x W' + s (x A') B', `summed` x (W + s B A)' with a sum that is built once per step, and `autograd`
the same as PyTorch does it by itself, with the gradient of the sum. `bf16` is `lora` with the base
in bf16; `frozen` trains nothing but wpe; `peft` and `transformers` (all weights) recompute nothing.
With --compile this project's contenders are compiled; "peft compiled" always is. Compare the sum
of forward and backward, because this project's loss computes its gradient in the forward pass.
"""

import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Contender, Result, Size
from benchmarks.train_step import LoopStep, TimedStep, time_parts
from engine import lora
from engine.config import flag, run_command
from model import GPT

RANK, BASELINE = 8, "full none"
NAME = re.compile(
    r"(full|lora|summed|autograd|bf16|frozen|peft|transformers) (none|light|block|compiled)( \d+)?"
)


@dataclass(frozen=True)
class LoRABenchmarkConfig(BenchmarkConfig):
    contenders: list[str] = flag(
        [BASELINE, "lora none", "lora light", "peft none"], "what is trained and recomputed"
    )
    size: str = flag("12x768:4x128", "LAYERSxWIDTH:BATCHxTOKENS")
    rounds: int = flag(3, "measured steps of each contender, after one that warms up")
    threads: int = flag(1, "CPU threads of each contender")
    compile: bool = flag(False, "torch.compile this project's contenders")


class AutogradLoRA(lora.LoRALinear):
    """x (W + s B A)' by autograd alone: the sum and its gradient are computed at every call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._matrix() + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, weight, self.bias)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors `before` and of all that operations make while it is on, as
    long as they live: on a CPU, what CUDA's allocator tells.
    """

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self.peak = self.now

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        self.storages.update(tensor.untyped_storage() for tensor in tensors)
        self.peak = max(self.peak, self.now)
        return out


def make_model(what: str, size: Size, rank: int) -> GPT:
    model = GPT(size.gpt_config())
    if what == "full":
        return model
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
    return model


def make_peer(what: str, size: Size, rank: int) -> Any:
    model = harness.transformers_gpt2(size.gpt_config())
    if what == "transformers":
        return model
    import peft

    targets = ["c_attn", "c_proj", "c_fc"]
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **options))


def make_contender(name: str, size: Size, config: LoRABenchmarkConfig) -> Contender:
    if not (match := NAME.fullmatch(name)):
        raise ValueError(f"a contender is {name}, expected one like: lora light 16")
    what, recompute, given_rank = match.groups()
    rank = min(int(given_rank or RANK), size.n_embd)  # the tiny model is not wide enough for all
    if what in ("transformers", "peft"):
        peer = make_peer(what, size, rank)
        called: Any = torch.compile(peer) if recompute == "compiled" else peer
        step = LoopStep(peer, lambda idx: called(idx, labels=idx).loss, size, config)
    else:
        settings = {"recompute": recompute, "compile": config.compile}
        model = make_model(what, size, rank)
        step = harness.random_training_step(model, size, config, TimedStep, **settings)
    memory = measure_memory(step, size.tokens, config.open_device())
    turn = time_parts(step, config)

    def timed_turn(i: int) -> Result:
        parts = turn(i)
        return {**parts, "sum": parts["forward"] + parts["backward"], **memory}

    return timed_turn


def measure_memory(step: TimedStep | LoopStep, n_tokens: int, device: torch.device) -> Result:
    """The peak of a step in GB, and what its last forward pass, of `n_tokens`, keeps for the
    backward pass, in kB per token.
    """
    step.note = lambda: None
    step(1)  # now the optimizer has its state
    live: list[int] = []  # bytes before and after each forward pass, and after the last backward
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.note = lambda: live.append(torch.cuda.memory_allocated(device))
        step(2)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        states = [state.values() for state in step.optimizers[0].state.values()]
        before = *step.model.parameters(), *step.model.buffers(), *itertools.chain(*states)
        with LiveBytes(before) as counted:
            step.note = lambda: live.append(counted.now)
            step(2)
        peak = counted.peak
    return {"peak": peak / 1e9, "kept": (live[-2] - live[-3]) / n_tokens / 1e3}


def main(config: LoRABenchmarkConfig) -> None:
    size, rows = Size.parse(config.size), []
    results = harness.measure(make_contender, config.contenders, size, config)
    for name, steps in results.items():
        medians = [harness.median(steps, part) for part in ("forward", "backward", "sum")]
        ratio = harness.ratio(results, name, BASELINE, "sum")
        memory = f"{steps[0]['peak']:.2f}", f"{steps[0]['kept']:.0f}"
        rows.append([name, *(f"{seconds * 1e3:.0f}" for seconds in medians), ratio, *memory])
    columns = "forward ms", "backward ms", "sum", "/ full", "peak memory, GB"
    harness.print_table([str(size), *columns, "kept for backward, kB per token"], rows)


if __name__ == "__main__":
    run_command(main, LoRABenchmarkConfig, __doc__)
