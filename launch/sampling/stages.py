"""How a long sampling reports itself, and lets go of what it no longer needs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from data_pipelines.encoders import Encoders


@contextmanager
def stage(name: str, encoders: Encoders) -> Iterator[None]:
    """Prints the name of a stage and how long it took; lets its networks go at the end."""
    started = time.perf_counter()
    print(f"{name} ... ", end="", flush=True)
    yield
    encoders.release()
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


class StepBar(tqdm):
    """A progress bar of denoising steps."""

    def __init__(self, steps: int, name: str = "denoising"):
        super().__init__(total=steps, desc=name, unit="step")

    def reach(self, step: int) -> None:
        """Step `step`, counted from 0, is done; it may be said again."""
        self.update(step + 1 - self.n)
