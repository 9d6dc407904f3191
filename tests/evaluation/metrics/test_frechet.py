"""The Fréchet distance against its definition with a matrix square root, and cases whose answer is known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from configs.errors import RequestError
from evaluation.metrics import frechet


def normal(seed, count, size, scale=1.0):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) @ random.normal(size=(size, size)) * scale + random.normal(size=size)


def definition(a, b):
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)


def test_it_is_the_definition():
    for count in (40, 9):  # more samples than features, and as few as they are many
        a, b = normal(0, count, 6), normal(1, count + 3, 6, 2.0)
        assert frechet.distance(a, b) == pytest.approx(definition(a, b), rel=1e-6)


def test_known_answers():
    a = normal(2, 5, 400)  # singular: fewer samples than features
    assert frechet.distance(a, a[::-1]) == pytest.approx(0, abs=1e-8 * np.square(a).sum())
    assert frechet.distance(a, a + 0.5) == pytest.approx(400 * 0.25)
    mean = a.mean(0)
    assert frechet.distance(a, mean + 3 * (a - mean)) == pytest.approx(4 * np.cov(a, rowvar=False).trace())  # (3 - 1)^2 of the variance
    with pytest.raises(RequestError, match="1 and 5 clips"):
        frechet.distance(a[:1], a)
