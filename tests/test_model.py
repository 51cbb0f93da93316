import ast
import sys

import pytest
import torch
from conftest import ROOT, random_ids, small_transformers_gpt2
from transformers import GPT2LMHeadModel
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from model import GPT, GPTConfig, KVCache, sample_next


def test_model_py_stands_alone():
    """Outside functions, model.py imports only torch and stdlib. Block.forward has two lines."""
    tree = ast.parse((ROOT / "model.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    outside = set(ast.walk(tree)) - inside
    names = {alias.name for node in outside if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in outside if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names}
    assert {"torch"} <= packages <= {"torch", *sys.stdlib_module_names}
    block = next(n for n in tree.body if getattr(n, "name", "") == "Block")
    forward = next(n for n in block.body if getattr(n, "name", "") == "forward")
    assert len(forward.body) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": False, "n_positions": 17, "n_head": 2},
        {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-3},
    ],
)
def test_logits_equal_transformers_both_ways(options, tmp_path):
    """Our logits match transformers when we load its checkpoint and when it loads ours."""
    theirs = small_transformers_gpt2(**options)
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


def test_initialization_matches_gpt2():
    """Weights have std 0.02, except projections into the residual stream: 0.02 / sqrt(2 n_layer).
    Biases are 0, and LayerNorm weights are 1.
    """
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=2000))
    for name, param in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert param.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif param.dim() == 2:
            assert param[:2000].std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (param == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_cached_forward_equals_full_forward(tiny_model):
    """With the KV cache, a prompt and then one token at a time give the same hidden states as one
    full pass. Several tokens at once are refused unless the cache is empty.
    """
    idx = random_ids(2, 20)
    caches = [KVCache(48) for _ in range(2)]
    with torch.no_grad():
        full = tiny_model.hidden(idx)
        parts = [tiny_model.hidden(idx[:, :7], caches)]
        parts += [tiny_model.hidden(idx[:, i : i + 1], caches) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2 tokens at once after 20 cached ones"):
        tiny_model.hidden(idx[:, :2], caches)


@pytest.mark.parametrize("process", [None, lambda idx, logits: logits.scatter(1, idx, -torch.inf)])
def test_greedy_generation_equals_transformers(tmp_path, process):
    """Greedy tokens match transformers' generate for several prompts, also with process_logits."""
    theirs = small_transformers_gpt2()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    idx = random_ids(3, 8)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(idx, **options, logits_processor=[process] if process else None)
    assert torch.equal(ours.generate(idx, 40, temperature=0, process_logits=process), expected)


def test_generation_past_the_window(tiny_model):
    """A full window restarts from its last half, as in generation without a cache."""
    expected = window = idx = random_ids(2, 45)
    for _ in range(40):
        if window.size(1) > 48:
            window = window[:, -24:]
        with torch.no_grad():
            next_id = tiny_model(window)[:, -1].argmax(-1, keepdim=True)
        expected, window = torch.cat([expected, next_id], 1), torch.cat([window, next_id], 1)
    assert torch.equal(tiny_model.generate(idx, 40, temperature=0), expected)


def test_long_prompt_uses_its_last_window(tiny_model):
    """A prompt longer than block_size is continued from its last block_size tokens."""
    idx = random_ids(1, 60)
    long, short = (tiny_model.generate(t, 1, temperature=0)[0, -1] for t in (idx, idx[:, -48:]))
    assert long == short
    with pytest.raises(ValueError, match="60 tokens exceed block_size 48"):
        tiny_model(idx)


def test_padding_ids_are_never_sampled():
    """Even from a flat distribution, no padding id is drawn."""
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    out = model.generate(torch.zeros(64, 1, dtype=torch.long), 40, temperature=100.0)
    assert model.lm_head.out_features == 128
    assert out.max() == 99


def test_eos_ends_a_row(tiny_model):
    """A row that has produced eos is padded with it. Generation ends once all rows have eos."""
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


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (20, 0.5), (None, 1.0)])
def test_top_k_and_top_p_match_transformers(top_k, top_p):
    """top_k and top_p keep the same tokens as transformers, with the same probabilities."""
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
    """The error for an invalid shape names its value."""
    with pytest.raises(ValueError, match="n_embd 65 is not a multiple of n_head 4"):
        GPTConfig(n_embd=65, n_head=4)
    with pytest.raises(ValueError, match="n_layer is 0"):
        GPTConfig(n_layer=0)
