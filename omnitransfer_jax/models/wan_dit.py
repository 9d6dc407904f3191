"""The Wan2.1 diffusion transformer (Wan2.1 model.py), and how a target reads references in it (OmniTransfer sections 4.2 and 4.3).

    latents -> patches -> [ self-attention -> cross-attention (text, and CLIP image) -> feed-forward ] x layers -> velocity

The target and each reference are streams through the same blocks. A reference attends to itself, is modulated as at time 0 and skips
the cross-attention and the head; the target attends to itself and to the keys and values of all references (models/attend.py). A
reference never reads the target, so its keys and values are the same at every step and can be cached: `make_kv_cache`, then
`kv_cache=`. Siblings of this construction differ in a few values of DiTConfig: the references' time, whether they read a context of
their own, and what of them the target reads. In the paper's baseline (`references="bidirectional"`) all streams attend to all, at the
target's time and with its context: Wan unchanged, on a longer sequence.

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
from jaxtyping import Array, Bool, Float, Int

from configs.base import DiTConfig
from configs.errors import RequestError, require
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.attend import (
    ANSWER,
    PROJECTED,
    QKV,
    Attend,
    Frames,
    Keep,
    Kept,
    KeysValues,
    Reach,
    Streams,
    cached,
    injecting,
    joint,
    on_shard,
    plain,
    split,
    together,
)
from omnitransfer_jax.models.cross_attention import Context, CrossAttention, Rows
from omnitransfer_jax.models.embedders import MLP, ImageEmbedder, TimeEmbedder
from omnitransfer_jax.models.kv_cache import CachedArray, KVCache
from omnitransfer_jax.models.layers import LayerNorm, Linear, RMSNorm
from omnitransfer_jax.models.rope3d import grid, rotate, rotation

REMAT = {  # what the forward pass keeps for the backward pass, by DiTConfig.remat
    "attention": jax.checkpoint_policies.save_only_these_names(ANSWER),
    "qkv": jax.checkpoint_policies.save_only_these_names(ANSWER, PROJECTED),
    "full": jax.checkpoint_policies.nothing_saveable,
}

SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    (r"blocks\..*\.kernel", ("layers", "in", "out")),
    (r"blocks\..*\.(bias|scale|kernel_scale)", ("layers", "vector")),
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
    text: Float[Array, "B S E"] | None = None
    """Encoded prompt of its own, with `dit.reference_context`."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of its own first frame, likewise."""


class Inputs(NamedTuple):
    """What the blocks need of one stream beside its tokens."""

    modulation: Float[Array, "6 B L D"]
    """The projected timestep, one row a sample or one a token."""
    rotation: Float[Array, "2 B L k"]
    """Cosines and sines of its tokens' positions."""
    tokens: int
    """Tokens of the whole stream, of which a device may have a part."""
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
        text: Float[Array, "B S E"] | Context,
        image: Float[Array, "B I J"] | None = None,
        has_image: Float[Array, " B"] | None = None,
        references: tuple[Reference, ...] = (),
        kv_cache: KVCache | None = None,
        shard: Shard = UNSHARDED,
        embed_text: bool = True,
        active: Bool[Array, " layers"] | None = None,
        injection: Injection | None = None,
    ) -> Float[Array, "B F H W c"]:
        """The velocity of `latents` (noise first, then mask and condition) at `timestep` in 0..1000, one per sample or per token.

        `text` is the encoder's output, padded with zeros to `config.text_len`; `image` the CLIP features of the first frame, of the
        samples where `has_image` is 1. The target reads `references`, or their `kv_cache`, or neither: plain Wan.
        With `embed_text=False` the text is already as wide as the blocks and goes to them as it is. A `Context` in the place of `text`
        is what they read instead of text and image. `active` says which blocks run; all do if it is not given. `injection` is of the
        target's tokens alone, all on one device.
        """
        patches = self.grid(latents)
        require(
            kv_cache is None or kv_cache.grid == patches,
            f"cached references of a {kv_cache and kv_cache.grid} target: this one is {patches}",
        )
        x, inputs, contexts, time = self.prepare(latents, timestep, text, image, has_image, references, shard, embed_text)
        assert x.target is not None
        if self.config.references == "bidirectional":
            require(not references or timestep.ndim == 1, "bidirectional references: they are at the target's time, so give one a sample")
            inputs, contexts = like_target(inputs, contexts)
        frames = kv_cache.frames if kv_cache is not None else self.frames(references)
        attend = self.strategy(bool(references), kv_cache is not None, self.reach(patches, frames, x.target.shape[1], shard))
        x, _ = self.run(x, inputs, contexts, attend, kv_cache, shard, active=active, injection=injection)
        assert x.target is not None
        return self.project(x.target, time, patches, shard)

    def strategy(self, references: bool, with_cache: bool = False, reach: Reach | None = None) -> Attend:
        """Who attends to whom: models/attend.py."""
        if not references and not with_cache:
            return partial(plain, kernel=self.config.attention)
        if self.config.references != "split" and not with_cache:
            return partial({"joint": joint, "bidirectional": together}[self.config.references], kernel=self.config.attention)
        return partial(cached if with_cache else split, kernel=self.config.attention, reach=reach)

    def reach(self, target: tuple[int, int, int], frames: tuple[Frames, ...], tokens: int, shard: Shard) -> Reach | None:
        """What of its references a target of so many patches reads, of which this device has `tokens` tokens; None: everything."""
        if self.config.reach == "all" or not frames:
            return None
        return Reach(target[1] * target[2], frames, shard.start(tokens))

    def frames(self, references: tuple[Reference, ...]) -> tuple[Frames, ...]:
        """Which tokens of each reference are at which time."""
        sizes = [self.grid(reference.latents) for reference in references]
        return tuple(Frames(h * w, reference.offset[:, 0]) for (_, h, w), reference in zip(sizes, references, strict=True))

    def make_kv_cache(
        self, references: tuple[Reference, ...], target: tuple[int, int, int], shard: Shard = UNSHARDED, activations: bool = False
    ) -> KVCache:
        """Keys and values of `references` in every layer, for a target of that many patches (time, rows, columns).

        A device holds a part of it. With `activations` it is what they are projected from. References that attend to the
        target (`bidirectional`) differ at every step, so they can have no cache.
        """
        require(
            self.config.references != "bidirectional",
            "dit.references='bidirectional': references attend to the target; pass them at each step",
        )
        x, inputs, contexts = self.prepare_references(references, shard)
        attend, keep = self.strategy(references=False), "activations" if activations else "keys_values"
        _, kept = self.run(x, inputs, contexts, attend, None, shard, keep=keep)
        rotations, tokens = zip(*((each.rotation, each.tokens) for each in inputs.references), strict=True)
        return KVCache(jax.tree.map(CachedArray, kept), rotations, self.frames(references), target, tokens)

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
        x, inputs, contexts, _ = self.prepare(latents, timestep, text, image, shard=shard)
        x, _ = self.run(x, inputs, contexts, self.strategy(False), None, shard, layer, injection=injection)
        inputs = inputs if injection is None else injection.rotate(inputs)
        assert x.target is not None
        assert inputs.target is not None
        return x.target, inputs.target

    def run(
        self,
        x: Streams[Array],
        inputs: Streams[Inputs],
        contexts: Streams[Context | None],
        attend: Attend,
        kv_cache: KVCache | None,
        shard: Shard,
        stop: int | None = None,
        active: Bool[Array, " layers"] | None = None,
        injection: Injection | None = None,
        keep: Keep | None = None,
    ) -> tuple[Streams[Array], Kept | None]:
        """The tokens after all blocks, or after the first `stop`, and what is kept of references, layers first, or what `attend` returned.

        Where `active` is false a block is left out; nothing can be kept of it.
        """
        graphdef, layers = nnx.split(self.blocks)
        inputs = inputs if injection is None else injection.rotate(inputs)
        tokens, cached_tokens = inputs.map(lambda each: each.tokens), () if kv_cache is None else kv_cache.tokens
        per_layer = layers, None if kv_cache is None else kv_cache.kept, active

        def step(x, per_layer, attend=attend):
            layer, kept, runs = per_layer
            block = nnx.merge(graphdef, shard.gather_layer(layer))

            def run(x):
                cache = None if kv_cache is None else self.read_cache(block, kept, kv_cache.rotations, shard)
                return block(x, inputs, contexts, on_shard(attend, shard, tokens, cached_tokens, keep), cache)

            return run(x) if runs is None else jax.lax.cond(runs, run, lambda x: (x, None), x)

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

    def read_cache(
        self, block: "Block", kept: tuple[tuple[CachedArray, ...], ...], rotations: tuple[Array, ...], shard: Shard
    ) -> tuple[KeysValues, ...]:
        """The keys and values of each reference in one layer, projected again where the cache holds what they are projected from."""
        found = []
        for arrays, table in zip(kept, rotations, strict=True):
            read = tuple(array.read(jnp.dtype(self.config.dtype)) for array in arrays)
            if len(read) == 1:
                read = tuple(map(shard.tokens_for_heads, block.self_attention.keys_values(*read, table)))
            found.append(read)
        return tuple(found)

    def prepare(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B L"],
        text: Float[Array, "B S E"] | Context,
        image: Float[Array, "B I J"] | None = None,
        has_image: Float[Array, " B"] | None = None,
        references: tuple[Reference, ...] = (),
        shard: Shard = UNSHARDED,
        embed_text: bool = True,
    ) -> tuple[Streams[Array], Streams[Inputs], Streams[Context | None], Float[Array, "B L D"]]:
        """Before the blocks: tokens, inputs and contexts of all streams, and the embedded time; arguments as for `__call__`."""
        x, rotation = self.embed(latents, jnp.zeros((1, 3), jnp.int32), shard)
        time = self.time_embedder(shard.local(timestep) if timestep.ndim == 2 else timestep[:, None])
        context = text if isinstance(text, Context) else self.embed_context(text, image, has_image, embed_text)
        context = Context(context.text.local(shard), context.image and context.image.local(shard), context.has_image)
        others, others_inputs, contexts = self.prepare_references(references, shard)
        inputs = Streams(Inputs(self.project_time(time), rotation, self.tokens(latents)), others_inputs.references)
        return Streams(x, others.references), inputs, Streams(context, contexts.references), time

    def prepare_references(
        self, references: tuple[Reference, ...], shard: Shard
    ) -> tuple[Streams[Array], Streams[Inputs], Streams[Context | None]]:
        """Tokens, inputs and contexts of the references, all at `dit.reference_time`."""
        embedded = [self.embed(r.latents, r.offset, shard) for r in references]
        modulation = self.project_time(self.time_embedder(jnp.full((1, 1), self.config.reference_time)))
        inputs = [Inputs(modulation, rotation, self.tokens(r.latents)) for (_, rotation), r in zip(embedded, references, strict=True)]
        contexts = tuple(map(self.reference_context, references))
        return Streams(None, tuple(x for x, _ in embedded)), Streams(None, tuple(inputs)), Streams(None, contexts)

    def reference_context(self, reference: Reference) -> Context | None:
        """What a reference reads in the cross-attention, if it does."""
        if not self.config.reference_context:
            return None
        if reference.text is None:
            raise RequestError("dit.reference_context: every reference needs a text of its own")
        return self.embed_context(reference.text, reference.image)

    def embed_context(
        self,
        text: Float[Array, "B S E"],
        image: Float[Array, "B I J"] | None = None,
        has_image: Float[Array, " B"] | None = None,
        embed_text: bool = True,
    ) -> Context:
        """Encoded text and CLIP features at the width of the blocks; arguments as for `__call__`."""
        dtype, rows = jnp.dtype(self.config.dtype), None
        if self.image_embedder is not None and image is not None:
            rows = Rows(self.image_embedder(image.astype(dtype)))
        text = text.astype(dtype)
        return Context(Rows(self.text_embedder(text) if embed_text else text), rows, has_image)

    def grid(self, latents: Float[Array, "B F H W C"]) -> tuple[int, int, int]:
        """How many patches (time, rows, columns) `latents` have."""
        frames, rows, columns = (n // p for n, p in zip(latents.shape[1:4], self.config.patch, strict=True))
        return frames, rows, columns

    def tokens(self, latents: Float[Array, "B F H W C"]) -> int:
        """How many tokens `latents` have."""
        return int(np.prod(self.grid(latents)))

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
        x = shard.gather(self.head(self.head_norm(x) * (1 + scale) + shift), F * H * W)
        return rearrange(x, "B (F H W) (t h w c) -> B (F t) (H h) (W w) c", F=F, H=H, W=W, t=t, h=h, w=w)


def like_target(inputs: Streams[Inputs], contexts: Streams[Context | None]) -> tuple[Streams[Inputs], Streams[Context | None]]:
    """What the blocks need of references that are at the target's time and read the target's context."""
    target = inputs.target
    assert target is not None
    require(
        not inputs.references or contexts.target is None or contexts.target.text.of_frames is None,
        "dit.references='bidirectional': references are of no latent frame, so none can have rows of its own; take 'split'",
    )
    references = tuple(each._replace(modulation=target.modulation) for each in inputs.references)
    return replace(inputs, references=references), Streams(contexts.target, (contexts.target,) * len(references))


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
        x: Streams[Array],
        inputs: Streams[Inputs],
        contexts: Streams[Context | None],
        attend: Attend,
        cache: tuple[KeysValues, ...] | None,
    ) -> tuple[Streams[Array], Kept | None]:
        """The tokens of all streams after this layer, and what `attend` returned for the cache."""
        m = inputs.map(self.modulation_of)
        with jax.named_scope("self_attention"):
            qkv = x.map(self.project, m, inputs)
            outputs, kept = attend(qkv, cache)
            outputs = outputs.map(self.self_attention.join)
            x = x.map(lambda x, m, a: x + m.gate * a.astype(jnp.float32), m, outputs)
        with jax.named_scope("cross_attention"):
            x = x.map(self.read_context, contexts)
        with jax.named_scope("feed_forward"):
            h = x.map(lambda x, m: self.modulate(x, m.ffn_shift, m.ffn_scale), m)
            return x.map(lambda x, m, h: x + m.ffn_gate * self.ffn(h).astype(jnp.float32), m, h), kept

    def read_context(self, x: Float[Array, "B L D"], context: Context | None) -> Float[Array, "B L D"]:
        """One stream's tokens after the cross-attention; a stream without a context is left as it is."""
        if context is None:
            return x
        return x + self.cross_attention(self.cross_norm(x).astype(self.dtype), context).astype(jnp.float32)

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
        q = rearrange(self.query_norm(self.query(x)), "B L (N K) -> B L N K", N=self.num_heads)
        return QKV(rotate(q, rotation).astype(x.dtype), *self.keys_values(x, rotation if key_rotation is None else key_rotation), x)

    def keys_values(self, x: Float[Array, "B L D"], rotation: Float[Array, "2 #B L k"]) -> KeysValues:
        """The keys and values alone."""
        k, v = (rearrange(y, "B L (N K) -> B L N K", N=self.num_heads) for y in (self.key_norm(self.key(x)), self.value(x)))
        return rotate(k, rotation).astype(x.dtype), v

    def join(self, heads: Float[Array, "B L N K"]) -> Float[Array, "B L D"]:
        """The output projection of one stream's attention."""
        return self.out(rearrange(heads, "B L N K -> B L (N K)"))
