"""What a weight table consists of: which tensor of a checkpoint is which leaf of our model, and how their layouts differ.

A table is a list of entries, one for every tensor of a model. `convert.py` loads and saves by the same table. The table of a model is in
the file of this package that has the model's name.
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
    """One tensor of a checkpoint and the leaf of our model that it fills."""

    theirs: str
    """Name in the checkpoint."""
    ours: str
    """Path of the leaf, as in `blocks.self_attention.query.kernel`."""
    layout: Layout = SAME
    layer: int | None = None
    """Index on the leaf's first axis, for layers that are stacked and scanned here."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the leaf is the i-th of n equal parts of their tensor's first axis (fused projections)."""
