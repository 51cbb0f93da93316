"""On three ranks, rank 2 misses a barrier that times out after three seconds."""

import time
from datetime import timedelta

from engine.distributed import Distributed

if __name__ == "__main__":
    dist = Distributed.start("cpu")
    if dist.rank == 2:
        time.sleep(60)  # until it is killed, because another rank failed
    else:
        dist.barrier(timedelta(seconds=3))
