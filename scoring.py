"""A file of its own because every measurement asks a model the same: how likely continuations are.

A context and its continuations are one row of tokens, each common beginning in it once: a tree,
written so that a token's descendants follow it. Token i sees token j if j <= i < ends[j].
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from tokenizer import END_OF_TEXT_ID, get_tokenizer

# Tokens in a batch: a CPU's matrix products are at full speed from here on, and on an accelerator
# 32 rows of 1024. Rows are padded to a multiple there, so that few shapes occur.
BATCH_TOKENS, LENGTH_MULTIPLE = {"cpu": 480}, {"cpu": 1}
BATCH_TOKENS_ELSEWHERE, LENGTH_MULTIPLE_ELSEWHERE = 32_768, 32


class Request(NamedTuple):
    """Token ids: a context of one or more, and what may follow it, each of one or more."""

    context: Sequence[int]
    continuations: list[Sequence[int]]


class Score(NamedTuple):
    """Of a continuation: its summed log-probability in nats, and whether each of its tokens is the
    likeliest.
    """

    log_prob: float
    greedy: bool


def encode(text: str) -> list[int]:
    """Token ids; `<|endoftext|>` in the text is one, as in Hugging Face's tokenizer."""
    return get_tokenizer().encode(text, allowed_special="all")


def encode_request(context: str, continuations: list[str]) -> Request:
    """Split the tokens of context + continuation as lm-eval does (`_encode_pair` and
    `loglikelihood` of 0.4.13): trailing white space of the context belongs to the continuation,
    which is what follows as many tokens as the context alone has; an empty context is
    `<|endoftext|>`. ValueError for a continuation without tokens.
    """
    stripped = context.rstrip()
    space = context[len(stripped) :]
    context_ids = encode(stripped)
    pairs = []
    for continuation in continuations:
        ids = encode(stripped + space + continuation)
        if not context_ids and ids[:1] != [END_OF_TEXT_ID]:
            ids = [END_OF_TEXT_ID, *ids]
        pairs.append(ids)
    context_ids = context_ids or [END_OF_TEXT_ID]
    request = Request(context_ids, [ids[len(context_ids) :] for ids in pairs])
    if empty := [c for c, ids in zip(continuations, request.continuations, strict=True) if not ids]:
        raise ValueError(f"{empty[0]!r} has no tokens of its own after its context")
    return request


class Tree(NamedTuple):
    """A row of a batch. Prediction p is of token `targets[p]` after the row's token `parents[p]`;
    `members` are the predictions that make up each continuation.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    parents: list[int]
    targets: list[int]
    members: list[list[int]]


def grow_tree(context: Sequence[int], continuations: list[Sequence[int]]) -> Tree:
    """The tree of a context and its continuations. Equal continuations share their predictions, so
    they come out exactly as likely as each other.
    """
    C = len(context)
    tokens, positions, ends = list(context), list(range(C)), [0] * C
    children: dict[tuple[int, int], int] = {}  # by parent and token
    predictions: dict[tuple[int, int], int] = {}
    members: list[list[int]] = [[] for _ in continuations]
    # In sorted order each continuation branches off the one before, so descendants stay together.
    for i in sorted(range(len(continuations)), key=lambda i: list(continuations[i])):
        node, path = C - 1, []
        for depth, token in enumerate(continuations[i], start=1):
            edge = (node, token)
            members[i].append(predictions.setdefault(edge, len(predictions)))
            if depth == len(continuations[i]):  # nothing is predicted after the last token
                break
            if edge not in children:
                children[edge] = len(tokens)
                tokens.append(token)
                positions.append(C + depth - 1)
                ends.append(0)
            node = children[edge]
            path.append(node)
        for node in path:
            ends[node] = len(tokens)
    ends[:C] = [len(tokens)] * C
    parents, targets = [list(column) for column in zip(*predictions, strict=True)]
    return Tree(tokens, positions, ends, parents, targets, members)


def plant(request: Request, block_size: int) -> list[tuple[list[int], Tree]]:
    """The trees of a request, each with the indices of its continuations. There is one unless the
    text is too long for the model, when continuations of different lengths leave room for different
    amounts of the end of the context (lm-eval's cut).
    """
    context, continuations = request
    return [
        (members, grow_tree(context[-n:], [continuations[i] for i in members]))
        for n, members in context_groups(request, block_size).items()
    ]


def context_groups(request: Request, block_size: int) -> dict[int, list[int]]:
    """The indices of a request's continuations by the number of context tokens that they keep. The
    last token of a continuation is only predicted, so a text may be one longer than the window.
    """
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(request.continuations):
        groups.setdefault(min(len(request.context), block_size + 1 - len(ids)), []).append(i)
    return groups


def plan_batches(
    requests: list[Request], block_size: int, batch_tokens: int, multiple: int
) -> list[list[int]]:
    """The requests' indices in batches of at most `batch_tokens` tokens with padding, or of one
    request, the longest first. It is the same whoever computes which of them.
    """
    sizes = []  # rows and tokens in each, before common beginnings are joined
    for request in requests:
        groups = context_groups(request, block_size)
        lengths = [
            n + sum(len(request.continuations[i]) - 1 for i in members)
            for n, members in groups.items()
        ]
        sizes.append((len(groups), max(lengths)))
    batches: list[list[int]] = []
    rows_left = 0
    for i in sorted(range(len(requests)), key=lambda i: -sizes[i][1]):
        rows, length = sizes[i][0], round_up(sizes[i][1], multiple)
        if rows > rows_left:
            batches.append([])
            rows_left = max(rows, batch_tokens // length)
        batches[-1].append(i)
        rows_left -= rows
    return batches


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def collate(trees: list[Tree], multiple: int) -> tuple[np.ndarray, ...]:
    """The arguments of `GPT.log_probs` but for the mask, for which it has `ends` (B, T)."""
    longest = max(len(tree.tokens) for tree in trees)
    B, T = len(trees), round_up(longest, multiple)
    idx, positions, ends = np.zeros((3, B, T), dtype=np.int64)
    ends[:] = T  # of the padding, which is seen by nothing but later padding
    for b, tree in enumerate(trees):
        n = len(tree.tokens)
        idx[b, :n], positions[b, :n], ends[b, :n] = tree.tokens, tree.positions, tree.ends
    parents = np.concatenate([b * T + np.array(tree.parents) for b, tree in enumerate(trees)])
    nodes, which = np.unique(parents, return_inverse=True)
    targets = np.concatenate([tree.targets for tree in trees])
    return idx, positions, ends, nodes, which, targets


@torch.no_grad()
def score_trees(model: GPT, trees: list[Tree], device: torch.device) -> list[list[Score]]:
    """The scores of the continuations of each tree."""
    multiple = LENGTH_MULTIPLE.get(device.type, LENGTH_MULTIPLE_ELSEWHERE)
    arrays = collate(trees, multiple)
    idx, positions, ends, *predictions = (torch.from_numpy(a).to(device) for a in arrays)
    column = torch.arange(idx.size(1), device=device)
    mask = (column <= column[:, None]) & (column[:, None] < ends[:, None, None])  # (B, 1, T, T)
    log_probs, greedy = (
        t.cpu().numpy() for t in model.log_probs(idx, positions, mask, *predictions)
    )
    scores, start = [], 0
    for tree in trees:
        chosen = [start + np.array(members) for members in tree.members]
        scores.append(
            [Score(float(log_probs[c].sum(dtype=float)), bool(greedy[c].all())) for c in chosen]
        )
        start += len(tree.targets)
    return scores


def score(
    model: GPT,
    requests: list[Request],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[tuple[int, list[Score]]]]:
    """Yield the scores of this rank's share of the requests, batch by batch, by their indices;
    batches of which all are `done` are left out. Every rank calls the model equally often, as
    sharded models need it.
    """
    block_size = model.config.block_size
    batches = plan_batches(
        requests,
        block_size,
        BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE),
        LENGTH_MULTIPLE.get(device.type, LENGTH_MULTIPLE_ELSEWHERE),
    )
    batches = [batch for batch in batches if not done.issuperset(batch)]
    for first in range(0, len(batches), world_size):
        mine = first + rank < len(batches)
        batch = batches[first + rank if mine else first]
        planted = [(i, *pair) for i in batch for pair in plant(requests[i], block_size)]
        scores = score_trees(model, [tree for _, _, tree in planted], device)
        if not mine:
            continue
        found: dict[int, dict[int, Score]] = {i: {} for i in batch}
        for (i, members, _), tree_scores in zip(planted, scores, strict=True):
            found[i] |= zip(members, tree_scores, strict=True)
        yield [(i, [by_index[j] for j in sorted(by_index)]) for i, by_index in found.items()]
