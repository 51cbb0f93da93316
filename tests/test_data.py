import itertools
import json
import os
import struct

import numpy as np
import pytest

from data import (
    PretrainingData,
    TokenShards,
    evaluation_batches,
    open_shard,
    write_atomically,
    write_manifest,
    write_shard,
)


def predicted(data: PretrainingData, steps: range) -> np.ndarray:
    """All targets of one rank's steps, in order."""
    batches = [
        data.micro_batch(step, micro_step)
        for step in steps
        for micro_step in range(1, data.grad_accum_steps + 1)
    ]
    targets = np.concatenate([targets.ravel() for _, targets in batches])
    return targets[targets != -100]


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 10, 16, 17, 18, 100, 129, 1000])
def test_each_token_once_per_epoch(make_shards, n_tokens):
    """Whatever the number of tokens, two epochs predict each token but the first exactly twice,
    with no window left over and none counted double.
    """
    shards = TokenShards(make_shards(*[n_tokens // 2, n_tokens - n_tokens // 2]), "train")
    data = PretrainingData(shards, block_size=8, batch_size=1, total_batch_size=8, seed=3)
    for epochs in (1, 2):
        counts = np.bincount(predicted(data, range(1, epochs * data.n_windows + 1)))
        assert counts.tolist() == [0] + [epochs] * (n_tokens - 1)


def test_targets_follow_their_inputs(make_shards):
    """In a window each target is the token after its input, across the borders of shards."""
    data = PretrainingData(TokenShards(make_shards(5, 1, 30, 64), "train"), 8, 2, 32, seed=0)
    for step in range(1, 9):
        for micro_step in (1, 2):
            idx, targets = data.micro_batch(step, micro_step)
            valid = targets != -100
            assert (targets[valid] == idx[valid] + 1).all()


def test_global_step_does_not_depend_on_the_machine(make_shards):
    """For 1, 2, 3 and 4 ranks and any batch_size that divides, a step is the same windows in the
    same order, and knows the same number of targets.
    """
    shards = TokenShards(make_shards(400, 601), "train")
    seen = set()
    for world_size, batch_size in itertools.product((1, 2, 3, 4), (1, 2, 3, 6)):
        if 24 % (world_size * batch_size):
            continue
        ranks = [
            PretrainingData(shards, 8, batch_size, 24 * 8, 5, rank, world_size)
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
    """targets_in_step is the number of targets that the step's batches hold."""
    data = PretrainingData(TokenShards(make_shards(77), "train"), 8, 3, 48, seed=1)
    for step in range(1, 12):
        assert data.targets_in_step(step) == len(predicted(data, range(step, step + 1)))


def test_order_is_seeded_and_new_each_epoch(make_shards):
    """The order follows from the seed, differs between epochs and is no plain sequence."""
    shards = TokenShards(make_shards(801), "train")

    def order(seed: int, epoch: int) -> list[int]:
        data = PretrainingData(shards, 8, 1, 8, seed)
        return [data.micro_batch(s, 1)[0][0, 0] for s in range(epoch * 100 + 1, epoch * 100 + 101)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != sorted(order(1, 0)) == sorted(order(1, 1))


def test_a_data_set_smaller_than_a_batch(make_shards):
    """A tiny data set fills a large step with several epochs instead of hanging."""
    data = PretrainingData(TokenShards(make_shards(9), "train"), 8, 16, 256, seed=0)
    assert (data.micro_batch(1, 2)[0] == np.arange(8)).all()


@pytest.mark.parametrize("eval_tokens", [1, 50, 64, 199, 10_000])
def test_evaluation_is_the_same_tokens_on_any_machine(make_shards, eval_tokens):
    """The first eval_tokens are predicted once each, whatever ranks and batch size; ranks get the
    same number of batches.
    """
    shards = TokenShards(make_shards(200), "train")
    for world_size, batch_size in itertools.product((1, 2, 3), (1, 4, 7)):
        batches = [
            list(evaluation_batches(shards, 8, batch_size, eval_tokens, rank, world_size))
            for rank in range(world_size)
        ]
        assert len({len(b) for b in batches}) == 1
        targets = np.concatenate([t.ravel() for b in batches for _, t in b])
        expected = np.arange(1, min(eval_tokens, 199) + 1)
        assert sorted(targets[targets != -100]) == expected.tolist()


def test_reads_llmc_shards(tmp_path):
    """An llm.c .bin, written here field by field, reads as its tokens; damage is named."""
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
    """Our shards are NumPy files that a one-liner reads, with the layout of build-nanogpt."""
    entry = write_shard(tmp_path / "edu_train_000000.npy", np.array([50256, 7]))
    tokens = np.load(tmp_path / "edu_train_000000.npy")
    assert (tokens.dtype, tokens.tolist(), entry["tokens"]) == (np.uint16, [50256, 7], 2)


def test_damaged_and_missing_shards_are_named(make_shards):
    """A truncated, exchanged or missing shard ends in an error with its name and the remedy."""
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
    with pytest.raises(ValueError, match="expected a row of uint16"):
        TokenShards(folder, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"x_train_000001\.npy is missing"):
        TokenShards(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TokenShards(folder, "train")


def test_splits_are_told_apart_whatever_the_folder_is_called(make_shards, tmp_path):
    """The word val in another place of a file's name does not make it validation data, with a
    manifest or without one.
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
    """A flipped bit, a token that GPT-2 does not have, and a preparation that has not ended, are
    errors; other shards have another fingerprint.
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
    with pytest.raises(ValueError, match="has not come to its end"):
        TokenShards(folder, "train")


def test_no_data_says_how_to_get_some(tmp_path):
    """Without shards the error has the two commands that make some."""
    with pytest.raises(FileNotFoundError) as error:
        TokenShards(tmp_path, "val")
    assert str(error.value).count("python fineweb.py --dataset") == 2


def test_batch_sizes_that_do_not_divide(make_shards):
    """Where the sizes do not divide, the error names the nearest total_batch_size that does."""
    shards = TokenShards(make_shards(100), "train")
    with pytest.raises(ValueError, match="= 96; the nearest are 960 or 1056"):
        PretrainingData(shards, 8, 3, 1000, seed=0, world_size=4)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A write that fails half-way leaves what was there."""
    file = tmp_path / "manifest.json"
    file.write_text("old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_text() == "old"
