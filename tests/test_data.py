import itertools

import numpy as np
import pytest

from engine.data import PretrainingData, validation_batches
from engine.shards import TokenShards


def make_data(
    shards: TokenShards, batch_size: int, total_batch_size: int, **options: int
) -> PretrainingData:
    sizes = {"batch_size": batch_size, "total_batch_size": total_batch_size}
    return PretrainingData(shards, block_size=8, **sizes, **options)


def predicted(data: PretrainingData, steps: range) -> np.ndarray:
    """All targets of one rank in these steps, in order."""
    batches = [
        data.micro_batch(step, micro_step)
        for step in steps
        for micro_step in range(1, data.grad_accum_steps + 1)
    ]
    targets = np.concatenate([targets.numpy().ravel() for _, targets, _ in batches])
    return targets[targets != -100]


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 10, 16, 17, 18, 100, 129, 1000])
def test_each_token_once_per_epoch(make_shards, n_tokens):
    """For any number of tokens, two epochs predict each token but the first exactly twice."""
    shards = TokenShards(make_shards(*[n_tokens // 2, n_tokens - n_tokens // 2]), "train")
    data = make_data(shards, 1, 8, seed=3)
    for epochs in (1, 2):
        counts = np.bincount(predicted(data, range(1, epochs * data.n_rows + 1)))
        assert counts.tolist() == [0] + [epochs] * (n_tokens - 1)


def test_targets_follow_their_inputs(make_shards):
    """Each target is the token after its input, also across shard borders."""
    data = make_data(TokenShards(make_shards(5, 1, 30, 64), "train"), 2, 32, seed=0)
    for step in range(1, 9):
        for micro_step in (1, 2):
            idx, targets, _ = data.micro_batch(step, micro_step)
            valid = targets != -100
            assert (targets[valid] == idx[valid] + 1).all()


def test_global_step_does_not_depend_on_the_machine(make_shards):
    """For 1 to 4 ranks and every batch_size that divides, a step has the same windows in the same
    order, and the same number of targets.
    """
    shards = TokenShards(make_shards(400, 601), "train")
    seen = set()
    for world_size, batch_size in itertools.product((1, 2, 3, 4), (1, 2, 3, 6)):
        if 24 % (world_size * batch_size):
            continue
        ranks = [
            make_data(shards, batch_size, 24 * 8, seed=5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        ids = [
            rank.micro_batch(step, micro_step)[0].tolist()
            for step in range(1, 8)
            for micro_step in range(1, ranks[0].grad_accum_steps + 1)
            for rank in ranks
        ]
        rows = tuple(tuple(row) for batch in ids for row in batch)
        seen.add((rows, tuple(ranks[0].targets_in_step(step) for step in range(1, 8))))
    assert len(seen) == 1


def test_targets_in_step_are_counted(make_shards):
    """targets_in_step equals the number of targets in the step's batches."""
    data = make_data(TokenShards(make_shards(77), "train"), 3, 48, seed=1)
    for step in range(1, 12):
        assert data.targets_in_step(step) == len(predicted(data, range(step, step + 1)))


def test_order_is_seeded_and_new_each_epoch(make_shards):
    """The order depends on the seed, differs between epochs and is shuffled."""
    shards = TokenShards(make_shards(801), "train")

    def order(seed: int, epoch: int) -> list[int]:
        data = make_data(shards, 1, 8, seed=seed)
        return [
            data.micro_batch(s, 1)[0][0, 0].item()
            for s in range(epoch * 100 + 1, epoch * 100 + 101)
        ]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != sorted(order(1, 0)) == sorted(order(1, 1))


def test_a_data_set_smaller_than_a_batch(make_shards):
    """A tiny dataset fills a large step with several epochs instead of hanging."""
    data = make_data(TokenShards(make_shards(9), "train"), 16, 256, seed=0)
    assert (data.micro_batch(1, 2).idx.numpy() == np.arange(8)).all()


@pytest.mark.parametrize("eval_tokens", [1, 50, 64, 199, 10_000])
def test_evaluation_is_the_same_tokens_on_any_machine(make_shards, eval_tokens):
    """The first eval_tokens are predicted once each, for any number of ranks and any batch size;
    ranks get equally many batches.
    """
    shards = TokenShards(make_shards(200), "train")
    for world_size, batch_size in itertools.product((1, 2, 3), (1, 4, 7)):
        batches = [
            list(
                validation_batches(
                    shards,
                    block_size=8,
                    batch_size=batch_size,
                    eval_tokens=eval_tokens,
                    rank=rank,
                    world_size=world_size,
                )
            )
            for rank in range(world_size)
        ]
        assert len({len(b) for b in batches}) == 1
        targets = np.concatenate([t.numpy().ravel() for b in batches for _, t, _ in b])
        expected = np.arange(1, min(eval_tokens, 199) + 1)
        assert sorted(targets[targets != -100]) == expected.tolist()


def test_batch_sizes_that_do_not_divide(make_shards):
    """If the sizes do not divide, the error names a total_batch_size that does."""
    shards = TokenShards(make_shards(100), "train")
    with pytest.raises(ValueError, match="= 96; 1056 is one"):
        make_data(shards, 3, 1000, seed=0, world_size=4)


def test_a_batch_size_that_fits_is_named(make_shards):
    """If only batch_size does not divide, the error names the largest smaller one that does, with
    which the curve is the same.
    """
    shards = TokenShards(make_shards(100), "train")
    with pytest.raises(ValueError, match="batch_size 5 fits, and the loss curve is the same"):
        make_data(shards, 7, 8 * 4 * 10, seed=0, world_size=4)
    make_data(shards, 5, 8 * 4 * 10, seed=0, world_size=4)


def test_a_small_evaluation_is_not_padded(make_shards):
    """Six windows make one batch of six rows, not of batch_size; ranks have equal shapes."""
    shards = TokenShards(make_shards(200), "train")
    sizes = {"block_size": 8, "batch_size": 64, "eval_tokens": 48}
    assert [b.idx.shape for b in validation_batches(shards, **sizes)] == [(6, 8)]
    for rank in range(4):
        (batch,) = validation_batches(shards, **sizes, rank=rank, world_size=4)
        assert batch.idx.shape == (2, 8)
    # A compiled model gets the shape of training.
    assert [b.idx.shape for b in validation_batches(shards, **sizes, one_shape=True)] == [(64, 8)]
