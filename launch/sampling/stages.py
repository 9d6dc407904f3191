"""How a long sampling reports itself, and lets go of what it no longer needs."""

import time
from collections.abc import Callable, Iterator
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


@contextmanager
def steps(count: int, name: str = "denoising") -> Iterator[Callable[[int], None]]:
    """A progress bar; gives what is called with the number of each step, counted from 0, when it is done."""
    with tqdm(total=count, desc=name, unit="step") as bar:
        yield lambda step: bar.update(step + 1 - bar.n) and None
