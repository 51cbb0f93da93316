import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import random_ids, run_worker, small_transformers_gpt2
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2LMHeadModel

from engine import lora
from engine.adapter import load_adapter, read_adapter_config, save_adapter
from engine.checkpoint import load_model
from engine.data import Batch
from engine.decode import speed_up_decoding
from engine.lora import (
    LoRAConfig,
    LoRALinear,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    get_lora_state_dict,
    hold_copies,
    lora_linears,
    merge_lora,
    only_optimize_lora_parameters,
)
from engine.loss import SummedLoss
from engine.pretrained import hash_weights
from engine.recompute import apply_recompute
from model import GPT, GPTConfig


def randomize(model):
    """Fill lora_A and lora_B with random values. The initial zeros of lora_B would hide errors."""
    torch.manual_seed(0)
    for tensor in get_lora_state_dict(model).values():
        tensor.normal_(std=0.1)
    return model


@pytest.fixture
def idx() -> torch.Tensor:
    return random_ids(2, 30)


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """Save a small GPT-2 and return its folder."""
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_with_lora(base: Path, part_module_name: str = "h.", **settings) -> GPT:
    """Load a model and add random LoRA to the linear layers that `part_module_name` selects."""
    model = GPT.from_pretrained(base)
    return randomize(convert_linear_layer_to_lora(model, part_module_name, LoRAConfig(**settings)))


def hold_all_copies(model: torch.nn.Module, is_summed: bool, dtype: torch.dtype | None = None):
    """Multiply with copies of the weights in all layers that have LoRA."""
    linears = [*lora_linears(model).values()]
    for linear in linears:
        linear.use_summed_form = is_summed
    return hold_copies(linears, dtype)


def trained_parameters(model: GPT) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def mean_loss(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    return SummedLoss(model)(Batch(idx, idx.roll(1), None)) / idx.numel()


@torch.no_grad()
def logits(model, idx: torch.Tensor) -> torch.Tensor:
    out = model.eval()(idx)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_number_of_parameters_at_124m():
    """At 124M and rank 8, LoRA on 48 linear layers trains 96 tensors with 1,179,648 parameters."""
    with torch.device("meta"):
        model = convert_linear_layer_to_lora(GPT(GPTConfig()), config=LoRAConfig(lora_dim=8))
        base_names = {name for name, _ in GPT(GPTConfig()).named_parameters()}
    only_optimize_lora_parameters(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(lora_linears(model)) == 48
    assert (len(trained), sum(p.numel() for p in trained.values())) == (96, 1_179_648)
    assert set(trained) == set(get_lora_state_dict(model))
    assert {n for n, _ in model.named_parameters()} == base_names | set(trained)


def test_training_starts_from_the_base_model():
    """As in PEFT, A starts uniform within 1 / sqrt(in) and B at zero, so LoRA adds nothing yet."""
    model = GPT(GPTConfig(vocab_size=1000, n_layer=1))
    convert_linear_layer_to_lora(model, config=LoRAConfig(lora_dim=64))
    for name, tensor in get_lora_state_dict(model).items():
        if name.endswith("lora_B"):
            assert (tensor == 0).all()
        else:
            bound = 1 / math.sqrt(tensor.size(1))
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "light", "block"])
@pytest.mark.parametrize(
    ("is_summed", "trained"), [(False, "adapter"), (True, "adapter"), (True, "everything")]
)
def test_gradients_equal_those_of_a_plain_model(tiny_model, idx, recompute, trained, is_summed):
    """Loss and gradients match a plain model with the weights W + scaling * B A, summed by LoRA
    or not, with and without recomputation, with the base frozen or trained. No weight changes.
    """
    convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dim=4, lora_alpha=6))
    params = dict(randomize(tiny_model).named_parameters())
    values = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    summed = {n: v for n, v in values.items() if "lora_" not in n}
    for name in lora_linears(tiny_model):
        a, b = values[f"{name}.lora_A"], values[f"{name}.lora_B"]
        summed[f"{name}.weight"] = values[f"{name}.weight"] + 6 / 4 * b @ a
    summed["lm_head.weight"] = summed["transformer.wte.weight"]
    out = torch.func.functional_call(GPT(tiny_model.config), summed, (idx,))
    expected = torch.nn.functional.cross_entropy(out.flatten(0, 1), idx.roll(1).flatten())
    expected.backward()
    if trained == "adapter":
        only_optimize_lora_parameters(tiny_model)
    apply_recompute(tiny_model, recompute)
    with hold_all_copies(tiny_model, is_summed):
        loss = mean_loss(tiny_model, idx)
        loss.backward()
    assert not any(linear.uses_copies for linear in lora_linears(tiny_model).values())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, param in params.items():
        assert torch.equal(param, values[name])
        if param.requires_grad:
            scale = values[name].grad.abs().max().item()
            torch.testing.assert_close(param.grad, values[name].grad, rtol=0, atol=1e-5 * scale)
        else:
            assert param.grad is None


@pytest.mark.parametrize(("is_summed", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_layer_gradients_pass_gradcheck(monkeypatch, is_summed, dropout):
    """In float64, gradients match finite differences, even if the rows do not fill a chunk."""
    monkeypatch.setattr(lora, "CPU_GRAD_ROWS", 4)
    torch.manual_seed(0)
    config = LoRAConfig(lora_dim=2, lora_alpha=3, lora_dropout=dropout)
    linear = LoRALinear(torch.nn.Linear(5, 6).double(), config).requires_grad_(False)
    del linear.lora_A, linear.lora_B  # `forward` sets plain tensors under these names

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        linear.lora_A, linear.lora_B = a, b
        torch.manual_seed(1)  # the same dropout in every call
        linear.copied = None  # an earlier call needs its copies for its backward pass
        with hold_all_copies(linear, is_summed):
            assert linear.is_summed == (is_summed and not dropout)
            return linear(x)

    shapes = (3, 3, 5), (2, 5), (6, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("is_summed", [False, True])
def test_compiled_gradients(idx, is_summed):
    """With recomputation, compiled gradients match eager ones, without a graph break."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=30, vocab_size=1000, n_layer=1, n_head=2, n_embd=16))
    only_optimize_lora_parameters(randomize(convert_linear_layer_to_lora(model)))
    apply_recompute(model, "light")
    compiled = torch.compile(model.hidden, backend="aot_eager", fullgraph=True)
    with hold_all_copies(model, is_summed):
        eager, traced = (
            torch.autograd.grad(hidden(idx).square().mean(), trained_parameters(model))
            for hidden in (model.hidden, compiled)
        )
    for mine, expected in zip(traced, eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_lora_launches_few_kernels():
    """On a GPU, forward and backward pass launch at most 1.3 times the kernels of full fine-tuning:
    counted in Inductor's code for an H100.
    """
    pytest.importorskip("triton", reason="needs Triton")
    launches = json.loads(run_worker("count_launches.py"))
    assert 80 < launches["full"] < 100
    assert launches["separate"] <= 1.3 * launches["full"]
    assert launches["summed"] <= 1.3 * launches["full"]


@pytest.mark.parametrize("is_summed", [False, True])
def test_no_gradient_has_the_size_of_the_weight(is_summed):
    """The backward pass of a frozen layer allocates nothing as large as its weight."""
    linear = LoRALinear(torch.nn.Linear(256, 256).requires_grad_(False), LoRAConfig())
    x = torch.randn(4, 8, 256, requires_grad=True)
    with hold_all_copies(linear, is_summed):
        y = linear(x).sum()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            y.backward()
    assert linear.lora_B.grad.abs().sum() > 0
    assert 0 < max(event.cpu_memory_usage for event in prof.events()) < 256 * 256 * 4


def test_copies_follow_the_weights(tiny_model, idx):
    """Copies follow what they were made from: the form, the dtype, a trained adapter, and a base
    that was loaded since. Making them changes no weight and adds nothing to the checkpoint.
    """
    only_optimize_lora_parameters(randomize(convert_linear_layer_to_lora(tiny_model)))
    before = copy.deepcopy(tiny_model.state_dict())
    for is_summed, dtype in ((False, None), (True, None), (True, torch.bfloat16), (False, None)):
        with hold_all_copies(tiny_model, is_summed, dtype):
            assert {m.weight_copy.dtype for m in lora_linears(tiny_model).values()} == {
                dtype or torch.float32
            }
        assert all(torch.equal(t, before[name]) for name, t in tiny_model.state_dict().items())
    assert tiny_model.state_dict().keys() == before.keys()
    with torch.no_grad():
        for linear in lora_linears(tiny_model).values():
            linear.lora_B.mul_(2)
            linear.weight.mul_(3)
            linear.bias.add_(1)
    expected = mean_loss(tiny_model, idx)
    for is_summed in (False, True):
        with hold_all_copies(tiny_model, is_summed):
            torch.testing.assert_close(mean_loss(tiny_model, idx), expected, rtol=1e-5, atol=0)
    other = copy.deepcopy(tiny_model)
    for linear in lora_linears(other).values():
        torch.nn.init.zeros_(linear.lora_B)
    with hold_all_copies(other, is_summed=True), hold_all_copies(tiny_model, is_summed=True):
        assert abs(mean_loss(other, idx) - expected) > 3e-4
        torch.testing.assert_close(mean_loss(tiny_model, idx), expected, rtol=1e-5, atol=0)
    cast_frozen_weights(tiny_model, torch.bfloat16)
    with hold_all_copies(tiny_model, is_summed=False):  # in fp32, of which W would take more
        assert {m.weight_copy.dtype for m in lora_linears(tiny_model).values()} == {torch.bfloat16}
    merge_lora(tiny_model)
    assert not [*tiny_model.buffers()]


def test_sums_keep_small_updates():
    """The summed weight is rounded to bf16 once, so even tiny updates survive on average."""
    torch.manual_seed(0)
    linear = LoRALinear(torch.nn.Linear(768, 768), LoRAConfig())
    linear.requires_grad_(False).weight.normal_(std=0.14)
    linear.lora_B.normal_(std=5e-4)
    update = linear.scaling * linear.lora_B @ linear.lora_A
    with torch.autocast("cpu", torch.bfloat16), hold_all_copies(linear, True, torch.bfloat16):
        difference = linear.weight_copy.float() - linear.weight
    assert (difference * update).sum() / update.square().sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("part", "recompute"), [("h.", "none"), ("attn.c_attn", "light"), ("attn.c_attn", "block")]
)
def test_frozen_weights_in_bf16(tiny_model, idx, part, recompute):
    """Logits and gradients match an fp32 model whose weights were rounded to bf16. Biases,
    LayerNorms, positions and the adapter stay in fp32.
    """
    convert_linear_layer_to_lora(tiny_model, part)
    only_optimize_lora_parameters(randomize(tiny_model))
    rounded = copy.deepcopy(tiny_model)
    for name, param in rounded.named_parameters():
        if name.endswith(".weight") and param.dim() == 2 and "wpe" not in name:
            param.data = param.bfloat16().float()
    cast_frozen_weights(tiny_model, torch.bfloat16)
    apply_recompute(tiny_model, recompute)
    n_bf16 = sum(p.numel() for p in tiny_model.parameters() if p.dtype == torch.bfloat16)
    assert n_bf16 == 1024 * 64 + 2 * 12 * 64 * 64
    losses = [mean_loss(model, idx) for model in (tiny_model, rounded)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for param, same in zip(*map(trained_parameters, (tiny_model, rounded)), strict=True):
        torch.testing.assert_close(param.grad, same.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logits(tiny_model, idx), logits(rounded, idx), rtol=0, atol=1e-5)
    merge_lora(tiny_model)
    torch.testing.assert_close(logits(tiny_model, idx), logits(rounded, idx), rtol=0, atol=2e-2)


@pytest.mark.parametrize("recompute", ["light", "block"])
def test_dropout_survives_recomputation(tiny_model, idx, recompute):
    """Recomputation repeats the dropout of the forward pass, so gradients are bit for bit equal. In
    eval mode there is no dropout, and eval() changes no weight.
    """
    convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dropout=0.5))
    only_optimize_lora_parameters(randomize(tiny_model))
    gradients = []
    for mode in ("none", recompute):
        apply_recompute(tiny_model, mode)
        torch.manual_seed(7)
        loss = mean_loss(tiny_model, idx)
        gradients.append(torch.autograd.grad(loss, trained_parameters(tiny_model)))
    assert all(map(torch.equal, *gradients))
    before = [param.clone() for param in tiny_model.parameters()]
    dropped = tiny_model(idx)
    assert not torch.equal(dropped, logits(tiny_model, idx))
    assert torch.equal(logits(tiny_model, idx), logits(tiny_model, idx))
    assert all(map(torch.equal, tiny_model.parameters(), before))  # in eval mode
    assert all(map(torch.equal, tiny_model.train().parameters(), before))


@pytest.mark.parametrize(
    ("is_summed", "base_dtype"), [(False, torch.float32), (True, torch.bfloat16)]
)
def test_autocast(tiny_model, idx, is_summed, base_dtype):
    """Under bf16 autocast, gradients are fp32 and point almost the same way as without autocast."""
    only_optimize_lora_parameters(randomize(convert_linear_layer_to_lora(tiny_model)))
    flat = []
    for dtype in (None, torch.bfloat16):
        if dtype:
            cast_frozen_weights(tiny_model, base_dtype)
        copying = hold_all_copies(tiny_model, is_summed, dtype)
        with torch.autocast("cpu", dtype, enabled=dtype is not None), copying:
            grads = torch.autograd.grad(mean_loss(tiny_model, idx), trained_parameters(tiny_model))
        assert {g.dtype for g in grads} == {torch.float32}
        flat.append(torch.cat([g.flatten() for g in grads]))
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.parametrize(("part", "count"), [("attn.c_attn,mlp", 6), ("h.1.", 4)])
def test_adapters_load_in_peft(base, idx, tmp_path, part, count):
    """A saved adapter loads in PEFT with the same layers and logits, and reads back here."""
    mine = load_with_lora(base, part, lora_dim=4, lora_alpha=6, lora_dropout=0.1)
    assert len(lora_linears(mine)) == count
    save_adapter(mine, tmp_path / "adapter", str(base))
    stock = GPT2LMHeadModel.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules()) == count
    config = read_adapter_config(tmp_path / "adapter")
    assert (config.base_model, config.lora) == (str(base), LoRAConfig(4, 6, 0.1))
    torch.testing.assert_close(logits(theirs, idx), logits(mine, idx), atol=1e-4, rtol=0)
    assert (logits(mine, idx) - logits(GPT.from_pretrained(base), idx)).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "lora_alpha": 3},
        {"target_modules": r".*h\.1\.mlp\.c_(fc|proj)"},
        {"target_modules": ["mlp.c_proj", "h.0.attn.c_attn"], "use_rslora": True},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 0},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["h.0.mlp.c_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*h\.1.*", "bias": "none"},
        {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "rank_pattern": {"h.1.attn.c_attn": 2, "mlp.c_proj": 6, r".*h\.0\.mlp.c_fc": 8},
            "alpha_pattern": {"c_fc": 20, r"h\.[01]\.attn\.c_proj": 1},
            "init_lora_weights": "orthogonal",
        },
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_saved_by_peft_load_here(base, idx, tmp_path, options, file):
    """An adapter saved by PEFT gives the same logits on our model and on transformers' GPT-2. Saved
    again here, it still does in PEFT.
    """
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", fan_in_fan_out=True, **options)
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    for name, param in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(param, std=0.1)
    is_safe = file.endswith(".safetensors")
    theirs.save_pretrained(tmp_path / "adapter", safe_serialization=is_safe)
    if not is_safe and not (tmp_path / "adapter" / file).exists():  # PEFT no longer writes .bin
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        torch.save(tensors, tmp_path / "adapter" / file)
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    mine = load_model(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(mine, idx), logits(theirs, idx), atol=1e-4, rtol=0)
    hf = load_adapter(GPT2LMHeadModel.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(hf, idx), logits(theirs, idx), atol=1e-4, rtol=0)
    assert load_model(tmp_path / "adapter").name_or_path == str(base)
    assert torch.equal(
        logits(load_model(base, tmp_path / "adapter" / file), idx), logits(mine, idx)
    )
    save_adapter(mine, tmp_path / "again", str(base))
    again = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base), tmp_path / "again"
    )
    torch.testing.assert_close(logits(again, idx), logits(mine, idx), atol=1e-4, rtol=0)


def test_adapters_with_embeddings_are_refused(base, tmp_path):
    """If the embeddings of a PEFT adapter were resized for new tokens, the error says so."""
    stock = GPT2LMHeadModel.from_pretrained(base)
    stock.resize_token_embeddings(stock.config.vocab_size + 3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(stock, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has lm_head .* an adapter for which tokens were added"):
        load_model(base, tmp_path / "adapter")


def test_adapters_know_the_weights_of_their_base(base, tmp_path):
    """An adapter does not load on other weights than it was trained on, whatever their name."""
    mine = load_with_lora(base)
    sha256 = hash_weights(GPT.from_pretrained(base))
    save_adapter(mine, tmp_path / "adapter", str(base), base_sha256=sha256)
    shutil.copytree(base, tmp_path / "copy")
    assert lora_linears(load_model(tmp_path / "copy", tmp_path / "adapter"))
    changed = GPT.from_pretrained(base)
    changed.transformer.ln_f.bias.data[0] += 1e-6
    changed.save_pretrained(base)
    for names in ((base, tmp_path / "adapter"), (tmp_path / "adapter",)):
        with pytest.raises(ValueError, match=rf"does not belong to .*{sha256}\); pass that"):
            load_model(*names)


def test_gradients_on_transformers_model_equal_peft(idx, tmp_path):
    """On transformers' GPT2LMHeadModel, which stores weights transposed, gradients match PEFT."""
    ours = convert_linear_layer_to_lora(small_transformers_gpt2())
    only_optimize_lora_parameters(randomize(ours))
    save_adapter(ours, tmp_path)
    stock = small_transformers_gpt2()
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path, is_trainable=True)
    ours(idx, labels=idx).loss.backward()
    theirs(idx, labels=idx).loss.backward()
    params = dict(theirs.named_parameters())
    for name in get_lora_state_dict(ours):
        expected = params[f"base_model.model.{name}.default.weight"].grad
        torch.testing.assert_close(ours.get_parameter(name).grad, expected, atol=1e-6, rtol=1e-4)


def test_merging(base, idx, tmp_path):
    """Merging changes logits by at most 1e-5. A merged model saves as an ordinary checkpoint and
    takes no more memory than one without LoRA. Saving before merging is an error.
    """
    model = load_with_lora(base, lora_dim=4)
    expected = logits(model, idx)
    with pytest.raises(ValueError, match="call merge_lora first, or use save_adapter"):
        model.save_pretrained(tmp_path / "merged")
    merge_lora(model)
    torch.testing.assert_close(logits(model, idx), expected, atol=1e-5, rtol=0)
    for wrong in (merge_lora, only_optimize_lora_parameters, lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="the model has no LoRA"):
            wrong(model)
    model.save_pretrained(tmp_path / "merged")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(theirs, idx), expected, atol=1e-4, rtol=0)
    sizes = [len(pickle.dumps(m)) for m in (model, GPT.from_pretrained(base))]
    assert sizes[0] < 1.01 * sizes[1]


def test_wrong_conversions_are_refused(tiny_model):
    """An unknown layer name, a rank out of range or a second conversion is an error."""
    for part in ("attn.c_atn", "mlp,q_proj", "", "lm_head"):
        expected = r"no linear layer has .* in its name; .*h.\*.mlp.c_fc"
        with pytest.raises(ValueError, match=expected):
            convert_linear_layer_to_lora(tiny_model, part)
    with pytest.raises(ValueError, match="lora_dim is 0, expected at least 1"):
        LoRAConfig(lora_dim=0)
    expected = r"lora_dim is 65, expected at most 64, the width of .*c_attn"
    with pytest.raises(ValueError, match=expected):
        convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dim=65))
    assert not lora_linears(tiny_model)
    convert_linear_layer_to_lora(tiny_model)
    with pytest.raises(ValueError, match="the layers are none"):
        convert_linear_layer_to_lora(tiny_model)


def test_lora_state_file(base, idx, tmp_path):
    """lora.pt is the plain state dict. Its settings come from the adapter_config.json next to it,
    even if others are passed in. Without that file, the scaling must be passed in, or it does not
    load.
    """
    mine = load_with_lora(base, lora_dim=4, lora_alpha=6)
    save_adapter(mine, tmp_path / "a")
    file = tmp_path / "a" / "lora.pt"
    assert torch.load(file, weights_only=True).keys() == get_lora_state_dict(mine).keys()
    assert torch.equal(logits(load_model(base, file), idx), logits(mine, idx))
    other = LoRAConfig(2, 1.0, 0.5, use_rslora=True)
    with_config = load_adapter(GPT.from_pretrained(base), file, other)
    assert torch.equal(logits(with_config, idx), logits(mine, idx))
    file = file.rename(tmp_path / "lora.pt")
    with_settings = load_adapter(GPT.from_pretrained(base), file, LoRAConfig(4, 6.0))
    assert torch.equal(logits(with_settings, idx), logits(mine, idx))
    with pytest.raises(ValueError, match="does not contain lora_alpha"):
        load_model(base, file)
    with_other_rank = load_adapter(GPT.from_pretrained(base), file, LoRAConfig(8, 6.0))
    assert torch.equal(logits(with_other_rank, idx), logits(mine, idx))  # the rank is in the file


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["wte"]}, r"modules_to_save \['wte'\] is not supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication \[\[0, 2\]\] is not supported"),
        ({"rank_pattern": {"c_fc": 2}}, r"c_fc.lora_A \(8, 64\), expected \(2, 64\)"),
        ({"alpha_pattern": {"c_fc": "x"}}, "lora_alpha is x, expected a number"),
        ({"layers_to_transform": [1]}, "8 unexpected tensors, such as transformer.h.0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"peft_type": "IA3", "feedforward_modules": ["x"]}, "peft_type 'IA3' is not supported"),
        ({"r": 10**15}, "and at most 1,000,000,000,000; save the adapter again"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"target_modules": 5}, "target_modules is 5, expected names or a pattern"),
        ({"target_modules": ["q_proj"]}, "has LoRA for none of the model's linear layers"),
    ],
)
def test_bad_adapter_configs_are_refused(base, tmp_path, options, expected):
    """An unsupported option or invalid value in adapter_config.json is an error that names it."""
    save_adapter(load_with_lora(base), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(ValueError, match=expected):
        load_model(base, tmp_path)


def test_bad_adapter_files_are_refused(base, tmp_path):
    """A missing, unexpected or misshapen tensor, or a missing file, is an error that names it."""
    model, folder = load_with_lora(base), tmp_path / "adapter"
    state, name = get_lora_state_dict(model), "transformer.h.0.mlp.c_fc.lora_B"
    for tensors, expected in (
        ({n: t for n, t in state.items() if n != name}, f"missing tensors, such as {name}"),
        (state | {"h.9.lora_A": torch.zeros(2)}, "unexpected tensors, such as h.9"),
        (
            {n: t.char() for n, t in state.items()},
            "has dtype torch.int8, expected floating point",
        ),
        (state | {name: state[name].t()}, r"c_fc.lora_B \(8, 256\), expected \(256, 8\)"),
    ):
        save_adapter(model, folder, tensors=tensors)
        with pytest.raises(ValueError, match=expected):
            load_model(base, folder)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is not a file of tensors"):
        load_model(base, folder / "adapter_config.json")
    with pytest.raises(ValueError, match=r"has transformer.* If it is a full model, do"):
        load_model(base, base / "model.safetensors")
    for file, expected in (
        ("adapter_model.safetensors", "safetensors is not a file of tensors; expected a folder"),
        ("adapter_config.json", "expected a folder with adapter_config.json"),
    ):
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=expected):
            load_model(base, folder)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; expected a hub name"):
        load_model(base, tmp_path / "nowhere")


def test_generation_uses_the_adapter(base, idx):
    """A model with LoRA generates what the merged model does, with and without fast decoding."""
    model = load_with_lora(base, lora_dim=4)
    out = model.generate(idx[:1, :5], 20, temperature=0)
    assert not torch.equal(out, GPT.from_pretrained(base).generate(idx[:1, :5], 20, temperature=0))
    # speed_up_decoding does not touch LoRA layers that are not merged.
    for change in (speed_up_decoding, merge_lora, speed_up_decoding):
        change(model)
        assert torch.equal(out, model.generate(idx[:1, :5], 20, temperature=0))
