"""Bicubic interpolation as in torch, without antialias, as Wan2.1 resizes first frames and the input of CLIP."""

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Float32

SHARPNESS = np.float32(-0.75)  # the free coefficient `a` of the cubic convolution kernel, torch's choice


def bicubic_resize(image: Float[Array, "B H W C"], height: int, width: int) -> Float32[Array, "B {height} {width} C"]:
    """The whole image resized to `height` x `width` pixels; the aspect ratio may change, and values may leave the input's range.

    Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: pixel centres at half integers,
    four taps in each direction at any scale (so a strong reduction aliases), edges repeated.
    """
    rows, columns = _taps(image.shape[1], height), _taps(image.shape[2], width)
    x = jnp.einsum("hH,BHWC->BhWC", rows, image.astype(jnp.float32), precision=Precision.HIGHEST)
    return jnp.einsum("wW,BhWC->BhwC", columns, x, precision=Precision.HIGHEST)


def _taps(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes one axis.

    Positions are float32 as in torch, so that they have the same rounding errors, about 1e-5 of a pixel at a thousand pixels.
    """
    centre = np.float32(old) / np.float32(new) * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    left = np.floor(centre)
    offset = np.arange(-1, 3, dtype=np.float32)[:, None]  # taps 1 and 2 lie within one pixel of the centre, 0 and 3 within two
    distance = np.abs(centre - left - offset)
    a, d = SHARPNESS, distance
    weight = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)
    source = np.clip(left + offset, 0, old - 1).astype(np.int64)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new)[None], source), weight)
    return matrix
