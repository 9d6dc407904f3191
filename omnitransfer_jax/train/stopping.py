"""How a run is asked to stop, and how soon it does: signals, and a run that makes no progress.

in a step, a save          after the step, or when the save is written
waiting for data,          at once: Python's handler raises `Stopped` there, and the step before is saved
evaluating, sampling
compiling                  at once: XLA does not return to Python, so a thread ends the process; nothing new was learnt before
a second signal            ends the process
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

NUMBERS = (signal.SIGTERM, signal.SIGINT)
WAKE = signal.SIGURG  # nothing here uses it


class Stopped(BaseException):
    """The run is to stop where it waits; not an `Exception`, so that no library takes it for its own."""


class Stopping:
    """Whether the run was asked to stop; `asked` is called by the handler of the signals."""

    def __init__(self, asked_by_all: Callable[[int], bool] | None = None):
        self.signals: list[int] = []
        self.waits, self.asked_by_all = False, asked_by_all

    def __call__(self, step: int) -> bool:
        """Whether to stop after `step`; to be called once for each. Several processes agree on it."""
        return self.asked_by_all(step) if self.asked_by_all else bool(self.signals)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What is done here raises `Stopped` when a signal comes, or has come. With several processes it is finished."""
        if self.signals:
            raise Stopped
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextmanager
    def ends_at_once(self, message: str) -> Iterator[None]:
        """A signal that comes here, or has come, ends the process with this message, also while Python waits for C++. Not of several."""
        if self.asked_by_all or threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            while number := ours.recv(1):
                if number[0] in NUMBERS:
                    os.write(1, f"{message}\n".encode())
                    os._exit(0)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            if self.signals:
                theirs.send(bytes([self.signals[0]]))
            yield
        finally:
            signal.set_wakeup_fd(before)
            theirs.close()  # the thread reads the end
            thread.join()
            ours.close()


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Gives stopping(step): whether the run was asked to stop, by SIGTERM or SIGINT; a second signal ends the process at once.

    Several processes have to stop at the same step; there JAX receives SIGTERM and finds the step.
    """
    if jax.process_count() > 1:
        yield Stopping(multihost_utils.reached_preemption_sync_point)
        return
    stopping = Stopping()

    def note(number: int, frame: Any) -> None:
        stopping.signals.append(number)
        os.write(2, b"stopping after this step; again to stop at once\n")  # print may be interrupted by us and cannot be entered twice
        for each, handler in before.items():
            signal.signal(each, handler)
        if stopping.waits:
            stopping.waits = False
            raise Stopped

    before = {number: signal.signal(number, note) for number in NUMBERS}
    try:
        with main_thread_woken():
            yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def main_thread_woken() -> Iterator[None]:
    """A signal that the system gives to another thread is heard at once too, where the main thread sleeps or waits for a lock.

    Python runs handlers in the main thread, when that gets to it. Whichever thread the signal comes to writes to the wakeup file; a thread
    that reads it then interrupts the main one with a signal of its own, which does nothing else.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    handler, file = signal.signal(WAKE, lambda *_: None), signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := ours.recv(64):
            if main.ident and set(numbers) & set(NUMBERS):
                signal.pthread_kill(main.ident, WAKE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(file)
        theirs.close()  # the thread reads the end
        thread.join()
        signal.signal(WAKE, handler)
        ours.close()


class Watchdog:
    """Ends a process that has made no progress for `seconds`, after it has said where every thread stands; 0 seconds: never."""

    def __init__(self, seconds: int):
        self.seconds, self.doing, self.since = seconds, "starting", threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.since.set()
        if self.seconds:
            self.thread.join()

    def progress(self, doing: str) -> None:
        """Begins the time anew."""
        self.doing = doing
        self.since.set()

    def _watch(self) -> None:
        while not self.over.is_set():
            if self.since.wait(self.seconds):
                self.since.clear()
                continue
            print(
                f"no progress for {self.seconds} s: {self.doing}; the run ends, and the same command goes on from its last checkpoint. "
                "Where every thread stands:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)
