"""Intervals whose ends follow from what is drawn."""

import math

import numpy as np

from evaluation.intervals import crossed_interval, interval


def test_a_rater_who_is_strict_for_all_clips_counts_as_one():
    """Of two raters who always say 0 and 1, a quarter of the draws has one of them alone: the interval is from 0 to 1 for any clips."""
    clips, raters, values = [str(i // 2) for i in range(80)], ["strict", "kind"] * 40, [0.0, 1.0] * 40
    assert crossed_interval(values, clips, raters) == (0, 1)
    low, high = interval(values, clips)  # which draws single ratings
    assert high - low < 0.3
    assert crossed_interval(values, raters, clips) == (0, 1)  # the same for two clips


def test_one_rater_or_one_clip_has_no_interval():
    assert all(map(math.isnan, crossed_interval([1, 2], ["a", "b"], ["x", "x"])))
    assert all(map(math.isnan, crossed_interval([1, 2], ["a", "a"], ["x", "y"])))


def test_answers_may_be_absent():
    random = np.random.default_rng(0)
    there = [(str(i), str(j)) for i in range(6) for j in range(5) if random.random() < 0.4]
    low, high = crossed_interval([4.0] * len(there), [i for i, _ in there], [j for _, j in there])
    assert (low, high) == (4, 4)
