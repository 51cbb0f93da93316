"""On three ranks, rank 2 misses a barrier that times out after three seconds."""

import time
from datetime import timedelta

from engine.distributed import Distributed

if __name__ == "__main__":
    dist = Distributed.start("cpu")
    if dist.rank == 2:
        time.sleep(60)  # until it is killed, because another rank failed
    else:
        # Rank 0 names the missing rank. On a busy machine, rank 1 may arrive earlier. It waits
        # longer, so that it does not fail first.
        dist.barrier(timedelta(seconds=3 if dist.is_main else 30))
