"""A file of its own for what differs between machines: ranks, devices, precision, signals."""

import ctypes
import os
import platform
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from data import IGNORE_INDEX, Batch
from model import GPT

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
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
DEVICE_TYPES = ("cpu", "cuda", "mps")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h
LARGEST_C_INT = 2**31 - 1
BARRIER_TIMEOUT = timedelta(minutes=30)  # time enough to download 6 GB of GPT-2 1.5B


@dataclass(frozen=True)
class Distributed:
    """This process among all of the run, as torchrun tells it, and its device."""

    rank: int
    world_size: int
    device: torch.device
    control: torch.distributed.ProcessGroup | None = None
    """a group on the CPUs, for what is no tensor and for waiting"""

    @classmethod
    def start(cls, device: str) -> "Distributed":
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if device == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            device = found.type if found and found.type in DEVICE_TYPES else "cpu"
        if device.partition(":")[0] not in DEVICE_TYPES:
            raise ValueError(f"device is {device}, expected auto, cpu, cuda or mps")
        if world_size > 1 and ":" in device:
            raise ValueError(f"device is {device}, but each of {world_size} ranks needs its own")
        try:
            device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {device} is not available: {reason}") from error
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world_size > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(
            rank,
            world_size,
            device,
            torch.distributed.new_group(backend="gloo") if world_size > 1 else None,
        )

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

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank goes through alone, the others after it and from what it has cached."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self, timeout: timedelta = BARRIER_TIMEOUT) -> None:
        """Wait for all ranks; after `timeout` an error says which have not come."""
        if self.world_size > 1:
            torch.distributed.monitored_barrier(self.control, timeout, wait_all_ranks=True)

    def stop(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def shard(model: GPT, dist: Distributed, dtype: torch.dtype | None, compile_blocks: bool) -> None:
    """Spread the parameters of `model` over the ranks: a group a block, one for the rest (FSDP2).

    The order is PyTorch's: recomputation is inside the block, around it comes compilation, around
    that sharding, which gathers a block before it runs and frees it afterwards.
    """
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for entry in ("loss", "generate", "log_probs"):  # what the loop calls; all gather like forward
        register_fsdp_forward_method(model, entry)


def default_precision(device: torch.device) -> str:
    """bf16 on CUDA, fp16 on cards that only emulate it, fp32 elsewhere."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def keep_freed_memory(dist: Distributed) -> None:
    """On a CPU have glibc keep what is freed for the next allocation, for the rest of the process.
    By default it gives every large tensor back to the system, and the page faults of the next one
    cost a training step a few percent; the loss in chunks sees to it that the peak stays as it was.
    """
    if dist.device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST_C_INT)
    if dist.is_main:
        done = "keeps freed memory, to save page faults" if kept else "refused to keep freed memory"
        print(f"allocator: glibc {done} (mallopt)", flush=True)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit peak, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((f for card, f in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), None)


def to_device(
    batch: Batch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """idx and targets on the device, and where some targets do not count, the positions of those
    that do among the flat ones: found here, since there it would make the CPU wait.
    """
    rows = np.flatnonzero(batch[1] != IGNORE_INDEX)
    tensors = [torch.from_numpy(array) for array in (*batch, rows)]
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    idx, targets, rows = (tensor.to(device) for tensor in tensors)
    return idx, targets, rows if len(rows) < targets.numel() else None


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
        text = f"\n{signal.Signals(signum).name}: saving after this step (again: stop at once)\n"
        os.write(2, text.encode())  # print may not interrupt another print
