"""How commands report errors: one line and exit code 2, or a traceback for a bug."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

BAD_INPUT = 2  # argparse's exit code for bad usage
INTERRUPTED = 130  # what a shell reports after Ctrl-C: 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE
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
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse(load: Callable[[Any], Any], source: Any) -> Any:
    """What `load`, such as json.loads, makes of the source; ValueError if it is nested too deep."""
    try:
        return load(source)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error


def describe_error(error: Exception) -> str | None:
    """The message for the user; None for a bug, which deserves its traceback."""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(type(error), "check that it can be written and the disk has room")
        return f"{error.filename or 'the output'}: {error.strerror}; {remedy}"
    if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
        return None
    if isinstance(error, (MemoryError, RuntimeError)):  # PyTorch raises the latter
        return f"not enough memory: {error}; use a smaller model or a smaller batch"
    return str(error)
