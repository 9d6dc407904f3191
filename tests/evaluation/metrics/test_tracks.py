"""The tracker finds shifts that are known, and loses what is no longer there."""

import builtins

import numpy as np
import pytest

from configs.errors import RequestError
from evaluation.metrics import tracks

pytest.importorskip("cv2")


def texture(height=64, width=96, seed=0):
    """A smooth random picture that is periodic, as its frequencies."""
    random = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    waves = np.fft.fft2(random.standard_normal((height, width))) * np.exp(-60 * (rows**2 + columns**2))
    return waves, rows, columns


def moving(*places, **size):
    """The texture moved by each of `places` (columns, rows), exact to the rounding of bytes."""
    waves, rows, columns = texture(**size)
    frames = np.stack([np.fft.ifft2(waves * np.exp(-2j * np.pi * (rows * dy + columns * dx))).real for dx, dy in places])
    grey = np.clip(128 + 45 * frames / frames.std(), 0, 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


@pytest.mark.parametrize("shift", [(1.0, 0.0), (0.5, -1.25), (-3.3, 2.6)])
def test_a_shift_is_found_to_a_tenth_of_a_pixel(shift):
    found = tracks.track(moving(*(np.multiply(shift, t) for t in range(4))))
    moved = found.places - found.places[:, :1]
    inside = tracks.window((64, 96)) // 2 + 1  # nearer to an edge, what comes in is compared with nothing
    kept = found.seen[:, -1] & ((found.places >= inside) & (found.places <= np.array([95, 63]) - inside)).all((1, 2))
    assert kept.mean() > 0.5
    places = found.places[found.seen]
    assert ((places >= 0) & (places <= [95, 63])).all()
    assert np.abs(moved[kept] - np.multiply.outer(np.arange(4), shift)).max() < 0.1


def test_the_grid_covers_the_picture():
    points = tracks.grid((64, 96))
    assert points.shape == (32 * 48, 2)
    assert points[0].tolist() == [0.5, 0.5]
    assert points[-1].tolist() == [94.5, 62.5]
    assert len(tracks.grid((480, 832))) == 55 * 55
    assert [tracks.window(size) for size in ((16, 16), (64, 96), (480, 832))] == [7, 9, 21]


def test_a_point_that_does_not_come_back_is_lost_for_good():
    still, other = moving((0, 0), (0, 0), (0, 0)), moving((0, 0), seed=1)
    found = tracks.track(np.concatenate([still, other, still]))
    assert found.seen[:, :3].all()
    assert found.seen[:, 3].mean() < 0.3
    assert not (found.seen[:, 4:] & ~found.seen[:, 3:4]).any()
    assert np.isfinite(found.places).all()


def test_without_the_package_there_is_an_error_of_one_line(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RequestError, match="pip install opencv-python-headless"):
        tracks.opencv()
