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
RANK_0_SECONDS = 5.0  # for rank 0 to report an error before another rank does
REMEDIES = {
    FileNotFoundError: "check that it exists",
    FileExistsError: "expected a folder",
    NotADirectoryError: "expected a folder",
    IsADirectoryError: "expected a file",
    PermissionError: "check its permissions",
}


def with_reported_errors(call: Callable[[], None], debug: bool = False) -> None:
    """Call. Errors that a user can fix end in one line and exit code 2, unless `debug`."""
    try:
        call()
    except BrokenPipeError:  # the reader, such as head, has seen enough
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
    """Print the error as one line and exit. On several ranks, which mostly have the same error,
    rank 0 prints it, and torchrun then ends the others; its report names the error as well.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(RANK_0_SECONDS)
    line = f"error: {f'rank {rank}: ' if rank else ''}{' '.join(message.split())}"
    print(line, file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        info = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": info}))
    sys.exit(BAD_INPUT)


def describe_error(error: Exception) -> str | None:
    """The message for the user; None for a bug, which deserves its traceback."""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(type(error), "check that it can be written and the disk has room")
        return f"{error.filename or 'the output'}: {error.strerror}; {remedy}"
    if any(cls.__name__ == "BackendCompilerFailed" for cls in type(error).__mro__):
        return (
            f"torch.compile failed: {str(error).splitlines()[0]}; install a C++ compiler and "
            "Python's headers (apt install build-essential python3-dev), or turn compile off"
        )
    if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
        return None
    if isinstance(error, (MemoryError, RuntimeError)):  # PyTorch raises the latter
        return (
            f"not enough memory: {error}; use a smaller model or, in training, a smaller "
            "batch_size (the loss curve stays the same) or recompute block"
        )
    return str(error)
