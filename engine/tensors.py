"""Files of tensors: read them, and copy them into a model with every mismatch named."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What torch.load raises for a damaged file, and what unexpected contents lead to.
TORCH_LOAD_ERRORS = (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError)
MAX_NAMES_SHOWN = 4  # in an error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of one written by torch.save; ValueError if it is
    damaged or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
        if not all(isinstance(tensor, torch.Tensor) for tensor in dict(tensors).values()):
            raise TypeError("it holds more than tensors")
    except pickle.UnpicklingError as error:  # torch's message advises loading it unsafely
        raise ValueError(f"{path} is damaged, or holds more than tensors; save it again") from error
    except (SafetensorError, *TORCH_LOAD_ERRORS) as error:
        raise ValueError(f"{path} is damaged: {error}; save or download it again") from error
    return tensors


def check_tensors(
    tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], source: str
) -> None:
    """ValueError names what is missing, unexpected or misshapen in the tensors of `source`."""
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
                f"{source}: {len(names)} {problem} tensors, such as {shown}; it belongs to a "
                "different model"
            )


def copy_tensors(
    tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], source: str
) -> None:
    """Copy each tensor into the target of the same name. On a mismatch, raise and copy none."""
    check_tensors(tensors, targets, source)
    for name, target in targets.items():
        target.copy_(tensors[name])


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: autocast's where it is on, else its own."""
    device_type = x.device.type
    is_on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else x.dtype
