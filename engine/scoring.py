"""Log-likelihoods of continuations, packed into rows that share their context.

A row holds a context and its continuations. A prefix that continuations share is stored once, and
the tokens that follow a token come right after it: token i attends to token j if j <= i < ends[j].
"""

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engine.distributed import Distributed
from engine.tokenizer import Tokenizer
from model import GPT

# Tokens in a batch, and the multiple that rows are padded to. A CPU's matrix products reach full
# speed at 480 tokens; on an accelerator it is 32 rows of 1024, padded so that few shapes occur.
BATCH_SHAPE = {"cpu": (480, 1)}
BATCH_SHAPE_ELSEWHERE = (32_768, 32)
HEAD_COLUMNS = 2048  # vocabulary entries per matrix product: the logits stay in a CPU's cache

Continuations = dict[int, Sequence[int]]  # token ids by their index in the request


class Request(NamedTuple):
    """Token ids: a context of at least one, and its continuations, each of at least one."""

    context: Sequence[int]
    continuations: list[Sequence[int]]


class Score(NamedTuple):
    """A continuation's log-probability in nats, and whether greedy decoding would produce it."""

    log_prob: float
    greedy: bool


def encode_request(tokenizer: Tokenizer, context: str, continuations: list[str]) -> Request:
    """Split the tokens of context + continuation as lm-eval does (`_encode_pair` and
    `loglikelihood` of 0.4.13). Whitespace at the end of the context moves to the continuation, and
    an empty context becomes the start of a text. ValueError for a continuation without tokens.
    """
    stripped = context.rstrip()
    space = context[len(stripped) :]
    context_ids, start = tokenizer.encode(stripped), [tokenizer.start_of_text]
    request = Request(context_ids or start, [])
    for continuation in continuations:
        ids = tokenizer.encode(stripped + space + continuation)
        if not context_ids and ids[:1] != start:
            ids = start + ids
        if len(ids) <= len(request.context):
            raise ValueError(f"{continuation!r} adds no tokens to its context")
        request.continuations.append(ids[len(request.context) :])
    return request


class PackedRow(NamedTuple):
    """Prediction p is of token `targets[p]` after the row's token `previous[p]`; `members[i]` are
    the predictions of the request's continuation i.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    previous: list[int]
    targets: list[int]
    members: dict[int, list[int]]


class PackedBatch(NamedTuple):
    """Token ids `idx`, their `positions` and `ends`, all (B, T). Token `targets[n]` follows token
    `previous[inverse[n]]` of the flat `idx`; `previous` (P) has no duplicates.
    """

    idx: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    previous: torch.Tensor
    inverse: torch.Tensor
    targets: torch.Tensor


@torch.no_grad()
def compute_log_probs(model: GPT, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N) in nats of `batch.targets`, and whether each target is the most likely
    token (N). Autocast does not round the logits.
    """
    column = torch.arange(batch.idx.size(1), device=batch.idx.device)
    mask = (column <= column[:, None]) & (column[:, None] < batch.ends[:, None, None])
    x = model.hidden(batch.idx, positions=batch.positions, mask=mask)  # mask: (B, 1, T, T)
    x = x.flatten(0, 1)[batch.previous]  # (P, C)
    weight = model.lm_head.weight[: model.config.vocab_size]
    x = x.to(weight.dtype)
    target_logits = torch.zeros(len(batch.targets), device=x.device)
    sums, maxima = [], []
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(weight), HEAD_COLUMNS):
            logits = F.linear(x, weight[start : start + HEAD_COLUMNS]).float()
            sums.append(logits.logsumexp(-1))
            maxima.append(logits.amax(-1))
            column, last = batch.targets - start, logits.size(1) - 1
            found = logits[batch.inverse, column.clamp(0, last)]
            target_logits = torch.where((column >= 0) & (column <= last), found, target_logits)
    log_sum, maximum = torch.stack(sums).logsumexp(0), torch.stack(maxima).amax(0)
    return target_logits - log_sum[batch.inverse], target_logits == maximum[batch.inverse]


def pack_continuations(context: Sequence[int], continuations: Continuations) -> PackedRow:
    """Equal continuations share their predictions, so that their scores are exactly equal."""
    C = len(context)
    tokens, positions, ends = list(context), list(range(C)), [0] * C
    index_of: dict[tuple[int, int], int] = {}  # in the row, by previous index and token
    predictions: dict[tuple[int, int], int] = {}
    members: dict[int, list[int]] = {i: [] for i in continuations}
    # In sorted order each continuation shares its longest prefix with the one before it.
    for i, ids in sorted(continuations.items(), key=lambda item: list(item[1])):
        previous, path = C - 1, []
        for depth, token in enumerate(ids, start=1):
            edge = (previous, token)
            members[i].append(predictions.setdefault(edge, len(predictions)))
            if depth == len(ids):  # nothing is predicted after the last token
                break
            if edge not in index_of:
                index_of[edge] = len(tokens)
                tokens.append(token)
                positions.append(C + depth - 1)
                ends.append(0)
            previous = index_of[edge]
            path.append(previous)
        for index in path:
            ends[index] = len(tokens)
    ends[:C] = [len(tokens)] * C
    sources, targets = [list(column) for column in zip(*predictions, strict=True)]
    return PackedRow(tokens, positions, ends, sources, targets, members)


def pack_request(request: Request, block_size: int) -> list[PackedRow]:
    """The rows of a request: one, unless its continuations leave room for different contexts."""
    groups = group_by_context(request, block_size)
    return [pack_continuations(request.context[-n:], group) for n, group in groups.items()]


def group_by_context(request: Request, block_size: int) -> dict[int, Continuations]:
    """The continuations by the number of context tokens that each leaves room for; the context is
    truncated on the left. The last token is only predicted, so it takes no room (as in lm-eval).
    """
    groups: dict[int, Continuations] = {}
    for i, ids in enumerate(request.continuations):
        groups.setdefault(min(len(request.context), block_size + 1 - len(ids)), {})[i] = ids
    return groups


def plan_batches(
    requests: list[Request], block_size: int, batch_tokens: int, multiple: int
) -> list[list[int]]:
    """The requests' indices, longest first, in batches of at most `batch_tokens` tokens with
    padding, or of a single request. The plan is the same on every rank.
    """
    sizes = []  # rows, and tokens in the longest before shared prefixes are merged
    for request in requests:
        groups = group_by_context(request, block_size)
        lengths = [n + sum(len(ids) - 1 for ids in g.values()) for n, g in groups.items()]
        sizes.append((len(groups), max(lengths)))
    batches: list[list[int]] = []
    rows_left = 0
    for i in sorted(range(len(requests)), key=lambda i: -sizes[i][1]):
        rows, length = sizes[i]
        if rows > rows_left:
            batches.append([])
            rows_left = max(rows, batch_tokens // round_up(length, multiple))
        batches[-1].append(i)
        rows_left -= rows
    return batches


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def collate(rows: list[PackedRow], multiple: int) -> PackedBatch:
    """The rows as a batch of CPU tensors, padded to a multiple of `multiple` tokens."""
    B, T = len(rows), round_up(max(len(row.tokens) for row in rows), multiple)
    idx, positions, ends = np.zeros((3, B, T), dtype=np.int64)
    ends[:] = T  # only later padding attends to padding
    for b, row in enumerate(rows):
        n = len(row.tokens)
        idx[b, :n], positions[b, :n], ends[b, :n] = row.tokens, row.positions, row.ends
    flat = np.concatenate([b * T + np.array(row.previous) for b, row in enumerate(rows)])
    previous, inverse = np.unique(flat, return_inverse=True)
    targets = np.concatenate([row.targets for row in rows])
    arrays = (idx, positions, ends, previous, inverse, targets)
    return PackedBatch(*map(torch.from_numpy, arrays))


def score_rows(
    model: GPT, rows: list[PackedRow], device: torch.device, multiple: int
) -> list[dict[int, Score]]:
    """The scores of each row's continuations."""
    batch = PackedBatch(*(tensor.to(device) for tensor in collate(rows, multiple)))
    log_probs, greedy = (tensor.cpu().numpy() for tensor in compute_log_probs(model, batch))
    ends = np.cumsum([len(row.targets) for row in rows])[:-1]
    return [
        {i: Score(float(p[m].sum(dtype=float)), bool(g[m].all())) for i, m in row.members.items()}
        for row, p, g in zip(rows, np.split(log_probs, ends), np.split(greedy, ends), strict=True)
    ]


def score(
    model: GPT, requests: list[Request], dist: Distributed, done: Container[int] = ()
) -> Iterator[list[tuple[int, list[Score]]]]:
    """Yield the scores of this rank's share of the requests with their indices, a batch at a time.
    Batches whose requests are all `done` are skipped. Every rank calls the model and yields equally
    often, in the end perhaps an empty batch: sharded models are gathered by all ranks together.
    """
    block_size = model.config.block_size
    batch_tokens, multiple = BATCH_SHAPE.get(dist.device.type, BATCH_SHAPE_ELSEWHERE)
    batches = plan_batches(requests, block_size, batch_tokens, multiple)
    batches = [batch for batch in batches if any(i not in done for i in batch)]
    for first in range(0, len(batches), dist.world_size):
        is_mine = first + dist.rank < len(batches)
        batch = batches[first + dist.rank if is_mine else first]
        packed = [(i, row) for i in batch for row in pack_request(requests[i], block_size)]
        scores = score_rows(model, [row for _, row in packed], dist.device, multiple)
        found: dict[int, dict[int, Score]] = {i: {} for i in batch}
        for (i, _), row_scores in zip(packed, scores, strict=True):
            found[i] |= row_scores
        scored = [(i, [by_index[j] for j in sorted(by_index)]) for i, by_index in found.items()]
        yield scored if is_mine else []
