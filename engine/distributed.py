"""Set up the ranks of a run, its device and precision, and FSDP2."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed

from engine.config import Precision, TrainConfig
from engine.tensors import autocast_dtype
from model import GPT

Config = TypeVar("Config", bound=TrainConfig)
DEVICE_TYPES = ("cpu", "cuda", "mps")
CPU_BF16_UNITS = ("avx512_bf16", "amx_bf16")  # as torch.cpu.get_capabilities names them
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h
MAX_C_INT = 2**31 - 1
BARRIER_TIMEOUT = timedelta(minutes=30)  # enough to download GPT-2 1.5B (6 GB)


@dataclass(frozen=True)
class Distributed:
    """The rank and device of this process, and the number of ranks, as set up by torchrun."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: torch.distributed.ProcessGroup | None = None  # gloo; for barriers and objects

    @classmethod
    def start(cls, device_name: str) -> Self:
        """Select the device (auto, cpu, cuda, cuda:1, mps) and join the other ranks."""
        rank = int(os.environ.get("RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        device = init_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
        if world_size == 1:
            return cls(rank, world_size, device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world_size, device, torch.distributed.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over all ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.all_reduce(tensor).tolist()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place. On CUDA this does not wait for the result."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value, self.cpu_group)
        return values

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, so that the other ranks find what it has cached."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self, timeout: timedelta = BARRIER_TIMEOUT) -> None:
        """Wait for all ranks. After `timeout`, raise an error that names the missing ranks."""
        if self.world_size > 1:
            torch.distributed.monitored_barrier(self.cpu_group, timeout, wait_all_ranks=True)

    def stop(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def init_device(name: str, local_rank: int) -> torch.device:
    """Select the device for this process. "auto" picks one. Raises ValueError if the device is not
    available. Also turns off cuDNN attention, because it is slow for every new shape. Turn it on
    with `cudnn_attention(True)`.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found and found.type in DEVICE_TYPES else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"device {name} is not available: {reason}; use auto to pick an available one"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


@contextmanager
def cudnn_attention(enabled: bool) -> Iterator[None]:
    """Choose whether attention can use cuDNN inside this context. cuDNN takes a second to plan for
    every new shape.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the hardware computes in bf16 rather than slowly emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(units.get(name, False) for name in CPU_BF16_UNITS)


def default_precision(device: torch.device) -> Precision:
    """Return the precision for training: bf16 if the hardware has it, else fp16 on CUDA or fp32."""
    if has_bf16_units(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def resolve_device_settings(config: Config, dist: Distributed) -> Config:
    """Fill in `precision` and `compile` for this device if they are None."""
    device = dist.device
    precision = config.precision or default_precision(device)
    if config.precision is None and device.type == "cpu" and dist.is_main:
        has = "has" if precision == "bf16" else "has no"
        print(f"precision: {precision} (this CPU {has} bf16 units; set precision to change it)")
    if precision == "bf16" and device.type == "cpu" and not has_bf16_units(device) and dist.is_main:
        print("precision: this CPU has no bf16 units, so bf16 is many times slower than fp32")
    compile_step = device.type == "cuda" if config.compile is None else config.compile
    return replace(config, precision=precision, compile=compile_step)


def autocast(device: torch.device, precision: Precision | None) -> torch.autocast:
    dtype = autocast_dtype(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def shard_model(
    model: GPT, dist: Distributed, dtype: torch.dtype | None, compile_blocks: bool
) -> None:
    """Shard the parameters over the ranks with FSDP2: one group per block, one for the rest. FSDP
    gathers the parameters of a block before it runs and frees them afterwards.

    Apply activation checkpointing before calling this: PyTorch recommends the order checkpointing,
    compile, FSDP.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        if compile_blocks:
            block.compile()
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    # Training, evaluation and generation call `hidden`, not `forward`. Make that call gather the
    # parameters outside the blocks. They stay gathered until backward, so the head can use them.
    fsdp.register_fsdp_forward_method(model, "hidden")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor from all ranks. Return any other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def has_finite_weights(model: GPT) -> bool:
    return all(full_tensor(param).isfinite().all() for param in model.parameters())


def shard_like(param: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of `full` if `param` is sharded, else `full` itself. All ranks must
    have the same `full`.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(param, DTensor):
        return full
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def keep_freed_memory(dist: Distributed) -> None:
    """On a CPU, make glibc keep freed memory and reuse it, until the process ends.

    By default, glibc returns the memory of every large tensor to the system. Writing to the next
    tensor then causes page faults, which cost a few percent of a training step. Keeping the memory
    does not raise the peak: the loss is computed in chunks, so there is no huge tensor whose memory
    would be kept but never reused.
    """
    if dist.device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MAX_C_INT)
    done = "keeps freed memory, to avoid page faults" if kept else "refused to keep freed memory"
    if dist.is_main:
        print(f"allocator: glibc {done} (mallopt)", flush=True)
