import copy
import dataclasses
import io
import math
import shutil
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import make_data, make_step, new_model, on_cpu_and_gpu, random_ids
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from engine.data import Batch, PretrainingData
from engine.lora import (
    LoRAConfig,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    only_optimize_lora_parameters,
)
from engine.loss import SummedLoss
from engine.optim import learning_rate
from engine.step import Prefetcher, apply_recompute
from model import GPT, GPTConfig


def test_steps_equal_a_plain_loop_in_transformers(shards, tmp_path):
    """Five steps of 12 micro-batches equal five steps of a plain loop that trains transformers'
    model on the whole batch at once, with unfused AdamW and hand-written clipping.
    """
    model = new_model()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    decayed = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    step = make_step(model, shards, batch_size=1, grad_clip=0.5)
    whole = make_data(shards, 12)
    for s in range(1, 6):
        idx, targets, _ = whole.micro_batch(s, 1)
        logits = theirs(idx).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step.config)
        optimizer.step()
        optimizer.zero_grad()
        my_loss, my_norm = (figure.item() for figure in step(s))
        assert my_loss == pytest.approx(loss.item(), rel=1e-5)
        assert my_norm == pytest.approx(norm, rel=1e-6)
    model.save_pretrained(tmp_path)
    mine = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: name + m)


def test_micro_batch_size_does_not_change_the_curve(shards):
    """1, 4 and 12 sequences per micro-step give the same losses up to summation order, also with
    the short window at the end of an epoch.
    """
    curves = []
    for batch_size in (1, 4, 12):
        step = make_step(new_model(), shards, batch_size)
        curves.append([step(s)[0].item() for s in range(1, 7)])  # an epoch has fewer than 4 steps
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


OPTIMIZERS = [{}, {"optimizer": "muon"}, {"optimizer": "muon", "muon_beta2": 0.95}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["AdamW", "Muon", "NorMuon"])
def test_state_continues_bit_for_bit(shards, options):
    """A snapshot does not change while training continues; restoring it repeats the next steps."""
    step = make_step(new_model(), shards, **options)
    for s in (1, 2, 3):
        step(s)
    weights, state = step.snapshot()
    expected = [step(s) for s in (4, 5, 6)]
    model = new_model()
    model.load_state_dict(weights, strict=False)  # a tied head has two names
    step = make_step(model, shards, **options)
    step.restore(state)
    assert [step(s) for s in (4, 5, 6)] == expected


@on_cpu_and_gpu
def test_prefetched_batches_are_the_ones_asked_for(shards, dist):
    """The prefetcher returns the batch asked for, on the device, in any order and also if asked
    twice. A background thread prepares it, and errors in the data reach the caller.
    """
    makers = []

    class Watched(PretrainingData):
        def micro_batch(self, step, micro_step):
            makers.append((step, micro_step, threading.current_thread()))
            if step == 9:
                raise OSError("the disk is gone")
            return super().micro_batch(step, micro_step)

    data = Watched(shards, block_size=16, batch_size=4, total_batch_size=192, seed=1)
    batches = Prefetcher(data, dist.device)
    for asked in [(1, 1), (1, 2), (1, 3), (2, 1), (7, 2), (7, 2)]:
        batch = batches(*asked)
        assert batch.idx.device == batch.targets.device == dist.device
        idx, targets, rows = (tensor if tensor is None else tensor.cpu() for tensor in batch)
        expected = PretrainingData.micro_batch(data, *asked)
        assert torch.equal(idx, expected.idx)
        assert torch.equal(targets, expected.targets)
        counted = (targets != -100).flatten()
        assert (rows is None) == bool(counted.all())
        assert rows is None or torch.equal(rows, counted.nonzero()[:, 0])
    made = [maker[:2] for maker in makers]
    assert made[:5] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert threading.main_thread() not in [thread for *_, thread in makers]
    with pytest.raises(OSError, match="the disk is gone"):
        batches(9, 1)
    batches(1, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_follows_fp32(shards, precision):
    """In bf16, and in fp16 with its scaler, losses stay close to fp32; weights stay in fp32."""
    exact = make_step(new_model(), shards)
    model = new_model()
    rounded = make_step(model, shards, precision=precision)
    for s in range(1, 9):
        assert rounded(s)[0].item() == pytest.approx(exact(s)[0].item(), rel=5e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded.scaler.is_enabled() == (precision == "fp16")


class CountCasts(TorchDispatchMode):
    """Counts casts of fp32 tensors of one shape to bf16."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.casts = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func == torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.casts += out.dtype == torch.bfloat16 and out.shape == self.shape
        return out


def test_weights_are_cast_once_a_step(shards):
    """Under bf16, three micro-steps cast each matrix once and match one large micro-step."""
    models = [new_model(), new_model()]
    three, one = (
        make_step(m, shards, n, precision="bf16") for m, n in zip(models, (4, 12), strict=True)
    )
    with CountCasts(models[0].transformer.h[0].mlp.c_fc.weight.shape) as counter:
        loss, norm = three(1)
    assert counter.casts == len(models[0].transformer.h)
    torch.testing.assert_close((loss, norm), one(1), atol=0, rtol=1e-2)


@on_cpu_and_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_skipped(shards, precision, optimizer, dist):
    """A NaN gradient changes neither weights nor optimizer state, step counters included."""
    model = new_model().to(dist.device)
    options = {"muon_weight_decay": 0.1, "muon_beta2": 0.95, "precision": precision}
    step = make_step(model, shards, dist=dist, optimizer=optimizer, **options)
    step(1)
    state = copy.deepcopy(step.snapshot()[1]["optimizer"]["state"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.nan)
    step(2)
    step(3)
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = step.snapshot()[1]["optimizer"]["state"]
    for name, tensors in state.items():
        assert all(torch.equal(tensor, after[name][key]) for key, tensor in tensors.items())
    assert step(4)[1].isfinite()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_the_eager_one(shards, monkeypatch, backend):
    """The compiled loss and its gradients equal the eager ones; parameter names do not change."""
    if backend == "inductor" and shutil.which("gcc") is None:
        pytest.skip("torch.compile on a CPU needs gcc")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    raw, compiled = new_model(), new_model()
    batch = make_data(shards, 12, 0).micro_batch(1, 1)
    losses = [SummedLoss(raw)(batch), SummedLoss(compiled, compile_trunk=True)(batch)]
    sum(losses).backward()
    torch.testing.assert_close(*losses, atol=0, rtol=1e-5)
    for (name, a), b in zip(compiled.named_parameters(), raw.parameters(), strict=True):
        assert "_orig_mod" not in name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("recompute", ["light", "block"])
def test_recomputing_changes_nothing(tiny_model, recompute):
    """Loss and gradients are bit for bit the same whether activations are stored or recomputed."""
    idx, results = random_ids(2, 40), []
    for mode in ("none", recompute):
        apply_recompute(tiny_model, mode)
        loss = SummedLoss(tiny_model)(Batch(idx, idx.roll(1)))
        results.append([loss, *torch.autograd.grad(loss, list(tiny_model.parameters()))])
    assert all(map(torch.equal, *results))


def add_lora(model: GPT) -> None:
    convert_linear_layer_to_lora(model, config=LoRAConfig(lora_dim=4))
    only_optimize_lora_parameters(model)


def average(model: GPT) -> GPT:
    return torch.optim.swa_utils.AveragedModel(model).module


def through_a_file(model: GPT) -> GPT:
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
        ("light", "LoRA on bf16", average),
        ("light", "LoRA on bf16", through_a_file),
    ],
)
def test_a_copy_computes_with_its_own_weights(tiny_config, mode, base, copy_model):
    """A copy of a model with recomputation and LoRA gives the same logits. Changing c_attn in the
    copy changes only the logits of the copy. Names stay the same, and a LayerNorm works when called
    directly.
    """
    model, idx = GPT(tiny_config), random_ids(2, 8)
    if base != "full":
        add_lora(model)
    names = list(model.state_dict())
    if base == "LoRA on bf16":
        cast_frozen_weights(model, torch.bfloat16)
    apply_recompute(model, mode)
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
    """What a forward pass stores for backward, as flat fp32 tensors, one for each storage: without
    parameters, ids and the one or two numbers per row of LayerNorm and attention.
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
    """With light, backward stores neither the outputs of a block's LayerNorms nor that of its GELU,
    and otherwise as much as with none; with block, only the inputs of attention and MLP.
    """
    config = GPTConfig(block_size=48, vocab_size=1000, n_layer=3, n_head=4, n_embd=64)
    idx, outputs = random_ids(2, 40), []
    # In multiples of (B, T, C), for each block: the inputs of LayerNorms 2, their outputs 2, q, k
    # and v 3, the output of attention 1, the input of GELU 4 and its output 4; then ln_f's input.
    sizes = {"none": 3 * 16 + 1, "light": 3 * 10 + 1, "block": 3 * 2 + 1}
    for mode, size in sizes.items():
        torch.manual_seed(0)
        model = GPT(config)
        for block in model.transformer.h if mode == "none" else ():
            for module in (block.ln_1, block.ln_2, block.mlp.gelu):
                module.register_forward_hook(lambda *args: outputs.append(args[-1].flatten()))
        apply_recompute(model, mode)
        stored = stored_activations(model, idx)
        assert sum(tensor.numel() for tensor in stored) == size * idx.numel() * 64, mode
        found = [any(torch.equal(output, tensor) for tensor in stored) for output in outputs]
        assert found == [mode == "none"] * 9, mode


@pytest.fixture
def one_layer(tiny_config) -> GPTConfig:
    """tiny_config with one layer, to compile in half the time."""
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


@pytest.mark.parametrize("is_lora", [False, True])
def test_compiled_light_recomputes_no_large_matmul(one_layer, is_lora):
    """Compiled, recompute="light" stores less than "none", and its backward pass repeats no matrix
    product, except one small LoRA product per block.
    """
    aten = torch.ops.aten
    idx, products, stored = random_ids(4, 40), {}, {}
    for mode in ("none", "light"):
        torch._dynamo.reset()
        model = GPT(one_layer)
        if is_lora:
            add_lora(model)
        apply_recompute(model, mode)

        def count(graph, _inputs, mode=mode):
            targets = [node.target for node in graph.graph.nodes]
            # Those of the backward pass, which is compiled last.
            products[mode] = targets.count(aten.mm.default) + targets.count(aten.addmm.default)
            return make_boxed_func(graph)

        partition = min_cut_rematerialization_partition  # Inductor's
        backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
        hidden = torch.compile(model.hidden, dynamic=False, backend=backend)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            x = hidden(idx)
        x.sum().backward()
        stored[mode] = sum(sizes)
    assert stored["light"] < 0.9 * stored["none"]
    assert products["light"] - products["none"] == int(is_lora)
