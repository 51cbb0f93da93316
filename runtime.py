"""A file of its own for what differs between machines: ranks, devices, precision, signals."""

import ctypes
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self

import numpy as np
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from data import Batch, TrainingData
from model import GPT
from tokenizer import IGNORE_INDEX

if sys.platform != "win32":
    import resource

# Dense peak of the matrix units in 16-bit floating point with fp32 accumulation, FLOP/s, from the
# makers' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
Precision = Literal["fp32", "bf16", "fp16"]
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
    def start(cls, name: str) -> Self:
        rank, world_size, local_rank = (
            int(os.environ.get(variable, default))
            for variable, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            name = found.type if found and found.type in DEVICE_TYPES else "cpu"
        if name.partition(":")[0] not in DEVICE_TYPES:
            raise ValueError(f"device is {name}, expected auto, cpu, cuda or mps")
        if world_size > 1 and ":" in name:
            raise ValueError(f"device is {name}, but each of {world_size} ranks needs its own")
        try:
            device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise ValueError(
                f"device {name} is not available: {reason}; use auto, which takes what is there"
            ) from error
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
        return self.summed(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor summed over all ranks, in place; on CUDA not waited for."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

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


def default_precision(device: torch.device) -> Precision:
    """bf16 on CUDA, fp16 on cards that only emulate it, fp32 elsewhere."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast_dtype(precision: Precision | None, device: torch.device) -> torch.dtype | None:
    """Of matrix products at this precision, or at the default of the device; None is fp32."""
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[precision or default_precision(device)]


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


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on CUDA of tensors there, elsewhere of this process; 0 where
    the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


Tensors = tuple[torch.Tensor, ...]  # idx, targets, and where some do not count, rows


def on_host(batch: Batch, device: torch.device) -> Tensors:
    """idx and targets, and where some targets do not count, the positions of those that do among
    the flat ones: found here, since on the device it would make the CPU wait. For CUDA in pinned
    memory, out of which a copy runs beside the computation.
    """
    rows = np.flatnonzero(batch[1] != IGNORE_INDEX)
    arrays = (*batch, rows) if len(rows) < batch[1].size else batch
    tensors = [torch.from_numpy(array) for array in arrays]
    return tuple(t.pin_memory() if device.type == "cuda" else t for t in tensors)


def check_compiler() -> None:
    """ValueError where torch.compile would find none of the C compilers that it knows."""
    known = (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang", "clang++", "cl")
    if not any(name and shutil.which(name) for name in known):
        raise ValueError(
            "--compile needs a C compiler, and none of gcc, clang and cl is on the path; install "
            "one (apt install build-essential), or go without: --compile false"
        )


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    return tuple(t.to(device, non_blocking=True) for t in tensors)


class Prefetch:
    """The micro-batches of a rank, each made by a thread while the one before it is computed. Data
    are a function of step and micro-step, so this changes nothing but when they are read.
    """

    def __init__(self, data: TrainingData, device: torch.device):
        self.data, self.device = data, device
        # A new thread would pin memory for the first card, whichever this rank's is.
        on_card = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.thread = ThreadPoolExecutor(1, "prefetch", *on_card)
        self.ahead: tuple[tuple[int, int], Future[Tensors]] | None = None

    def __call__(self, step: int, micro_step: int) -> Tensors:
        """The tensors of a micro-step on the device; raises what making them has raised."""
        if self.ahead is None or self.ahead[0] != (step, micro_step):
            self.ahead = self._start(step, micro_step)
        tensors = self.ahead[1].result()
        last = micro_step == self.data.grad_accum_steps
        self.ahead = self._start(step + 1, 1) if last else self._start(step, micro_step + 1)
        # In the order of the computation: a copy of 1 MB takes 40 us, a stream of its own is not
        # worth it.
        return to_device(tensors, self.device)

    def _start(self, step: int, micro_step: int) -> tuple[tuple[int, int], Future[Tensors]]:
        def make() -> Tensors:
            return on_host(self.data.micro_batch(step, micro_step), self.device)

        return (step, micro_step), self.thread.submit(make)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> Self:
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
