"""How near two arrays are."""

import logging

import numpy as np

LOG = logging.getLogger(__name__)


def relative_l2(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, in float64; `pytest --log-cli-level=INFO` shows every one."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    LOG.info("%.1e", error)
    return error
