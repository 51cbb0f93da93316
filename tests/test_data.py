import itertools
import threading
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import on_cpu_and_gpu

from engine.data import Batch, Prefetcher, PretrainingData, validation_batches
from engine.shards import TokenShards


def make_data(shards: TokenShards, batch_size: int, rows: int, **options: int) -> PretrainingData:
    """Make training data with windows of 8 tokens, `rows` of them per step."""
    sizes = {"block_size": 8, "batch_size": batch_size, "total_batch_size": 8 * rows}
    return PretrainingData(shards, **sizes, **options)


def micro_batches(data: PretrainingData, steps: range) -> list[Batch]:
    """Read all batches of one rank in these steps, in order."""
    numbers = range(1, data.grad_accum_steps + 1)
    return [data.micro_batch(step, micro_step) for step in steps for micro_step in numbers]


def collect_targets(batches: Iterable[Batch]) -> np.ndarray:
    """Return all targets in the batches, in order."""
    targets = np.concatenate([targets.numpy().ravel() for _, targets, _ in batches])
    return targets[targets != -100]


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 10, 16, 17, 18, 100, 129, 1000])
def test_each_token_once_per_epoch(make_shards, n_tokens):
    """An epoch predicts each token but the first exactly once, whatever the number of tokens."""
    shards = TokenShards(make_shards(n_tokens // 2, n_tokens - n_tokens // 2), "train")
    data = make_data(shards, 1, 1, seed=3)
    for epochs in (1, 2):
        targets = collect_targets(micro_batches(data, range(1, epochs * data.n_rows + 1)))
        assert np.bincount(targets).tolist() == [0] + [epochs] * (n_tokens - 1)


def test_targets_follow_their_inputs(make_shards):
    """Each target is the token after its input, also across shards. targets_in_step counts them."""
    data = make_data(TokenShards(make_shards(5, 1, 30, 41), "train"), 3, 6, seed=1)
    for step in range(1, 12):
        batches = micro_batches(data, range(step, step + 1))
        for idx, targets, _ in batches:
            valid = targets != -100
            assert (targets[valid] == idx[valid] + 1).all()
        assert data.targets_in_step(step) == len(collect_targets(batches))


def test_a_step_does_not_depend_on_ranks_or_batch_size(make_shards):
    """A step has the same windows in the same order on 1 to 4 ranks and at every batch_size."""
    shards = TokenShards(make_shards(400, 601), "train")
    seen = set()
    for world_size, batch_size in itertools.product((1, 2, 3, 4), (1, 2, 3, 6)):
        if 24 % (world_size * batch_size):
            continue
        options = {"seed": 5, "world_size": world_size}
        ranks = [make_data(shards, batch_size, 24, rank=i, **options) for i in range(world_size)]
        by_rank = [micro_batches(rank, range(1, 8)) for rank in ranks]
        batches = itertools.chain(*zip(*by_rank, strict=True))
        rows = [tuple(row) for batch in batches for row in batch.idx.tolist()]
        seen.add((*rows, *(ranks[0].targets_in_step(step) for step in range(1, 8))))
    assert len(seen) == 1


def test_order_is_seeded_and_new_each_epoch(make_shards):
    """The order is shuffled. It depends on the seed, and every epoch has a new one."""
    shards = TokenShards(make_shards(801), "train")

    def order(seed: int, epoch: int) -> list[int]:
        data = make_data(shards, 1, 1, seed=seed)
        steps = range(epoch * 100 + 1, epoch * 100 + 101)
        return [data.micro_batch(step, 1).idx[0, 0].item() for step in steps]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != sorted(order(1, 0))
    assert sorted(order(1, 0)) == sorted(order(1, 1))  # the same windows


def test_a_data_set_smaller_than_a_batch(make_shards):
    """If a step is larger than the dataset, it has several epochs instead of hanging."""
    data = make_data(TokenShards(make_shards(9), "train"), 16, 32, seed=0)
    assert (data.micro_batch(1, 2).idx.numpy() == np.arange(8)).all()


@pytest.mark.parametrize("eval_tokens", [1, 50, 64, 199, 10_000])
def test_ranks_evaluate_each_token_once(make_shards, eval_tokens):
    """Together, ranks predict each eval token once. All have the same number of batches."""
    shards = TokenShards(make_shards(200), "train")
    for world_size, batch_size in itertools.product((1, 2, 3), (1, 4, 7)):
        sizes = {"block_size": 8, "batch_size": batch_size, "eval_tokens": eval_tokens}
        options = {**sizes, "world_size": world_size}
        by_rank = [list(validation_batches(shards, **options, rank=i)) for i in range(world_size)]
        assert len({len(batches) for batches in by_rank}) == 1
        expected = np.arange(1, min(eval_tokens, 199) + 1)
        assert sorted(collect_targets(itertools.chain(*by_rank))) == expected.tolist()


def test_batch_sizes_that_do_not_divide(make_shards):
    """If the sizes do not divide evenly, the error suggests the next smaller batch_size that
    fits and says that the curve stays the same. If none fits, it suggests a total_batch_size.
    """
    shards = TokenShards(make_shards(100), "train")
    with pytest.raises(ValueError, match=r"use batch_size 5, .* same loss curve"):
        make_data(shards, 7, 40, seed=0, world_size=4)
    make_data(shards, 5, 40, seed=0, world_size=4)
    with pytest.raises(ValueError, match=r"= 96; use total_batch_size 1056$"):
        make_data(shards, 3, 125, seed=0, world_size=4)


def test_a_small_evaluation_is_not_padded(make_shards):
    """Six windows make a batch of six rows, not of batch_size. All ranks have the same shape."""
    shards = TokenShards(make_shards(200), "train")
    sizes = {"block_size": 8, "batch_size": 64, "eval_tokens": 48}
    assert [b.idx.shape for b in validation_batches(shards, **sizes)] == [(6, 8)]
    for rank in range(4):
        (batch,) = validation_batches(shards, **sizes, rank=rank, world_size=4)
        assert batch.idx.shape == (2, 8)
    # For a compiled model, batches have the shape of training.
    (batch,) = validation_batches(shards, **sizes, full_batches=True)
    assert batch.idx.shape == (64, 8)


@on_cpu_and_gpu
def test_prefetched_batches_are_the_ones_asked_for(shards, dist):
    """The prefetcher returns the requested batch, on the device, whatever the order of requests and
    even if one is repeated. A background thread prepares batches. Errors reach the caller.
    """
    calls = []  # (step, micro_step, thread) of each call to `micro_batch`

    class Watched(PretrainingData):
        def micro_batch(self, step, micro_step):
            calls.append((step, micro_step, threading.current_thread()))
            if step == 9:
                raise OSError("the disk is gone")
            return super().micro_batch(step, micro_step)

    data = Watched(shards, block_size=16, batch_size=4, total_batch_size=192, seed=1)
    batches = Prefetcher(data, dist.device)
    for asked in [(1, 1), (1, 2), (1, 3), (2, 1), (7, 2), (7, 2)]:
        batch = batches(*asked)
        assert batch.idx.device == batch.targets.device == dist.device
        idx, targets, positions = (t if t is None else t.cpu() for t in batch)
        expected = PretrainingData.micro_batch(data, *asked)
        assert torch.equal(idx, expected.idx)
        assert torch.equal(targets, expected.targets)
        is_target = (targets != -100).flatten()
        assert (positions is None) == bool(is_target.all())
        assert positions is None or torch.equal(positions, is_target.nonzero()[:, 0])
    prepared = [call[:2] for call in calls]
    assert prepared[:5] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]  # (2, 2) was not asked for
    assert threading.main_thread() not in [thread for *_, thread in calls]
    with pytest.raises(OSError, match="the disk is gone"):
        batches(9, 1)
    batches(1, 1)
