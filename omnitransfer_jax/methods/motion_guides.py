"""What a guide reads of the network and compares with a reference, and two guides that are the baselines of DiTFlow's paper.

    SMM    Spatial Marginal Mean (Yatim et al., arXiv 2311.17009): how the mean feature of a frame differs from that of every other
    MOFT   Motion Feature (Xiao et al., arXiv 2405.14864): what of the features moves, in the channels that tell most of the motion

Both are written as DiTFlow's released code has them, on the tokens behind block `block`. There SMM takes the anchor of the sample from
the reference, which is no difference of the sample's features; here it is the sample's own, as in SMM's paper.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from configs.ditflow import GuidanceConfig
from omnitransfer_jax.models.wan_dit import WanDiT

Grid = tuple[int, int, int]
"""Patches: latent frames, rows, columns."""


class Guide(NamedTuple):
    """A way to say how far the motion of a sample is from that of a reference."""

    read: Callable[..., Any]
    """read(dit, block, latents, timestep, text, image, injection=, shard=) -> features."""
    target: Callable[[Any, Grid, GuidanceConfig], Any]
    """target(features of the reference, ...) -> what is kept of them; the first axis is the batch."""
    loss: Callable[[Any, Any, Grid, GuidanceConfig], Float[Array, " B"]]
    """loss(features of the sample, target, ...) -> one number for each sample."""


def block_output(dit: WanDiT, block: int, *inputs: Any, **hooks: Any) -> Float[Array, "B L D"]:
    """The target's tokens after block `block`; no block behind it is computed."""
    return dit.run_to(block + 1, *inputs, **hooks)[0]


def smm_target(tokens: Float[Array, "B L D"], grid: Grid, config: GuidanceConfig) -> Float[Array, "B F F D"]:
    """Differences [i, j] of the mean feature of frame j from that of frame i."""
    means = rearrange(tokens, "B (F P) D -> B F P D", F=grid[0]).mean(2)
    return means[:, None] - means[:, :, None]


def smm_loss(tokens: Float[Array, "B L D"], target: Float[Array, "B F F D"], grid: Grid, config: GuidanceConfig) -> Float[Array, " B"]:
    """1 - the cosine between the differences of sample and reference, mean over pairs of different frames."""
    alike = cosine(smm_target(tokens, grid, config), target)
    pairs = 1 - jnp.eye(grid[0])
    return ((1 - alike) * pairs[None]).sum((1, 2)) / jnp.maximum(pairs.sum(), 1)


class MotionFeatures(NamedTuple):
    """What MOFT keeps of a reference."""

    features: Float[Array, "B L C"]
    """In the channels that are compared, without their mean over time."""
    channels: Int[Array, "B C"]
    """Which these are."""


def moft_target(tokens: Float[Array, "B L D"], grid: Grid, config: GuidanceConfig) -> MotionFeatures:
    """The channels with the largest weights in the first right singular vector of the features, and the features there."""
    moving = _without_mean(tokens, grid)
    count = max(1, int(config.channels * tokens.shape[-1]))
    # The first right singular vector is the eigenvector of the largest eigenvalue of this matrix; eigh sorts them upwards.
    _, vectors = jnp.linalg.eigh(jnp.einsum("blc,bld->bcd", moving, moving, precision="highest"))
    channels = jnp.argsort(-jnp.abs(vectors[..., -1]), axis=-1)[:, :count]
    return MotionFeatures(_at(moving, channels), channels)


def moft_loss(tokens: Float[Array, "B L D"], target: MotionFeatures, grid: Grid, config: GuidanceConfig) -> Float[Array, " B"]:
    """1 - the cosine over these channels, mean over all tokens."""
    return 1 - cosine(_at(_without_mean(tokens, grid), target.channels), target.features).mean(1)


def _without_mean(tokens: Float[Array, "B L D"], grid: Grid) -> Float[Array, "B L D"]:
    """Features without their mean over the frames."""
    frames = rearrange(tokens, "B (F P) D -> B F P D", F=grid[0])
    return rearrange(frames - frames.mean(1, keepdims=True), "B F P D -> B (F P) D")


def _at(features: Float[Array, "B L D"], channels: Int[Array, "B C"]) -> Float[Array, "B L C"]:
    """The features of each sample in its channels."""
    return jnp.take_along_axis(features, channels[:, None], axis=-1)


def cosine(a: Float[Array, "*lead D"], b: Float[Array, "*lead D"]) -> Float[Array, "*lead"]:
    """Cosine of vectors; 0 where one of them is 0, and then without a gradient, as in torch."""
    squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
    return (a * b).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


SMM = Guide(block_output, smm_target, smm_loss)
MOFT = Guide(block_output, moft_target, moft_loss)
