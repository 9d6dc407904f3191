"""Real commands in processes of their own that start in milliseconds: Python's fork server has imported everything once.

It is one thread that never starts JAX, so what it forks is as clean as a new process; XLA_FLAGS are read in the child.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MODULES = ["launch.train", "launch.encode", "launch.import_weights", "tortures.tiny"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(MODULES)
LIMIT = 120.0  # seconds after which a process hangs


class HangError(Exception):
    """A process that did not end in time; it is killed."""


class Job:
    """One process, and what it printed."""

    def __init__(self, function: Callable[..., None], *args: Any, log: Path, devices: int = 1):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self.process: BaseProcess = CONTEXT.Process(target=_child, args=(str(log), devices, function, args))
        self.process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, unless the process is over."""
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code, that of a signal negative."""
        self.process.join(limit)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise HangError(f"did not end in {limit:g} s: {self.output[-500:]}")
        return int(self.process.exitcode or 0)

    def wait_for(self, seen: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Whether `seen` becomes true before the process ends."""
        until = time.monotonic() + limit
        while not seen():
            if not self.process.is_alive():
                return seen()
            if time.monotonic() > until:
                raise HangError(f"nothing happened in {limit:g} s: {self.output[-500:]}")
            time.sleep(0.005)
        return True


def command(module: str, arguments: Sequence[str]) -> None:
    """Runs a command of launch/ as its process would; it never returns."""
    from importlib import import_module

    from launch.command import run

    found = import_module(module)
    sys.argv = [module, *arguments]
    run(found.main, found.FLAGS)


def _child(log: str, devices: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if devices > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    function(*args)
