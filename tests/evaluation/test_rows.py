"""The control whose reference has lost its order in time."""

import numpy as np
import pytest

from evaluation.rows import shuffled


@pytest.mark.parametrize("frames", [2, 5, 9, 17, 81])
def test_a_shuffled_reference_has_the_same_frames_in_another_order(frames):
    clip = np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    order = shuffled(clip)[:, 0, 0, 0]
    assert sorted(order) == list(range(frames))
    assert (order != np.arange(frames)).any()
    assert (shuffled(clip) == shuffled(clip + 0)).all(), "the same for all clips of one length"
