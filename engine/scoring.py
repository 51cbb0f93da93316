"""Score continuations by their log-likelihood. The continuations of a context are packed into one
row, so that prefixes they share are computed once.

The continuations form a tree below the context. The row lists its tokens in depth-first order: the
descendants of token j are at indices j + 1 to ends[j] - 1. So token i attends to its ancestors and
itself: to token j if j <= i < ends[j]. Take the context "The cat" and the continuations " sat up
straight", " sat down now" and " ran off":

    The - cat -+- sat -+- up
               |       +- down           The last token of each continuation is a target, but never
               +- ran                    an input, so it is not in the row.

    index         0    1    2    3    4    5
    token        The  cat  sat  up  down  ran
    position      0    1    2    3    3    2
    ends          6    6    5    4    5    6
"""

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engine.data import round_up
from engine.distributed import Distributed
from engine.tokenizer import Tokenizer
from model import GPT

# The most tokens in a batch, and the multiple to which rows are padded. On a CPU, matmuls reach
# full speed at 480 tokens. On a GPU, padding limits the number of different shapes.
BATCH_LIMITS = {"cpu": (480, 1)}
DEFAULT_BATCH_LIMITS = (32_768, 32)  # 32 rows of 1024
VOCAB_CHUNK = 2048  # compute this many columns of the logits at a time: they fit a CPU's cache

# Some or all continuations of a request, by their index in it.
ContinuationsByIndex = dict[int, Sequence[int]]


class Request(NamedTuple):
    """A context and its continuations, as token ids. None of them may be empty."""

    context: Sequence[int]
    continuations: list[Sequence[int]]


class Score(NamedTuple):
    """A continuation's log-probability in nats, and whether greedy decoding would produce it."""

    log_prob: float
    greedy: bool


def encode_request(tokenizer: Tokenizer, context: str, continuations: list[str]) -> Request:
    """Split the tokens of context + continuation as lm-eval does (`_encode_pair` and
    `loglikelihood` of 0.4.13). Whitespace at the end of the context moves to the continuation. An
    empty context is replaced by the BOS token. Raises ValueError if a continuation adds no tokens.
    """
    bos = [tokenizer.start_of_text]
    context_ids = tokenizer.encode(context.rstrip())
    request = Request(context_ids or bos, [])
    for continuation in continuations:
        ids = tokenizer.encode(context + continuation)
        if not context_ids and ids[:1] != bos:  # the text may begin with this token already
            ids = bos + ids
        if len(ids) <= len(request.context):
            raise ValueError(f"{continuation!r} adds no tokens to its context")
        request.continuations.append(ids[len(request.context) :])
    return request


class PackedRow(NamedTuple):
    """A context and the tree of its continuations. `tokens`, `positions` and `ends` are the input.
    Prediction p uses the output at index `sources[p]` of the row to predict the token id
    `targets[p]`. `predictions[i]` lists the predictions of continuation i of the request.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    sources: list[int]
    targets: list[int]
    predictions: dict[int, list[int]]


class PackedBatch(NamedTuple):
    """The inputs `idx`, `positions` and `ends`, all (B, T). Prediction n uses the output at index
    `sources[inverse[n]]` of the flattened idx to predict the token id `targets[n]`. `sources` (P)
    has no duplicates, so that the head runs only once per index.
    """

    idx: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    sources: torch.Tensor
    inverse: torch.Tensor
    targets: torch.Tensor


@torch.no_grad()
def compute_log_probs(model: GPT, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability in nats of each target of the batch (N), and whether it is the
    most likely token (N). Ties go to the lowest id, as in lm-eval. The logits are computed without
    autocast, which would round them.
    """
    index = torch.arange(batch.idx.size(1), device=batch.idx.device)
    # j <= i < ends[j], for each query i and key j of a row: (B, 1, T, T)
    mask = (index <= index[:, None]) & (index[:, None] < batch.ends[:, None, None])
    x = model.hidden(batch.idx, positions=batch.positions, mask=mask)
    weight = model.lm_head.weight[: model.config.vocab_size]
    x = x.flatten(0, 1)[batch.sources].to(weight.dtype)  # (P, C)
    target_logits = torch.zeros(len(batch.targets), device=x.device)
    chunks = []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(weight), VOCAB_CHUNK):
            logits = F.linear(x, weight[start : start + VOCAB_CHUNK]).float()  # (P, chunk)
            chunks.append((logits.logsumexp(-1), *logits.max(-1)))
            # The targets in this chunk get their logits. The clamp keeps the others in range.
            column, last = batch.targets - start, logits.size(1) - 1
            found = logits[batch.inverse, column.clamp(0, last)]
            target_logits = torch.where((column >= 0) & (column <= last), found, target_logits)
    sums, maxima, columns = map(torch.stack, zip(*chunks, strict=True))  # (n_chunks, P) each
    best = maxima.argmax(0, keepdim=True)  # on ties, max and argmax return the first
    best_ids = (best * VOCAB_CHUNK + columns.gather(0, best))[0]
    log_probs = target_logits - sums.logsumexp(0)[batch.inverse]
    return log_probs, batch.targets == best_ids[batch.inverse]


def pack_continuations(context: Sequence[int], continuations: ContinuationsByIndex) -> PackedRow:
    """Pack a context and its continuations into one row, as in the drawing at the top. Equal
    continuations share their predictions, so their scores are exactly equal.
    """
    n_context = len(context)
    tokens, positions = list(context), list(range(n_context))
    parents = list(range(-1, n_context - 1))  # for each token of the row, the index of its parent
    predictions: dict[int, list[int]] = {i: [] for i in continuations}
    # An edge of the tree is (index of the parent, token id). Predictions are numbered by edge.
    prediction_of: dict[tuple[int, int], int] = {}
    child_of: dict[tuple[int, int], int] = {}  # the index of that token
    # In sorted order, continuations with a common prefix follow each other, so appending each new
    # token to the row gives depth-first order.
    for i, ids in sorted(continuations.items(), key=lambda item: list(item[1])):
        parent = n_context - 1
        for depth, token in enumerate(ids):
            edge = (parent, token)
            predictions[i].append(prediction_of.setdefault(edge, len(prediction_of)))
            if depth == len(ids) - 1:  # the last token is never an input
                break
            if edge not in child_of:
                child_of[edge] = len(tokens)
                tokens.append(token)
                positions.append(n_context + depth)
                parents.append(parent)
            parent = child_of[edge]
    ends = list(range(1, len(tokens) + 1))
    for index in reversed(range(1, len(tokens))):  # children before their parents
        ends[parents[index]] = max(ends[parents[index]], ends[index])
    sources = [parent for parent, _ in prediction_of]
    targets = [token for _, token in prediction_of]
    return PackedRow(tokens, positions, ends, sources, targets, predictions)


def pack_request(request: Request, block_size: int) -> list[PackedRow]:
    """Pack a request into rows: one, unless long continuations truncate the context."""
    groups = group_by_context_length(request, block_size)
    return [pack_continuations(request.context[-n:], group) for n, group in groups.items()]


def group_by_context_length(request: Request, block_size: int) -> dict[int, ContinuationsByIndex]:
    """Group the continuations by how many tokens of the context fit in front of them. The context
    is truncated on the left. As in lm-eval, the last token of a continuation needs no space in
    block_size, because it is never an input.
    """
    groups: dict[int, ContinuationsByIndex] = {}
    for i, ids in enumerate(request.continuations):
        groups.setdefault(min(len(request.context), block_size + 1 - len(ids)), {})[i] = ids
    return groups


def plan_batches(
    requests: list[Request], block_size: int, batch_tokens: int, multiple: int
) -> list[list[int]]:
    """Group the indices of the requests into batches, longest first. A batch has at most
    `batch_tokens` tokens, including padding, unless it is a single longer request. The plan is the
    same on every rank.
    """
    sizes = []  # for each request: its number of rows, and an upper bound on their length
    for request in requests:
        groups = group_by_context_length(request, block_size)
        lengths = [n + sum(len(ids) - 1 for ids in g.values()) for n, g in groups.items()]
        sizes.append((len(groups), max(lengths)))
    batches: list[list[int]] = []
    rows_left = 0
    for i in sorted(range(len(requests)), key=lambda i: -sizes[i][1]):
        n_rows, length = sizes[i]
        if n_rows > rows_left:  # start a new batch; its first request is the longest
            batches.append([])
            rows_left = max(n_rows, batch_tokens // round_up(length, multiple))
        batches[-1].append(i)
        rows_left -= n_rows
    return batches


def collate(rows: list[PackedRow], multiple: int) -> PackedBatch:
    """Build a batch of CPU tensors. Rows are padded to a multiple of `multiple` tokens."""
    B, T = len(rows), round_up(max(len(row.tokens) for row in rows), multiple)
    idx, positions, ends = np.zeros((3, B, T), dtype=np.int64)
    # Padding attends to padding, because a fully masked row would give NaN. Tokens come before the
    # padding, so they do not attend to it.
    ends[:] = T
    for b, row in enumerate(rows):
        n = len(row.tokens)
        idx[b, :n], positions[b, :n], ends[b, :n] = row.tokens, row.positions, row.ends
    flat = np.concatenate([b * T + np.array(row.sources) for b, row in enumerate(rows)])
    sources, inverse = np.unique(flat, return_inverse=True)
    targets = np.concatenate([row.targets for row in rows])
    arrays = (idx, positions, ends, sources, inverse, targets)
    return PackedBatch(*map(torch.from_numpy, arrays))


def score_batch(model: GPT, requests: list[Request], multiple: int) -> list[list[Score]]:
    """Score the continuations of each request, in one forward pass."""
    block_size, device = model.config.block_size, model.lm_head.weight.device
    packed = [(n, row) for n, r in enumerate(requests) for row in pack_request(r, block_size)]
    batch = collate([row for _, row in packed], multiple)
    batch = PackedBatch(*(tensor.to(device) for tensor in batch))
    log_probs, greedy = (tensor.cpu().numpy() for tensor in compute_log_probs(model, batch))
    scores: list[dict[int, Score]] = [{} for _ in requests]
    offset = 0  # index in the batch of the first prediction of the row
    for n, row in packed:
        for i, numbers in row.predictions.items():
            found = offset + np.array(numbers)
            log_prob = float(log_probs[found].sum(dtype=float))
            scores[n][i] = Score(log_prob, bool(greedy[found].all()))
        offset += len(row.targets)
    return [[by_index[i] for i in sorted(by_index)] for by_index in scores]


def score(
    model: GPT, requests: list[Request], dist: Distributed, done: Container[int] = ()
) -> Iterator[list[tuple[int, list[Score]]]]:
    """Yield the scores of this rank's share of the requests, with their indices, a batch at a time.
    Skip batches whose requests are all `done`.

    Every rank runs the same number of forward passes, because a sharded model needs all ranks in
    each. In the last round, a rank with no batch left computes another rank's batch again, and
    yields an empty list.
    """
    batch_tokens, multiple = BATCH_LIMITS.get(dist.device.type, DEFAULT_BATCH_LIMITS)
    batches = plan_batches(requests, model.config.block_size, batch_tokens, multiple)
    batches = [batch for batch in batches if any(i not in done for i in batch)]
    for first in range(0, len(batches), dist.world_size):
        is_mine = first + dist.rank < len(batches)
        batch = batches[first + dist.rank if is_mine else first]
        scores = score_batch(model, [requests[i] for i in batch], multiple)
        yield list(zip(batch, scores, strict=True)) if is_mine else []
