import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

import model as model_module
from model import GPT, GPTConfig, KVCache, Linear, sample_next


def hugging_face(**options) -> GPT2LMHeadModel:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 48, "vocab_size": 1000}
    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**shape, **ends, **options})).eval()


def random_ids(*shape: int, vocab_size: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_positions": 17, "n_head": 2},
        {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-3},
        {"vocab_size": 50257},
    ],
)
def test_logits_equal_transformers_both_ways(options, tmp_path):
    """A transformers checkpoint opens here, and ours opens in transformers, with equal logits."""
    theirs = hugging_face(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    idx = random_ids(3, 16)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert ours(idx).shape == expected.shape
        torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(again(idx).logits, expected, atol=1e-4, rtol=0)


def test_untrained_loss_is_uniform():
    """A new model predicts the uniform distribution over the real vocabulary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=64))
    idx = random_ids(8, 64, vocab_size=50257)
    assert abs(model.loss(idx, idx.roll(1)).item() - math.log(50257)) < 0.05


def test_initialisation_is_gpt2s(tiny_config):
    """Weights have std 0.02, the projections onto the residual stream 0.02 / sqrt(2 n_layer),
    biases are 0 and LayerNorms the identity.
    """
    config = GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=2000)
    for name, param in GPT(config).named_parameters():
        if name.endswith("c_proj.weight"):
            assert param.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif param.dim() == 2:
            assert param[:2000].std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (param == float(name.endswith("weight"))).all(), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_loss_equals_plain_cross_entropy(tiny_model, reduction, chunk_rows, monkeypatch):
    """The loss and its gradients are those of cross-entropy over the real vocabulary, chunked or
    not, ignored targets included; the padding rows get no gradient.
    """
    monkeypatch.setitem(model_module.LOSS_CHUNK_ROWS, "cpu", chunk_rows)
    idx, targets = random_ids(3, 40), random_ids(3, 40).roll(1)
    targets[0, :11] = -100
    plain = F.cross_entropy(
        tiny_model(idx).flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=-100
    )
    expected = torch.autograd.grad(plain, list(tiny_model.parameters()))
    loss = tiny_model.loss(idx, targets, reduction)
    gradients = torch.autograd.grad(loss, list(tiny_model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(plain.detach()))
    assert gradients[0].shape == (1024, 64)
    assert (gradients[0][1000:] == 0).all()


@pytest.mark.parametrize("chunk_rows", [16, 1000])
def test_loss_keeps_its_precision_under_autocast(tiny_model, chunk_rows, monkeypatch):
    """Under bf16 autocast the loss is still summed in fp32: its error is that of bf16 logits, not
    of a sum with 8 bits.
    """
    monkeypatch.setitem(model_module.LOSS_CHUNK_ROWS, "cpu", chunk_rows)
    idx = random_ids(8, 48)
    exact = tiny_model.loss(idx, idx.roll(1), "sum")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny_model.loss(idx, idx.roll(1), "sum")
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=3e-4)
    rounded.backward()
    assert tiny_model.transformer.wte.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_head_skips_rows_that_do_not_count(tiny_model, dtype):
    """Loss and gradients are the same to rounding whether the head computes ignored rows or not; a
    batch in which nothing counts is 0; a second backward pass is refused.
    """
    idx, targets = random_ids(2, 30), random_ids(2, 30)
    targets[:, :20] = -100
    rows = (targets.flatten() != -100).nonzero()[:, 0]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = [tiny_model.loss(idx, targets, "sum", rows=r) for r in (None, rows)]
        nothing = tiny_model.loss(idx, torch.full_like(targets, -100), "sum", rows=rows[:0])
    params = list(tiny_model.parameters())
    all_rows, few_rows = (torch.autograd.grad(loss, params, retain_graph=True) for loss in losses)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for a, b in zip(all_rows, few_rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 if dtype is None else 1e-2)
    assert nothing.item() == 0
    with pytest.raises(TypeError):
        losses[0].backward()


@pytest.mark.parametrize("recompute", ["light", "block"])
def test_recomputing_changes_nothing(tiny_model, recompute):
    """Loss and gradients are the same to the bit whether the backward pass keeps or recomputes."""
    idx, results = random_ids(2, 40), []
    for mode in ("none", recompute):
        for block in tiny_model.transformer.h:
            block.recompute = mode
        loss = tiny_model.loss(idx, idx.roll(1))
        results.append([loss, *torch.autograd.grad(loss, list(tiny_model.parameters()))])
    assert all(map(torch.equal, *results))


def test_texts_that_share_a_row(tiny_model):
    """With positions and a mask, two texts in one row get the hidden states of each alone."""
    idx = random_ids(1, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    text = torch.tensor([0] * 12 + [1] * 18)
    mask = (text[:, None] == text) & torch.ones(30, 30).tril().bool()
    together = tiny_model.hidden(idx, positions=positions, mask=mask[None, None])
    alone = torch.cat([tiny_model.hidden(idx[:, :12]), tiny_model.hidden(idx[:, 12:])], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_loss_never_holds_all_logits(monkeypatch):
    """No single allocation of a loss with its backward is as large as the (B·T, V) logits."""
    monkeypatch.setitem(model_module.LOSS_CHUNK_ROWS, "cpu", 32)
    config = GPTConfig(block_size=64, vocab_size=8192, n_layer=1, n_head=1, n_embd=8)
    model, idx = GPT(config), random_ids(16, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        model.loss(idx, idx).backward()
    largest = max(event.cpu_memory_usage for event in prof.events())
    assert largest < 16 * 64 * 8192 * 4 / 4


def test_cached_forward_equals_full_forward(tiny_model):
    """The KV cache changes nothing: token by token gives the hidden states of one pass."""
    idx = random_ids(2, 20)
    caches = [KVCache(48) for _ in range(2)]
    with torch.no_grad():
        full = tiny_model.hidden(idx)
        parts = [tiny_model.hidden(idx[:, :7], caches)]
        parts += [tiny_model.hidden(idx[:, i : i + 1], caches) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)


def test_the_trunk_compiles_without_a_break(tiny_model):
    """torch.compile takes the training step's trunk as one graph."""
    explained = torch._dynamo.explain(tiny_model.hidden)(random_ids(2, 16))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_several_tokens_after_cached_ones_are_refused(tiny_model):
    """The cache takes a prompt, then one token at a time; anything else is an error."""
    caches = [KVCache(48) for _ in range(2)]
    with torch.no_grad():
        tiny_model.hidden(random_ids(1, 4), caches)
        with pytest.raises(ValueError, match="2 tokens at once after 4 cached ones"):
            tiny_model.hidden(random_ids(1, 2), caches)


def test_few_rows_take_the_same_linear(monkeypatch):
    """The decoding path of Linear computes what nn.Linear does, for each number of threads."""
    layer, x = Linear(24, 36), torch.randn(3, 2, 24)
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_greedy_generation_equals_transformers(tmp_path):
    """Greedy tokens are those of transformers' generate, one for one, for several prompts."""
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    idx = random_ids(3, 8)
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 40, temperature=0), expected)


def test_generation_past_the_window(tiny_model):
    """Past block_size the window restarts from its last half: the tokens are those of a plain
    recomputation under the same rule.
    """
    idx = random_ids(2, 45)
    expected, window = idx, idx
    for _ in range(70):
        if window.size(1) > 48:
            window = window[:, -24:]
        with torch.no_grad():
            next_id = tiny_model(window)[:, -1].argmax(-1, keepdim=True)
        expected, window = torch.cat([expected, next_id], 1), torch.cat([window, next_id], 1)
    assert torch.equal(tiny_model.generate(idx, 70, temperature=0), expected)


def test_long_prompt_uses_its_last_window(tiny_model):
    """A prompt longer than block_size is continued from its last block_size tokens."""
    idx = random_ids(1, 60)
    long, short = (tiny_model.generate(t, 1, temperature=0)[0, -1] for t in (idx, idx[:, -48:]))
    assert long == short
    with pytest.raises(ValueError, match="60 tokens do not fit the model's block_size 48"):
        tiny_model(idx)


def test_padding_ids_are_never_sampled():
    """However flat the distribution, no id of the padding is drawn."""
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    out = model.generate(torch.zeros(64, 1, dtype=torch.long), 40, temperature=100.0)
    assert model.lm_head.out_features == 128
    assert out.max() == 99


def test_eos_ends_a_row(tiny_model):
    """A row that produced eos is filled up with it; generation ends when all rows have."""
    idx = random_ids(4, 5)
    generator = torch.Generator().manual_seed(0)
    free = tiny_model.generate(idx, 30, generator=generator)
    eos = free[0, 9].item()
    out = tiny_model.generate(idx, 30, eos=eos, generator=generator.manual_seed(0))
    assert (out[0, 9:] == eos).all()
    assert torch.equal(out[:, :10], free[:, :10])
    one_row = tiny_model.generate(idx[:1], 30, temperature=0)
    stopped = tiny_model.generate(idx[:1], 30, temperature=0, eos=one_row[0, 7].item())
    assert stopped.size(1) <= 8


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (20, 0.5), (None, 1.0)])
def test_sampling_is_over_transformers_support(top_k, top_p):
    """top_k and top_p leave the tokens, with the probabilities, that transformers leaves."""
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    warped = logits / 0.8
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p:
        warped = TopPLogitsWarper(top_p)(None, warped)
    probs = warped.softmax(-1)[0]
    draws = sample_next(logits.expand(20_000, -1), 0.8, top_k, top_p, torch.Generator())
    frequency = draws.flatten().bincount(minlength=50) / 20_000
    assert (frequency[probs == 0] == 0).all()
    torch.testing.assert_close(frequency, probs, atol=0.015, rtol=0)


def test_config_errors_name_the_value():
    """A shape that cannot be is refused with its value."""
    with pytest.raises(ValueError, match="n_embd 65 does not divide into n_head 4"):
        GPTConfig(n_embd=65, n_head=4)
    with pytest.raises(ValueError, match="n_layer is 0"):
        GPTConfig(n_layer=0)
