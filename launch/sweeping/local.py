"""The engine `local`: one trial after the other on this machine, without a library."""

from collections.abc import Callable, Sequence

from launch.sweeping.runner import PreemptionError, advance, stop_signals
from launch.sweeping.trials import Sweep


def bring(sweep: Sweep, numbers: Sequence[int], until: int, done: Callable[[int], None]) -> None:
    """Brings each trial to step `until`, or to its end; `done` is told of each."""
    with stop_signals(sweep):
        for number in numbers:
            try:
                advance(sweep, number, until)
            except PreemptionError:
                raise KeyboardInterrupt from None
            done(number)
            if sweep.is_asked_to_stop:
                raise KeyboardInterrupt
