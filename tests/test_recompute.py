import copy
import dataclasses
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition

from engine.data import Batch
from engine.lora import (
    LoRAConfig,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    only_optimize_lora_parameters,
)
from engine.loss import SummedLoss
from engine.recompute import apply_recompute
from model import GPT, GPTConfig


@pytest.mark.parametrize("recompute", ["light", "block"])
def test_recomputing_changes_nothing(tiny_model, recompute):
    """Loss and gradients are the same, bit for bit, whether activations are stored or not."""
    idx, results = random_ids(2, 40), []
    for mode in ("none", recompute):
        apply_recompute(tiny_model, mode)
        loss = SummedLoss(tiny_model)(Batch(idx, idx.roll(1)))
        results.append([loss, *torch.autograd.grad(loss, list(tiny_model.parameters()))])
    assert all(map(torch.equal, *results))


def add_lora(model: GPT) -> None:
    convert_linear_layer_to_lora(model, config=LoRAConfig(lora_dim=4))
    only_optimize_lora_parameters(model)


def copy_by_averaging(model: GPT) -> GPT:
    return torch.optim.swa_utils.AveragedModel(model).module


def save_and_load(model: GPT) -> GPT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("mode", "base", "copy_model"),
    [
        ("none", "LoRA", copy.deepcopy),
        ("block", "full", copy.deepcopy),
        ("light", "LoRA on bf16", copy.deepcopy),
        ("light", "LoRA on bf16", copy_by_averaging),
        ("light", "LoRA on bf16", save_and_load),
    ],
)
def test_a_copy_computes_with_its_own_weights(tiny_config, mode, base, copy_model, monkeypatch):
    """A copy of a model with recomputation and LoRA, trained by compiled code, gives the same
    logits. Changing c_attn in the
    copy changes only the logits of the copy. Parameters keep their names, and a LayerNorm can still
    be called directly.
    """
    model, idx = GPT(tiny_config), random_ids(2, 8)
    if base != "full":
        add_lora(model)
    names = list(model.state_dict())
    if base == "LoRA on bf16":
        cast_frozen_weights(model, torch.bfloat16)
    apply_recompute(model, mode)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    SummedLoss(model, trunk_mode="default")(Batch(idx, idx.roll(1)))
    copied = copy_model(model)
    assert list(model.state_dict()) == list(copied.state_dict()) == names
    assert torch.equal(model(idx), copied(idx))
    before = model(idx)
    for block in copied.transformer.h:
        with torch.no_grad():
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.fill_(1.0)
    assert torch.equal(model(idx), before)
    assert not torch.allclose(copied(idx), before)
    copied(idx).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    assert any(param.grad is not None for param in copied.parameters())
    x, ln_1 = torch.randn(2, 8, tiny_config.n_embd), copied.transformer.h[0].ln_1
    assert torch.equal(ln_1(x), F.layer_norm(x, x.shape[-1:], ln_1.weight, ln_1.bias))


def stored_activations(model: GPT, idx: torch.Tensor) -> list[torch.Tensor]:
    """Run a forward pass. Return the fp32 activations it stores for backward, one flat tensor per
    storage, but no parameters, no ids, and not the small statistics of LayerNorm and attention.
    """
    stored = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.float32 and storage.nbytes() >= 4 * idx.numel() * 64:
            flat = torch.tensor([], dtype=torch.float32).set_(storage)
            stored[storage.data_ptr()] = flat  # keeps the storage, so no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(idx)
    params = {param.untyped_storage().data_ptr() for param in model.parameters()}
    return [tensor for pointer, tensor in stored.items() if pointer not in params]


def test_recomputing_stores_less():
    """With "light", blocks store the same as with "none", minus the outputs of LayerNorm and GELU.
    With "block", they store only the inputs of attention and MLP.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=1000, n_layer=3, n_head=4, n_embd=64))
    idx, hooked, outputs = random_ids(2, 40), copy.deepcopy(model), []
    for block in hooked.transformer.h:
        for module in (block.ln_1, block.ln_2, block.mlp.gelu):
            module.register_forward_hook(lambda _, args, out: outputs.append(out.flatten()))
    hooked.hidden(idx)
    # What a block stores, in multiples of (B, T, C):    none  light  block
    #   inputs of ln_1 and ln_2                            2      2      2
    #   outputs of ln_1 and ln_2                           2
    #   q, k, v and output of attention                    4      4
    #   input of GELU                                      4      4
    #   output of GELU                                     4
    #   sum                                               16     10      2
    # The model also stores the input of ln_f.
    sizes = {"none": 3 * 16 + 1, "light": 3 * 10 + 1, "block": 3 * 2 + 1}
    for mode, size in sizes.items():
        apply_recompute(model, mode)
        stored = stored_activations(model, idx)
        assert sum(tensor.numel() for tensor in stored) == size * idx.numel() * 64, mode
        found = [any(torch.equal(output, tensor) for tensor in stored) for output in outputs]
        assert found == [mode == "none"] * 9, mode


@pytest.fixture
def one_layer(tiny_config) -> GPTConfig:
    """tiny_config with only one layer, which compiles in half the time."""
    torch._dynamo.reset()
    return dataclasses.replace(tiny_config, n_layer=1)


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "light"])
def test_all_lengths_share_two_graphs(one_layer, recompute):
    """Compiled LoRA handles twelve sequence lengths with two graphs and no graph break."""
    model = GPT(one_layer)
    add_lora(model)
    apply_recompute(model, recompute)
    hidden = torch.compile(model.hidden, backend="aot_eager")
    counters.clear()
    for T in range(8, 44, 3):
        hidden(random_ids(4, T)).sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def compile_and_count(model: GPT, idx: torch.Tensor) -> tuple[int, int]:
    """Compile the model and run forward and backward. Return how many numbers are stored for
    backward, and how many matmuls the graph of backward has.
    """
    matmuls = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    found, sizes = [], []

    def compile_backward(graph, _inputs):
        found.extend(node for node in graph.graph.nodes if node.target in matmuls)
        return make_boxed_func(graph)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    backend = aot_autograd(
        fw_compiler=lambda graph, _inputs: make_boxed_func(graph),
        bw_compiler=compile_backward,
        partition_fn=min_cut_rematerialization_partition,  # as in Inductor
    )
    hidden = torch.compile(model.hidden, dynamic=False, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = hidden(idx)
    x.sum().backward()
    return sum(sizes), len(found)


@pytest.mark.parametrize("is_lora", [False, True])
def test_compiled_light_recomputes_no_large_matmul(one_layer, is_lora):
    """When compiled, "light" stores less than "none". Its backward pass recomputes no matmuls,
    except a small one of LoRA in each block.
    """
    stored, n_matmuls = {}, {}
    for mode in ("none", "light"):
        torch._dynamo.reset()
        model = GPT(one_layer)
        if is_lora:
            add_lora(model)
        apply_recompute(model, mode)
        stored[mode], n_matmuls[mode] = compile_and_count(model, random_ids(4, 40))
    assert stored["light"] < 0.9 * stored["none"]
    assert n_matmuls["light"] - n_matmuls["none"] == int(is_lora)
