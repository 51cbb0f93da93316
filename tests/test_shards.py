import hashlib
import json
import struct

import numpy as np
import pytest
from conftest import GPT2_TOKENIZER

from engine.shards import ShardFile, TokenShards, open_shard, write_manifest, write_shard


def test_reads_llmc_shards(tmp_path):
    """open_shard reads an llm.c .bin, written here field by field. It refuses a damaged one."""
    tokens = np.array([50256, 1, 2, 65535], dtype=np.uint16)
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    file = tmp_path / "fineweb_train_000001.bin"
    file.write_bytes(header + tokens.tobytes())
    assert open_shard(file).tolist() == tokens.tolist()
    assert len(TokenShards(tmp_path, "train")) == 4
    other = struct.pack("<256i", 1, *[0] * 255)
    for wrong, found in ((header, r"\[20240520, 1, 4\]"), (other, r"\[1, 0, 0\]")):
        file.write_bytes(wrong + tokens.tobytes()[:-2])
        with pytest.raises(ValueError, match=rf"begins with {found}, expected \[20240520, 1, 3\]"):
            open_shard(file)


@pytest.mark.parametrize("n", [0, 1000])
def test_a_shard_written_in_parts(tmp_path, n):
    """Written in parts or at once, a shard is the file that np.save writes for uint16. Its
    manifest entry has the sha256 of the file. The file appears only once it is complete.
    """
    tokens = np.arange(n)
    np.save(tmp_path / "numpy.npy", tokens.astype(np.uint16))
    expected = (tmp_path / "numpy.npy").read_bytes()
    sha256 = hashlib.sha256(expected).hexdigest()
    file = ShardFile(tmp_path / "parts.npy")
    for part in np.array_split(tokens.astype(np.uint16), 7):
        file.write(part)
    assert not (tmp_path / "parts.npy").exists()
    assert file.finish() == {"name": "parts.npy", "tokens": n, "sha256": sha256}
    whole = write_shard(tmp_path / "whole.npy", tokens)
    assert whole == {"name": "whole.npy", "tokens": n, "sha256": sha256}
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == dict.fromkeys(
        ("numpy.npy", "parts.npy", "whole.npy"), expected
    )


def test_damaged_and_missing_shards_are_refused(make_shards):
    """A truncated, replaced or missing shard is an error that names it and says what to do."""
    folder = make_shards(50, 50)
    file = folder / "x_train_000001.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"x_train_000001.npy is truncated.*prepare the data agai"):
        TokenShards(folder, "train")
    np.save(file, np.zeros(50, dtype=np.int64))
    with pytest.raises(ValueError, match=r"int64 .* 1-D array of uint16; .*astype\(np.uint16\)"):
        TokenShards(folder, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file.*x_train_000001\.npy"):
        TokenShards(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TokenShards(folder, "train")


def test_every_byte_is_checked_before_a_run(make_shards):
    """A flipped bit, a token beyond the vocabulary and an incomplete preparation are errors."""
    folder = make_shards(50, 50)
    fingerprint = TokenShards(folder, "train", GPT2_TOKENIZER).fingerprint
    file = folder / "x_train_000001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match=r"x_train_000001.npy has changed since it was written"):
        TokenShards(folder, "train", GPT2_TOKENIZER)
    (folder / "manifest.json").unlink()
    np.save(file, np.array([1, 50257], dtype=np.uint16))
    with pytest.raises(ValueError, match="holds token 50257"):
        TokenShards(folder, "train", GPT2_TOKENIZER)
    assert TokenShards(folder, "train").fingerprint != fingerprint
    write_manifest(folder, {"complete": False, "shards": []})
    with pytest.raises(ValueError, match="is incomplete"):
        TokenShards(folder, "train")


def test_splits_are_recognized_by_the_end_of_the_name(make_shards):
    """With or without a manifest, the word val elsewhere in a file name does not make a file
    validation data. If there are no shards, the error names two commands that make some.
    """
    folder, name = make_shards(40), "my_val_set_train_000000.npy"
    (folder / "x_train_000000.npy").rename(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    write_manifest(folder, manifest)
    no_shards = r"no val shards in .*, expected X_val_0" + ".*python fineweb.py --dataset" * 2
    for _ in range(2):
        assert len(TokenShards(folder, "train")) == 40
        with pytest.raises(FileNotFoundError, match=no_shards):
            TokenShards(folder, "val")
        (folder / "manifest.json").unlink(missing_ok=True)
    (folder / name).rename(folder / "shakespeare_val.npy")
    assert len(TokenShards(folder, "val")) == 40


def test_nanogpts_files_are_read(tmp_path):
    """The train.bin and val.bin of nanoGPT, uint16 without a header, are read. Those of its
    character-level examples, with their own vocabulary in meta.pkl, are refused.
    """
    tokens = np.arange(1000, dtype="<u2")
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
        shards = TokenShards(tmp_path, split, GPT2_TOKENIZER)
        assert shards.read(10, 990).tolist() == [*range(10, 990)]
    (tmp_path / "meta.pkl").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"train.bin was tokenized with the vocabulary in meta"):
        TokenShards(tmp_path, "train")


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8"])
@pytest.mark.parametrize("largest", [50_256, 262_000])
def test_wide_integers_are_refused(tmp_path, dtype, largest):
    """A train.bin of 32- or 64-bit ids is an error, also if its vocabulary is too large for uint16.
    Read as uint16, every second token would be 0 or tiny, with a loss that looks fine.
    """
    ids = np.random.default_rng(0).integers(0, largest, 5000)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train.bin holds integers of 32 or 64 bits.*astype"):
        TokenShards(tmp_path, "train")
    (ids % 50_257).astype("<u2").tofile(tmp_path / "train.bin")
    assert len(TokenShards(tmp_path, "train", GPT2_TOKENIZER)) == 5000
