import copy
import io
import json
import math

import peft
import pytest
import torch
from conftest import random_ids
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from engine import lora
from engine.adapter import (
    AdapterConfig,
    is_adapter,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from engine.checkpoint import load_model
from engine.data import Batch
from engine.decode import speed_up_decoding
from engine.lora import (
    LoRAConfig,
    LoRALinear,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    get_lora_state_dict,
    load_lora,
    lora_linears,
    merge_lora,
    only_optimize_lora_parameters,
    summed_weights,
)
from engine.loss import SummedLoss
from engine.step import apply_recompute
from model import GPT, GPTConfig


def randomize(model, seed: int = 0) -> None:
    """Fill lora_A and lora_B; the latter starts at zero, which hides errors."""
    torch.manual_seed(seed)
    for tensor in get_lora_state_dict(model).values():
        tensor.normal_(std=0.1)


@pytest.fixture
def idx() -> torch.Tensor:
    return random_ids(2, 30)


@pytest.fixture
def base(tiny_model, tmp_path):
    """The folder of a small GPT-2."""
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_with_lora(base, part_module_name: str = "h.", **settings) -> GPT:
    """The model in the folder, with random LoRA on the linears of the part."""
    model = GPT.from_pretrained(base)
    convert_linear_layer_to_lora(model, part_module_name, LoRAConfig(**settings))
    randomize(model)
    return only_optimize_lora_parameters(model)


def mean_loss(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    return SummedLoss(model)(Batch(idx, idx.roll(1), None)) / idx.numel()


@torch.no_grad()
def logits(model, idx: torch.Tensor) -> torch.Tensor:
    out = model.eval()(idx)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_number_of_parameters_at_124m():
    """GPT-2 124M has LoRA on 48 linears: 96 trained tensors, at rank 8 1,179,648 parameters."""
    with torch.device("meta"):
        model = convert_linear_layer_to_lora(GPT(GPTConfig()), config=LoRAConfig(lora_dim=8))
    only_optimize_lora_parameters(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(lora_linears(model)) == 48
    assert (len(trained), sum(p.numel() for p in trained.values())) == (96, 1_179_648)
    assert set(trained) == set(get_lora_state_dict(model))
    base_names = set(dict(GPT(GPTConfig(n_layer=12, n_embd=12)).named_parameters()))
    assert {n for n, _ in model.named_parameters()} == base_names | set(trained)


def test_initialization_is_pefts():
    """A is uniform within 1 / sqrt(in) and B is zero, so that training starts at the base model."""
    model = convert_linear_layer_to_lora(GPT(GPTConfig(n_layer=2)), config=LoRAConfig(lora_dim=64))
    for name, tensor in get_lora_state_dict(model).items():
        if name.endswith("lora_B"):
            assert (tensor == 0).all()
        else:
            bound = 1 / math.sqrt(tensor.size(1))
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "light", "block"])
@pytest.mark.parametrize("trained", ["adapter", "everything"])
@pytest.mark.parametrize("form", ["separate", "summed"])
def test_gradients_equal_those_of_the_summed_weight(tiny_model, idx, recompute, trained, form):
    """Loss and gradients equal those of an ordinary model whose weights are W + scaling * B A, in
    both forms, with and without recomputation, with the base frozen or trained.
    """
    convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dim=4, lora_alpha=6))
    randomize(tiny_model)
    names = dict(tiny_model.named_parameters())
    values = {n: p.detach().clone().requires_grad_() for n, p in names.items()}
    summed = {n: v for n, v in values.items() if "lora_" not in n}
    for linear in lora_linears(tiny_model):
        a, b = values[f"{linear}.lora_A"], values[f"{linear}.lora_B"]
        summed[f"{linear}.weight"] = values[f"{linear}.weight"] + 6 / 4 * b @ a
    summed["lm_head.weight"] = summed["transformer.wte.weight"]
    plain = GPT(tiny_model.config)
    out = torch.func.functional_call(plain, summed, (idx,))
    expected = torch.nn.functional.cross_entropy(out.flatten(0, 1), idx.roll(1).flatten())
    expected.backward()
    if trained == "adapter":
        only_optimize_lora_parameters(tiny_model)
    apply_recompute(tiny_model, recompute)
    linears = [*lora_linears(tiny_model).values()]
    with summed_weights(linears if form == "summed" else [], None):
        loss = mean_loss(tiny_model, idx)
        loss.backward()
    assert all(linear.summed_weight is None for linear in linears)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, param in names.items():
        if param.requires_grad:
            scale = values[name].grad.abs().max().item()
            torch.testing.assert_close(param.grad, values[name].grad, rtol=0, atol=1e-5 * scale)
        else:
            assert param.grad is None


@pytest.mark.parametrize("form", ["separate", "summed"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_a_layer_are_numerical_ones(monkeypatch, form, dropout):
    """In float64, the gradients of a layer are those of finite differences, in rows that do not fit
    a chunk, with dropout and without.
    """
    monkeypatch.setattr(lora, "CPU_ROWS", 4)
    torch.manual_seed(0)
    config = LoRAConfig(lora_dim=2, lora_alpha=3, lora_dropout=dropout)
    linear = LoRALinear(torch.nn.Linear(5, 6).double(), config).requires_grad_(False)
    del linear.lora_A, linear.lora_B  # parameters, which `forward` replaces with its arguments

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        linear.lora_A, linear.lora_B = a, b
        torch.manual_seed(1)  # the same dropout in every call
        with summed_weights([linear] if form == "summed" else [], None):
            assert (linear.summed_weight is None) == (form == "separate" or dropout > 0)
            return linear(x)

    shapes = (3, 3, 5), (2, 5), (6, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("form", ["separate", "summed"])
def test_compiled_gradients(tiny_model, idx, form):
    """Traced by torch.compile without a graph break, with recomputation, gradients are the same."""
    only_optimize_lora_parameters(convert_linear_layer_to_lora(tiny_model))
    randomize(tiny_model)
    apply_recompute(tiny_model, "light")
    trained = [p for p in tiny_model.parameters() if p.requires_grad]
    compiled = torch.compile(tiny_model.hidden, backend="aot_eager", fullgraph=True)
    linears = [*lora_linears(tiny_model).values()] if form == "summed" else []
    with summed_weights(linears, None):
        eager, traced = (
            torch.autograd.grad(hidden(idx).square().mean(), trained)
            for hidden in (tiny_model.hidden, compiled)
        )
    for mine, expected in zip(traced, eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["separate", "summed"])
def test_no_gradient_has_the_size_of_the_weight(form):
    """The backward pass of a frozen layer allocates nothing as large as the weight."""
    linear = LoRALinear(torch.nn.Linear(256, 256), LoRAConfig())
    linear.weight.requires_grad_(False)
    linear.bias.requires_grad_(False)
    x = torch.randn(4, 8, 256, requires_grad=True)
    with summed_weights([linear] if form == "summed" else [], None):
        y = linear(x).sum()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            y.backward()
    assert linear.lora_B.grad.abs().sum() > 0
    assert 0 < max(event.cpu_memory_usage for event in prof.events()) < 256 * 256 * 4


def test_sums_keep_small_updates():
    """Under bf16 autocast the sum is rounded once, to bf16, so that updates far smaller than the
    spacing of bf16 numbers still act on average.
    """
    torch.manual_seed(0)
    linear = LoRALinear(torch.nn.Linear(768, 768), LoRAConfig())
    linear.requires_grad_(False).weight.normal_(std=0.14)
    linear.lora_B.normal_(std=5e-4)
    update = linear.scaling * linear.lora_B @ linear.lora_A
    with torch.autocast("cpu", torch.bfloat16), summed_weights([linear], torch.bfloat16):
        difference = linear.summed_weight.float() - linear.weight
    assert (difference * update).sum() / update.square().sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("part", ["h.", "attn.c_attn"])
@pytest.mark.parametrize("recompute", ["none", "light", "block"])
def test_frozen_weights_in_bf16(tiny_model, idx, part, recompute):
    """Gradients and logits are those of a model in fp32 with the same, rounded, weights. Vectors,
    positions and the adapter stay in fp32.
    """
    convert_linear_layer_to_lora(tiny_model, part)
    randomize(only_optimize_lora_parameters(tiny_model))
    rounded = copy.deepcopy(tiny_model)
    for name, param in rounded.named_parameters():
        if name.endswith(".weight") and param.dim() == 2 and "wpe" not in name:
            param.data = param.bfloat16().float()
    cast_frozen_weights(tiny_model, torch.bfloat16)
    apply_recompute(tiny_model, recompute)
    n_bf16 = sum(p.numel() for p in tiny_model.parameters() if p.dtype == torch.bfloat16)
    assert n_bf16 == 1024 * 64 + 2 * 12 * 64 * 64
    losses = []
    for model in (tiny_model, rounded):
        losses.append(mean_loss(model, idx))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    expected = dict(rounded.named_parameters())
    for name, param in tiny_model.named_parameters():
        if param.requires_grad:
            assert param.dtype == torch.float32
            torch.testing.assert_close(param.grad, expected[name].grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logits(tiny_model, idx), logits(rounded, idx), rtol=0, atol=1e-5)
    merge_lora(tiny_model)
    torch.testing.assert_close(logits(tiny_model, idx), logits(rounded, idx), rtol=0, atol=2e-2)


@pytest.mark.parametrize("recompute", ["light", "block"])
def test_dropout_survives_recomputation(tiny_model, idx, recompute):
    """Recomputation repeats the dropout of the forward pass: gradients are bit for bit equal. In
    eval mode there is no dropout, and eval() changes no weight.
    """
    convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dropout=0.5))
    only_optimize_lora_parameters(tiny_model)
    randomize(tiny_model)
    gradients = []
    for mode in ("none", recompute):
        apply_recompute(tiny_model, mode)
        torch.manual_seed(7)
        tiny_model.zero_grad()
        mean_loss(tiny_model, idx).backward()
        gradients.append([p.grad for p in tiny_model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))
    before = {n: p.clone() for n, p in tiny_model.named_parameters()}
    with torch.no_grad():
        dropped = tiny_model(idx)
    assert not torch.equal(dropped, logits(tiny_model, idx))
    assert torch.equal(logits(tiny_model, idx), logits(tiny_model, idx))
    tiny_model.train()
    assert all(torch.equal(p, before[n]) for n, p in tiny_model.named_parameters())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["separate", "summed"])
def test_autocast(tiny_model, idx, form, base_dtype):
    """Under bf16 autocast, gradients are in fp32 and have the direction of those without it."""
    only_optimize_lora_parameters(convert_linear_layer_to_lora(tiny_model))
    randomize(tiny_model)
    linears = [*lora_linears(tiny_model).values()] if form == "summed" else []
    flat = []
    for enabled in (False, True):
        tiny_model.zero_grad()
        dtype = torch.bfloat16 if enabled else None
        if enabled:
            cast_frozen_weights(tiny_model, base_dtype)
        with torch.autocast("cpu", dtype, enabled=enabled), summed_weights(linears, dtype):
            mean_loss(tiny_model, idx).backward()
        grads = [p.grad for p in tiny_model.parameters() if p.requires_grad]
        assert {g.dtype for g in grads} == {torch.float32}
        flat.append(torch.cat([g.flatten() for g in grads]))
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_base_weights_do_not_change(tiny_model, idx):
    """Training an adapter lowers the loss and leaves every base weight as it was, bit for bit."""
    before = {n: p.clone() for n, p in tiny_model.named_parameters()}
    only_optimize_lora_parameters(convert_linear_layer_to_lora(tiny_model))
    trained = [p for p in tiny_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = mean_loss(tiny_model, idx)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = dict(tiny_model.named_parameters())
    assert all(torch.equal(after[name], param) for name, param in before.items())


@pytest.mark.parametrize(
    ("part", "count"), [("h.", 8), ("attn.c_attn,mlp", 6), ("h.1.", 4), ("c_proj", 4)]
)
def test_adapters_load_in_peft(base, idx, tmp_path, part, count):
    """An adapter saved here has equal logits in PEFT on transformers' model, whatever its linears,
    and its config reads back.
    """
    mine = load_with_lora(base, part, lora_dim=4, lora_alpha=6, lora_dropout=0.1)
    assert len(lora_linears(mine)) == count
    save_adapter(mine, tmp_path / "adapter", str(base))
    stock = GPT2LMHeadModel.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    targets = theirs.peft_config["default"].target_modules
    config = read_adapter_config(tmp_path / "adapter")
    assert config == AdapterConfig(str(base), config.target_modules, LoRAConfig(4, 6, 0.1))
    assert set(config.target_modules) == set(targets)
    torch.testing.assert_close(logits(theirs, idx), logits(mine, idx), atol=1e-4, rtol=0)
    assert (logits(mine, idx) - logits(GPT.from_pretrained(base), idx)).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear", "lora_alpha": 3},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
        {"target_modules": r".*h\.1\.mlp\.c_(fc|proj)"},
        {"target_modules": ["mlp.c_proj", "h.0.attn.c_attn"]},
    ],
)
def test_pefts_adapters_load_here(base, idx, tmp_path, options):
    """Adapters that PEFT wrote have equal logits here, on our model and on transformers'."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", fan_in_fan_out=True, **options)
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    for name, param in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(param, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = load_model(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(mine, idx), logits(theirs, idx), atol=1e-4, rtol=0)
    hf = load_adapter(GPT2LMHeadModel.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(hf, idx), logits(theirs, idx), atol=1e-4, rtol=0)
    assert load_model(tmp_path / "adapter").name_or_path == str(base)


def test_gradients_on_transformers_model_are_pefts(idx):
    """On transformers' GPT2LMHeadModel, whose weights are transposed, gradients equal PEFT's."""
    config = GPT2Config(n_positions=48, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    torch.manual_seed(0)
    ours, stock = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    stock.load_state_dict(ours.state_dict())
    convert_linear_layer_to_lora(ours, config=LoRAConfig(lora_dim=4, lora_alpha=8))
    only_optimize_lora_parameters(ours)
    randomize(ours)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(stock, lora)
    params = dict(theirs.named_parameters())
    named = {n: params[f"base_model.model.{n}.default.weight"] for n in get_lora_state_dict(ours)}
    with torch.no_grad():
        for name, tensor in get_lora_state_dict(ours).items():
            named[name].copy_(tensor)
    ours(idx, labels=idx).loss.backward()
    theirs(idx, labels=idx).loss.backward()
    for name, param in ours.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, named[name].grad, atol=1e-6, rtol=1e-4)


def pickled_bytes(model: GPT) -> int:
    """The size of everything that the model holds."""
    file = io.BytesIO()
    torch.save(model, file)
    return len(file.getvalue())


def test_merging(base, idx, tmp_path):
    """Merging keeps the logits within 1e-5, and a merged model is saved as an ordinary checkpoint.
    It takes no more memory than a model without LoRA. Merging or saving at the wrong time is an
    error.
    """
    model = load_with_lora(base, lora_dim=4)
    expected = logits(model, idx)
    with pytest.raises(ValueError, match="call merge_lora or save_adapter first"):
        model.save_pretrained(tmp_path / "merged")
    merge_lora(model)
    torch.testing.assert_close(logits(model, idx), expected, atol=1e-5, rtol=0)
    for wrong in (merge_lora, get_lora_state_dict, only_optimize_lora_parameters):
        with pytest.raises(ValueError, match="the model has no LoRA"):
            wrong(model)
    with pytest.raises(ValueError, match="the model has no LoRA"):
        save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(theirs, idx), expected, atol=1e-4, rtol=0)
    assert pickled_bytes(model) < 1.01 * pickled_bytes(GPT.from_pretrained(base))


def test_parts_that_match_no_name(tiny_model):
    """A part that is in no name is an error that lists the names; so is converting twice. A rank
    out of range is an error.
    """
    for part in ("attn.c_atn", "mlp,q_proj", "", "lm_head"):
        with pytest.raises(
            ValueError, match=r"no linear layer has .* in its name; .*h.\*.mlp.c_fc"
        ):
            convert_linear_layer_to_lora(tiny_model, part)
    assert not lora_linears(tiny_model)
    with pytest.raises(ValueError, match="lora_dim is 0, expected at least 1"):
        LoRAConfig(lora_dim=0)
    with pytest.raises(
        ValueError, match=r"lora_dim is 65, expected at most 64, the width of .*c_attn"
    ):
        convert_linear_layer_to_lora(tiny_model, config=LoRAConfig(lora_dim=65))
    assert not lora_linears(tiny_model)
    with pytest.raises(ValueError, match="the model has no LoRA"):
        only_optimize_lora_parameters(tiny_model)
    convert_linear_layer_to_lora(tiny_model)
    with pytest.raises(ValueError, match="those without LoRA are none"):
        convert_linear_layer_to_lora(tiny_model)


def test_lora_state_file(base, idx, tmp_path):
    """lora.pt is the plain state dict. It loads with the adapter_config.json beside it, which wins,
    or with the settings that are given, and not without either.
    """
    mine = load_with_lora(base, lora_dim=4, lora_alpha=6)
    save_adapter(mine, tmp_path / "a")
    plain = torch.load(tmp_path / "a" / "lora.pt", weights_only=True)
    assert plain.keys() == get_lora_state_dict(mine).keys()
    beside = load_model(base, tmp_path / "a" / "lora.pt")
    assert torch.equal(logits(beside, idx), logits(mine, idx))
    assert is_adapter(tmp_path / "a")
    other = LoRAConfig(2, 1.0, 0.5, use_rslora=True)
    described = load_adapter(GPT.from_pretrained(base), tmp_path / "a" / "lora.pt", other)
    assert torch.equal(logits(described, idx), logits(mine, idx))
    (tmp_path / "a" / "lora.pt").rename(tmp_path / "lora.pt")
    alone = load_adapter(GPT.from_pretrained(base), tmp_path / "lora.pt", LoRAConfig(4, 6.0))
    assert torch.equal(logits(alone, idx), logits(mine, idx))
    with pytest.raises(ValueError, match="holds no lora_alpha"):
        load_model(base, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora_A \(4, 64\), expected"):
        load_adapter(GPT.from_pretrained(base), tmp_path / "lora.pt", LoRAConfig(8, 6.0))


def test_bad_adapters_are_errors(base, tmp_path):
    """Missing, unexpected and misshapen tensors, unsupported options, damaged and missing files:
    each is an error that names the cause.
    """
    good = load_with_lora(base, lora_dim=4)
    folder = tmp_path / "adapter"

    def check_error(match: str, change=None, config: dict | None = None) -> None:
        save_adapter(good, folder)
        if config:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        if change:
            change()
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_model(base, folder)

    weights, state = folder / "adapter_model.safetensors", get_lora_state_dict(good)
    name = "transformer.h.0.mlp.c_fc.lora_B"

    def rewrite(tensors: dict) -> None:
        named = {f"base_model.model.{n}.weight": t.contiguous() for n, t in tensors.items()}
        save_file(named, weights)

    without = {n: t for n, t in state.items() if n != name}
    check_error(f"missing tensors, such as {name}", lambda: rewrite(without))
    check_error(
        "unexpected tensors, such as lm_head", lambda: rewrite({**state, "lm_head": torch.zeros(2)})
    )
    check_error(r"c_fc.lora_B \(4, 256\)", lambda: rewrite({**state, name: state[name].t()}))
    check_error("is damaged", lambda: weights.write_bytes(weights.read_bytes()[:-100]))
    check_error("adapter_model.safetensors does not exist", weights.unlink)
    check_error("is damaged", lambda: (folder / "adapter_config.json").write_text("{"))
    check_error(
        "expected a folder with adapter_config.json", (folder / "adapter_config.json").unlink
    )
    check_error("use_dora True is not supported", config={"use_dora": True})
    check_error("bias 'all' is not supported", config={"bias": "all"})
    check_error("rank_pattern", config={"rank_pattern": {"c_fc": 2}})
    check_error("init_lora_weights 'pissa'", config={"init_lora_weights": "pissa"})
    check_error("peft_type 'IA3' is not supported", config={"peft_type": "IA3"})
    check_error("and at most 1,000,000,000,000", config={"r": 10**15})
    check_error("lora_alpha is 0", config={"lora_alpha": 0})
    check_error("lora_dropout is 1.5", config={"lora_dropout": 1.5})
    check_error("lora_alpha is null", config={"lora_alpha": None})
    check_error("target_modules is 5", config={"target_modules": 5})
    check_error("LoRA for none of the model's linear layers", config={"target_modules": ["q_proj"]})
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_model(base, tmp_path / "nowhere")
    other = GPT(GPTConfig(block_size=48, vocab_size=1000, n_layer=2, n_head=4, n_embd=32))
    save_adapter(good, folder)
    with pytest.raises(ValueError, match="misshapen tensors"):
        load_adapter(other, folder)
    with pytest.raises(ValueError, match="missing tensors"):
        load_lora(good, {})


@pytest.mark.parametrize("content", [[1], torch.zeros(2), {"a": 1}, b".", b"h", b"K"])
def test_lora_state_files_with_other_contents(base, tmp_path, content):
    """A lora.pt that does not hold named tensors is reported as damaged."""
    file = tmp_path / "lora.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"lora.pt is damaged"):
        load_adapter(GPT.from_pretrained(base), file, LoRAConfig(4, 6.0))


def test_generation_uses_the_adapter(base, idx):
    """Greedy tokens equal those of the merged model, with and without the fast decode path."""
    model = load_with_lora(base, lora_dim=4)
    out = model.generate(idx[:1, :5], 20, temperature=0)
    speed_up_decoding(model)  # leaves a LoRA that is not merged alone
    assert torch.equal(out, model.generate(idx[:1, :5], 20, temperature=0))
    merge_lora(model)
    assert torch.equal(out, model.generate(idx[:1, :5], 20, temperature=0))
    speed_up_decoding(model)
    assert torch.equal(out, model.generate(idx[:1, :5], 20, temperature=0))
    assert not torch.equal(out, GPT.from_pretrained(base).generate(idx[:1, :5], 20, temperature=0))
