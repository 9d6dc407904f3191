"""Samples in memory: every epoch has each of them once, whatever the number of processes; the position can be restored."""

import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines.in_memory import batches, digest

SAMPLES = {"x": np.arange(6), "y": np.arange(12.0).reshape(6, 2)}


def test_each_epoch_is_a_permutation():
    found = batches(SAMPLES, 4, seed=3)
    drawn = [next(found) for _ in range(6)]
    x = np.concatenate([batch["x"] for batch in drawn]).reshape(4, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in x)
    assert len({tuple(epoch) for epoch in x}) > 1
    assert all((batch["y"][:, 0] == 2 * batch["x"]).all() for batch in drawn)


def test_processes_share_one_order():
    whole, halves = batches(SAMPLES, 4, seed=3), [batches(SAMPLES, 4, seed=3, process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        assert (next(whole)["x"] == np.concatenate([next(half)["x"] for half in halves])).all()


def test_position_is_restored():
    first = batches(SAMPLES, 4, seed=3)
    for _ in range(2):
        next(first)
    second = batches(SAMPLES, 4, seed=3)
    second.set_state(first.get_state())
    assert (next(first)["x"] == next(second)["x"]).all()


def test_processes_divide_the_batch():
    with pytest.raises(RequestError, match="multiple of the 3"):
        batches(SAMPLES, 4, seed=0, process_count=3)


def test_digest_sees_values_types_and_shapes():
    y = SAMPLES["y"]
    others = [{**SAMPLES, "y": each} for each in (y + 1e-9, y.astype(np.float32), y.reshape(2, 6))]
    assert len({digest(each) for each in (SAMPLES, *others)}) == 4
