"""Shared colours are counted; a frozen clip is steady and gives no NaN."""

import itertools

import numpy as np
import pytest

from evaluation.metrics.appearance import appearance_leak, temporal_consistency


def plain(*colours, frames=3):
    """A clip of stripes of equal width, each of one colour."""
    return np.repeat(np.repeat(np.array(colours, np.uint8), 4, 0)[None, None], frames, 0).repeat(5, 1)


def test_leak_is_the_share_of_common_colours():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert appearance_leak(plain(red, green), plain(green, red, frames=7)) == pytest.approx(1)
    assert appearance_leak(plain(red, green), plain(red, blue)) == pytest.approx(0.5)
    assert appearance_leak(plain(red), plain(blue)) == appearance_leak(plain(red), plain(green)) == 0
    assert appearance_leak(plain((31, 0, 0)), plain((0, 0, 0))) == pytest.approx(1)  # one step of 32
    assert appearance_leak(plain((32, 0, 0)), plain((0, 0, 0))) == 0


def test_consistency_is_a_correlation_of_neighbours():
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    expected = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in itertools.pairwise(frames)])
    assert temporal_consistency(frames) == pytest.approx(expected)
    assert temporal_consistency(frames[[0, 0, 0]]) == pytest.approx(1)
    assert temporal_consistency(plain((9, 9, 9))) == 1
    half = np.concatenate([plain((9, 9, 9), frames=2), frames[:1, :5, :4]])
    assert temporal_consistency(half) == pytest.approx(0.5)
