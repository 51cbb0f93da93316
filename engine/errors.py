"""How commands report errors: one line and exit code 2, or a traceback for a bug."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2  # argparse's exit code for bad usage
INTERRUPTED = 130  # what a shell reports after Ctrl-C: 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE
TEMPORARY_FOLDER = "in TMPDIR, by default /tmp"
RANK_0_HEAD_START = 5.0  # seconds for rank 0 to report an error before the other ranks do
REMEDIES = {
    FileNotFoundError: "check that it exists",
    FileExistsError: "expected a folder",  # mkdir found a file
    NotADirectoryError: "expected a folder",
    IsADirectoryError: "expected a file",
    PermissionError: "check its permissions",
}


def run_and_report_errors(call: Callable[[], None], debug: bool = False) -> None:
    """Run `call`. Report errors that a user can fix in one line, and exit with code 2. With
    `debug`, raise them as they are.
    """
    try:
        call()
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
        # Without this, Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = describe_error(error)
        if debug or message is None:
            raise
        exit_with_error(message)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def exit_with_error(message: str) -> NoReturn:
    """Print the error as one line and exit.

    If there are several ranks, they usually fail with the same error. So rank 0 prints it first,
    and torchrun then stops the others. The error file puts the line into torchrun's own report.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(RANK_0_HEAD_START)
    line = f"error: {f'rank {rank}: ' if rank else ''}{' '.join(message.split())}"
    print(line, file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        info = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": info}))
    sys.exit(BAD_INPUT)


def print_notice(text: str) -> None:
    """Print to stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def describe_error(error: Exception) -> str | None:
    """Return the message for the user, or None if the error is a bug and needs its traceback."""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(type(error), "check that it can be written and the disk has room")
        file = error.filename or f"the output or a temporary file ({TEMPORARY_FOLDER})"
        return f"{file}: {error.strerror}; {remedy}"
    # Compared by name: importing the class would import torch's compiler.
    if any(cls.__name__ == "BackendCompilerFailed" for cls in type(error).__mro__):
        return (
            f"torch.compile failed: {str(error).splitlines()[0]}; install a C++ compiler and "
            "Python's headers (apt install build-essential python3-dev), make room for temporary "
            f"files ({TEMPORARY_FOLDER}), or turn compile off"
        )
    # PyTorch raises a RuntimeError if memory runs out. Any other RuntimeError is a bug.
    is_runtime_error = isinstance(error, RuntimeError)
    if is_runtime_error and not re.search("(allocate|out of) memory", str(error)):
        return None
    if is_runtime_error or isinstance(error, MemoryError):
        return (
            f"not enough memory: {error}; use a smaller model or, in training, a smaller "
            "batch_size (the loss curve stays the same) or --recompute block"
        )
    return str(error)
