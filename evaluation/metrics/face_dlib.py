"""dlib's face network (ResNet of 29 layers, 128 numbers) on aligned faces, from a file that the user names.

The file is a safetensors of `LAYER/conv/filters` (HWIO), `LAYER/conv/bias`, `LAYER/scale/weights`, `LAYER/scale/biases` and `fc`, the
names of face-api.js.
dlib compares faces by Euclidean distance and calls two the same person below 0.6.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from evaluation.metrics import weight_file

SIDE = 150  # pixels of a face
MEAN = (122.782, 117.001, 104.298)  # red, green, blue (dlib's input_rgb_image)
BLOCKS = (  # whether each residual block halves the picture
    ("conv32_1", False), ("conv32_2", False), ("conv32_3", False), ("conv64_down", True), ("conv64_1", False), ("conv64_2", False),
    ("conv64_3", False), ("conv128_down", True), ("conv128_1", False), ("conv128_2", False), ("conv256_down", True),
    ("conv256_1", False), ("conv256_2", False), ("conv256_down_out", True),
)  # fmt: skip
Params = Mapping[str, Any]


def names() -> list[str]:
    """The arrays that a file must have."""
    return ["fc", *(f"{layer}/{kind}" for layer in layers() for kind in ("conv/filters", "conv/bias", "scale/weights", "scale/biases"))]


def layers() -> Iterator[str]:
    """The names of all convolutions."""
    yield "conv32_down"
    yield from (f"{block}/{conv}" for block, _ in BLOCKS for conv in ("conv1", "conv2"))


def load(path: str) -> dict[str, np.ndarray]:
    """The weights of a file; a `RequestError` if it has not all of them."""
    return weight_file.load(path, names(), "dlib's face network as face-api.js names it")


def embed(params: Params, faces: UInt8[np.ndarray, "N 150 150 3"]) -> Float[np.ndarray, "N 128"]:
    """A vector for each face."""
    return np.concatenate([np.asarray(vectors(params, jnp.asarray(face[None], jnp.float32))) for face in faces])


@jax.jit
def vectors(params: Params, faces: Float[Array, "N H W 3"]) -> Float[Array, "N 128"]:
    """A vector for each face of pixels from 0 to 255."""
    x = (faces - jnp.asarray(MEAN)[None, None, None]) / 256
    x = jax.nn.relu(scaled(params, "conv32_down", convolved(params, "conv32_down", x, 2, "VALID")))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
    for name, halves in BLOCKS:
        x = block(params, name, x, halves)
    return jnp.einsum("bc,ck->bk", x.mean((1, 2)), params["fc"])


def block(params: Params, name: str, x: Array, halves: bool) -> Array:
    """A residual block; one that halves the picture adds the mean of 2 x 2 pixels, with zeros for channels that are new."""
    stride, padding = (2, "VALID") if halves else (1, "SAME")
    y = jax.nn.relu(scaled(params, f"{name}/conv1", convolved(params, f"{name}/conv1", x, stride, padding)))
    y = scaled(params, f"{name}/conv2", convolved(params, f"{name}/conv2", y, 1, "SAME"))
    if halves:
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        height, width, channels = (max(p, q) for p, q in zip(x.shape[1:], y.shape[1:], strict=True))
        x, y = (jnp.pad(z, ((0, 0), *((0, s - t) for s, t in zip((height, width, channels), z.shape[1:], strict=True)))) for z in (x, y))
    return jax.nn.relu(x + y)


def convolved(params: Params, name: str, x: Array, stride: int, padding: str) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params[f"{name}/conv/filters"], (stride, stride), padding, dimension_numbers=layout)
    return y + params[f"{name}/conv/bias"][None, None, None]


def scaled(params: Params, name: str, x: Array) -> Array:
    return x * params[f"{name}/scale/weights"][None, None, None] + params[f"{name}/scale/biases"][None, None, None]
