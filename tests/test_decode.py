"""Fast decoding generates the same text as ordinary decoding. Logits are processed as they say."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, small_gpt2
from torch import nn
from transformers import RepetitionPenaltyLogitsProcessor

from engine import decode
from engine.decode import (
    FEW_ROWS,
    force_prompts,
    linear_few_rows,
    penalize_repetition,
    speed_up_decoding,
)
from model import sample_next


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (3, 2, 24), (8, 24), (0, 24)])
def test_few_rows_equal_linear(monkeypatch, threads, bias, shape):
    """The result equals F.linear up to rounding, whatever the number of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer, x = nn.Linear(24, 36, bias=bias), torch.randn(shape)
    with torch.no_grad():
        found = linear_few_rows(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias))


def test_other_inputs_fall_back_to_f_linear(monkeypatch):
    """With more than FEW_ROWS rows, or with gradients, the layer calls F.linear itself."""
    layer = nn.Linear(24, 36)
    speed_up_decoding(layer)
    monkeypatch.setattr(torch, "bmm", pytest.fail)
    many = torch.randn(FEW_ROWS + 1, 24)
    with torch.no_grad():
        assert torch.equal(layer(many), F.linear(many, layer.weight, layer.bias))
    layer(many[:FEW_ROWS]).sum().backward()
    assert layer.weight.grad is not None


def test_generation_takes_the_fast_path(tiny_model, monkeypatch):
    """When decoding, all linear layers and the head take the fast path. The text is the same."""
    calls, bmm = [], torch.bmm
    expected = tiny_model.generate(random_ids(1, 12), 20, temperature=0)
    speed_up_decoding(tiny_model)
    monkeypatch.setattr(decode.torch, "bmm", lambda *args: calls.append(1) or bmm(*args))
    found = tiny_model.generate(random_ids(1, 12), 20, temperature=0)
    assert torch.equal(found, expected)
    # The prompt gives the first token. Its 12 rows are too many for the fast path, except in the
    # head, which gets only the last one.
    n_linears = 4 * tiny_model.config.n_layer
    assert len(calls) == 19 * n_linears + 20


def test_a_static_cache_gives_the_same_text(monkeypatch):
    """A cache of constant shape gives the same tokens, even past the end of the context."""

    class PlainGraph(decode.TokenGraph):  # test_cuda.py has CUDA graphs
        def capture(self):
            self.graph = SimpleNamespace(replay=self.replay)

        def replay(self):
            self.hidden = self.compute_hidden()

    monkeypatch.setattr(decode, "TokenGraph", PlainGraph)
    model, idx = small_gpt2(block_size=32).eval(), random_ids(2, 20)
    expected = model.generate(idx, 40, temperature=0)
    model.last_hidden = decode.GraphedDecoder(model)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for rows in (slice(2), slice(1), slice(2)):  # change the batch size and back
            assert torch.equal(model.generate(idx[rows], 40, temperature=0), expected[rows])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_equals_transformers(penalty):
    """Logits equal those of transformers, whether positive, negative, zero or -inf, and if ids are
    repeated.
    """
    idx, logits = random_ids(3, 40, vocab_size=50), 5 * torch.randn(3, 60)
    idx[:, 30:] = idx[:, :10]
    logits[0, idx[0, :4]] = torch.tensor([0.0, -0.0, -torch.inf, 1e-30])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    assert torch.equal(penalize_repetition(idx, logits, penalty), expected)


@pytest.mark.parametrize("settings", [(0.0,), (1.0, 50), (0.01, None, 0.1), (100.0, 1, 1.0)])
def test_prompts_are_forced_with_any_sampling(settings):
    """A row within its prompt gets the prompt's next token, however improbable, and whatever the
    temperature, top_k and top_p. The logits of the other rows do not change.
    """
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    idx, logits = torch.tensor([[1, 2], [4, 0], [5, 6], [7, 8]]), torch.randn(4, 60)
    logits[0, 3], logits[3, 9] = -torch.inf, -1e9
    processed = force_prompts(idx, logits.clone(), prompts)
    for _ in range(20):
        next_ids = sample_next(processed, *settings).flatten().tolist()
        assert (next_ids[0], next_ids[3]) == (3, 9)
    assert torch.equal(processed[1:3], logits[1:3])
