"""LoRA compared with full fine-tuning and PEFT at GPT-2 124M: time and memory of a step.

    python benchmarks/lora.py   # four contenders, one CPU thread, fp32: 5 minutes
    python benchmarks/lora.py --size 12x768:2x512 --contenders "full none" "summed light 64"
    python benchmarks/lora.py --device cuda --precision bf16 --compile --graphs --size 12x768:16x139

A contender is METHOD RECOMPUTE [RANK]. RECOMPUTE is none, light (LayerNorm and GELU) or block; the
default rank is 8. `full` trains all weights. `lora` computes x W.T + s (x A.T) B.T. `summed`
computes x (W + s B A).T and builds the sum once per step. `autograd` builds it in every forward
pass and lets autograd differentiate it. `bf16` is `lora` with the base in bf16. `frozen` trains
only wpe. `peft` (LoRA) and `transformers` (all weights) cannot recompute; for them, RECOMPUTE is
none or compiled. --compile compiles the others. Compare the sum of forward and backward, because
our loss computes its gradient in the forward pass.
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
from benchmarks.train_step import HookedStep, PeerStep, time_parts
from engine import lora
from engine.config import flag, run_command
from model import GPT

RANK, BASELINE = 8, "full none"
NAME = re.compile(
    r"((?:full|lora|summed|autograd|bf16|frozen)(?= none| light| block)"
    r"|(?:peft|transformers)(?= none| compiled)) (none|light|block|compiled)( \d+)?"
)


@dataclass(frozen=True)
class LoRABenchmarkConfig(BenchmarkConfig):
    contenders: list[str] = flag(
        [BASELINE, "lora none", "lora light", "peft none"], "each METHOD RECOMPUTE [RANK]"
    )
    size: str = flag("12x768:4x128", "LAYERSxWIDTH:BATCHxTOKENS")
    rounds: int = flag(3, "measured steps of each contender, after one warmup step")
    threads: int = flag(1, "CPU threads of each contender")
    compile: bool = flag(False, "torch.compile this project's contenders")
    graphs: bool = flag(False, "use CUDA graphs in this project's contenders")


class AutogradLoRA(lora.LoRALinear):
    """Computes x (W + s B A).T and lets autograd differentiate through the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.matrix() + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, weight, self.bias)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors: the `existing` ones, and those made while it is active."""

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        # PyTorch keeps one Python object per storage, for as long as the storage lives.
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)
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


def make_model(method: str, size: Size, rank: int) -> GPT:
    model = GPT(size.gpt_config())
    if method == "full":
        return model
    lora_config = lora.LoRAConfig(lora_dim=rank, lora_alpha=2 * rank)
    lora.convert_linear_layer_to_lora(model, config=lora_config)
    lora.only_optimize_lora_parameters(model)
    if method == "frozen":  # LoRA only froze the weights; for wpe, gradients go through all blocks
        lora.merge_lora(model)
        model.transformer.wpe.weight.requires_grad_()
    if method == "bf16":
        lora.cast_frozen_weights(model, torch.bfloat16)
    for linear in lora.lora_linears(model).values():
        linear.use_summed_form = method == "summed"
        if method == "autograd":
            linear.__class__ = AutogradLoRA
    return model


def make_peer(method: str, size: Size, rank: int) -> Any:
    model = harness.transformers_gpt2(size.gpt_config())
    if method == "transformers":
        return model
    import peft

    targets = ["c_attn", "c_proj", "c_fc"]
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **options))


def make_contender(name: str, size: Size, config: LoRABenchmarkConfig) -> Contender:
    if not (match := NAME.fullmatch(name)):
        expected = "METHOD RECOMPUTE [RANK], such as lora light 16"
        raise ValueError(f"contender is {name}, expected {expected} (-h lists the methods)")
    method, recompute, given_rank = match.groups()
    rank = min(int(given_rank or RANK), size.n_embd)  # harness.TINY is narrower than most ranks
    if method in ("transformers", "peft"):
        peer = make_peer(method, size, rank)
        forward: Any = torch.compile(peer) if recompute == "compiled" else peer
        step = PeerStep(peer, lambda idx: forward(idx, labels=idx).loss, size, config)
    else:
        settings: Any = {
            "recompute": recompute,
            "compile": config.compile,
            "use_graphs": config.graphs,
        }
        model = make_model(method, size, rank)
        step = harness.random_training_step(model, size, config, HookedStep, **settings)
    memory = measure_memory(step, size.tokens, config.init_device())
    take_timed_turn = time_parts(step, config)

    def take_turn(i: int) -> Result:
        seconds = take_timed_turn(i)
        return {**seconds, "sum": seconds["forward"] + seconds["backward"], **memory}

    return take_turn


def measure_memory(step: HookedStep | PeerStep, n_tokens: int, device: torch.device) -> Result:
    """Return {"peak": the peak memory of a step in GB, "kept": the kB per token that its forward
    pass over `n_tokens` tokens keeps for the backward pass}.
    """
    step(1)  # creates the state of the optimizer
    live: list[int] = []  # bytes at each boundary between the parts of the step
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.on_boundary = lambda: live.append(torch.cuda.memory_allocated(device))
        step(2)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        states = [state.values() for state in step.optimizers[0].state.values()]
        existing = *step.model.parameters(), *step.model.buffers(), *itertools.chain(*states)
        with LiveBytes(existing) as counter:
            step.on_boundary = lambda: live.append(counter.now)
            step(2)
        peak = counter.peak
    before_forward, after_forward, _after_backward = live
    return {"peak": peak / 1e9, "kept": (after_forward - before_forward) / n_tokens / 1e3}


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
