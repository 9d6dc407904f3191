"""Tracks from files: a shift, what is hidden in between, and files that are none."""

import numpy as np
import pytest

from configs.errors import RequestError
from evaluation.metrics import track_files
from evaluation.metrics.motion_fidelity import motion_fidelity


def moving(step, frames=6, points=5):
    places = np.random.default_rng(0).uniform(10, 50, (1, points, 2)) + np.arange(frames)[:, None, None] * np.array(step)
    return places.astype(np.float32)


def written(path, **arrays):
    np.savez(path, **arrays)
    return track_files.read(path, 6)


def test_a_shift_is_read_as_it_is(tmp_path):
    places = moving((1.25, -0.5))
    for name, arrays in (
        ("plain", {"tracks": places}),
        ("batch", {"tracks": places[None], "visibility": np.ones((1, 6, 5), bool)}),
    ):
        found = written(tmp_path / f"{name}.npz", **arrays)
        np.testing.assert_array_equal(found.places, places.transpose(1, 0, 2))
        assert found.seen.all()
    same, other = written(tmp_path / "same.npz", tracks=moving((2.5, -1))), written(tmp_path / "other.npz", tracks=moving((-1.25, 0.5)))
    assert motion_fidelity(found, same) == pytest.approx(1)
    assert motion_fidelity(found, other) == pytest.approx(-1)
    assert motion_fidelity(found.standing(), found) == 0


def test_a_point_that_was_hidden_has_no_motion_when_it_comes_back(tmp_path):
    places, visible = moving((1, 0)), np.ones((6, 5), bool)
    places[3, 0], visible[3, 0] = (400, 400), False
    found = written(tmp_path / "a.npz", tracks=places, visibility=visible)
    assert found.seen[0].tolist() == [True, True, True, False, False, True]
    assert motion_fidelity(found, written(tmp_path / "b.npz", tracks=moving((1, 0)))) == pytest.approx(1)


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    for path, words in ((tmp_path / "absent.npz", "No such file"), (tmp_path / "text.npz", "no tracks")):
        with pytest.raises(RequestError, match=words):
            track_files.read(path, 6)
    for arrays, words in (
        ({"other": np.zeros(3)}, "no array `tracks`"),
        ({"tracks": np.zeros((6, 5, 3))}, "give an npz"),
        ({"tracks": moving((1, 0)), "visibility": np.ones((5, 6))}, "give an npz"),
        ({"tracks": moving((1, 0), 5)}, "tracks of 5 frames, 6 needed"),
        ({"tracks": np.full((6, 5, 2), np.nan)}, "a visible point without a place"),
    ):
        with pytest.raises(RequestError, match=words):
            written(tmp_path / "bad.npz", **arrays)
