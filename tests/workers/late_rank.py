"""Under torchrun: rank 2 misses a barrier that times out after two seconds."""

import time
from datetime import timedelta

from engine.distributed import Distributed

if __name__ == "__main__":
    dist = Distributed.start("cpu")
    if dist.rank == 2:
        time.sleep(8)
    else:
        dist.barrier(timedelta(seconds=2))
