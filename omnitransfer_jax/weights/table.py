"""What a weight table is made of: which tensor of a checkpoint is which leaf of ours, and how its layout differs.

A table is a list of entries, spelled out for every tensor of one model, so it reads the same way in both directions:
`files.py` loads by it and saves by it. Each model's table lives beside this file under the model's own name.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A change of layout and its exact inverse; both only move elements."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # torch (out, in) <-> (in, out)
CONV = Layout(  # torch (out, in, *window) <-> (*window, in, out)
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)


class Entry(NamedTuple):
    """One tensor of a checkpoint and the place it has here."""

    theirs: str
    """Name in the checkpoint."""
    ours: str
    """Path of the leaf, as in `blocks.self_attention.query.kernel`."""
    layout: Layout = SAME
    layer: int | None = None
    """Row of the leaf's leading axis, for layers that are stacked and scanned here."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the leaf is the i-th of n equal parts of their tensor's first axis (fused projections)."""
