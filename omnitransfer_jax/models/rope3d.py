"""Rotary position embedding in time, height and width.

The table is computed from the coordinates of the tokens, not from their index in a sequence, so it can be computed for any subset:
for the tokens of one device, or for a reference that is moved by an offset.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

POSITIONS = 1024  # rows of the original's table on every axis (Wan2.1 model.py)


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions encode time, height and width (Wan2.1 model.py): 44, 42, 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@functools.cache
def _angles(width: int, base: float, top: float) -> np.ndarray:
    """Angles [POSITIONS, width / 2] of one axis, in float64 as the original computes them."""
    return np.arange(POSITIONS)[:, None] * (top * base ** -(np.arange(0, width, 2) / width))[None]


def grid(frames: int, rows: int, columns: int) -> Int[Array, "L 3"]:
    """Coordinates (time, row, column) of a patch grid's tokens, in token order."""
    axes = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    return jnp.asarray(np.stack(axes, -1).reshape(-1, 3), jnp.int32)


def rotation(
    coordinates: Int[Array, "*B L 3"], head_dim: int, base: float, top: float, time_scale: float = 1.0
) -> Float[Array, "2 *B L k"]:
    """Cosines and sines for tokens at (time, row, column), each below `POSITIONS`; k is head_dim / 2.

    `base` and `top` are `DiTConfig.rope_base` and `rope_top`: pair i of an axis of width w turns by top * base ** -(2i / w) radians
    from one position to the next. Positions in time are `time_scale` apart.
    """
    scales = (time_scale, 1.0, 1.0)
    angles = [scale * _angles(width, base, top) for scale, width in zip(scales, axis_widths(head_dim), strict=True)]
    tables = [np.stack([np.cos(a), np.sin(a)]).astype(np.float32) for a in angles]
    return jnp.concatenate([jnp.asarray(t)[:, coordinates[..., i]] for i, t in enumerate(tables)], axis=-1)


def rotate(x: Float[Array, "B L N K"], table: Float[Array, "2 #B L k"]) -> Float[Array, "B L N K"]:
    """Rotates each pair (2i, 2i + 1) of dimensions by its angle, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    (cos, sin), (a, b) = table[:, :, :, None, :], (pairs[..., 0], pairs[..., 1])
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
