"""How near two arrays are."""

import numpy as np


def relative_l2(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
