import pytest
import torch
from safetensors.torch import save_file

from engine.tensors import copy_tensors, read_tensors


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_tensor_files(tmp_path, name):
    """Both formats read back bit for bit. A damaged file is an error that says what to do."""
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1, 2], dtype=torch.int64)}
    file = tmp_path / name
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, file)
    found = read_tensors(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    intact = file.read_bytes()
    for content in (intact[: len(intact) // 2], b"", b"h", bytes(range(256))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged.*again"):
            read_tensors(file)


class Unsafe:
    """An object that can only be unpickled by importing its class."""


@pytest.mark.parametrize("content", [{"a": {"b": torch.ones(1)}}, [1], [], {"a": Unsafe()}])
def test_only_dicts_of_tensors_are_read(tmp_path, content):
    """A file of torch.save is refused unless it holds a dict of tensors and nothing else. No class
    is loaded, and the error does not suggest loading the file unsafely.
    """
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is damaged") as raised:
        read_tensors(tmp_path / "x.pt")
    assert "weights_only" not in str(raised.value)


def test_copying_tensors_is_all_or_nothing():
    """Tensors are copied by name. If one does not fit, it is an error, and none is copied."""
    names = [f"h.{i}" for i in range(6)]
    targets = {name: torch.zeros(2, 3) for name in names}
    tensors = {name: torch.full((2, 3), i + 1.0) for i, name in enumerate(names)}
    misshapen = tensors | {"h.5": torch.ones(3, 2)}
    for wrong, expected in (
        ({"h.0": targets["h.0"]}, r"5 missing tensors, such as h\.1, h\.2, h\.3, h\.4$"),
        (tensors | {"more": torch.ones(1)}, "1 unexpected tensors, such as more$"),
        (misshapen, r"1 misshapen tensors, such as h\.5 \(3, 2\), expected \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=f"^x belongs .*: {expected}"):
            copy_tensors(wrong, targets, "x")
        assert not any(target.any() for target in targets.values())
    quantized = tensors | {"h.2": torch.ones(2, 3, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"^x: h\.2 has dtype torch.int8, expected floating"):
        copy_tensors(quantized, targets, "x")
    copy_tensors(tensors, targets, "x")
    assert all(torch.equal(targets[name], tensors[name]) for name in names)
