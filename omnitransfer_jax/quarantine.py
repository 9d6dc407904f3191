"""The records of a training that failed their check and are set aside; in the place of each, every process reads the same other one.

A run keeps the list in its checkpoints (`folders/run_folder.py`), so that a run that goes on sets aside the same records, mended or not.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import RequestError

Place = tuple[int, int]
"""Which data set of a run, and which of its records."""


class Damage(NamedTuple):
    """A record that fails its check."""

    place: Place
    name: str
    reason: str
    """With the file, and what to do."""


class Quarantine:
    """The damaged records of a run, in the order in which it met them; one more than `most` ends the run."""

    def __init__(self, most: int = 0):
        self.most = most
        self.places: list[Place] = []
        self._known: set[Place] = set()
        self._news: list[Damage] = []

    def __contains__(self, place: Place) -> bool:
        return place in self._known

    def take(self, found: Iterable[Damage]) -> None:
        """Sets records aside. A `RequestError` with the last one if they are too many."""
        for damage in found:
            if damage.place not in self._known:
                self._add(damage.place)
                self._news.append(damage)
                self.require_few(damage.reason)

    def news(self) -> list[Damage]:
        """What was set aside since this was asked before."""
        news, self._news = self._news, []
        return news

    def take_back(self) -> None:
        """Forgets what was set aside since `news` was asked: the batch that met it is not used, and will be read again."""
        for damage in self._news:
            self.places.remove(damage.place)
            self._known.remove(damage.place)
        self._news = []

    def require_few(self, reason: str) -> None:
        if len(self.places) > self.most:
            raise RequestError(f"{reason}; {len(self.places)} damaged records are more than data.quarantine={self.most}")

    def share(self) -> None:
        """All processes of a run learn what each has set aside; all are to call it at the same step."""
        if jax.process_count() == 1 or not self.most:
            return
        ours = np.full((self.most, 2), -1, np.int32)
        ours[: len(self.places)] = np.asarray(self.places, np.int32).reshape(-1, 2)
        for place in np.asarray(multihost_utils.process_allgather(ours)).reshape(-1, 2).tolist():
            if place[0] >= 0 and tuple(place) not in self._known:
                self._add((place[0], place[1]))
        self.places.sort()  # the same order in all processes
        self.require_few("damaged records in several processes, which name them")

    @property
    def state(self) -> np.ndarray:
        """What a checkpoint keeps of it: int64 "N 2"."""
        return np.asarray(self.places, np.int64).reshape(-1, 2)

    def restore(self, state: np.ndarray) -> None:
        """What a checkpoint has kept; a `RequestError` if it is more than `most` by now."""
        self.places, self._known = [], set()
        for source, index in state.tolist():
            self._add((source, index))
        self.require_few("set aside before the last checkpoint")

    def _add(self, place: Place) -> None:
        self.places.append(place)
        self._known.add(place)
