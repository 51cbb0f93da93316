"""Print, as JSON, how many kernels a GPU would launch for a trunk of two blocks with full
fine-tuning, and with each form of LoRA: {"full": 87, ...}. Runs on a CPU.

Inductor writes the Triton code for an H100. We count the launches in it, and do not run it. Calls
of attention and copies inside matmuls are not counted.
"""

import json
import os
import re
from contextlib import suppress
from types import SimpleNamespace

os.environ["TORCHINDUCTOR_TRITON_DISABLE_DEVICE_DETECTION"] = "1"

import torch
import triton
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

from engine.lora import (
    convert_linear_layer_to_lora,
    hold_copies,
    lora_linears,
    only_optimize_lora_parameters,
)
from engine.loss import SummedLoss
from engine.recompute import apply_recompute
from model import GPT, GPTConfig


class H100Driver:
    """What Inductor asks Triton's driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NotRunError(Exception):
    pass


def fail(_: list) -> None:
    raise NotRunError


def count_launches(form: str, recompute: str) -> int:
    """Return the launches of the forward and the backward pass, in bf16."""
    codes: list[str] = []

    def keep_code(graph: GraphLowering) -> SimpleNamespace:
        codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=fail, key="", __file__="")

    GraphLowering.compile_to_module = keep_code
    model = GPT(GPTConfig(block_size=256, vocab_size=1000, n_layer=2, n_head=2, n_embd=128))
    if form != "full":
        only_optimize_lora_parameters(convert_linear_layer_to_lora(model))
    linears = [*lora_linears(model).values()]
    for linear in linears:
        linear.use_summed_form = form == "summed"
    apply_recompute(model, recompute)
    compiled = torch.compile(SummedLoss(model).run_trunk)
    idx = torch.zeros(4, 64, dtype=torch.long)
    torch._dynamo.maybe_mark_dynamic(idx, 1)  # for dynamic shapes, backward is compiled at once
    dtype = torch.bfloat16
    with torch.autocast("cpu", dtype), hold_copies(linears, dtype), suppress(NotRunError):
        compiled(idx)
    calls = [code[code.index("def call(") :] for code in codes]
    return sum(len(re.findall(r"\.run\(|extern_kernels\.", call)) for call in calls)


if __name__ == "__main__":
    triton.runtime.driver.set_active(H100Driver())
    inductor_config.cpu_backend = "triton"
    inductor_config.fx_graph_cache = functorch_config.enable_autograd_cache = False
    counts = {form: count_launches(form, "none") for form in ("full", "separate", "summed")}
    print(json.dumps(counts))
