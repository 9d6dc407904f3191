"""The Wan2.1 diffusion transformer (Wan2.1 model.py), from the whole down to its parts.

    latents -> patches -> [ self-attention -> cross-attention (text, and CLIP image) -> feed-forward ] x layers -> velocity

Projections compute in `config.dtype`. Float32 always, as in the original: time embedding, modulation, norms, rotation, softmax,
the residual stream and the head.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from configs.base import DiTConfig
from omnitransfer_jax.models.attention import attention
from omnitransfer_jax.models.layers import LayerNorm, Linear, RMSNorm
from omnitransfer_jax.models.rope3d import grid, rotate, rotation

REMAT = {  # what the backward pass finds stored, by DiTConfig.remat
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class WanDiT(nnx.Module):
    """Predicts the velocity of noisy latents."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.config = config
        patch_shape = (*config.patch, config.in_channels, dim)
        self.patch_embedding = nnx.Param(nnx.initializers.lecun_normal(in_axis=(0, 1, 2, 3))(rngs.params(), patch_shape))
        self.patch_bias = nnx.Param(jnp.zeros((dim,)))
        self.text_embedder = MLP(config.text_dim, dim, dim, rngs=rngs)
        self.image_embedder = ImageEmbedder(config.image_dim, dim, rngs=rngs) if config.image_dim else None
        self.time_embedder = TimeEmbedder(config.freq_dim, dim, rngs=rngs)
        self.time_projection = Linear(dim, 6 * dim, rngs=rngs)
        self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), config.num_layers))
        self.head_modulation = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) * dim**-0.5)
        self.head_norm = LayerNorm(dim, config.eps, affine=False)
        self.head = Linear(dim, int(np.prod(config.patch)) * config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B L"],
        text: Float[Array, "B S E"],
        image: Float[Array, "B I J"] | None = None,
    ) -> Float[Array, "B F H W c"]:
        """The velocity of `latents` (noise first, then mask and condition) at `timestep` in 0..1000, one per sample or per token.

        `text` is the encoder's output, padded with zeros to `config.text_len`; `image` the CLIP features of the first frame.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        frames, rows, columns = (n // p for n, p in zip(latents.shape[1:4], config.patch, strict=True))
        x = self.embed_patches(latents)
        table = rotation(grid(frames, rows, columns)[None], config.dim // config.num_heads)
        time = self.time_embedder(timestep.reshape(latents.shape[0], -1))  # one row, or one a token
        modulation = rearrange(self.time_projection(jax.nn.silu(time)), "B L (six D) -> six B L D", six=6)
        text = self.text_embedder(text.astype(dtype))
        if self.image_embedder is not None and image is not None:
            image = self.image_embedder(image.astype(dtype))

        graphdef, layers = nnx.split(self.blocks)

        def step(x, layer):
            return nnx.merge(graphdef, layer)(x, modulation, table, text, image), None

        if config.remat != "none":
            step = jax.checkpoint(step, policy=REMAT[config.remat], prevent_cse=False)
        x, _ = jax.lax.scan(step, x, layers)
        return self.project(x, time, (frames, rows, columns))

    def embed_patches(self, latents: Float[Array, "B F H W C"]) -> Float[Array, "B L D"]:
        """One float32 token per patch, ordered by time, row, column."""
        (t, h, w), dtype = self.config.patch, jnp.dtype(self.config.dtype)
        x = rearrange(latents.astype(dtype), "B (F t) (H h) (W w) C -> B (F H W) (t h w C)", t=t, h=h, w=w)
        kernel = rearrange(self.patch_embedding.astype(dtype), "t h w C D -> (t h w C) D")
        return (jnp.einsum("blc,cd->bld", x, kernel) + self.patch_bias.astype(dtype)[None, None]).astype(jnp.float32)

    def project(
        self, x: Float[Array, "B L D"], time: Float[Array, "B #L D"], grid: tuple[int, int, int]
    ) -> Float[Array, "B F H W c"]:
        """The head, in float32: tokens back to latents; within a token the channels run fastest."""
        (F, H, W), (t, h, w) = grid, self.config.patch
        shift, scale = self.head_modulation[:, None, None].astype(jnp.float32) + time[None]
        x = self.head(self.head_norm(x) * (1 + scale) + shift)
        return rearrange(x, "B (F H W) (t h w c) -> B (F t) (H h) (W w) c", F=F, H=H, W=W, t=t, h=h, w=w)


class Block(nnx.Module):
    """One layer: self-attention and feed-forward under the timestep's modulation, cross-attention without."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, config.dim)) * config.dim**-0.5)
        self.norm = LayerNorm(config.dim, config.eps, affine=False)
        self.self_attention = SelfAttention(config, rngs=rngs)
        self.cross_norm = LayerNorm(config.dim, config.eps)
        self.cross_attention = CrossAttention(config, rngs=rngs)
        self.ffn = MLP(config.dim, config.ffn_dim, config.dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        modulation: Float[Array, "6 B #L D"],
        table: Float[Array, "2 #B L k"],
        text: Float[Array, "B S D"],
        image: Float[Array, "B I D"] | None,
    ) -> Float[Array, "B L D"]:
        """`modulation` is the projected timestep, `table` the rotation of the tokens."""
        modulation = modulation + self.modulation[:, None, None].astype(jnp.float32)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        h = (self.norm(x) * (1 + scale) + shift).astype(self.dtype)
        x = x + gate * self.self_attention(h, table).astype(jnp.float32)
        h = self.cross_norm(x).astype(self.dtype)
        x = x + self.cross_attention(h, text, image).astype(jnp.float32)
        h = (self.norm(x) * (1 + ffn_scale) + ffn_shift).astype(self.dtype)
        return x + ffn_gate * self.ffn(h).astype(jnp.float32)


class SelfAttention(nnx.Module):
    """Attention over the tokens; queries and keys are normalised over all heads at once, then rotated."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads, self.kind = config.num_heads, config.attention
        self.query, self.key, self.value, self.out = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def __call__(self, x: Float[Array, "B L D"], table: Float[Array, "2 #B L k"]) -> Float[Array, "B L D"]:
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        q, k, v = (rearrange(y, "B L (N K) -> B L N K", N=self.num_heads) for y in (q, k, self.value(x)))
        q, k = rotate(q, table).astype(x.dtype), rotate(k, table).astype(x.dtype)
        out = checkpoint_name(attention(q, k, v, self.kind), "attention")
        return self.out(rearrange(out, "B L N K -> B L (N K)"))


class CrossAttention(nnx.Module):
    """The tokens read the text, and in image-to-video networks the image as well, with the same normalised query; both answers add up."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        has_image = config.image_dim is not None
        self.image_key = Linear(dim, dim, rngs=rngs) if has_image else None
        self.image_value = Linear(dim, dim, rngs=rngs) if has_image else None
        self.image_key_norm = RMSNorm(dim, config.eps) if has_image else None

    def __call__(
        self, x: Float[Array, "B L D"], text: Float[Array, "B S D"], image: Float[Array, "B I D"] | None
    ) -> Float[Array, "B L D"]:
        q = self.query_norm(self.query(x)).astype(x.dtype)
        out = self._read(q, self.key_norm(self.key(text)), self.value(text))
        if image is not None and self.image_key is not None:
            out = out + self._read(q, self.image_key_norm(self.image_key(image)), self.image_value(image))
        return self.out(out)

    def _read(self, q: Array, k: Array, v: Array) -> Array:
        q, k, v = (rearrange(y.astype(q.dtype), "B L (N K) -> B L N K", N=self.num_heads) for y in (q, k, v))
        return rearrange(attention(q, k, v), "B L N K -> B L (N K)")


class MLP(nnx.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.up = Linear(in_dim, hidden_dim, rngs=rngs)
        self.down = Linear(hidden_dim, out_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class ImageEmbedder(nnx.Module):
    """CLIP features to the model's width (Wan2.1 MLPProj): its norms have PyTorch's epsilon 1e-5 and its GELU is exact."""

    def __init__(self, image_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = LayerNorm(image_dim, 1e-5), LayerNorm(dim, 1e-5)
        self.up, self.down = Linear(image_dim, image_dim, rngs=rngs), Linear(image_dim, dim, rngs=rngs)

    def __call__(self, image: Float[Array, "B I J"]) -> Float[Array, "B I D"]:
        h = self.up(self.norm_in(image).astype(image.dtype))
        h = self.down(jax.nn.gelu(h, approximate=False))
        return self.norm_out(h).astype(image.dtype)


class TimeEmbedder(nnx.Module):
    """Sinusoids [cos | sin] of the timestep (0..1000) through two layers, all in float32."""

    def __init__(self, freq_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.freq_dim = freq_dim
        self.up, self.down = Linear(freq_dim, dim, rngs=rngs), Linear(dim, dim, rngs=rngs)

    def __call__(self, timestep: Float[Array, "B L"]) -> Float[Array, "B L D"]:
        half = self.freq_dim // 2
        frequencies = jnp.asarray(10_000.0 ** -(np.arange(half) / half), jnp.float32)
        angles = timestep.astype(jnp.float32)[..., None] * frequencies[None, None]
        embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        return self.down(jax.nn.silu(self.up(embedding)))
