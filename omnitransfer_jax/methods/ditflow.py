"""DiTFlow (Pondaven et al., arXiv 2412.07776) on Wan: the motion of a reference guides the sampling of another video. Nothing trains.

    flow of the reference, once, from queries Q and keys K of block n at time 0, with the empty prompt:
        L[p, q] = <Q[p], K[q]> / sqrt(head width), averaged over the heads             (the released code's order)
        hard flow [i, j, p] = argmax_q L[p of frame i, q of frame j] - p               one patch is the unit, [dx, dy] the order

    in each step of the guided window, with the sample x_t and the prompt:
        keys and values of block 0 are those of the reference noised to t              (injection; optional)
        a new Adam, K times:
            soft flow [i, j, p] = sum_q softmax_q(temperature L[p of i, q of j]) q - p     from block n; no block behind it is computed
            loss = mean of (soft - hard)^2 where i is not j and the hard flow is not zero
            update x_t, or the rotations of all queries and keys, which the next guided step goes on from
        an ordinary step of the sampler with them

The softmax is over the places of one frame. Logits are computed for one source frame at a time and again in the backward pass, never for
all tokens against all. What was optimised can be kept and taken in place of the optimisation, for another prompt (`saved`).

Other guides take the place of the flow: methods/motion_guides.py, the paper's baselines.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from configs.ditflow import DiTFlow, GuidanceConfig
from configs.errors import require
from configs.run import SamplerConfig
from omnitransfer_jax import samplers
from omnitransfer_jax.flow import interpolate, time_grid
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.methods.motion_guides import MOFT, SMM, Grid, Guide
from omnitransfer_jax.models.cross_attention import Context
from omnitransfer_jax.models.omnitransfer import Conditions, on_mesh, velocity_of
from omnitransfer_jax.models.wan_dit import Injection, WanDiT


class Source(NamedTuple):
    """The reference as the network reads it; as many as there are samples, of their size."""

    latents: Float[Array, "B F H W C"]
    """Noise-free."""
    text_context: Float[Array, "B S E"]
    """The encoded empty prompt."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of its own first frame (image-to-video)."""
    condition: Float[Array, "B F H W c"] | None = None
    """Mask and encoded first frame of its own (image-to-video)."""


class Guided(NamedTuple):
    """What comes of guided sampling."""

    latents: Float[Array, "B F H W C"]
    """The video."""
    saved: Float[Array, "B S *lead"]
    """The latents, or the rotations "2 2 L k", with which each guided step was taken."""
    losses: Float[Array, "B S updates"]
    """The loss before each update of each guided step."""


class Carry(NamedTuple):
    """What one step of the sampler hands to the next; `saved` and `losses` as in `Guided`, filled row by row."""

    injection: Injection
    saved: Float[Array, "B S *lead"]
    losses: Float[Array, "B S updates"]


# The flow


def hard_flow(q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], grid: Grid) -> Float[Array, "B F f P 2"]:
    """Displacements [dx, dy], in patches, from each place of frame F to the place of frame f that attention finds most alike."""

    def displacements(logits: Float[Array, "B P f p"]) -> Float[Array, "B P f 2"]:
        return places(grid)[logits.argmax(-1)] - places(grid)[None, :, None]

    return rearrange(_map_frames(displacements, q, k, grid), "F B P f c -> B F f P c")


def soft_flow(q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], grid: Grid, temperature: float) -> Float[Array, "B F f P 2"]:
    """The same as means over all places of frame f, weighted by attention; it has gradients."""

    def displacements(logits: Float[Array, "B P f p"]) -> Float[Array, "B P f 2"]:
        return mean_displacements(logits, grid, temperature)

    return rearrange(_map_frames(displacements, q, k, grid), "F B P f c -> B F f P c")


def flow_loss(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], flow: Float[Array, "B F f P 2"], grid: Grid, temperature: float
) -> Float[Array, " B"]:
    """Mean squared difference of the soft flow from `flow`, over both components, where `flow` counts; 0 where it never does."""
    mask = counts(flow)

    def errors(logits: Array, wanted: Float[Array, "B f P 2"], mask: Bool[Array, "B f P"]) -> Float[Array, " B"]:
        found = rearrange(mean_displacements(logits, grid, temperature), "B P f c -> B f P c")
        return jnp.where(mask[..., None], jnp.square(found - wanted), 0).sum((1, 2, 3))

    total = _map_frames(errors, q, k, grid, flow.swapaxes(0, 1), mask.swapaxes(0, 1)).sum(0)
    return total / jnp.maximum(2 * mask.sum((1, 2, 3)), 1).astype(jnp.float32)


def counts(flow: Float[Array, "B F f P 2"]) -> Bool[Array, "B F f P"]:
    """Where a reference's flow counts: between different frames, at places that move."""
    different = ~jnp.eye(flow.shape[1], dtype=bool)
    return (flow != 0).any(-1) & different[None, :, :, None]


def mean_displacements(logits: Float[Array, "B P f p"], grid: Grid, temperature: float) -> Float[Array, "B P f 2"]:
    """Displacements to the mean of the places of each frame, weighted by the softmax."""
    weights = jax.nn.softmax(temperature * logits, axis=-1)
    # Full precision: GPUs would round places to 10 bits, which is a part of the displacement.
    means = jnp.einsum("bpfq,qc->bpfc", weights, places(grid), precision="highest")
    return means - places(grid)[None, :, None]


def places(grid: Grid) -> Float[Array, "P 2"]:
    """Column and row of each patch of a frame, in token order."""
    rows, columns = np.indices(grid[1:]).reshape(2, -1)
    return jnp.asarray(np.stack([columns, rows], -1), jnp.float32)


def _map_frames(function: Callable[..., Array], q: Array, k: Array, grid: Grid, *per_frame: Array) -> Array:
    """`function(logits "B P f p" of a source frame against all frames, rows of per_frame)` of each source frame, which come first."""
    scale = 1 / (q.shape[2] * q.shape[3] ** 0.5)
    queries = rearrange(q, "B (F P) N K -> F B P (N K)", F=grid[0])
    keys = rearrange(k, "B (F P) N K -> B F P (N K)", F=grid[0])

    @jax.checkpoint
    def of_frame(rows: tuple[Array, ...]) -> Array:
        queries, *others = rows
        # The mean over heads of products is one product over all of them.
        logits = jnp.einsum("bpd,bfqd->bpfq", queries, keys, preferred_element_type=jnp.float32) * scale
        return function(logits, *others)

    return jax.lax.map(of_frame, (queries, *per_frame))


def queries_keys(dit: WanDiT, block: int, *inputs: Any, **hooks: Any) -> tuple[Array, Array]:
    """Queries and keys of block `block`; no block from there on is computed."""
    return dit.tap(block, *inputs, **hooks)[:2]


FLOW = Guide(
    queries_keys,
    lambda features, grid, config: hard_flow(features[0], features[1], grid),
    lambda features, flow, grid, config: flow_loss(features[0], features[1], flow, grid, config.temperature),
)
GUIDES = {"flow": FLOW, "smm": SMM, "moft": MOFT, "none": None}


# Sampling


def guided_steps(sampler: SamplerConfig, config: GuidanceConfig) -> Int[np.ndarray, " S"]:
    """The indices of the sampler's steps that are guided; they follow each other, and no such step is a `RequestError`."""
    times = time_grid(sampler.steps, sampler.shift)[:-1]
    if config.window == "steps":
        found = np.arange(int(config.share * len(times) + 1e-9))
        require(len(found) > 0, f"ditflow.share={config.share}: less than one of {len(times)} steps; give at least {1 / len(times):.2g}")
        return found
    found = np.flatnonzero((times >= config.lowest) & (times <= config.highest))
    require(
        len(found) > 0,
        f"ditflow.lowest={config.lowest}, ditflow.highest={config.highest}: no step of the sampler is between these levels; "
        f"they are {times[0]:.3g} to {times[-1]:.3g}",
    )
    return found


def sample(
    dit: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B F H W C"],
    source: Source | None,
    saved: Float[Array, "B S *lead"] | None,
    config: DiTFlow,
    on_step: Callable[[int], None] | None = None,
    shard: Shard = UNSHARDED,
) -> Guided:
    """Clean latents from `noise` with the motion of `source`; with `saved` its values replace the optimisation.

    The guided steps are branches of the sampler's scan, so one program holds everything: its memory is the larger of the two kinds of
    steps, and a host loop would compile as much.
    """
    steer, start = steering(dit, conditions, noise, source, saved, config, shard)
    velocity = velocity_of(dit, conditions, dit.grid(noise), config.sampler, config.sampler.guidance, shard=shard)

    def injected(x: Array, timestep: Array, carry: Carry) -> Array:
        return velocity(x, timestep, carry.injection)

    latents, last = samplers.sample(injected, noise, config.sampler, on_step, steer=steer, carry=start)
    return Guided(latents, last.saved, last.losses)


def sample_on(mesh: Mesh, config: DiTFlow, on_step: Callable[[int], None] | None = None) -> Callable[..., Guided]:
    """`sample` by all devices of `mesh`, compiled; a function of (dit, conditions, noise, source, saved)."""

    def local(dit: WanDiT, conditions: Conditions, noise: Array, source: Source | None, saved: Array | None, shard: Shard) -> Guided:
        return sample(dit, conditions, noise, source, saved, config, on_step, shard)

    return on_mesh(mesh, config, local)


def steering(
    dit: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B F H W C"],
    source: Source | None,
    saved: Float[Array, "B S *lead"] | None,
    config: DiTFlow,
    shard: Shard = UNSHARDED,
) -> tuple[samplers.Steer, Carry]:
    """(steer, its first carry) of `samplers.sample`; arguments as for `sample`."""
    guidance, sampler, grid, batch = config.ditflow, config.sampler, dit.grid(noise), len(noise)
    steps = guided_steps(sampler, guidance)
    inside = jnp.zeros(sampler.steps, bool).at[steps].set(True)
    timesteps = jnp.asarray(samplers.SOLVERS[sampler.solver](time_grid(sampler.steps, sampler.shift))[1], jnp.float32)
    rates = jnp.linspace(guidance.rate, guidance.last_rate, len(steps) + 1)
    guide = GUIDES[guidance.guide] if saved is None else None
    assert not isinstance(conditions.text_context, Context)
    network = Network(dit, conditions.text_context, conditions.image, conditions.latents, shard)
    theirs = None if source is None else Network(dit, source.text_context, source.image, source.condition, shard)
    if guide is not None:
        assert source is not None
        assert theirs is not None
        features = theirs.read(guide.read, guidance.block, source.latents, jnp.zeros(batch))
        target = guide.target(features, grid, guidance)

    def guided(step: Array, time: Array, x: Array, carry: Carry) -> tuple[Array, Carry]:
        row, timestep, losses = step - int(steps[0]), jnp.full(batch, timesteps[step]), carry.losses
        injection = carry.injection._replace(active=jnp.array(True))
        if guidance.kv_injection:
            assert source is not None
            assert theirs is not None
            noised = interpolate(source.latents, noise, jnp.full(batch, time))
            injection = injection._replace(keys_values=theirs.read(WanDiT.tap, 0, noised, timestep)[1:3])

        def put(variable: Array) -> tuple[Array, Injection]:
            return (variable, injection) if injection.rotations is None else (x, injection._replace(rotations=variable))

        def loss(variable: Array) -> tuple[Array, Array]:
            assert guide is not None
            latents, moved = put(variable)
            each = guide.loss(network.read(guide.read, guidance.block, latents, timestep, moved), target, grid, guidance)
            return each.sum(), each

        variable = x if injection.rotations is None else injection.rotations
        if saved is not None:
            variable = saved[:, row]
        elif guide is not None:
            variable, found = optimise(loss, variable, rates[row], guidance.updates)
            losses = losses.at[:, row].set(found)
        latents, moved = put(variable)
        return latents, Carry(moved, carry.saved.at[:, row].set(variable), losses)

    def plain(step: Array, time: Array, x: Array, carry: Carry) -> tuple[Array, Carry]:
        return x, carry._replace(injection=carry.injection._replace(active=jnp.array(False)))

    def steer(step: Array, time: Array, x: Array, carry: Carry) -> tuple[Array, Carry]:
        return jax.lax.cond(inside[step], guided, plain, step, time, x, carry)

    return steer, _first_carry(network, noise, len(steps), guidance)


def optimise(
    loss: Callable[[Array], tuple[Array, Array]], variable: Float[Array, "B *lead"], rate: Float[Array, ""], updates: int
) -> tuple[Float[Array, "B *lead"], Float[Array, "B updates"]]:
    """`variable` after so many updates of a new Adam, and each sample's loss before each; loss(variable) -> (sum, that of each sample)."""
    optimizer = optax.adam(rate)

    def update(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        variable, moments = state
        (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(variable)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer count
            changes, moments = optimizer.update(gradient, moments)
        return (jax.tree.map(jnp.add, variable, changes), moments), each

    (variable, _), losses = jax.lax.scan(update, (variable, optimizer.init(variable)), length=updates)
    return variable, losses.T


class Network(NamedTuple):
    """The network with the conditions of one video."""

    dit: WanDiT
    text_context: Float[Array, "B S E"]
    image: Float[Array, "B I J"] | None
    condition: Float[Array, "B F H W c"] | None
    shard: Shard

    def read(self, what: Callable[..., Any], block: int, latents: Array, timestep: Array, injection: Injection | None = None) -> Any:
        """What `what` (`Guide.read`, `WanDiT.tap`) finds in block `block`."""
        return what(self.dit, block, self.whole(latents), timestep, self.text_context, self.image, injection=injection, shard=self.shard)

    def whole(self, latents: Float[Array, "B F H W C"]) -> Float[Array, "B F H W c"]:
        """The latents with the channels of mask and first frame behind them, if there are any."""
        return latents if self.condition is None else jnp.concatenate([latents, self.condition], axis=-1)


def _first_carry(network: Network, noise: Float[Array, "B F H W C"], steps: int, config: GuidanceConfig) -> Carry:
    """Before any step: the network's own rotations, and nothing injected or saved."""
    dit, batch = network.dit, len(noise)
    tokens, own = dit.embed(network.whole(noise), jnp.zeros((1, 3), jnp.int32))
    rotations = None
    if config.variable == "positions":
        rotations = jnp.broadcast_to(own.swapaxes(0, 1)[:, None], (batch, 2, *own.swapaxes(0, 1).shape[1:]))
    keys = None
    if config.kv_injection:
        heads = dit.config.num_heads
        keys = jnp.zeros((batch, tokens.shape[1], heads, dit.config.dim // heads), dit.config.dtype)
    injection = Injection(jnp.array(False), rotations, None if keys is None else (keys, keys))
    variable = noise if rotations is None else rotations
    saved = jnp.zeros((batch, steps, *variable.shape[1:]))
    return Carry(injection, saved, jnp.zeros((batch, steps, config.updates)))
