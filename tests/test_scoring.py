"""Packed continuations score as they do alone in transformers, on any number of ranks."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU_DIST, GPT2_TOKENIZER, TIKTOKEN, small_transformers_gpt2
from transformers import GPT2LMHeadModel

from engine import scoring
from engine.scoring import (
    Request,
    Score,
    collate,
    encode_request,
    pack_continuations,
    pack_request,
    plan_batches,
    score,
)
from model import GPT

BLOCK_SIZE = 128


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    """A GPT-2 with large weights, so that scores differ, and a head that takes three chunks."""
    model = small_transformers_gpt2(n_positions=BLOCK_SIZE, vocab_size=5000)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(4)
    return model


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory) -> GPT:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return GPT.from_pretrained(folder).eval()


def random_requests(n: int) -> list[Request]:
    """Make requests of few different tokens, so that continuations share prefixes or repeat."""
    rng = np.random.default_rng(0)

    def ids(high: int) -> list[int]:
        return rng.integers(0, 50, rng.integers(1, high)).tolist()

    return [Request(ids(BLOCK_SIZE), [ids(40) for _ in range(4)]) for _ in range(n)]


def score_all(model: GPT, requests: list[Request], dist=CPU_DIST) -> list[tuple[int, list[Score]]]:
    return [pair for batch in score(model, requests, dist) for pair in batch]


def test_a_token_attends_to_its_own_past():
    """In a packed row, a token attends to the context and the tokens before it in its continuation.
    Each has the position that it would have alone. A shared prefix is stored only once.
    """
    context, continuations = [9, 8], [[1, 2, 3], [1, 2], [4], [1, 5, 6, 7], [1, 2]]
    row = pack_continuations(context, dict(enumerate(continuations)))
    # Token i attends to token j if j <= i < ends[j]. seen[i] lists all such tokens.
    indices = range(len(row.tokens))
    seen = [[row.tokens[j] for j in range(i + 1) if i < row.ends[j]] for i in indices]
    assert sorted(seen) == [[9], [9, 8], [9, 8, 1], [9, 8, 1, 2], [9, 8, 1, 5], [9, 8, 1, 5, 6]]
    assert [len(past) - 1 for past in seen] == row.positions
    assert sorted(row.predictions) == list(range(len(continuations)))
    for i, ids in enumerate(continuations):
        assert [row.targets[p] for p in row.predictions[i]] == ids
        pasts = [seen[row.sources[p]] for p in row.predictions[i]]  # what p is predicted from
        assert pasts == [context + ids[:n] for n in range(len(ids))]
    assert row.predictions[1] == row.predictions[4]
    assert len(set(zip(row.sources, row.targets, strict=True))) == len(row.targets)


@torch.no_grad()
def test_scores_equal_transformers_one_by_one(theirs, model):
    """Packed, or truncated on the left, a continuation gets the same log-probability and `greedy`
    flag as when transformers scores it alone.
    """
    requests = random_requests(12)
    best = theirs(torch.tensor([requests[0].context])).logits[0, -1].argmax().item()
    requests[0].continuations[2:] = [[best], [best, 7]]  # the first is all greedy
    requests[1].continuations[3] = [4999, 2047, 2048, 0]  # the edges of chunks of the head
    greedy = []
    for i, scores in score_all(model, requests):
        for ids, found in zip(requests[i].continuations, scores, strict=True):
            text = [*requests[i].context, *ids][-BLOCK_SIZE - 1 :]
            logits = theirs(torch.tensor([text[:-1]])).logits[0, -len(ids) :]
            expected = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
            assert found.log_prob == pytest.approx(expected, abs=1e-4, rel=1e-6)
            assert found.greedy == (logits.argmax(-1).tolist() == ids)
            greedy.append(found.greedy)
    assert len(greedy) == 48
    assert sum(greedy) == 1


def test_greedy_ties_go_to_the_lowest_id(model):
    """Of several ids with the same, largest logit, only the lowest is greedy, like the result of
    argmax, whether or not they are in the same chunk of the head.
    """
    model = copy.deepcopy(model)
    context = [1, 2, 3]
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([context]))[0, -1]
        row = torch.zeros_like(hidden)  # with a single weight, the logits are equal to the bit
        row[hidden.abs().argmax()] = 1e3 * hidden[hidden.abs().argmax()].sign()
        for ties in ([4999], [2500, 4999], [2047, 2048, 2500, 4999], [700, 900, 2047, 4999]):
            weight = model.lm_head.weight
            weight[ties] = row
            logits = hidden @ weight[:5000].t()
            assert logits.topk(len(ties)).values.unique().numel() == 1
            ((_, scores),) = score_all(model, [Request(context, [[i] for i in ties])])
            assert [s.greedy for s in scores] == [i == logits.argmax() for i in ties]
            assert len({s.log_prob for s in scores}) == 1


def test_equal_continuations_score_equally(model):
    """Scores of equal continuations are equal to the bit, so that ties between them are ties."""
    ids = [[3, 4, 5], [3, 4], [3, 4, 5], [3, 9]]
    ((_, scores),) = score_all(model, [Request([1, 2], ids)])
    assert scores[0] == scores[2] != scores[1]


def test_autocast_does_not_round_logits(model):
    """Under bf16 autocast, the head still computes in fp32, from bf16 hidden states."""
    request = random_requests(1)[0]
    context, first = request.context, request.continuations[0][:1]
    with torch.autocast("cpu", torch.bfloat16):
        ((_, (found,)),) = score_all(model, [Request(context, [first])])
        causal = torch.ones(len(context), len(context), dtype=torch.bool).tril()
        hidden = model.hidden(torch.tensor([context]), mask=causal[None, None])
    logits = (hidden[0, -1].float() @ model.lm_head.weight.t())[: model.config.vocab_size]
    exact, rounded = (t.float().log_softmax(-1)[first] for t in (logits, logits.bfloat16()))
    assert found.log_prob == pytest.approx(exact.item(), abs=1e-5)
    assert found.log_prob != pytest.approx(rounded.item(), abs=1e-5)


def test_ranks_share_the_batches(model, monkeypatch):
    """The ranks together score each request once, and all call the model equally often."""
    requests = random_requests(10)
    batches = list(score(model, requests, CPU_DIST))
    world_size = len(batches) - 1  # two rounds; in the second, only rank 0 has a batch
    spy = Mock(wraps=scoring.compute_log_probs)
    monkeypatch.setattr(scoring, "compute_log_probs", spy)
    shared = []
    for rank in range(world_size):
        shared += score_all(model, requests, replace(CPU_DIST, rank=rank, world_size=world_size))
        assert spy.call_count == 2 * (rank + 1)
    assert sorted(shared) == sorted(pair for batch in batches for pair in batch)
    assert len(shared) == 10


def test_done_batches_are_skipped(model):
    """A batch is skipped when all its requests are done, and recomputed as a whole otherwise."""
    requests = random_requests(10)
    batches = list(score(model, requests, CPU_DIST))
    done = frozenset(i for batch in batches[:2] for i, _ in batch)
    assert len(batches) > 3
    assert list(score(model, requests, CPU_DIST, done=done)) == batches[2:]
    not_quite = done - {batches[0][-1][0]}
    assert next(score(model, requests, CPU_DIST, done=not_quite)) == batches[0]


def test_batches_fit_and_are_sorted():
    """Each request is in one batch, longest first. Only a batch of one may exceed batch_tokens."""
    requests = random_requests(60)
    batches = plan_batches(requests, BLOCK_SIZE, batch_tokens=1000, multiple=16)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    lengths = []
    for batch in batches:
        rows = [row for i in batch for row in pack_request(requests[i], BLOCK_SIZE)]
        idx = collate(rows, 16).idx
        assert len(batch) == 1 or idx.numel() <= 1000
        lengths.append(idx.size(1))
    assert lengths[0] > 2 * lengths[-1]
    # Batches are planned before shared prefixes, here short ones, are merged: allow 16 tokens.
    assert all(a >= b - 16 for a, b in itertools.pairwise(lengths))


def test_padding_changes_nothing(model, monkeypatch):
    """Padding rows to a multiple, as on a GPU, does not change their scores."""
    requests = random_requests(6)
    plain = sorted(score_all(model, requests))
    monkeypatch.setattr(scoring, "BATCH_LIMITS", {"cpu": (4096, 32)})
    padded = sorted(score_all(model, requests))
    for (i, scores), (j, same) in zip(plain, padded, strict=True):
        assert i == j
        assert [s.log_prob for s in scores] == pytest.approx([s.log_prob for s in same], abs=1e-4)


def test_request_is_the_text_split_in_two():
    """Context and continuation together are the tokens of the joined text. Whitespace between them
    goes to the continuation. A continuation without tokens is refused.
    """
    encode = TIKTOKEN.encode
    request = encode_request(GPT2_TOKENIZER, "One two ", ["three", " four"])
    texts = [[*request.context, *ids] for ids in request.continuations]
    assert request.context == encode("One two")
    assert texts == [encode("One two three"), encode("One two  four")]
    assert encode_request(GPT2_TOKENIZER, "", [" a"]) == Request([50256], [encode(" a")])
    with pytest.raises(ValueError, match="'' adds no tokens"):
        encode_request(GPT2_TOKENIZER, "One", [" two", ""])
