"""The Wan2.1 diffusion transformer (Wan2.1 model.py), and how a target reads references in it (OmniTransfer sections 4.2 and 4.3).

    latents -> patches -> [ self-attention -> cross-attention (text, and CLIP image) -> feed-forward ] x layers -> velocity

The target and each reference are streams through the same blocks. A reference attends to itself, is modulated as at time 0 and skips
the cross-attention and the head; the target attends to itself and to the keys and values of all references. Nothing flows back, so
a reference's keys and values are the same at every step and can be kept: `remember`, then `kv_cache=`. The paper's baseline
(`references="bidirectional"`) has one stream instead, the target's tokens and the references', and is Wan unchanged.

Projections compute in `config.dtype`. Float32 always, as in the original: time embedding, modulation, norms, rotation, softmax,
the residual stream and the head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from configs.base import DiTConfig
from configs.errors import require
from omnitransfer_jax.models.attention import Kind, attention, one_directional_attention
from omnitransfer_jax.models.kv_cache import CachedArray, KVCache
from omnitransfer_jax.models.layers import LayerNorm, Linear, RMSNorm, exact_gelu
from omnitransfer_jax.models.rope3d import grid, rotate, rotation

REMAT = {  # what the backward pass finds stored, by DiTConfig.remat
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    (r"blocks\..*\.kernel", ("layers", "in", "out")),
    (r"blocks\..*\.(bias|scale)", ("layers", "vector")),
    (r"blocks\.modulation", ("layers", None, "vector")),
    (r"(?!blocks\.).*\.kernel", ("in", "out")),
    (r"(?!blocks\.).*\.(bias|scale)|patch_bias", ("vector",)),
    (r"patch_embedding", (None, None, None, "in", "out")),
    (r"head_modulation", (None, "vector")),
]


class Reference(NamedTuple):
    """A reference video as the network takes it."""

    latents: Float[Array, "B F H W C"]
    """Noise-free, all channels (`models/omnitransfer.py`); frames and size are its own."""
    offset: Int[Array, "B 3"]
    """Where its first token stands: time, row, column in patches (`tasks.offsets`)."""


class Stream(NamedTuple):
    """What one sequence brings to a block beside its tokens."""

    modulation: Float[Array, "6 B L D"]
    """The projected timestep, one row or one a token."""
    table: Float[Array, "2 B L k"]
    """The rotation of its tokens."""


class Context(NamedTuple):
    """What the target's cross-attention reads."""

    text: Float[Array, "B S D"]
    image: Float[Array, "B I D"] | None
    has_image: Float[Array, " B"] | None
    """1 or 0: whether a sample's image counts; None: all do."""


class Shard(NamedTuple):
    """The part of the network that this device runs, inside a `shard_map`."""

    context: str | None = None
    """Mesh axis over which the tokens of every stream are divided in equal parts."""
    gather: Callable[[nnx.State], nnx.State] = lambda layer: layer
    """Completes one layer's parameters, of which this device holds a part."""


ALONE = Shard()


class WanDiT(nnx.Module):
    """Predicts the velocity of noisy latents."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.config = config
        patch_shape = (*config.patch, config.in_channels, dim)
        self.patch_embedding = nnx.Param(nnx.initializers.lecun_uniform(in_axis=(0, 1, 2, 3))(rngs.params(), patch_shape))
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
        has_image: Float[Array, " B"] | None = None,
        references: tuple[Reference, ...] = (),
        kv_cache: KVCache | None = None,
        shard: Shard = ALONE,
        embed_text: bool = True,
    ) -> Float[Array, "B F H W c"]:
        """The velocity of `latents` (noise first, then mask and condition) at `timestep` in 0..1000, one per sample or per token.

        `text` is the encoder's output, padded with zeros to `config.text_len`; `image` the CLIP features of the first frame, of the
        samples where `has_image` is 1. The target reads `references`, or their `kv_cache`, or neither: plain Wan.
        With `embed_text=False` the text is already as wide as the blocks and goes to them as it is.
        """
        dtype, patches = jnp.dtype(self.config.dtype), self.grid(latents)
        require(
            kv_cache is None or kv_cache.grid == patches,
            f"reference kv_cache of a {kv_cache and kv_cache.grid} target: this one is {patches}",
        )
        x, table = self.embed(latents, jnp.zeros((1, 3), jnp.int32), shard)
        time = self.time_embedder(local(timestep, shard) if timestep.ndim == 2 else timestep[:, None])
        if self.image_embedder is not None and image is not None:
            image = self.image_embedder(image.astype(dtype))
        text = text.astype(dtype)
        context = Context(self.text_embedder(text) if embed_text else text, image, has_image)
        tokens, streams = self.open(references, shard)
        own = x.shape[1]
        if self.config.references == "bidirectional":
            require(not references or timestep.ndim == 1, "bidirectional references: they are at the target's time, so give one a sample")
            x, table, tokens, streams = *one_sequence(x, table, tokens, streams), (), ()
        x = self.run((x, *tokens), (Stream(self.project_time(time), table), *streams), context, kv_cache, shard)[0][0]
        return self.project(x[:, :own], time, patches, shard)

    def make_kv_cache(self, references: tuple[Reference, ...], target: tuple[int, int, int], shard: Shard = ALONE) -> KVCache:
        """The kv_cache of `references` for a target of that many patches (time, rows, columns); bidirectional ones can have none."""
        require(self.config.references != "bidirectional", "dit.references='bidirectional': they read the target; pass them at each step")
        tokens, streams = self.open(references, shard)
        _, remembered = self.run(tokens, streams, None, None, shard)
        assert remembered is not None  # it is, without a context
        keys, values = remembered
        return KVCache(CachedArray(keys), CachedArray(values), target)

    def run(
        self, tokens: tuple[Array, ...], streams: tuple[Stream, ...], context: Context | None, kv_cache: KVCache | None, shard: Shard
    ) -> tuple[tuple[Array, ...], tuple[Array, Array] | None]:
        """All blocks. With a `context` the first stream is the target; without one, what the references leave to remember is returned."""
        graphdef, layers = nnx.split(self.blocks)

        def step(tokens, inputs):
            layer, stored = inputs
            remembered = None if stored is None else tuple(part.read(jnp.dtype(self.config.dtype)) for part in stored)
            return nnx.merge(graphdef, shard.gather(layer))(tokens, streams, context, remembered, shard)

        if self.config.remat != "none":
            step = jax.checkpoint(step, policy=REMAT[self.config.remat], prevent_cse=False)
        return jax.lax.scan(step, tokens, (layers, None if kv_cache is None else (kv_cache.keys, kv_cache.values)))

    def open(self, references: tuple[Reference, ...], shard: Shard) -> tuple[tuple[Array, ...], tuple[Stream, ...]]:
        """Tokens and streams of the references, all at time 0."""
        embedded = [self.embed(r.latents, r.offset, shard) for r in references]
        still = self.project_time(self.time_embedder(jnp.zeros((1, 1))))
        return tuple(x for x, _ in embedded), tuple(Stream(still, table) for _, table in embedded)

    def grid(self, latents: Float[Array, "B F H W C"]) -> tuple[int, int, int]:
        """How many patches (time, rows, columns) `latents` have."""
        frames, rows, columns = (n // p for n, p in zip(latents.shape[1:4], self.config.patch, strict=True))
        return frames, rows, columns

    def embed(
        self, latents: Float[Array, "B F H W C"], offset: Int[Array, "b 3"], shard: Shard = ALONE
    ) -> tuple[Float[Array, "B L D"], Float[Array, "2 b L k"]]:
        """One float32 token per patch, ordered by time, row, column, and the rotation of its place."""
        (t, h, w), dtype = self.config.patch, jnp.dtype(self.config.dtype)
        x = local(rearrange(latents.astype(dtype), "B (F t) (H h) (W w) C -> B (F H W) (t h w C)", t=t, h=h, w=w), shard)
        kernel = rearrange(self.patch_embedding.astype(dtype), "t h w C D -> (t h w C) D")
        x = (jnp.einsum("blc,cd->bld", x, kernel) + self.patch_bias.astype(dtype)[None, None]).astype(jnp.float32)
        places = local(grid(*self.grid(latents))[None], shard) + offset[:, None]
        config = self.config
        return x, rotation(places, config.dim // config.num_heads, config.rope_base, config.rope_top)

    def project_time(self, time: Float[Array, "B L D"]) -> Float[Array, "6 B L D"]:
        """The modulation all blocks start from."""
        return rearrange(self.time_projection(jax.nn.silu(time)), "B L (six D) -> six B L D", six=6)

    def project(
        self, x: Float[Array, "B L D"], time: Float[Array, "B #L D"], patches: tuple[int, int, int], shard: Shard = ALONE
    ) -> Float[Array, "B F H W c"]:
        """The head, in float32: tokens back to latents; within a token the channels run fastest."""
        (F, H, W), (t, h, w) = patches, self.config.patch
        shift, scale = self.head_modulation[:, None, None].astype(jnp.float32) + time[None]
        x = whole(self.head(self.head_norm(x) * (1 + scale) + shift), shard)
        return rearrange(x, "B (F H W) (t h w c) -> B (F t) (H h) (W w) c", F=F, H=H, W=W, t=t, h=h, w=w)


def one_sequence(
    x: Float[Array, "B L D"], table: Float[Array, "2 #B L k"], tokens: tuple[Array, ...], streams: tuple[Stream, ...]
) -> tuple[Float[Array, "B S D"], Float[Array, "2 #B S k"]]:
    """The target's tokens and those of its references behind one another, and the rotation of all."""
    tables = [table, *(stream.table for stream in streams)]
    rows = max(t.shape[1] for t in tables)
    tables = [jnp.broadcast_to(t, (2, rows, *t.shape[2:])) for t in tables]
    return jnp.concatenate([x, *tokens], 1), jnp.concatenate(tables, 2)


def local(x: Array, shard: Shard) -> Array:
    """This device's share of the tokens, the second axis."""
    if shard.context is None:
        return x
    size = jax.lax.axis_size(shard.context)
    require(x.shape[1] % size == 0, f"{x.shape[1]} tokens: not a multiple of mesh.context={size}, so the devices' shares would differ")
    share = x.shape[1] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(shard.context) * share, share, axis=1)


def whole(x: Array, shard: Shard) -> Array:
    """All devices' shares of the tokens, the second axis."""
    return x if shard.context is None else jax.lax.all_gather(x, shard.context, axis=1, tiled=True)


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
        tokens: tuple[Array, ...],
        streams: tuple[Stream, ...],
        context: Context | None,
        kv_cache: tuple[Array, Array] | None,
        shard: Shard,
    ) -> tuple[tuple[Array, ...], tuple[Array, Array] | None]:
        """The streams' tokens after this layer; without a `context` all are references and their keys and values come out as well."""
        own = self.modulation[:, None, None].astype(jnp.float32)
        modulations = [stream.modulation + own for stream in streams]
        h = [self.modulate(x, shift, scale) for x, (shift, scale, *_) in zip(tokens, modulations, strict=True)]
        answers, remembered = self.self_attention(h, [s.table for s in streams], context is not None, kv_cache, shard)
        xs = [x + m[2] * a.astype(jnp.float32) for x, m, a in zip(tokens, modulations, answers, strict=True)]
        if context is not None:
            told = self.cross_attention(self.cross_norm(xs[0]).astype(self.dtype), context)
            xs[0] = xs[0] + told.astype(jnp.float32)
        h = [self.modulate(x, shift, scale) for x, (*_, shift, scale, _) in zip(xs, modulations, strict=True)]
        return tuple(x + m[5] * self.ffn(y).astype(jnp.float32) for x, m, y in zip(xs, modulations, h, strict=True)), remembered

    def modulate(self, x: Float[Array, "B L D"], shift: Float[Array, "b l D"], scale: Float[Array, "b l D"]) -> Float[Array, "B L D"]:
        """Norm, scale and shift in float32, then the compute dtype."""
        return (self.norm(x) * (1 + scale) + shift).astype(self.dtype)


class SelfAttention(nnx.Module):
    """The target reads itself and the references, each reference itself (Eq. 3 and 4).

    Queries and keys are normalised over all heads at once, then rotated.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads, self.joint = config.num_heads, config.references == "joint"
        self.kind: Kind = config.attention
        self.query, self.key, self.value, self.out = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def __call__(
        self, streams: list[Array], tables: list[Array], has_target: bool, kv_cache: tuple[Array, Array] | None, shard: Shard
    ) -> tuple[list[Array], tuple[Array, Array] | None]:
        """Each stream's answer "B L D"; if all streams are references, also their keys and values "B S N K"."""
        queries, keys, values = zip(*(self.project(x, table, shard) for x, table in zip(streams, tables, strict=True)), strict=True)
        remembered = None if has_target else (jnp.concatenate(keys, 1), jnp.concatenate(values, 1))
        if has_target and self.joint and len(streams) > 1:
            answers = one_directional_attention(queries, keys, values, self.kind)
        else:
            answers = [
                attention(q, k, v, self.kind) for q, k, v in zip(queries[has_target:], keys[has_target:], values[has_target:], strict=True)
            ]
            if has_target:
                seen = [(k, v) for k, v in zip(keys, values, strict=True)] + ([] if kv_cache is None else [kv_cache])
                k, v = (jnp.concatenate(x, 1) for x in zip(*seen, strict=True))
                answers = [attention(queries[0], k, v, self.kind), *answers]
        answers = [checkpoint_name(a, "attention") for a in answers]
        return [self.out(rearrange(a, "B L N K -> B L (N K)")) for a in answers], remembered

    def project(self, x: Float[Array, "B L D"], table: Float[Array, "2 #B L k"], shard: Shard) -> tuple[Array, Array, Array]:
        """Queries "B L N K" of this device's tokens, keys and values "B S N K" of everyone's."""
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        q, k, v = (rearrange(y, "B L (N K) -> B L N K", N=self.num_heads) for y in (q, k, self.value(x)))
        return rotate(q, table).astype(x.dtype), whole(rotate(k, table).astype(x.dtype), shard), whole(v, shard)


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

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> Float[Array, "B L D"]:
        q, text, image = self.query_norm(self.query(x)).astype(x.dtype), context.text, context.image
        out = self._read(q, self.key_norm(self.key(text)), self.value(text))
        if image is not None and self.image_key and self.image_value and self.image_key_norm:
            seen = self._read(q, self.image_key_norm(self.image_key(image)), self.image_value(image))
            out = out + (seen if context.has_image is None else context.has_image.astype(seen.dtype)[:, None, None] * seen)
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
        h = self.down(exact_gelu(h))
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
