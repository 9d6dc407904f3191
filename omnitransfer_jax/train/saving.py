"""When a run saves: every so many steps, when it is asked, at its end; and again if the system refuses, as when the disk is full.

A save that is refused costs nothing but itself: training goes on, the checkpoint before stays, and the next try follows after `RETRIES`.
After as many refusals in a row training waits, so that little is lost, and goes on by itself when there is room.
"""

import time
from collections.abc import Callable
from typing import Any

import grain

from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.folders.checkpoints import Checkpoints
from omnitransfer_jax.folders.refusals import is_full
from omnitransfer_jax.quarantine import Quarantine
from omnitransfer_jax.train.stopping import Stopping

RETRIES = (0.0, 30.0, 120.0, 300.0)  # seconds before each further try
PAUSE = 10.0  # seconds between tries of a run that waits
LAST_TRIES = 3  # of a run that was asked to stop


class Saver:
    """Saves the state of a run; `flush` says what the system refused of the log, whose lines are to be on the disk before a checkpoint."""

    def __init__(
        self, checkpoints: Checkpoints, every: int, stopping: Stopping, flush: Callable[[], str], quarantine: Quarantine | None = None
    ):
        self.checkpoints, self.every, self.stopping, self.flush = checkpoints, every, stopping, flush
        self.quarantine = quarantine
        self.refusals, self.next_try = 0, 0.0
        self.started = 0  # the step of the save that was started last and whose end is not known
        self.saved = checkpoints.latest
        """The step that was saved last, or is being saved."""
        self.asked = False

    def is_due(self, n: int) -> bool:
        """Whether step `n` is to be saved."""
        if self.started and not self.checkpoints.is_saving:
            self._note(self.checkpoints.wait())
        again = self.refusals > 0 and time.monotonic() >= self.next_try
        return n % self.every == 0 or again or self.asked

    def save(self, n: int, state: Any, data: grain.DatasetIterator[Any], last: bool) -> None:
        """Saves step `n`; with `last` it returns when that is done, else while it is written."""
        self.asked = False
        if self.quarantine is not None:
            self.quarantine.share()
        self._try(n, state, data)
        tries = 0
        while last or self.refusals > len(RETRIES):
            refusal = self.checkpoints.wait()
            self._note(refusal)
            if not refusal:
                return
            tries += 1
            if self.stopping.signals and tries >= LAST_TRIES:
                raise OSError(f"{refusal}; step {n} is not saved, the last checkpoint is that of step {self.checkpoints.latest}")
            if tries == 1:
                print(f"step {n}: training waits until it can be saved: {remedy(refusal)}; then it goes on by itself", flush=True)
            time.sleep(min(PAUSE, 1.0) if self.stopping.signals else PAUSE)
            self._try(n, state, data)

    def _try(self, n: int, state: Any, data: grain.DatasetIterator[Any]) -> None:
        if self.started:
            self._note(self.checkpoints.wait())  # how the save before ended, before this one begins
        self.started = self.saved = n
        if refusal := self.flush():
            self.checkpoints.wait()
            self.checkpoints.refusal = refusal
        else:
            run_folder.save(self.checkpoints, n, state, data, self.quarantine)

    def _note(self, refusal: str) -> None:
        """Takes how the save that was started last ended."""
        if self.started == 0:
            return
        if refusal:
            wait = RETRIES[min(self.refusals, len(RETRIES) - 1)]
            self.refusals, self.next_try = self.refusals + 1, time.monotonic() + wait
            print(
                f"step {self.started}: not saved, {refusal}; training goes on, the last checkpoint is that of step "
                f"{self.checkpoints.latest}; {remedy(refusal)}",
                flush=True,
            )
        elif self.refusals:
            print(f"step {self.started}: saved again", flush=True)
            self.refusals = 0
        self.started = 0


def remedy(refusal: str) -> str:
    """What a person can do about it."""
    return "free some space" if is_full(refusal) else "see to the disk"
