import hashlib
import json
import struct

import numpy as np
import pytest

from engine.shards import ShardFile, TokenShards, open_shard, write_manifest, write_shard


def test_reads_llmc_shards(tmp_path):
    """An llm.c .bin, written here field by field, reads as its tokens; damage is reported."""
    tokens = np.array([50256, 1, 2, 65535], dtype=np.uint16)
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    file = tmp_path / "fineweb_train_000001.bin"
    file.write_bytes(header + tokens.tobytes())
    assert open_shard(file).tolist() == tokens.tolist()
    assert len(TokenShards(tmp_path, "train")) == 4
    file.write_bytes(header + tokens.tobytes()[:-2])
    with pytest.raises(
        ValueError, match=r"begins with \[20240520, 1, 4\], expected \[20240520, 1, 3\]"
    ):
        open_shard(file)
    file.write_bytes(struct.pack("<256i", 1, *[0] * 255) + tokens.tobytes()[:-2])
    with pytest.raises(ValueError, match=r"begins with \[1, 0, 0\], expected \[20240520, 1, 3\]"):
        open_shard(file)


def test_shards_are_plain_npy(tmp_path):
    """Shards are plain NumPy files of uint16, as in build-nanogpt."""
    entry = write_shard(tmp_path / "edu_train_000000.npy", np.array([50256, 7]))
    tokens = np.load(tmp_path / "edu_train_000000.npy")
    assert (tokens.dtype, tokens.tolist(), entry["tokens"]) == (np.uint16, [50256, 7], 2)


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_shard_written_in_parts(tmp_path, n):
    """In parts or at once, a shard has the bytes that np.save writes, and its manifest entry their
    sha256. Until it is finished, no file has its name.
    """
    tokens = np.arange(n, dtype=np.uint16)
    file = ShardFile(tmp_path / "parts.npy")
    for part in np.array_split(tokens, 7):
        file.write(part)
    assert not (tmp_path / "parts.npy").exists()
    entry = file.finish()
    np.save(tmp_path / "numpy.npy", tokens)
    expected = (tmp_path / "numpy.npy").read_bytes()
    assert (tmp_path / "parts.npy").read_bytes() == expected
    sha256 = hashlib.sha256(expected).hexdigest()
    assert entry == {"name": "parts.npy", "tokens": n, "sha256": sha256}
    assert write_shard(tmp_path / "parts.npy", tokens) == entry
    assert {f.name for f in tmp_path.iterdir()} == {"parts.npy", "numpy.npy"}


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
    with pytest.raises(ValueError, match=r"x_train_000001.npy has changed since it was written"):
        TokenShards(folder, "train", verify=True)
    np.save(file, np.zeros(50, dtype=np.int64))
    with pytest.raises(ValueError, match="expected one dimension of uint16"):
        TokenShards(folder, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file.*x_train_000001\.npy"):
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
        with pytest.raises(FileNotFoundError, match=r"no val shards in .*, such as X_val_0"):
            TokenShards(folder, "val")
        (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "my_val_set_train_000000.npy").rename(folder / "shakespeare_val.npy")
    assert len(TokenShards(folder, "val")) == 40


def test_nanogpts_files_are_read(tmp_path):
    """train.bin and val.bin of nanoGPT, which are uint16 without a header, are read; those of its
    character-level examples, which have a vocabulary of their own in meta.pkl, are refused.
    """
    tokens = np.arange(1000, dtype="<u2")
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
        assert TokenShards(tmp_path, split, verify=True).read(10, 990).tolist() == [*range(10, 990)]
    (tmp_path / "meta.pkl").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"train.bin has the vocabulary of the meta.pkl"):
        TokenShards(tmp_path, "train")


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
