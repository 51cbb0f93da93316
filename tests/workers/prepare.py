"""Prepare shards in two worker processes that are started with the given method.

Arguments: fork, spawn or forkserver; a text file; the folder of the shards.
"""

import multiprocessing
import sys

import fineweb

if __name__ == "__main__":
    method, dataset, out_dir = sys.argv[1:]
    multiprocessing.set_start_method(method)
    fineweb.main(
        fineweb.PrepareConfig(dataset=[dataset], out_dir=out_dir, val_tokens=100, num_proc=2)
    )
