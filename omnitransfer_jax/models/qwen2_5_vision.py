"""The vision tower of Qwen2.5-VL: pixels to patches, and the patches of any number of images and videos to features.

A grid (t, h, w) counts the patches of one image (t = 1) or video. Patches are ordered as by the hub's processor: frame by frame, and
within a frame square by square, where a square is the `merge` x `merge` patches that become one feature.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32

from configs.base import QwenConfig, QwenVisionConfig
from configs.errors import require
from omnitransfer_jax.models.attend import attention
from omnitransfer_jax.models.clip_vision import MEAN, STD
from omnitransfer_jax.models.layers import Linear, RMSNorm, exact_gelu

THETA = 10_000.0  # base of the tower's rotation (Qwen2.5-VL has no field for it)
WIDEST = 200  # the largest aspect ratio that the hub's processor accepts

Grid = tuple[int, int, int]
Attend = Callable[[Array, Array, Array], Array]


def fit(height: int, width: int, config: QwenVisionConfig, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The height and width to resize to: whole squares of patches, `min_pixels` to `max_pixels` in total, nearly the same aspect ratio.

    The arithmetic is that of the hub's processor (transformers, smart_resize), which rounds halves to even.
    """
    require(
        max(height, width) <= WIDEST * min(height, width),
        f"{height}x{width} pixels: one side is more than {WIDEST} times the other; crop it",
    )
    unit = config.patch * config.merge
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows * unit, columns * unit


def grid_of(frames: int, height: int, width: int, config: QwenVisionConfig) -> Grid:
    """The grid of a clip of this size in pixels, which must be whole squares of patches, as `fit` returns."""
    unit = config.patch * config.merge
    require(height % unit == 0 and width % unit == 0, f"{height}x{width} pixels: multiples of {unit}; resize to what `fit` returns")
    return -(-frames // config.temporal_patch), height // config.patch, width // config.patch


def patchify(video: Float[Array, "T H W 3"], config: QwenVisionConfig) -> Float32[Array, "P X"]:
    """The patches of a clip in [-1, 1], or of an image (T = 1), normalised by CLIP's mean and standard deviation.

    X runs over channels, frames, rows and columns of a patch. The last frame is repeated to fill the last patch, so an image is
    repeated `temporal_patch` times.
    """
    frames, height, width, _ = video.shape
    grid_of(frames, height, width, config)
    x = (video.astype(jnp.float32) * 0.5 + 0.5 - jnp.asarray(MEAN)[None, None, None]) / jnp.asarray(STD)[None, None, None]
    x = jnp.pad(x, ((0, -frames % config.temporal_patch), (0, 0), (0, 0), (0, 0)), mode="edge")
    return rearrange(
        x, "(t f) (h a p) (w b q) C -> (t h w a b) (C f p q)",
        f=config.temporal_patch, a=config.merge, b=config.merge, p=config.patch, q=config.patch,
    )  # fmt: skip


class QwenVision(nnx.Module):
    """Patches to features. Most blocks attend within windows of a frame, some within the whole frame, none between frames."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        vision = config.vision
        self.config, self.dtype = vision, jnp.dtype(config.dtype)
        self.patch_embedding = Linear(3 * vision.temporal_patch * vision.patch**2, vision.dim, bias=False, rngs=rngs)
        self.blocks = nnx.vmap(lambda key: Block(vision, self.dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), vision.num_layers)
        )
        self.merger = Merger(vision, config.dim, self.dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "P X"], grids: tuple[Grid, ...]) -> Float32[Array, "V D"]:
        """The features of all images and videos, concatenated; `grids` are static, and so is every index below.

        Between the first projection and the last the patches are ordered window by window, so that most blocks need no reordering.
        """
        config = self.config
        total = sum(t * h * w for t, h, w in grids)
        require(patches.shape[0] == total, f"{patches.shape[0]} patches: the grids {grids} have {total}; give the grids of these patches")
        windows, frames = Segments.of(window_patches(grids, config)), Segments.of(_frames(grids))
        back = np.argsort(windows.order)
        to_frames = back[frames.order]
        from_frames = np.argsort(to_frames)
        table = rotation(_cells(grids, config.merge)[windows.order], config.dim // config.num_heads)
        full = jnp.asarray([i in config.full_attention for i in range(config.num_layers)])
        graphdef, blocks = nnx.split(self.blocks)

        def within_windows(q, k, v):
            return windows.attend(q, k, v, window_attention)

        def within_frames(q, k, v):
            return frames.attend(q[to_frames], k[to_frames], v[to_frames], attention)[from_frames]

        @jax.checkpoint
        def step(x, layer):
            full, block = layer
            return nnx.merge(graphdef, block)(x, table, lambda *qkv: jax.lax.cond(full, within_frames, within_windows, *qkv)), None

        x = self.patch_embedding(patches.astype(self.dtype)[windows.order]).astype(jnp.float32)
        x, _ = jax.lax.scan(step, x, (full, blocks))
        square = config.merge**2
        return self.merger(x)[back[::square] // square]


class Block(nnx.Module):
    """Self-attention and a gated MLP, each after a norm; the residual stream is float32."""

    def __init__(self, config: QwenVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attention = SelfAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim, bias=True, rngs=rngs)

    def __call__(self, x: Float32[Array, "P D"], table: Float32[Array, "2 P k"], attend: Attend) -> Float32[Array, "P D"]:
        x = x + self.attention(self.norm1(x).astype(self.dtype), table, attend).astype(jnp.float32)
        return x + self.mlp(self.norm2(x).astype(self.dtype)).astype(jnp.float32)


class SelfAttention(nnx.Module):
    """Projections and rotation around `attend`, which restricts attention to windows or frames."""

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (Linear(config.dim, config.dim, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "P D"], table: Float32[Array, "2 P k"], attend: Attend) -> Float[Array, "P D"]:
        q, k, v = (rearrange(project(x), "P (N K) -> P N K", N=self.num_heads) for project in (self.query, self.key, self.value))
        return self.out(rearrange(attend(rotate(q, table), rotate(k, table), v), "P N K -> P (N K)"))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, ffn_dim: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate, self.up = (Linear(dim, ffn_dim, bias=bias, rngs=rngs) for _ in range(2))
        self.down = Linear(ffn_dim, dim, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Merger(nnx.Module):
    """Concatenates the patches of each square and projects them to one feature; the GELU is exact."""

    def __init__(self, config: QwenVisionConfig, out_dim: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.width = config.dim * config.merge**2
        self.norm = RMSNorm(config.dim, config.eps)
        self.up = Linear(self.width, self.width, rngs=rngs)
        self.down = Linear(self.width, out_dim, rngs=rngs)

    def __call__(self, x: Float32[Array, "P d"]) -> Float32[Array, "V D"]:
        squares = self.norm(x).astype(self.dtype).reshape(-1, self.width)
        return self.down(exact_gelu(self.up(squares))).astype(jnp.float32)


class Segments(NamedTuple):
    """A division of the patches: each attends to those of its own segment."""

    order: np.ndarray
    """Indices of the patches, segment by segment, the shortest segments first."""
    sizes: tuple[tuple[int, int], ...]
    """(number of segments, their length), one pair for each length."""

    @classmethod
    def of(cls, segments: Iterator[np.ndarray]) -> "Segments":
        ordered = sorted(segments, key=len)
        return cls(np.concatenate(ordered), tuple((len(list(same)), length) for length, same in groupby(ordered, key=len)))

    def attend(self, q: Float[Array, "P N K"], k: Float[Array, "P N K"], v: Float[Array, "P N K"], kernel: Attend) -> Float[Array, "P N K"]:
        """Attention of patches that are in `order`. Segments of equal length form a batch, so no padding and no mask is needed."""
        ends = np.cumsum([count * length for count, length in self.sizes])[:-1].tolist()
        batches = zip(self.sizes, *(jnp.split(x, ends) for x in (q, k, v)), strict=True)
        outs = [kernel(*(x.reshape(*size, *x.shape[1:]) for x in qkv)) for size, *qkv in batches]
        return jnp.concatenate([out.reshape(-1, *out.shape[2:]) for out in outs])


def window_attention(q: Float[Array, "W L N K"], k: Float[Array, "W L N K"], v: Float[Array, "W L N K"]) -> Float[Array, "W L N K"]:
    """Attention of all windows at once, the softmax in float32; a window's scores need no more memory than its patches."""
    scores = jnp.einsum("WqNK,WsNK->WNqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("WNqs,WsNK->WqNK", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def frequencies(theta: float, width: int) -> Float32[np.ndarray, "{width//2}"]:
    """The angle by which each pair of `width` dimensions turns from one position to the next, in float32 as in the original."""
    return 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))


def rotation(cells: np.ndarray, head_dim: int) -> Float32[Array, "2 P k"]:
    """Cosines and sines for patches at (row, column): half of a head's angles encode the row, half the column."""
    angles = jnp.asarray(cells, jnp.float32)[:, :, None] * jnp.asarray(frequencies(THETA, head_dim // 2))[None, None]
    angles = angles.reshape(len(cells), -1)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "*B L N K"], table: Float32[Array, "2 *B L k"]) -> Float[Array, "*B L N K"]:
    """Turns each pair (i, i + K / 2) of dimensions by its angle, in float32."""
    (cos, sin), (a, b) = table[..., None, :], jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _cells(grids: Sequence[Grid], merge: int) -> np.ndarray:
    """(row, column) of every patch in its frame."""
    frames = [rearrange(np.indices((h, w)), "i (h a) (w b) -> (h w a b) i", a=merge, b=merge) for _, h, w in grids]
    return np.concatenate([np.tile(cells, (t, 1)) for (t, _, _), cells in zip(grids, frames, strict=True)])


def _frames(grids: Sequence[Grid]) -> Iterator[np.ndarray]:
    """The patches of each frame."""
    start = 0
    for t, h, w in grids:
        yield from np.arange(start, start + t * h * w).reshape(t, h * w)
        start += t * h * w


def window_patches(grids: Sequence[Grid], config: QwenVisionConfig) -> Iterator[np.ndarray]:
    """The patches of each window; windows at the right and lower edge of a frame may be smaller."""
    square, side = config.merge**2, config.window // (config.patch * config.merge)
    start = 0
    for t, h, w in grids:
        patches = np.arange(start, start + t * h * w).reshape(t, h // config.merge, w // config.merge, square)
        for frame in patches:
            for row in range(0, frame.shape[0], side):
                for column in range(0, frame.shape[1], side):
                    yield frame[row : row + side, column : column + side].reshape(-1)
        start += t * h * w
