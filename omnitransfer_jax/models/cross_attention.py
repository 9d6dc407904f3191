"""The cross-attention of models/wan_dit.py: tokens read rows of text, and in image-to-video networks CLIP features too."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from configs.base import DiTConfig
from configs.errors import require
from omnitransfer_jax.mesh import Shard
from omnitransfer_jax.models.attend import Kind, attention
from omnitransfer_jax.models.layers import Linear, RMSNorm


class Rows(NamedTuple):
    """What tokens read in one branch of the cross-attention."""

    shared: Float[Array, "B S D"]
    """Read by all tokens."""
    of_frames: Float[Array, "B F s D"] | None = None
    """Read by the tokens of one latent frame each, beside the shared ones under one softmax."""

    def local(self, shard: Shard) -> "Rows":
        """Without the rows of frames whose tokens are on other devices; a device has whole frames."""
        if self.of_frames is None:
            return self
        frames = self.of_frames.shape[1]
        require(
            frames % shard.devices == 0,
            f"{frames} latent frames over mesh.heads * mesh.keys = {shard.devices} devices: each must have whole frames",
        )
        return Rows(self.shared, shard.local(self.of_frames))


class Context(NamedTuple):
    """What one stream's cross-attention reads, as wide as the blocks and in their dtype."""

    text: Rows
    image: Rows | None
    has_image: Float[Array, " B"] | None
    """1 or 0: whether a sample's image counts; None: all do."""


class CrossAttention(nnx.Module):
    """The target's tokens read the text, and in image-to-video networks the image as well; one normalised query, and a sum of both."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads = config.num_heads
        self.kernel: Kind = config.attention
        self.query, self.key, self.value, self.out = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        has_image = config.image_dim is not None
        self.image_key = Linear(dim, dim, rngs=rngs) if has_image else None
        self.image_value = Linear(dim, dim, rngs=rngs) if has_image else None
        self.image_key_norm = RMSNorm(dim, config.eps) if has_image else None

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> Float[Array, "B L D"]:
        q, image = self.query_norm(self.query(x)).astype(x.dtype), context.image
        out = self._read(q, context.text, self.key, self.key_norm, self.value)
        if image is not None and self.image_key and self.image_value and self.image_key_norm:
            read = self._read(q, image, self.image_key, self.image_key_norm, self.image_value)
            out = out + (read if context.has_image is None else context.has_image.astype(read.dtype)[:, None, None] * read)
        return self.out(out)

    def _read(self, q: Float[Array, "B L D"], rows: Rows, key: Linear, key_norm: RMSNorm, value: Linear) -> Float[Array, "B L D"]:
        """What the queries read of `rows`."""

        def heads(x: Array) -> Array:
            return rearrange(x.astype(q.dtype), "B L (N K) -> B L N K", N=self.num_heads)

        def keys_values(x: Array) -> tuple[Array, Array]:
            return heads(key_norm(key(x))), heads(value(x))

        queries, shared = heads(q), keys_values(rows.shared)
        if rows.of_frames is None:
            return rearrange(attention(queries, *shared, self.kernel), "B L N K -> B L (N K)")
        # As if each latent frame was a sample: its queries, and its own keys and values in front of the shared ones.
        F = rows.of_frames.shape[1]
        own = keys_values(rearrange(rows.of_frames, "B F S D -> B (F S) D"))
        k, v = (
            jnp.concatenate([rearrange(a, "B (F S) N K -> (B F) S N K", F=F), repeat(b, "B S N K -> (B F) S N K", F=F)], 1)
            for a, b in zip(own, shared, strict=True)
        )
        read = attention(rearrange(queries, "B (F L) N K -> (B F) L N K", F=F), k, v, self.kernel)
        return rearrange(read, "(B F) L N K -> B (F L) (N K)", F=F)
