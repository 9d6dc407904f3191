"""What the processes of one run tell each other, and what has to be the same for all. With one process nothing is exchanged."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import RequestError

LINE = 2000  # bytes of a text that are exchanged
PACKAGES = ("configs", "omnitransfer_jax", "data_pipelines", "world", "launch")  # those that a training runs
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def wait_for_all(done: str) -> None:
    """Returns when all processes have `done` it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(done)


def first_text(text: str) -> str:
    """Of the texts of all processes the first that is not empty, the same for all; empty if all are."""
    if jax.process_count() == 1:
        return text
    return next((found for found in gathered(text, LINE) if found), "")


def gathered(text: str, room: int) -> list[str]:
    """The texts of all processes, in their order, each cut to `room` bytes."""
    padded = np.frombuffer(text.encode()[:room].ljust(room, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def require_same(values: Mapping[str, Any]) -> None:
    """A `RequestError`, in every process, unless all run the same code and have the same `values`, each by its name in messages.

    Processes that differ would wait for each other for ever, or train something that nobody asked for.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps({name: str(value) for name, value in {**values, "code": code()}.items()})
    room = int(np.max(multihost_utils.process_allgather(np.int32(len(text.encode())))))
    first, *others = map(json.loads, gathered(text, room))
    for number, other in enumerate(others, 1):
        names = [name for name in first | other if first.get(name) != other.get(name)]
        if names:
            differs = f"{names[0]}: {other.get(names[0])!r} in process {number}, {first.get(names[0])!r} in process 0"
            more = f", and {len(names) - 1} more differ" if len(names) > 1 else ""
            raise RequestError(f"{differs}{more}; start all processes with the same command, code and data")


@cache
def code() -> str:
    """What the code of this process is known by: the files of this project that a training runs, and the libraries under it."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return ", ".join([digest.hexdigest()[:12], *(f"{name} {version(name)}" for name in LIBRARIES)])
