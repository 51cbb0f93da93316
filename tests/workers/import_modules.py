"""Import the modules that are the arguments, and fail if that starts a process group."""

import importlib
import sys

import torch.distributed

if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if torch.distributed.is_initialized():
        raise RuntimeError("importing started a process group")
