"""Lock the folder given as the argument until a line arrives on stdin."""

import sys
from pathlib import Path

from engine.files import lock_folder

if __name__ == "__main__":
    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        input()
