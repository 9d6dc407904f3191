"""The rows of every table: the transfer, and the controls that a sound metric must not prefer to it.

The first five are made by the network with the same noise; what differs is what it is given.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

Clip = UInt8[np.ndarray, "T H W 3"]


class Row(NamedTuple):
    """A row and what it is."""

    title: str
    about: str
    network: bool = True
    """Whether the network makes it; if not, it is made of what the network is given."""


ROWS = {
    "transfer": Row("transfer", "the reference, the prompt and the first frame of the case"),
    "swapped": Row("another reference", "the reference of another case of the task"),
    "shuffled": Row("shuffled reference", "the frames of the reference in random order"),
    "none": Row("no reference", "prompt and first frame alone"),
    "neutral": Row("no prompt", "the reference with an empty prompt, of cases that have one"),
    "still": Row("first frame held", "the first frame of the case, or else of the reference, in all frames", False),
    "copied": Row("reference copied", "the reference itself", False),
}
TRANSFER = "transfer"
CONTROLS = tuple(name for name in ROWS if name != TRANSFER)


def shuffled(clip: Clip) -> Clip:
    """The frames in an order that is random, the same for all clips of one length, and not their own."""
    order = np.random.default_rng(0).permutation(len(clip))
    return clip[order if (order != np.arange(len(clip))).any() else order[::-1]]
