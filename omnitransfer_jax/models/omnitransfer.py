"""How the models meet: what the diffusion transformer reads, and how its output becomes a video.

prompt -> UMT5 -> text_context            (from stage 2 on: models/alignment.py, [frame, reference, prompt] -> Qwen2.5-VL)
first frame -> CLIP -> image
first frame, then grey -> VAE -> latents
reference videos -> VAE -> latents with the task's flag -> WanDiT, once -> cached keys and values of every layer
noise, and all of these -> WanDiT, called by the sampler at every step -> latents -> VAE -> video
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from configs.base import MASK_CHANNELS
from configs.chips import compiler_options
from configs.run import Config, SamplerConfig
from omnitransfer_jax import samplers, tasks
from omnitransfer_jax.mesh import UNSHARDED, Shard, per_device, placed, replicated, specs
from omnitransfer_jax.models import alignment, wan_dit
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.clip_vision import CLIPVision, preprocess
from omnitransfer_jax.models.cross_attention import Context
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.kv_cache import quantize
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import Injection, Reference, WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.samplers import Expert, State

SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    *((rf"dit\.(?:{pattern})", axes) for pattern, axes in wan_dit.SHARDING),
    *((rf"alignment\.(?:{pattern})", axes) for pattern, axes in alignment.SHARDING),
]


class OmniTransfer(nnx.Module):
    """All that ever trains: the transformer, and from stage 2 on the alignment that makes its context."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.dit = WanDiT(config.dit, rngs=rngs)
        self.alignment = Alignment(config, rngs=rngs) if config.alignment.enabled else None
        self.embed_text = embeds_text(config)


def embeds_text(config: Config) -> bool:
    """Whether the context goes through Wan's text projection: always, but for a connector that leads straight into the blocks."""
    return not (config.alignment.enabled and config.alignment.into == "blocks")


class Conditions(NamedTuple):
    """What the network reads beside the noise."""

    text_context: Float[Array, "B S E"] | Context
    """Encoded prompt, zero rows beyond its end; from stage 2 on the alignment's context, one task's rows behind another's.

    A `Context` stands for text and image (`WanDiT`); the other one then has the same form."""
    negative_context: Float[Array, "B S E"] | Context
    """What the unconditional pass of guidance reads instead."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of the first frame (image-to-video)."""
    latents: Float[Array, "B F H W C"] | None = None
    """Mask and encoded first frame, the channels behind the noise (image-to-video)."""
    references: tuple[Reference, ...] = ()
    """What to transfer from; several are read side by side."""


def encode_text(encoder: UMT5Encoder, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S E"]:
    """The text context of the cross-attention."""
    return encoder(tokens, mask)


def encode_image(encoder: CLIPVision, image: Float[Array, "B H W 3"]) -> Float[Array, "B I J"]:
    """The image context of the cross-attention, from the first frame at its own size, in [-1, 1]."""
    return encoder(preprocess(image, encoder.config.image_size))


def encode_first_frame(vae: WanVAE, image: Float[Array, "B H W 3"] | None, shape: tuple[int, int, int, int]) -> Float[Array, "B F h w C"]:
    """Mask and condition latents of a video of `shape` (B, T, H, W): the frame followed by grey, encoded whole (Wan2.1 image2video.py).

    Without an image, as in text-to-video on an image-to-video network, all frames are grey and the mask is 0.
    """
    video = jnp.zeros((*shape, 3))
    if image is not None:
        video = video.at[:, 0].set(image)
    latents = vae.encode(video)
    mask = jnp.zeros((*latents.shape[:-1], MASK_CHANNELS))
    if image is not None:
        mask = mask.at[:, 0].set(1.0)
    return jnp.concatenate([mask, latents], axis=-1)


def reference_latents(latents: Float[Array, "B F H W C"], flags: Float[Array, " B"]) -> Float[Array, "B F H W c"]:
    """The reference's channels: its latents without noise, the task's flag in all four of the mask, its latents again (section 4.1)."""
    flag = jnp.broadcast_to(flags[:, None, None, None, None], (*latents.shape[:-1], MASK_CHANNELS)).astype(latents.dtype)
    return jnp.concatenate([latents, flag, latents], axis=-1)


def make_reference(
    latents: Float[Array, "B F H W C"],
    task: Int[Array, " B"],
    target: tuple[int, int, int],
    rank: int = 1,
    by: Literal["task", "frames", "beside"] = "task",
    flag: float | None = None,
) -> Reference:
    """The reference of each sample's task for a target of that many patches.

    `rank` and `by` (`dit.offsets`) as in `tasks.offsets`; `flag` (`dit.reference_flag`) takes the place of the task's if it is given.
    """
    flags = tasks.flags(task) if flag is None else jnp.full(task.shape, flag)
    return Reference(reference_latents(latents, flags), tasks.offsets(task, target, rank, by))


def denoise(
    dit: WanDiT,
    conditions: Conditions,
    state: State,
    sampler: SamplerConfig,
    expert: Expert,
    on_step: Callable[[int], None] | None = None,
    embed_text: bool = True,
    shard: Shard = UNSHARDED,
) -> State:
    """The sampler's state after the steps of `expert`, whose network is `dit`; `embed_text` and `shard` as in `WanDiT`."""
    velocity = velocity_of(dit, conditions, dit.grid(state.latents), sampler, expert.guidance, embed_text, shard)
    return samplers.advance(velocity, state, expert.steps, sampler, on_step)[0]


def velocity_of(
    dit: WanDiT,
    conditions: Conditions,
    grid: tuple[int, int, int],
    sampler: SamplerConfig,
    guidance: float,
    embed_text: bool = True,
    shard: Shard = UNSHARDED,
) -> Callable[..., Array]:
    """velocity(latents, timestep, injection=None) of both passes of guidance by `guidance`, for a target of `grid` patches.

    The references' keys and values are computed once, for all steps and both passes of guidance. The passes differ in the text alone
    and run one after the other, so they share the cache and need no second copy of the activations. Bidirectional references depend
    on the target and are computed at every step.
    """
    references, kv_cache = conditions.references, None
    if references and sampler.reference_cache != "none" and dit.config.references != "bidirectional":
        activations = sampler.reference_cache == "activations"
        kv_cache = quantize(dit.make_kv_cache(references, grid, shard, activations), sampler.reference_cache)
        references = ()

    def velocity(x: Array, timestep: Array, injection: Injection | None = None) -> Array:
        latents = x if conditions.latents is None else jnp.concatenate([x, conditions.latents], axis=-1)

        def with_context(passing: tuple[Array | Context, Array | None]) -> Array:
            text, active = passing
            return dit(
                latents,
                timestep,
                text,
                conditions.image,
                references=references,
                kv_cache=kv_cache,
                shard=shard,
                embed_text=embed_text,
                active=active,
                injection=injection,
            )

        if guidance == 1:
            return with_context((conditions.text_context, None))
        texts, active = jax.tree.map(lambda *x: jnp.stack(x), conditions.text_context, conditions.negative_context), None
        if sampler.skip_unconditional:
            active = jnp.ones((2, dit.config.num_layers), bool).at[1, list(sampler.skip_unconditional)].set(False)
        v, negative = jax.lax.map(with_context, (texts, active))
        return negative + guidance * (v - negative)

    return velocity


def denoise_on(
    mesh: Mesh, config: Config, on_step: Callable[[int], None] | None = None
) -> Callable[[Callable[[str], WanDiT], Conditions, Float[Array, "B F H W C"]], Float[Array, "B F H W C"]]:
    """Clean latents from noise by all devices of `mesh`, compiled: they divide the batch if it divides, each sample's tokens, and the
    parameters.

    Every device calls `on_step`, so it must not mind being called again for the same step. What is returned takes `load(part)`, which
    gives the network that `samplers.Expert.part` names; of two experts the first is let go before the second is loaded.
    """
    run = on_mesh(mesh, config, partial(denoise_part, config, on_step))

    def denoise_all(load: Callable[[str], WanDiT], conditions: Conditions, noise: Array) -> Array:
        conditions, state = jax.device_put((conditions, samplers.start(noise)), replicated(mesh))
        for expert in samplers.experts(config.sampler):
            state = run(load(expert.part), conditions, state, static=(expert,))
            state = jax.block_until_ready(state)  # until then the device keeps the parameters, and the next ones may not fit beside them
        return state.latents

    return denoise_all


def denoise_part(
    config: Config, on_step: Callable[[int], None] | None, dit: WanDiT, conditions: Conditions, state: State, shard: Shard, expert: Expert
) -> State:
    """`denoise` as `on_mesh` calls it."""
    return denoise(dit, conditions, state, config.sampler, expert, on_step, embeds_text(config), shard)


def on_mesh(mesh: Mesh, config: Config, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(dit, *trees, shard, *static)`, compiled, by all devices of `mesh` as in `denoise_on`; arrays have the batch first.

    Returns a function of (dit, *trees, static=()), compiled once for each `static`, a tuple of hashable values.
    """
    run, params = program_on(mesh, config, function)
    shardings = {path: leaf.sharding for path, leaf in params.items()}

    def run_all(dit: WanDiT, *trees: Any, static: tuple[Any, ...] = ()) -> Any:
        trees, size = jax.device_put(trees, replicated(mesh)), len(jax.tree.leaves(trees)[0])
        batched = size % (config.mesh.slices * config.mesh.data) == 0
        return run(jax.device_put(flat_params(dit), shardings), trees, batched=batched, static=static)

    return run_all


def program_on(
    mesh: Mesh, config: Config, function: Callable[..., Any], model: WanDiT | None = None
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """(run, params): run(params, trees, batched=, static=) of `on_mesh`, not yet compiled, and the parameters it takes, not yet loaded.

    `model` is a transformer without arrays that has more than the configured one, such as adapters.
    """
    blank = abstract(lambda rngs: WanDiT(config.dit, rngs=rngs)) if model is None else model
    leaves = flat_params(blank)
    spec = specs(leaves, wan_dit.SHARDING, config.mesh)

    options = compiler_options(mesh.devices.flat[0].device_kind)

    @partial(jax.jit, static_argnames=("batched", "static"), compiler_options=options or None)
    def run(params: dict[str, Array], trees: tuple[Any, ...], batched: bool, static: tuple[Any, ...]) -> Any:
        def local(params: dict[str, Array], *trees_and_shard: Any) -> Any:
            return function(with_params(blank, params), *trees_and_shard, *static)

        return per_device(local, mesh, spec, {"blocks.": config.dit.dtype}, batched)(params, *trees)

    stored = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dit.dtype)) for path, leaf in leaves.items()}
    return run, placed(mesh, stored, spec)


def abstract_conditions(config: Config) -> tuple[Conditions, State]:
    """Shape and dtype of what `denoise_part` takes for one video and one reference of the configured sizes."""

    def make() -> tuple[Conditions, State]:
        target, reference = (jnp.zeros((1, *size.latent_shape(config.vae))) for size in (config.video, config.data.reference))
        rows = config.alignment.queries if config.alignment.enabled else config.dit.text_len
        text = jnp.zeros((1, rows, config.dit.text_dim))
        clip, image_to_video = config.image, config.dit.image_to_video
        image = jnp.zeros((1, (clip.image_size // clip.patch) ** 2 + 1, clip.dim)) if config.dit.image_dim is not None else None
        latents = jnp.zeros((*target.shape[:-1], MASK_CHANNELS + config.vae.z_dim)) if image_to_video else None
        grid = config.video.patches(config.vae, config.dit.patch)
        made = make_reference(reference, jnp.zeros(1, jnp.int32), grid, by=config.dit.offsets, flag=config.dit.reference_flag)
        return Conditions(text, text, image, latents, (made,)), samplers.start(target)

    return jax.eval_shape(make)
