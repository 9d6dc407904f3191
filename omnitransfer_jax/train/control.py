"""A run is told what to do by files in its workdir, from any machine that sees it: touch WORKDIR/SAVE

    SAVE      saves after this step          SAMPLE    samples after this step
    STOP      saves after this step and ends      PAUSE     saves, and goes on when the file is removed

A file is obeyed within a step and removed, but for PAUSE, which a person removes. Of several processes the first one looks, and all obey.
"""

import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

FILES = ("SAVE", "SAMPLE", "STOP", "PAUSE")
LOOKS = 1.0  # seconds between looks of a run that is paused


class Control:
    """What the files in `workdir` ask for."""

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def asked(self) -> set[str]:
        """The names of the files that are there, the same for all processes; all but PAUSE are removed."""
        found = [(self.workdir / name).exists() for name in FILES] if jax.process_index() == 0 else [False] * len(FILES)
        if jax.process_count() > 1:
            found = multihost_utils.broadcast_one_to_all(np.array(found)).tolist()
        names = {name for name, there in zip(FILES, found, strict=True) if there}
        for name in names - {"PAUSE"} if jax.process_index() == 0 else ():
            (self.workdir / name).unlink(missing_ok=True)
        return names

    def is_paused(self) -> bool:
        """Whether the run is still to wait; to be called again and again."""
        paused = "PAUSE" in self.asked_to_wait()
        if paused:
            time.sleep(LOOKS)
        return paused

    def asked_to_wait(self) -> set[str]:
        """PAUSE, or STOP, which ends a pause too."""
        found = {name for name in ("PAUSE", "STOP") if (self.workdir / name).exists()} if jax.process_index() == 0 else set()
        if jax.process_count() > 1:
            both = multihost_utils.broadcast_one_to_all(np.array(["PAUSE" in found, "STOP" in found])).tolist()
            found = {name for name, there in zip(("PAUSE", "STOP"), both, strict=True) if there}
        return set() if "STOP" in found else found
