import itertools
import json
import struct

import numpy as np
import pytest

from engine.data import (
    PretrainingData,
    TokenShards,
    open_shard,
    validation_batches,
    write_manifest,
    write_shard,
)


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
        counts = np.bincount(predicted(data, range(1, epochs * data.n_windows + 1)))
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


def test_reads_llmc_shards(tmp_path):
    """An llm.c .bin, written here field by field, reads as its tokens; damage is reported."""
    tokens = np.array([50256, 1, 2, 65535], dtype=np.uint16)
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    file = tmp_path / "fineweb_train_000001.bin"
    file.write_bytes(header + tokens.tobytes())
    assert open_shard(file).tolist() == tokens.tolist()
    assert len(TokenShards(tmp_path, "train")) == 4
    file.write_bytes(header + tokens.tobytes()[:-2])
    with pytest.raises(ValueError, match="holds 3 tokens, its header says 4"):
        open_shard(file)
    file.write_bytes(struct.pack("<256i", 1, *[0] * 255))
    with pytest.raises(ValueError, match="expected magic 20240520"):
        open_shard(file)


def test_shards_are_plain_npy(tmp_path):
    """Shards are plain NumPy files of uint16, as in build-nanogpt."""
    entry = write_shard(tmp_path / "edu_train_000000.npy", np.array([50256, 7]))
    tokens = np.load(tmp_path / "edu_train_000000.npy")
    assert (tokens.dtype, tokens.tolist(), entry["tokens"]) == (np.uint16, [50256, 7], 2)


def test_damaged_and_missing_shards_are_named(make_shards):
    """A truncated, replaced or missing shard ends in an error with its name and the remedy."""
    folder = make_shards(50, 50)
    file = folder / "x_train_000001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(
        ValueError, match=r"x_train_000001.npy is truncated.*prepare the data again"
    ):
        TokenShards(folder, "train")
    np.save(file, np.zeros(49, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"holds 49 tokens, manifest\.json says 50"):
        TokenShards(folder, "train")
    np.save(file, np.zeros(50, dtype=np.int64))
    with pytest.raises(ValueError, match="expected one dimension of uint16"):
        TokenShards(folder, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"x_train_000001\.npy is missing"):
        TokenShards(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TokenShards(folder, "train")


def test_splits_are_recognized_by_the_end_of_the_name(make_shards, tmp_path):
    """The word val elsewhere in a file name does not make it validation data, with or without a
    manifest.
    """
    folder = make_shards(40)
    (folder / "x_train_000000.npy").rename(folder / "my_val_set_train_000000.npy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "my_val_set_train_000000.npy"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        assert len(TokenShards(folder, "train")) == 40
        with pytest.raises(FileNotFoundError, match="no val shards"):
            TokenShards(folder, "val")
        (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "my_val_set_train_000000.npy").rename(folder / "shakespeare_val.npy")
    assert len(TokenShards(folder, "val")) == 40


def test_every_byte_is_checked_before_a_run(make_shards):
    """A flipped bit, a token that GPT-2 does not have and an incomplete preparation are errors;
    other shards have another fingerprint.
    """
    folder = make_shards(50, 50)
    fingerprint = TokenShards(folder, "train", verify=True).fingerprint
    file = folder / "x_train_000001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match=r"x_train_000001.npy has changed since it was written"):
        TokenShards(folder, "train", verify=True)
    (folder / "manifest.json").unlink()
    np.save(file, np.array([1, 50257], dtype=np.uint16))
    with pytest.raises(ValueError, match="holds token 50257"):
        TokenShards(folder, "train", verify=True)
    assert TokenShards(folder, "train").fingerprint != fingerprint
    write_manifest(folder, {"complete": False, "shards": []})
    with pytest.raises(ValueError, match="is incomplete"):
        TokenShards(folder, "train")


def test_no_data_says_how_to_get_some(tmp_path):
    """Without shards, the error names two commands that make some."""
    with pytest.raises(FileNotFoundError) as error:
        TokenShards(tmp_path, "val")
    assert str(error.value).count("python fineweb.py --dataset") == 2


def test_batch_sizes_that_do_not_divide(make_shards):
    """If the sizes do not divide, the error names the nearest total_batch_size that does."""
    shards = TokenShards(make_shards(100), "train")
    with pytest.raises(ValueError, match="= 96; the nearest are 960 or 1056"):
        make_data(shards, 3, 1000, seed=0, world_size=4)
