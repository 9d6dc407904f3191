"""Follow-Your-Motion (arXiv 2506.05207): the motion of one clip as two low-rank adapters, on attention heads that are told apart first.

    heads     one forward pass of the noised clip; in every block each head's attention map is compared with two masks
              near(p, q): p and q are near in the token order, so in space.   near(p', q'): in the order with time fastest, so through time
              temporal if cos(map, near) < alpha cos(map, near')                                    (paper; `motion.rule` names others)
    spatial   x_t = (1 - t) frame + t noise, of one random frame of the clip;   q, k, v <- q, k, v + m_s (x A_s) B_s,   m_s by head
              loss  w(t) |v - (noise - frame)|^2
    temporal  A_s, B_s frozen;   q, k, v <- q, k, v + m_s (x A_s) B_s + m_t (x A_t) B_t,   m_t = 1 - m_s
              x_t of l latent frames, sampled sparsely from a clip of L; their temporal positions are stretched by (L - 1) / (l - 1)
              loss  w(t) [ |v - u|^2 + 1 - cos(v_f - v_{f-1}, u_f - u_{f-1}) ],   u = noise - clip
    sampling  m (x A) B is an ordinary LoRA with the mask in B: it is added to the kernels, and the network is a plain one again

The two stages are two runs of train/loop.py, which differ in data: `stage`, `objective`. Masks are data: another clip's heads need no
other program.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from configs.base import MASK_CHANNELS
from configs.errors import require
from configs.follow_your_motion import FollowYourMotion, MotionConfig
from omnitransfer_jax.flow import TIMESTEPS, draw_time, interpolate, loss_per_example, loss_weight
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.attend import QKV, Kept, KeysValues, Streams, plain
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import SHARDING, OmniTransfer
from omnitransfer_jax.models.rope3d import grid, rotation
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import flops
from omnitransfer_jax.train.objective import Metrics, Objective, Params

Stage = Literal["spatial", "temporal"]
ADAPTERS: dict[Stage, str] = {"spatial": "lora_spatial", "temporal": "lora_temporal"}
CHUNK = 256  # queries whose attention is computed at once, of one head
SMALLEST = 1e-8  # norm below which torch's cosine_similarity divides by this instead


class Sample(NamedTuple):
    """What a step reads: a frame, a sparse clip or a whole one, and what the network reads beside it."""

    latents: Float[Array, "B F H W C"]
    text: Float[Array, "B S E"]
    """Encoded caption of the clip, zero rows beyond its end."""
    condition: Float[Array, "B F H W M"] | None = None
    """Mask and first-frame latents, for image-to-video networks."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of the first frame, if one is given."""


class Drawn(NamedTuple):
    """The random numbers of a step."""

    time: Float[Array, " B"]
    noise: Float[Array, "B F H W C"]


# ---- Heads


class HeadScores(NamedTuple):
    """How much of each head's attention is near in space, and through time; means over its queries and over noises."""

    spatial_weight: Float[Array, "layers N"]
    """Attention within the spatial band, 0 to 1."""
    temporal_weight: Float[Array, "layers N"]
    spatial_cosine: Float[Array, "layers N"]
    """Cosine of the attention map and the mask of the spatial band."""
    temporal_cosine: Float[Array, "layers N"]


def head_scores(config: FollowYourMotion, dit: WanDiT, clip: Sample, key: Array) -> HeadScores:
    """The scores of all heads of the frozen transformer on the noised clip, averaged over `motion.head_draws` noises; a batch of 1."""
    motion = config.motion
    time = jnp.full((1,), motion.head_time)
    found = []
    for draw in range(motion.head_draws):
        noise = jax.random.normal(jax.random.fold_in(key, draw), clip.latents.shape)
        latents = _with_condition(interpolate(clip.latents, noise, time), clip)
        found.append(_scores(dit, latents, TIMESTEPS * time, clip.text, clip.image, band=motion.band_tokens))
    return jax.tree.map(lambda *scores: jnp.mean(jnp.stack(scores), 0), *found)


@partial(jax.jit, static_argnames="band")
def _scores(dit: WanDiT, latents: Float[Array, "1 F H W C"], timestep: Float[Array, "1"], text: Any, image: Any, band: int) -> HeadScores:
    """One forward pass, in which every block also scores its heads."""
    patches = dit.grid(latents)
    x, inputs, context, _ = dit.prepare(latents, timestep, text, image)

    def attend(streams: Streams[QKV], cache: Sequence[KeysValues] | None) -> tuple[Streams[Array], Kept]:
        assert streams.target is not None
        outputs, _ = plain(streams, cache, dit.config.attention)
        return outputs, (band_weights(streams.target.q[0], streams.target.k[0], patches, band),)

    _, kept = dit.run(x, inputs, context, attend, None, UNSHARDED)
    assert kept is not None
    ((inside, norm),) = kept
    (spatial, temporal), norm = jnp.moveaxis(inside, 1, 0), norm * band_size(patches, band) ** 0.5
    tokens = int(np.prod(patches))
    return HeadScores(spatial / tokens, temporal / tokens, spatial / norm, temporal / norm)


def band_weights(
    q: Float[Array, "L N K"], k: Float[Array, "L N K"], patches: tuple[int, int, int], band: int
) -> tuple[Float[Array, "2 N"], Float[Array, " N"]]:
    """The sum of each head's attention map softmax(q k^T / sqrt(K)) within the spatial and the temporal band, and the map's norm.

    The map is never whole: it is computed for `CHUNK` queries of one head at a time, in float32.
    """
    L, _, K = q.shape
    chunk = min(CHUNK, L)
    padded = -(-L // chunk) * chunk
    rows = jnp.minimum(jnp.arange(padded), L - 1).reshape(-1, chunk)
    counts = (jnp.arange(padded) < L).reshape(-1, chunk).astype(jnp.float32)  # rows that fill up the last chunk do not count
    orders, width = places(patches, band)
    steps = jnp.asarray(orders)

    def head(qk):
        q, k = qk

        def block(rows_and_counts):
            rows, counts = rows_and_counts
            scores = jnp.einsum("lk,sk->ls", q[rows], k, preferred_element_type=jnp.float32) * K**-0.5
            weights = jax.nn.softmax(scores, -1) * counts[:, None]
            near = jnp.abs(steps[:, rows, None] - steps[:, None]) < width
            return jnp.sum(jnp.where(near, weights[None], 0.0), (1, 2)), jnp.sum(jnp.square(weights))

        return jax.tree.map(lambda sums: sums.sum(0), jax.lax.map(block, (rows, counts)))

    inside, squares = jax.lax.map(head, (q.swapaxes(0, 1), k.swapaxes(0, 1)))
    return inside.T, jnp.sqrt(squares)


def places(patches: tuple[int, int, int], band: int) -> tuple[Int[np.ndarray, "2 L"], int]:
    """The step, of `band` tokens, in which each token lies: in its own order and in the order that has time fastest; and a band's width.

    Tokens are in a band if their steps differ by less than the width, which is that of a latent frame (released code).
    """
    frames, rows, columns = patches
    index = np.arange(frames * rows * columns)
    frame, pixel = np.divmod(index, rows * columns)
    return (np.stack([index, pixel * frames + frame]) // band).astype(np.int32), rows * columns // band


def band_size(patches: tuple[int, int, int], band: int) -> int:
    """How many pairs of tokens a band has; as many in either order."""
    orders, width = places(patches, band)
    count = np.bincount(orders[0])
    return int(sum(count[i] * count[max(0, i - width + 1) : i + width].sum() for i in range(len(count))))


def temporal_heads(scores: HeadScores, motion: MotionConfig) -> Bool[np.ndarray, "layers N"]:
    """Which heads are temporal by `motion.rule`; the others are spatial. A `RequestError` if one kind has no head at all."""
    spatial, temporal, spatial_cosine, temporal_cosine = map(np.asarray, scores)
    match motion.rule:
        case "paper":
            found = spatial_cosine < motion.paper_alpha * temporal_cosine
        case "released":
            found = temporal >= motion.released_factor * spatial
        case _:
            order = np.argsort(-temporal / spatial, axis=-1, kind="stable")
            found = np.argsort(order, axis=-1) < spatial.shape[-1] // 2
    for kind, absent in (("temporal", not found.any()), ("spatial", found.all())):
        require(
            not absent,
            f"motion.rule={motion.rule!r}: it finds no {kind} head in any block, so there is nothing to train on; "
            "take --motion.rule=ranked, or another factor",
        )
    return found


def head_table(temporal: Bool[np.ndarray, "layers N"]) -> str:
    """How many heads of each block are of which kind."""
    lines = [f"{'block':>5} {'spatial':>8} {'temporal':>9}"]
    for layer, heads in enumerate(temporal):
        spatial, count = int((~heads).sum()), int(heads.sum())
        lines.append(f"{layer:>5} {spatial:>8} {count:>9}" + ("" if spatial and count else "   all of one kind"))
    return "\n".join(lines)


# ---- Training


def stage(config: FollowYourMotion, name: Stage, init_from: str) -> FollowYourMotion:
    """The configuration of one stage's run, which starts from `init_from`."""
    motion = config.motion
    train = replace(config.train, init_from=init_from, trainable=(rf"dit/.*\.{ADAPTERS[name]}\..*",))
    optimizer = config.optimizer
    if name == "spatial":
        train = replace(train, steps=motion.spatial_steps)
        optimizer = replace(optimizer, learning_rate=motion.spatial_learning_rate, weight_decay=motion.spatial_weight_decay)
    return replace(config, train=train, optimizer=optimizer, motion=replace(motion, stage=name))


def make_model(config: FollowYourMotion, rngs: nnx.Rngs) -> OmniTransfer:
    """The transformer with the adapters of this stage: the spatial one, or both."""
    model = OmniTransfer(config, rngs=rngs)
    for name in [ADAPTERS["spatial"], *([ADAPTERS["temporal"]] if config.motion.stage == "temporal" else [])]:
        lora.add_lora(model.dit, config.motion.lora, name, config.dit.num_heads, rngs=rngs)
    return model


def with_heads(params: Params, temporal: Bool[np.ndarray, "layers N"]) -> Params:
    """`params` with the masks of these heads in the adapters: 1 for an adapter's own heads, 0 for the others."""
    mask = jnp.asarray(temporal, jnp.float32)
    return lora.with_head_mask(lora.with_head_mask(params, 1 - mask, ADAPTERS["spatial"]), mask, ADAPTERS["temporal"])


def adapters(model: OmniTransfer) -> dict[str, Any]:
    """The parameters of a model's adapters by path, without those of the transformer around them."""
    return {path: x for path, x in flat_params(model).items() if lora.PATH.fullmatch(path)}


def objective(config: FollowYourMotion, temporal: Bool[np.ndarray, "layers N"] | None = None) -> Objective:
    """The objective of a stage (`stage`) on these heads, or on all if a dry run has none; the transformer is its `base`."""
    model = abstract(partial(make_model, config))
    params = adapters(model)
    heads = np.ones((config.dit.num_layers, config.dit.num_heads), bool) if temporal is None else temporal
    key_init, key_steps, _ = keys(config)
    batch = sample_spec(config)
    tokens = int(np.prod([n // p for n, p in zip(batch.latents.shape[1:4], config.dit.patch, strict=True)]))
    return Objective(
        params=params,
        base={path: jax.ShapeDtypeStruct(x.shape, config.dit.dtype) for path, x in flat_params(model).items() if path not in params},
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=batch,
        draw=partial(draw, config),
        loss=partial(loss, config, model),
        init=lambda: with_heads(adapters(make_model(config, nnx.Rngs(key_init))), heads),
        root_key=lambda: key_steps,
        stacks={"dit.blocks.": config.dit.dtype},
        frozen_dtype=config.dit.dtype,
        models=config,
        imported={"dit.": "dit"},
        flops=2 * flops.target_pass(config.dit, tokens) * config.train.batch_size,  # no gradients of the transformer's own weights
    )


def keys(config: FollowYourMotion) -> Array:
    """The keys of the initial weights, of the steps, and of the noises under which heads are classified."""
    return jax.random.split(jax.random.key(config.seed), 3)


def sample_spec(config: FollowYourMotion) -> Sample:
    """Shapes and types of a batch of this stage."""
    is_spatial, dit, size = config.motion.stage == "spatial", config.dit, config.train.batch_size
    shape = replace(config.video, frames=1 if is_spatial else config.motion.sparse_frames).latent_shape(config.vae)
    clip = config.image

    def array(*axes: int) -> Any:
        return jax.ShapeDtypeStruct((size, *axes), jnp.float32)

    return Sample(
        latents=array(*shape),
        text=array(config.dit.text_len, config.dit.text_dim),
        condition=array(*shape[:-1], MASK_CHANNELS + config.vae.z_dim) if dit.image_to_video else None,
        image=array((clip.image_size // clip.patch) ** 2 + 1, clip.dim) if dit.image_dim is not None and not is_spatial else None,
    )


def draw(config: FollowYourMotion, key: Array, batch: Sample) -> Drawn:
    """Times and noise of one step."""
    key_time, key_noise = jax.random.split(key)
    return Drawn(draw_time(key_time, len(batch.latents), config.train.shift), jax.random.normal(key_noise, batch.latents.shape))


def loss(
    config: FollowYourMotion, model: OmniTransfer, params: Params, batch: Sample, drawn: Drawn, shard: Shard
) -> tuple[Float[Array, " B"], Metrics]:
    """The loss of each sample: flow matching, and in the temporal stage the motion loss."""
    x = _with_condition(interpolate(batch.latents, drawn.noise, drawn.time), batch)
    dit = with_params(model, params).dit
    found = velocity(dit, x, TIMESTEPS * drawn.time, batch.text, batch.image, config.time_scale, shard)
    error = loss_per_example(found, batch.latents, drawn.noise)
    weight = loss_weight(drawn.time, config.train.weighting, config.train.shift)
    if config.motion.stage == "spatial":
        return weight * error, {}
    motion = motion_loss(found, drawn.noise - batch.latents, config.motion.motion_loss)
    return weight * (error + config.motion.motion_weight * motion), {"flow": error, "motion": motion}


def velocity(
    dit: WanDiT,
    latents: Float[Array, "B F H W C"],
    timestep: Float[Array, " B"],
    text: Float[Array, "B S E"],
    image: Float[Array, "B I J"] | None,
    time_scale: float,
    shard: Shard = UNSHARDED,
) -> Float[Array, "B F H W c"]:
    """The transformer's velocity of latents whose temporal positions are `time_scale` apart (adaptive RoPE)."""
    config = dit.config
    x, inputs, context, time = dit.prepare(latents, timestep, text, image, shard=shard)
    assert inputs.target is not None
    positions = shard.local(grid(*dit.grid(latents))[None])
    stretched = rotation(positions, config.dim // config.num_heads, config.rope_base, config.rope_top, time_scale)
    inputs = replace(inputs, target=inputs.target._replace(rotation=stretched))
    x, _ = dit.run(x, inputs, context, dit.strategy(references=False), None, shard)
    assert x.target is not None
    return dit.project(x.target, time, dit.grid(latents), shard)


def motion_loss(
    found: Float[Array, "B F H W C"], true: Float[Array, "B F H W C"], kind: Literal["signed", "absolute"]
) -> Float[Array, " B"]:
    """1 - the mean cosine of the differences between adjacent latent frames of two velocities, float32.

    `signed`: the cosine is over the channels. `absolute`: of absolute differences, over time, as the released code has it.
    """
    a, b = (jnp.diff(x.astype(jnp.float32), axis=1) for x in (found, true))
    axis = -1
    if kind == "absolute":
        a, b, axis = jnp.abs(a), jnp.abs(b), 1
    # rsqrt of the larger: a norm of 0 has a gradient of 0, not NaN.
    scales = [jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis), SMALLEST**2)) for x in (a, b)]
    cosine = jnp.sum(a * b, axis) * scales[0] * scales[1]
    return 1 - cosine.mean(axis=tuple(range(1, cosine.ndim)))


def _with_condition(x: Float[Array, "B F H W C"], sample: Sample) -> Float[Array, "B F H W c"]:
    return x if sample.condition is None else jnp.concatenate([x, sample.condition], axis=-1)


# ---- Sampling and export


def sparse_frames(config: FollowYourMotion) -> Int[np.ndarray, " T"]:
    """Which of the clip's frames the temporal stage reads."""
    return np.linspace(0, config.video.frames - 1, config.motion.sparse_frames).round().astype(np.int64)


def one_adapter(params: Params, config: FollowYourMotion) -> Params:
    """Both adapters as one of twice the rank, named `lora`, with head masks and alpha / rank in `up`: y + (x down) up."""
    folded, found = lora.fold_head_masks(params), {}
    for path in folded:
        match = lora.PATH.fullmatch(path)
        if match and match["name"] == ADAPTERS["spatial"] and match["leaf"] == "down":
            pairs = [(folded[f"{match['linear']}.{name}.down"], folded[f"{match['linear']}.{name}.up"]) for name in ADAPTERS.values()]
            downs, ups = zip(*pairs, strict=True)
            found[f"{match['linear']}.lora.down"] = jnp.concatenate(downs, axis=-1)
            found[f"{match['linear']}.lora.up"] = config.motion.lora.scale * jnp.concatenate(ups, axis=-2)
    return found
