"""Read and write files of tensors, copy them into a model if they fit; dtypes and products."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# What torch.load raises if a file is damaged, and what our code raises on unexpected contents.
TORCH_LOAD_ERRORS = (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError)
MAX_NAMES_SHOWN = 4  # in an error
Item = TypeVar("Item")
Tensors = dict[str, torch.Tensor]  # by name
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_tensors(path: Path) -> Tensors:
    """Read the tensors of a .safetensors file or a file from torch.save. Raises ValueError if it is
    damaged or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
        values = tensors.values() if isinstance(tensors, dict) else [None]
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise TypeError("it holds more than named tensors")
    except pickle.UnpicklingError as error:  # its own message suggests weights_only=False
        raise ValueError(f"{path} is damaged, or holds more than tensors; save it again") from error
    except (SafetensorError, *TORCH_LOAD_ERRORS) as error:
        raise ValueError(f"{path} is damaged: {error}; save or download it again") from error
    return tensors


def save_tensors(tensors: Tensors, path: Path, **metadata: str) -> None:
    """Write a .safetensors file."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt", **metadata})
    path.chmod(mode)  # safetensors makes the file private


def check_tensors(tensors: Tensors, targets: Tensors, source: str) -> None:
    """Raise ValueError if tensors from `source` are missing, unexpected, of the wrong shape, or
    quantized.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: {name} has dtype {tensor.dtype}, expected floating point; quantized "
                "weights are not supported"
            )
    shapes, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (tensors, targets))
    misshapen = [n for n in expected.keys() & shapes.keys() if shapes[n] != expected[n]]
    for problem, names in (
        ("missing", expected.keys() - shapes.keys()),
        ("unexpected", shapes.keys() - expected.keys()),
        ("misshapen", [f"{n} {shapes[n]}, expected {expected[n]}" for n in misshapen]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN])
            raise ValueError(
                f"{source} belongs to a different model: {len(names)} {problem} tensors, such as "
                f"{shown}"
            )


def copy_tensors(tensors: Tensors, targets: Tensors, source: str) -> None:
    """Copy each tensor into the target with the same name, or none if `check_tensors` raises."""
    check_tensors(tensors, targets, source)
    for name, target in targets.items():
        target.copy_(tensors[name])


def batches_alike(
    items: Iterable[Item], key: Callable[[Item], tuple], max_elements: int
) -> Iterator[list[Item]]:
    """Yield lists of items that have the same key, which starts with a shape. The tensors of that
    shape have at most `max_elements` elements in a list, unless there is only one.
    """
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for (shape, *_), group in groups.items():
        at_once = max(1, max_elements // shape.numel())
        yield from (group[start : start + at_once] for start in range(0, len(group), at_once))


def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in fp32. On CUDA, it is not rounded to 16 bits first."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """Return the dtype that autocast uses for matmuls, or None for fp32 (no autocast)."""
    return None if precision in (None, "fp32") else DTYPES[precision]


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that autocast uses for matmuls, or the dtype of x if autocast is off."""
    device_type = x.device.type
    is_on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else x.dtype
