"""After `keep_freed_memory`, print how many page faults it takes to allocate a large tensor when
one of the same size was just freed.
"""

import resource

import torch

from engine.distributed import Distributed, keep_freed_memory

N_FLOATS = 2**24
N_WARMUP = 16

if __name__ == "__main__":
    keep_freed_memory(Distributed(rank=0, world_size=1, device=torch.device("cpu")))
    for _ in range(N_WARMUP):  # at first, small allocations may use some of the freed memory
        torch.ones(N_FLOATS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(N_FLOATS)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
