"""Distances between clips: what a copy is, whatever its times, and what is none."""

import numpy as np
import pytest

from evaluation.metrics import copies


def clip(seed, frames=6, side=16):
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def test_a_copy_is_one_in_any_order_of_its_frames():
    reference = clip(0)
    assert copies.copy_distance(reference, reference) == 0
    assert copies.copy_distance(reference[[3, 1, 1, 5]], reference) == 0
    assert copies.copy_distance(reference, np.repeat(reference, 2, 1).repeat(2, 2)) == pytest.approx(0, abs=1e-9)  # of another size
    noisy = np.clip(reference + np.random.default_rng(5).normal(0, 5, reference.shape), 0, 255).astype(np.uint8)
    assert 0 < copies.copy_distance(noisy, reference) < copies.COPY
    assert copies.copy_distance(clip(1), reference) > 5 * copies.COPY


def test_distances_by_hand():
    black, grey = np.zeros((3, 4, 4, 3), np.uint8), np.full((5, 4, 4, 3), 51, np.uint8)
    assert copies.distance(black, grey) == pytest.approx(0.2)
    assert copies.copy_distance(black, grey) == pytest.approx(0.2)
    assert copies.first_frame_error(np.concatenate([grey, black]), grey[0]) == 0
    assert copies.first_frame_error(np.concatenate([black, grey]), grey[0]) == pytest.approx(0.2)


def test_the_captions_share():
    own, near, far = (np.full((2, 4, 4, 3), level, np.uint8) for level in (0, 10, 30))
    assert copies.caption_share(own, near, far) == pytest.approx(0.25)
    assert copies.caption_share(own, near, own) == 1
    assert copies.caption_share(own, own, far) == 0
    assert np.isnan(copies.caption_share(own, own, own))


def test_large_clips_are_averaged_down():
    large = clip(2, 2, 128)
    small = copies.small(large)
    assert small.shape == (2, 64, 64, 3)
    expected = large.reshape(2, 64, 2, 64, 2, 3).mean((2, 4)) / 255
    np.testing.assert_allclose(small, expected, atol=1.01 / 255)  # Pillow rounds after each of its two passes
    assert abs(small - expected).mean() < 0.6 / 255
