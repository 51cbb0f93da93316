"""Run train_gpt2.py under torchrun. After logging step 5, rank 0 kills itself (first argument:
kill) or sends SIGTERM to torchrun (term), unless it was restarted.
"""

import os
import signal
import sys

from processes import run_here, send_signal_at

if __name__ == "__main__":
    is_kill = sys.argv[1] == "kill"
    if os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        signum, pid = (signal.SIGKILL, os.getpid()) if is_kill else (signal.SIGTERM, os.getppid())
        send_signal_at(5, signum, pid)
    run_here("train_gpt2.py", *sys.argv[2:])
