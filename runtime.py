"""A file of its own for what differs between machines: ranks, devices, precision, signals."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed

from data import Batch

# Dense peak of the matrix units in 16-bit floating point with fp32 accumulation, FLOP/s, from the
# makers' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Distributed:
    """This process among all of the run, as torchrun tells it, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> "Distributed":
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = accelerator.type if accelerator else "cpu"
        try:
            device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device} is not to be had here: {error}") from error
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        if world_size > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world_size, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def from_main(self, make: Callable[[], object]) -> object:
        """What `make` returns on the main rank, which alone calls it."""
        value = [make() if self.is_main else None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(value, src=0, device=self.device)
        return value[0]

    def stop(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of autocast's matrix products, None for fp32 throughout."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit peak, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.from_numpy(array) for array in batch]
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return tuple(tensor.to(device) for tensor in tensors)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; a second one stops at once."""

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self) -> "Interrupt":
        self.previous = {s: signal.signal(s, self._on) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _on(self, signum: int, _: object) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        print(f"\n{signal.Signals(signum).name}: saving after this step (again: stop at once)")
