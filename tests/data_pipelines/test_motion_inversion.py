"""What Motion-Textual Inversion reads of its clips: frames of its start, and copies with another look."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs import motion_inversion as configs
from data_pipelines import motion_inversion as data
from data_pipelines.clips import fit, to_unit

SMOKE = configs.get_config("smoke")
IMAGE = replace(SMOKE, inversion=replace(SMOKE.inversion, branch="image", augment=2))


class Fixed:
    """A generator of the numbers that it is given."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None) -> Any:
        taken, self.numbers = self.numbers[: size or 1], self.numbers[size or 1 :]
        return np.array(taken) if size else taken[0]


class Recorder:
    """In the place of the encoders: returns the pixels that it is given."""

    def text(self, prompts):
        return np.array([[[len(prompt)] * 2] * 4 for prompt in prompts], np.float32), np.array([min(4, 1 + len(p)) for p in prompts])

    latents = condition = image = staticmethod(lambda pixels: pixels)


def clip(frames=9, height=32, width=48):
    return np.random.default_rng(0).integers(40, 180, (frames, height, width, 3), dtype=np.uint8)


def test_colours_and_crop_are_the_same_in_all_frames():
    x = clip()
    bright = data.augmented(x, Fixed(1.0, 0.5, 0.5, 1.0, 1.0, 1.2))
    assert np.abs(bright - 1.2 * x.astype(np.float64)).max() <= 0.5 + 1e-3
    flat = data.augmented(x, Fixed(1.0, 0.5, 0.5, 1.0, 0.8, 1.0)).astype(np.float64)
    assert flat.std() == pytest.approx(0.8 * x.std(), rel=1e-2)
    assert flat.mean() == pytest.approx(x.mean(), abs=0.1)
    grey = data.augmented(x, Fixed(1.0, 0.5, 0.5, 0.8, 1.0, 1.0)).astype(np.float64)
    assert np.allclose(grey.mean(-1), x.mean(-1), atol=0.5)
    assert np.allclose(np.ptp(grey, -1), 0.8 * np.ptp(x.astype(np.float64), -1), atol=1.01)
    cropped = data.augmented(x, Fixed(0.8, 1.0, 0.0, 1.0, 1.0, 1.0))  # 26 x 38 pixels, at the right, at the top
    assert all(np.abs(a.astype(int) - fit(b[:26, 10:], 32, 48)).max() <= 1 for a, b in zip(cropped, x, strict=True))


def test_copies_follow_the_clips():
    x = np.stack([clip(), clip()[::-1]])
    samples, starts = data.encode(Recorder(), IMAGE, x, ["a", "bcd"])
    assert samples.clip.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(samples.latents[:2], to_unit(x))
    assert all(not np.array_equal(samples.latents[i], samples.latents[j]) for i in range(6) for j in range(i))
    assert np.array_equal(samples.condition, samples.latents[:, 0])  # a copy starts from its own first frame
    assert np.array_equal(samples.image, samples.latents[:, 0])
    assert np.array_equal(samples.text[:, 0, 0], [1, 3, 1, 3, 1, 3])  # the image branch keeps the prompt
    assert [start.caption.shape[0] for start in starts] == [2, 4]
    assert np.array_equal(starts[1].frames, to_unit(x[1])[[0, 2, 6]])  # latent frames of frames 0, 1 to 4, 5 to 8
    again, _ = data.encode(Recorder(), IMAGE, x, ["a", "bcd"])
    assert np.array_equal(again.latents, samples.latents)
    text, _ = data.encode(Recorder(), SMOKE, x, ["a", "bcd"])
    assert np.array_equal(text.text, np.zeros((2, 4, 2)))  # tokens in the place of the prompt: the empty one is read
    assert len(text.latents) == 2
