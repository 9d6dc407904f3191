"""Bicubic resizing against torch's, and its own laws."""

import jax.numpy as jnp
import numpy as np
import pytest

from omnitransfer_jax.resize import bicubic_resize
from tests.compare import relative_l2


@pytest.mark.parametrize(
    ("old", "new"),
    [((9, 7), (23, 30)), ((53, 37), (28, 28)), ((31, 64), (64, 31)), ((1, 2), (5, 3)), ((480, 832), (224, 224)), ((540, 961), (480, 832))],
)
def test_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).standard_normal((2, *old, 3), np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(image).permute(0, 3, 1, 2), size=new, mode="bicubic", align_corners=False)
    assert relative_l2(bicubic_resize(jnp.asarray(image), *new), expected.permute(0, 2, 3, 1)) <= 1e-5


def test_same_size_is_the_same_image():
    image = np.random.default_rng(0).standard_normal((1, 11, 6, 2), np.float32)
    np.testing.assert_allclose(bicubic_resize(jnp.asarray(image), 11, 6), image, atol=1e-5)


def test_flat_colour_stays_flat():
    flat = jnp.full((1, 13, 40, 3), 0.7)
    np.testing.assert_allclose(bicubic_resize(flat, 31, 17), np.full((1, 31, 17, 3), 0.7), rtol=1e-5)


def test_halving_a_slope_reads_it_midway_between_pixels():
    """Pixel centres lie at half integers: row i of the half-size image is read at 2i + 1/2."""
    slope = jnp.broadcast_to(jnp.arange(40.0)[None, :, None, None], (1, 40, 4, 1))
    np.testing.assert_allclose(bicubic_resize(slope, 20, 4)[0, 1:-1, 1, 0], 2 * np.arange(1, 19) + 0.5, rtol=1e-5)


def test_mirrored_image_gives_mirrored_result():
    image = np.random.default_rng(0).standard_normal((1, 20, 15, 3), np.float32)
    mirrored = bicubic_resize(jnp.asarray(image[:, ::-1, ::-1].copy()), 33, 8)
    np.testing.assert_allclose(mirrored[:, ::-1, ::-1], bicubic_resize(jnp.asarray(image), 33, 8), atol=1e-5)
