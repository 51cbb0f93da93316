"""Fast decoding on a CPU: linear layers for a few rows that use all threads."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT

FEW_ROWS = 8  # up to here, reading the weight takes the time


def speed_up_decoding(model: GPT) -> None:
    """Make all linear layers use `linear_few_rows` from now on, in a model that is only sampled.
    LoRA has to be merged first: a layer that is not keeps its own forward.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "lora_A"):
            module.forward = partial(  # type: ignore[method-assign]  # for this instance
                linear_few_rows, weight=module.weight, bias=module.bias
            )


def linear_few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """F.linear, faster for at most FEW_ROWS rows on a CPU without gradients.

    For one row MKL reads the weight on one thread, and for two to eight it reads it slowly. A
    batched product of blocks of the weight, one per thread, reads it at full memory speed.
    """
    threads, (out_features, in_features) = torch.get_num_threads(), weight.size()
    rows = x.numel() // in_features
    few_rows = x.device.type == "cpu" and rows <= FEW_ROWS and not torch.is_grad_enabled()
    if not few_rows or out_features % threads:
        return F.linear(x, weight, bias)
    x_t = x.reshape(rows, in_features).t().expand(threads, -1, -1)  # (threads, in, rows)
    y = torch.bmm(weight.view(threads, -1, in_features), x_t).view(out_features, rows).t()
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], out_features)
