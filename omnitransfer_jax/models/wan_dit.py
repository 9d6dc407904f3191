"""The Wan2.1 diffusion transformer (Wan2.1 model.py), and how a target reads references in it (OmniTransfer sections 4.2 and 4.3).

    latents -> patches -> [ self-attention -> cross-attention (text, and CLIP image) -> feed-forward ] x layers -> velocity

The target and each reference are streams through the same blocks. A reference attends to itself, is modulated as at time 0 and skips
the cross-attention and the head; the target attends to itself and to the keys and values of all references (models/attend.py). A
reference never reads the target, so its keys and values are the same at every step and can be cached: `make_kv_cache`, then
`kv_cache=`. The paper's baseline (`references="bidirectional"`) has one stream, the target's tokens and the references', and is Wan
unchanged.

Projections compute in `config.dtype`. Float32 always, as in the original: time embedding, modulation, norms, rotation, softmax,
the residual stream and the head.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from configs.base import DiTConfig
from configs.errors import require
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.attend import (
    QKV,
    Attend,
    KeysValues,
    Streams,
    attention,
    cached,
    gathered,
    injecting,
    joint,
    plain,
    recording,
    split,
)
from omnitransfer_jax.models.kv_cache import CachedArray, KVCache
from omnitransfer_jax.models.layers import LayerNorm, Linear, RMSNorm, exact_gelu
from omnitransfer_jax.models.rope3d import grid, rotate, rotation

REMAT = {  # what the forward pass keeps for the backward pass, by DiTConfig.remat
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
    *lora.sharding("blocks"),
]


class Reference(NamedTuple):
    """A reference video as the network takes it."""

    latents: Float[Array, "B F H W C"]
    """Noise-free, all channels (`models/omnitransfer.py`); frames and size are its own."""
    offset: Int[Array, "B 3"]
    """Where its first token stands: time, row, column in patches (`tasks.offsets`)."""


class Inputs(NamedTuple):
    """What the blocks need of one stream beside its tokens."""

    modulation: Float[Array, "6 B L D"]
    """The projected timestep, one row a sample or one a token."""
    rotation: Float[Array, "2 B L k"]
    """Cosines and sines of its tokens' positions."""
    key_rotation: Float[Array, "2 B L k"] | None = None
    """Those of its keys, where they are not those of its queries."""


class Injection(NamedTuple):
    """What the target takes from elsewhere instead of computing it; what is `None` it computes."""

    active: Bool[Array, ""]
    """If false, it computes everything."""
    rotations: Float[Array, "B 2 2 L k"] | None = None
    """In all blocks: the rotation of the queries, then that of the keys, each cosines and sines."""
    keys_values: KeysValues | None = None
    """In block 0: the keys, rotated, and the values that its queries read."""

    def rotate(self, inputs: Streams[Inputs]) -> Streams[Inputs]:
        """The inputs of the blocks with these rotations of the target."""
        if self.rotations is None:
            return inputs
        target = inputs.target
        assert target is not None
        queries, keys = (jnp.where(self.active, given, target.rotation) for given in rearrange(self.rotations, "B q c L k -> q c B L k"))
        return replace(inputs, target=target._replace(rotation=queries, key_rotation=keys))


class Modulation(NamedTuple):
    """What the timestep does to one stream in one block: before self-attention and feed-forward, and how much of each is added."""

    shift: Float[Array, "b l D"]
    scale: Float[Array, "b l D"]
    gate: Float[Array, "b l D"]
    ffn_shift: Float[Array, "b l D"]
    ffn_scale: Float[Array, "b l D"]
    ffn_gate: Float[Array, "b l D"]


class Context(NamedTuple):
    """What the target's cross-attention reads."""

    text: Float[Array, "B S D"]
    image: Float[Array, "B I D"] | None
    has_image: Float[Array, " B"] | None
    """1 or 0: whether a sample's image counts; None: all do."""


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
        shard: Shard = UNSHARDED,
        embed_text: bool = True,
        injection: Injection | None = None,
    ) -> Float[Array, "B F H W c"]:
        """The velocity of `latents` (noise first, then mask and condition) at `timestep` in 0..1000, one per sample or per token.

        `text` is the encoder's output, padded with zeros to `config.text_len`; `image` the CLIP features of the first frame, of the
        samples where `has_image` is 1. The target reads `references`, or their `kv_cache`, or neither: plain Wan.
        With `embed_text=False` the text is already as wide as the blocks and goes to them as it is. `injection` is of the target's tokens
        alone, all on one device.
        """
        patches = self.grid(latents)
        require(
            kv_cache is None or kv_cache.grid == patches,
            f"cached references of a {kv_cache and kv_cache.grid} target: this one is {patches}",
        )
        x, inputs, context, time = self.prepare(latents, timestep, text, image, has_image, references, shard, embed_text)
        assert x.target is not None
        tokens = x.target.shape[1]
        if self.config.references == "bidirectional":
            require(not references or timestep.ndim == 1, "bidirectional references: they are at the target's time, so give one a sample")
            x, inputs = one_sequence(x, inputs)
        x, _ = self.run(x, inputs, context, self.strategy(bool(x.references), kv_cache), kv_cache, shard, injection=injection)
        assert x.target is not None
        return self.project(x.target[:, :tokens], time, patches, shard)

    def strategy(self, references: bool, kv_cache: KVCache | None) -> Attend:
        """Who attends to whom: models/attend.py."""
        form = joint if self.config.references == "joint" else split
        chosen = cached if kv_cache is not None else form if references else plain
        return partial(chosen, kernel=self.config.attention)

    def make_kv_cache(self, references: tuple[Reference, ...], target: tuple[int, int, int], shard: Shard = UNSHARDED) -> KVCache:
        """Keys and values of `references` in every layer, for a target of that many patches (time, rows, columns).

        References that attend to the target (`bidirectional`) differ at every step, so they can have none.
        """
        require(
            self.config.references != "bidirectional",
            "dit.references='bidirectional': references attend to the target; pass them at each step",
        )
        x, inputs = self.prepare_references(references, shard)
        _, keys_values = self.run(x, inputs, None, partial(recording, kernel=self.config.attention), None, shard)
        assert keys_values is not None
        keys, values = keys_values
        return KVCache(CachedArray(keys), CachedArray(values), target)

    def tap(
        self,
        layer: int,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B L"],
        text: Float[Array, "B S E"],
        image: Float[Array, "B I J"] | None = None,
        injection: Injection | None = None,
        shard: Shard = UNSHARDED,
    ) -> QKV:
        """The target's queries, keys and values in block `layer`, counted from 0; the blocks from there on are not computed."""
        require(0 <= layer < self.config.num_layers, f"layer {layer}: the network has blocks 0 to {self.config.num_layers - 1}")
        x, inputs = self.run_to(layer, latents, timestep, text, image, injection, shard)
        graphdef, layers = nnx.split(self.blocks)
        block = nnx.merge(graphdef, shard.gather_layer(jax.tree.map(lambda leaf: leaf[layer], layers)))
        return block.project(x, block.modulation_of(inputs), inputs)

    def run_to(
        self,
        layer: int,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B L"],
        text: Float[Array, "B S E"],
        image: Float[Array, "B I J"] | None = None,
        injection: Injection | None = None,
        shard: Shard = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], Inputs]:
        """The target's tokens before block `layer`, counted from 0, and the other inputs of that block, if there is one.

        Neither that block nor one behind it is computed.
        """
        x, inputs, context, _ = self.prepare(latents, timestep, text, image, shard=shard)
        x, _ = self.run(x, inputs, context, self.strategy(False, None), None, shard, layer, injection)
        inputs = inputs if injection is None else injection.rotate(inputs)
        assert x.target is not None
        assert inputs.target is not None
        return x.target, inputs.target

    def run(
        self,
        x: Streams[Array],
        inputs: Streams[Inputs],
        context: Context | None,
        attend: Attend,
        kv_cache: KVCache | None,
        shard: Shard,
        stop: int | None = None,
        injection: Injection | None = None,
    ) -> tuple[Streams[Array], tuple[Array, Array] | None]:
        """The tokens after all blocks, or after the first `stop`, and what `attend` returned for the cache, layers first."""
        graphdef, layers = nnx.split(self.blocks)
        inputs = inputs if injection is None else injection.rotate(inputs)
        if shard.axis is not None:
            attend = gathered(attend, shard)
        per_layer = layers, None if kv_cache is None else (kv_cache.keys, kv_cache.values)

        def step(x, per_layer, attend=attend):
            layer, cache = per_layer
            if cache is not None:
                cache = tuple(array.read(jnp.dtype(self.config.dtype)) for array in cache)
            return nnx.merge(graphdef, shard.gather_layer(layer))(x, inputs, context, attend, cache)

        def indexed(x, index, attend=attend):
            return step(x, jax.tree.map(lambda leaf: leaf[index], per_layer), attend)

        def remat(step):
            policy = self.config.remat
            return step if policy == "none" else jax.checkpoint(step, policy=REMAT[policy], prevent_cse=False)

        if stop is None and (injection is None or injection.keys_values is None):
            return jax.lax.scan(remat(step), x, per_layer)
        # Layers are taken by their index here, because a slice of the stacked layers would be a copy of them.
        first, stop = 0, self.config.num_layers if stop is None else stop
        if injection is not None and injection.keys_values is not None and stop > 0:
            x, _ = remat(partial(indexed, attend=injecting(attend, injection.keys_values, injection.active)))(x, 0)
            first = 1
        return jax.lax.scan(remat(indexed), x, jnp.arange(first, stop))

    def prepare(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B L"],
        text: Float[Array, "B S E"],
        image: Float[Array, "B I J"] | None = None,
        has_image: Float[Array, " B"] | None = None,
        references: tuple[Reference, ...] = (),
        shard: Shard = UNSHARDED,
        embed_text: bool = True,
    ) -> tuple[Streams[Array], Streams[Inputs], Context, Float[Array, "B L D"]]:
        """Before the blocks: tokens and inputs of all streams, the context, and the embedded time; arguments as for `__call__`."""
        dtype = jnp.dtype(self.config.dtype)
        x, rotation = self.embed(latents, jnp.zeros((1, 3), jnp.int32), shard)
        time = self.time_embedder(shard.local(timestep) if timestep.ndim == 2 else timestep[:, None])
        if self.image_embedder is not None and image is not None:
            image = self.image_embedder(image.astype(dtype))
        text = text.astype(dtype)
        context = Context(self.text_embedder(text) if embed_text else text, image, has_image)
        others, others_inputs = self.prepare_references(references, shard)
        return Streams(x, others.references), Streams(Inputs(self.project_time(time), rotation), others_inputs.references), context, time

    def prepare_references(self, references: tuple[Reference, ...], shard: Shard) -> tuple[Streams[Array], Streams[Inputs]]:
        """Tokens and inputs of the references, all at time 0."""
        embedded = [self.embed(r.latents, r.offset, shard) for r in references]
        modulation = self.project_time(self.time_embedder(jnp.zeros((1, 1))))
        return Streams(None, tuple(x for x, _ in embedded)), Streams(None, tuple(Inputs(modulation, rotation) for _, rotation in embedded))

    def grid(self, latents: Float[Array, "B F H W C"]) -> tuple[int, int, int]:
        """How many patches (time, rows, columns) `latents` have."""
        frames, rows, columns = (n // p for n, p in zip(latents.shape[1:4], self.config.patch, strict=True))
        return frames, rows, columns

    def embed(
        self, latents: Float[Array, "B F H W C"], offset: Int[Array, "b 3"], shard: Shard = UNSHARDED
    ) -> tuple[Float[Array, "B L D"], Float[Array, "2 b L k"]]:
        """One float32 token per patch, ordered by time, row, column, and the rotation of its position."""
        (t, h, w), dtype = self.config.patch, jnp.dtype(self.config.dtype)
        x = shard.local(rearrange(latents.astype(dtype), "B (F t) (H h) (W w) C -> B (F H W) (t h w C)", t=t, h=h, w=w))
        kernel = rearrange(self.patch_embedding.astype(dtype), "t h w C D -> (t h w C) D")
        x = (jnp.einsum("blc,cd->bld", x, kernel) + self.patch_bias.astype(dtype)[None, None]).astype(jnp.float32)
        positions = shard.local(grid(*self.grid(latents))[None]) + offset[:, None]
        config = self.config
        return x, rotation(positions, config.dim // config.num_heads, config.rope_base, config.rope_top)

    def project_time(self, time: Float[Array, "B L D"]) -> Float[Array, "6 B L D"]:
        """The modulation all blocks start from."""
        return rearrange(self.time_projection(jax.nn.silu(time)), "B L (six D) -> six B L D", six=6)

    def project(
        self, x: Float[Array, "B L D"], time: Float[Array, "B #L D"], patches: tuple[int, int, int], shard: Shard = UNSHARDED
    ) -> Float[Array, "B F H W c"]:
        """The head, in float32: tokens back to latents; within a token the channels run fastest."""
        (F, H, W), (t, h, w) = patches, self.config.patch
        shift, scale = self.head_modulation[:, None, None].astype(jnp.float32) + time[None]
        x = shard.gather(self.head(self.head_norm(x) * (1 + scale) + shift))
        return rearrange(x, "B (F H W) (t h w c) -> B (F t) (H h) (W w) c", F=F, H=H, W=W, t=t, h=h, w=w)


def one_sequence(x: Streams[Array], inputs: Streams[Inputs]) -> tuple[Streams[Array], Streams[Inputs]]:
    """The target's tokens followed by those of its references, as one target at the target's time."""
    assert x.target is not None
    assert inputs.target is not None
    rotations = [inputs.target.rotation, *(each.rotation for each in inputs.references)]
    rows = max(r.shape[1] for r in rotations)
    rotations = [jnp.broadcast_to(r, (2, rows, *r.shape[2:])) for r in rotations]
    joined = Inputs(inputs.target.modulation, jnp.concatenate(rotations, 2))
    return Streams(jnp.concatenate([x.target, *x.references], 1), ()), Streams(joined, ())


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
        self, x: Streams[Array], inputs: Streams[Inputs], context: Context | None, attend: Attend, cache: KeysValues | None
    ) -> tuple[Streams[Array], KeysValues | None]:
        """The tokens of all streams after this layer, and what `attend` returned for the cache. Only the target reads the context."""
        m = inputs.map(self.modulation_of)
        with jax.named_scope("self_attention"):
            qkv = x.map(self.project, m, inputs)
            outputs, keys_values = attend(qkv, cache)
            outputs = outputs.map(self.self_attention.join)
            x = x.map(lambda x, m, a: x + m.gate * a.astype(jnp.float32), m, outputs)
        if context is not None and x.target is not None:
            with jax.named_scope("cross_attention"):
                read = self.cross_attention(self.cross_norm(x.target).astype(self.dtype), context)
                x = replace(x, target=x.target + read.astype(jnp.float32))
        with jax.named_scope("feed_forward"):
            h = x.map(lambda x, m: self.modulate(x, m.ffn_shift, m.ffn_scale), m)
            return x.map(lambda x, m, h: x + m.ffn_gate * self.ffn(h).astype(jnp.float32), m, h), keys_values

    def modulation_of(self, inputs: Inputs) -> Modulation:
        """The modulation of one stream, float32."""
        return Modulation(*(inputs.modulation + self.modulation[:, None, None].astype(jnp.float32)))

    def project(self, x: Float[Array, "B L D"], m: Modulation, inputs: Inputs) -> QKV:
        """Queries, keys and values of one stream's tokens in this layer."""
        return self.self_attention.project(self.modulate(x, m.shift, m.scale), inputs.rotation, inputs.key_rotation)

    def modulate(self, x: Float[Array, "B L D"], shift: Float[Array, "b l D"], scale: Float[Array, "b l D"]) -> Float[Array, "B L D"]:
        """Norm, scale and shift in float32, then the compute dtype."""
        return (self.norm(x) * (1 + scale) + shift).astype(self.dtype)


class SelfAttention(nnx.Module):
    """The projections around a strategy of models/attend.py. Queries and keys are normalised over all heads at once, then rotated."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.query_norm, self.key_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def project(
        self, x: Float[Array, "B L D"], rotation: Float[Array, "2 #B L k"], key_rotation: Float[Array, "2 #B L k"] | None = None
    ) -> QKV:
        """Queries, keys and values of one stream's tokens; the keys have the rotation of the queries if they have none of their own."""
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        q, k, v = (rearrange(y, "B L (N K) -> B L N K", N=self.num_heads) for y in (q, k, self.value(x)))
        return QKV(rotate(q, rotation).astype(x.dtype), rotate(k, rotation if key_rotation is None else key_rotation).astype(x.dtype), v)

    def join(self, heads: Float[Array, "B L N K"]) -> Float[Array, "B L D"]:
        """The output projection of one stream's attention."""
        return self.out(rearrange(checkpoint_name(heads, "attention"), "B L N K -> B L (N K)"))


class CrossAttention(nnx.Module):
    """The target's tokens read the text, and in image-to-video networks the image as well; one normalised query, and a sum of both."""

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
            read = self._read(q, self.image_key_norm(self.image_key(image)), self.image_value(image))
            out = out + (read if context.has_image is None else context.has_image.astype(read.dtype)[:, None, None] * read)
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
