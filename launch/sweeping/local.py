"""The engine `local`: one trial after the other on this machine, without a library. Ctrl-C and SIGTERM save the trial and end."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from launch.sweeping.proposals import propose
from launch.sweeping.runner import PreemptionError, run
from launch.sweeping.trials import Sweep


def bring(sweep: Sweep, numbers: Sequence[int], until: int, done: Callable[[int], None]) -> None:
    """Brings each trial to step `until`, or to its end; `done` is told of each."""
    with _signals() as asked:
        for number in numbers:
            trial = sweep.trial(number)
            if not trial.exists:
                propose(sweep, trial)
            try:
                run(sweep, trial, until, lambda: bool(asked))
            except PreemptionError:
                raise KeyboardInterrupt from None
            done(number)
            if asked:
                raise KeyboardInterrupt


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came; a second one is obeyed at once, as it would be outside."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        print("the trial that runs saves and ends; again to stop at once", flush=True)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
