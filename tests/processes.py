"""Run commands in processes forked from one with torch imported, as importing takes seconds."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from unittest import mock

import torch

from engine.files import JSONLinesLog

ROOT = Path(__file__).parents[1]
HANG_SECONDS = 600  # ten times what the slowest command takes on a busy machine
PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "matplotlib.figure", "tokenizers"]


def fork_server() -> BaseContext:
    """Return a multiprocessing context that forks from a process that has imported torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


class Job:
    """A running script of the project: one process, or several ranks as under torchrun."""

    def __init__(
        self,
        script: str,
        *args: object,
        cwd: Path | str = ".",
        ranks: int = 1,
        signal_at: tuple[int, signal.Signals] | None = None,
        **env: str,
    ):
        """Start. With signal_at=(step, signal), rank 0 gets the signal once the step is logged."""
        self.output = tempfile.TemporaryDirectory()
        env = {**os.environ, **env}
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as unused:
                port = str(unused.getsockname()[1])
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        options = {"argv": [script, *map(str, args)], "cwd": Path(cwd).absolute()}
        options |= {"output": self.output.name, "n_threads": torch.get_num_threads()}
        self.processes = []
        for rank in range(ranks):
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            options |= {"env": env, "signal_at": signal_at if rank == 0 else None}
            process = fork_server().Process(target=run_in_child, kwargs=options, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait until all ranks end or one fails. Return the output of all ranks together."""
        running = {process.sentinel: process for process in self.processes}
        codes: list[int] = []
        while running and not any(codes):
            ended = connection.wait(running, timeout=HANG_SECONDS)
            assert ended, "the command hangs"
            for sentinel in ended:
                running[sentinel].join()
                codes.append(running.pop(sentinel).exitcode)
        for process in running.values():
            process.kill()
        out, err = (Path(self.output.name, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(
            args=[], returncode=next(filter(None, codes), 0), stdout=out, stderr=err
        )


def run_script(script: str, *args: object, **options) -> subprocess.CompletedProcess:
    """Run a script in its own process and wait until it ends. `options` are those of Job."""
    return Job(script, *args, **options).wait()


def run_in_child(
    argv: list[str],
    cwd: Path,
    env: dict[str, str],
    output: str,
    n_threads: int,
    signal_at: tuple[int, signal.Signals] | None,
) -> None:
    """Turn this forked process into `python argv...`, with its output in {output}/out and err."""
    for descriptor, name in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(f"{output}/{name}", flags), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(n_threads)
    if signal_at:
        send_signal_at(*signal_at, os.getpid())
    run_here(*argv)


def run_here(script: str, *args: str) -> None:
    """Run a script in this process, as if it had been started with these arguments."""
    path = str(ROOT / script)
    with mock.patch.object(sys, "argv", [path, *args]):
        runpy.run_path(path, run_name="__main__")


def start_on_terminal(
    prelude: str, script: str, *args: str, **options
) -> tuple[subprocess.Popen, int]:
    """Start a script on a pseudo-terminal. Its process runs the Python code `prelude` first. Return
    the process and a file descriptor for the user's side of the terminal.
    """
    import pty  # not on Windows

    user_end, script_end = pty.openpty()
    program = f"import os, signal, sys; {prelude}; os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", program, sys.executable, str(ROOT / script), *args]
    options |= {"stdin": script_end, "stdout": script_end, "stderr": script_end}
    process = subprocess.Popen(command, **options)
    os.close(script_end)
    return process, user_end


def send_signal_at(step: int, signum: signal.Signals, pid: int) -> None:
    """Patch the log to send the signal to process `pid` once this process has logged `step`."""
    append = JSONLinesLog.append

    def append_and_send(log: JSONLinesLog, *records: dict) -> None:
        append(log, *records)
        if records and records[-1].get("step") == step:
            os.kill(pid, signum)

    JSONLinesLog.append = append_and_send
