"""Motion-Textual Inversion (arXiv 2408.00458) on Wan: the motion of a clip as tokens that its cross-attention reads.

    tokens     m: for each latent frame f a set m_f of N rows, and one set m_all for all frames
    attention  a query of frame f reads [m_f, m_all, rest] under one softmax, in the place of the prompt (or of the CLIP features)
    training   m* = argmin_m  E_(t, noise) | velocity(x_t, t, m, first frame of the clip) - (noise - x_0) |^2,  x_t = (1 - t) x_0 + t noise
               t = sigmoid(P + 1.6 n), n normal; the transformer is frozen
    sampling   with m* and another first frame; guidance moves away from the negative prompt, laid out in sets as m is

The paper has SVD, whose cross-attention is split: there the sets of frames are read in space and the shared one in time. Wan has one
cross-attention over all tokens, so a query reads both. `rest` is the encoded empty prompt (`inversion.sink`), in text-to-video networks
the prompt.

Several clips can be learnt in one run: the tokens are then stacked, and each sample reads those of its clip.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int32

from configs.motion_inversion import InversionConfig, MotionInversion
from configs.run import plain
from omnitransfer_jax.batch import sample_spec
from omnitransfer_jax.flow import TIMESTEPS, draw_time, interpolate, loss_per_example, loss_weight
from omnitransfer_jax.mesh import Shard
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models.cross_attention import Context, Rows
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import SHARDING, Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import flops
from omnitransfer_jax.train.objective import Metrics, Objective, Params

Tokens = Mapping[str, Float[Array | np.ndarray, "B sets N D"]]
"""The tokens of each sample, by the branch that reads them, `text` or `image`: the sets of all latent frames, then the shared one."""


class Sample(NamedTuple):
    """A batch, or what a training has of each of its clips."""

    clip: Int32[Array, " B"]
    """Number of the clip, whose tokens are read."""
    latents: Float[Array, "B F H W C"]
    text: Float[Array, "B S E"]
    """What is read beside the tokens: the encoded prompt, or the empty one where tokens replace it."""
    condition: Float[Array, "B F H W M"] | None = None
    """Mask and latents of the clip's first frame (image-to-video)."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of the clip's first frame, where the network has an image branch."""


class Start(NamedTuple):
    """What the tokens of a clip start from, as the encoders give it."""

    caption: Float[Array, "S E"]
    """The rows of its caption, without padding."""
    frames: Float[Array, "F I J"] | None
    """CLIP features of one frame of each latent frame; None if the image branch has no tokens."""


class Drawn(NamedTuple):
    """The random numbers of a step."""

    time: Float[Array, " B"]
    noise: Float[Array, "B F H W C"]


def objective(config: MotionInversion, initial: Tokens | None = None, clips: int = 1) -> Objective:
    """The training of the tokens of so many clips, from `initial`; the transformer is its `base`."""
    dit = abstract(lambda rngs: WanDiT(config.dit, rngs=rngs))
    size, dtype = config.train.batch_size, jnp.dtype(config.dit.dtype)
    return Objective(
        params={f"tokens.{name}": jax.ShapeDtypeStruct((clips, *shape), jnp.float32) for name, shape in shapes(config).items()},
        sharding=[(r"tokens\..*", (None,) * 4), *SHARDING],
        trainable=config.train.trainable,
        batch=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), spec(config)),
        draw=partial(draw, config),
        loss=partial(loss, config, dit),
        init=lambda: {f"tokens.{name}": jnp.asarray(rows) for name, rows in (initial or {}).items()},
        root_key=lambda: omnitransfer.keys(config)[1],
        base={path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in flat_params(dit, "dit.").items()},
        stacks={"dit.blocks.": config.dit.dtype},
        models=plain(config),
        imported={"dit.": "dit"},
        # Forward, and backward to the tokens alone: no gradients of weights.
        flops=2 * size * flops.target_pass(config.dit, flops.tokens(config, config.video)),
    )


def shapes(config: MotionInversion) -> dict[str, tuple[int, int, int]]:
    """Sets, rows and width of the tokens, by the branch that reads them."""
    sets = config.video.patches(config.vae, config.dit.patch)[0] + 1
    widths = {"text": config.dit.text_dim, "image": config.dit.image_dim or 0}
    branches = ("text", "image") if config.inversion.branch == "both" else (config.inversion.branch,)
    return {
        name: (sets, config.inversion.tokens, config.dit.dim if config.inversion.space == "blocks" else widths[name]) for name in branches
    }


def spec(config: MotionInversion) -> Sample:
    """Shape and type of one sample."""
    one = sample_spec(plain(config))
    condition = one.condition if config.dit.image_to_video else None
    return Sample._make((jax.ShapeDtypeStruct((), jnp.int32), one.target, one.text, condition, one.image))


def draw(config: MotionInversion, key: Array, batch: Sample) -> Drawn:
    """Noise levels and noise of one step."""
    key_time, key_noise = jax.random.split(key)
    size, inversion = len(batch.latents), config.inversion
    if inversion.times == "uniform":
        time = draw_time(key_time, size, config.train.shift)
    else:
        time = jax.nn.sigmoid(inversion.time_mean + inversion.time_std * jax.random.normal(key_time, (size,)))
    return Drawn(time, jax.random.normal(key_noise, batch.latents.shape))


def loss(
    config: MotionInversion, model: WanDiT, params: Params, batch: Sample, drawn: Drawn, shard: Shard
) -> tuple[Float[Array, " B"], Metrics]:
    """Flow matching of each sample on its clip, from its first frame, under its tokens; and the root mean square of those."""
    dit = with_params(model, {path.removeprefix("dit."): x for path, x in params.items() if path.startswith("dit.")})
    tokens = {path.removeprefix("tokens."): x[batch.clip] for path, x in params.items() if path.startswith("tokens.")}
    x = interpolate(batch.latents, drawn.noise, drawn.time)
    latents = x if batch.condition is None else jnp.concatenate([x, batch.condition], axis=-1)
    read = context(dit, config.inversion, tokens, batch.text, batch.image)
    velocity = dit(latents, TIMESTEPS * drawn.time, read, shard=shard)
    error = loss_weight(drawn.time, config.train.weighting) * loss_per_example(velocity, batch.latents, drawn.noise)
    return error, {f"{name}_rms": jnp.sqrt(jnp.square(rows).mean((1, 2, 3))) for name, rows in tokens.items()}


def context(
    dit: WanDiT, config: InversionConfig, tokens: Tokens, text: Float[Array, "B S E"], image: Float[Array, "B I J"] | None
) -> Context:
    """What the cross-attention reads: `tokens`, and of the encoded prompt and first frame what they leave in place."""
    given = dit.embed_context(text, image)
    rows = {name: embedded(dit, config, name, jnp.asarray(x)) for name, x in tokens.items()}
    text_rows, image_rows = given.text, given.image
    if "text" in rows:
        kept = [given.text.shared] if config.sink or not dit.config.image_to_video else []
        text_rows = Rows(jnp.concatenate([rows["text"][:, -1], *kept], 1), rows["text"][:, :-1])
    if "image" in rows:
        image_rows = Rows(rows["image"][:, -1], rows["image"][:, :-1])
    return Context(text_rows, image_rows, None)


def negative_context(
    dit: WanDiT, config: InversionConfig, like: Context, text: Float[Array, "B S E"], image: Float[Array, "B I J"] | None
) -> Context:
    """What the unconditional pass reads: the encoded negative prompt and the first frame, in sets as large as those of `like`.

    Every frame reads the same rows, and as many as with tokens: the prompt's rows and more of its padding, or only its first ones where
    tokens have no sink; of the frame, CLIP's features pooled as the tokens started.
    """
    given = dit.embed_context(text, image)
    text_rows, image_rows = given.text, given.image
    if like.text.of_frames is not None:
        frames, own = like.text.of_frames.shape[1:3]
        count = own + like.text.shared.shape[1]
        padding = dit.embed_context(jnp.zeros((len(text), max(0, count - text.shape[1]), text.shape[2]))).text.shared
        rows = jnp.concatenate([given.text.shared, padding], 1)[:, :count]
        text_rows = Rows(rows[:, own:], repeat(rows[:, :own], "B S D -> B F S D", F=frames))
    if like.image is not None and like.image.of_frames is not None and image is not None:
        pooled = dit.embed_context(text, jnp.stack([_pooled_frame(each, config.tokens) for each in image])).image
        assert pooled is not None
        image_rows = Rows(pooled.shared, repeat(pooled.shared, "B S D -> B F S D", F=like.image.of_frames.shape[1]))
    return Context(text_rows, image_rows, None)


def conditions(config: MotionInversion, tokens: Tokens, dit: WanDiT, encoded: Conditions) -> Conditions:
    """The conditions under which `tokens` move the first frame of `encoded`, which has the prompt, the negative one and the frame."""
    text, negative = encoded.text_context, encoded.negative_context
    assert not isinstance(text, Context)
    assert not isinstance(negative, Context)
    read = context(dit, config.inversion, tokens, text, encoded.image)
    unread = negative_context(dit, config.inversion, read, negative, encoded.image)
    return Conditions(read, unread, None, encoded.latents)


def embedded(dit: WanDiT, config: InversionConfig, branch: str, tokens: Float[Array, "B sets N E"]) -> Float[Array, "B sets N D"]:
    """Tokens as wide as the blocks, in the dtype of the computation."""
    rows = tokens.astype(jnp.dtype(dit.config.dtype))
    if config.space == "blocks":
        return rows
    flat = rearrange(rows, "B F N E -> B (F N) E")
    if branch == "text":
        flat = dit.text_embedder(flat)
    else:
        assert dit.image_embedder is not None
        flat = dit.image_embedder(flat)
    return rearrange(flat, "B (F N) D -> B F N D", F=tokens.shape[1])


def initial_tokens(config: MotionInversion, dit: WanDiT, start: Start, key: Array) -> dict[str, Float[Array, "sets N D"]]:
    """The tokens before the first step: of the text branch from the clip's caption, of the image branch from its frames, and noise.

    A caption of more rows than a set is averaged in pieces, a shorter one repeated; so are the patches of a frame behind its class token.
    All sets of the text branch are alike but for the noise; the shared set of the image branch is the first frame's.
    """
    found = {}
    for name, (sets, count, _) in shapes(config).items():
        if name == "text":
            rows = repeat(_pooled(start.caption, count), "N E -> sets N E", sets=sets)
        else:
            assert start.frames is not None
            frames = jnp.stack([_pooled_frame(features, count) for features in start.frames])
            rows = jnp.concatenate([frames, frames[:1]])
        if config.inversion.space == "blocks":
            rows = embedded(dit, replace(config.inversion, space="encoder"), name, rows[None])[0]
        rows = rows.astype(jnp.float32)
        key, key_noise = jax.random.split(key)
        found[name] = rows + config.inversion.init_noise * rows.std() * jax.random.normal(key_noise, rows.shape)
    return found


def _pooled(rows: Float[Array, "S E"], count: int) -> Float[Array, "N E"]:
    """`count` rows: means of equal pieces of more rows, or repetitions of fewer."""
    edges = np.arange(count + 1) * len(rows) // count
    return jnp.stack([rows[begin : max(begin + 1, end)].mean(0) for begin, end in pairwise(edges)])


def _pooled_frame(features: Float[Array, "I J"], count: int) -> Float[Array, "N J"]:
    """The class token, and means of equal pieces of the patches."""
    return features[:1] if count == 1 else jnp.concatenate([features[:1], _pooled(features[1:], count - 1)])
