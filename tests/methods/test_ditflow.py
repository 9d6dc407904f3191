"""Laws of DiTFlow and its baselines: what the flow is, what of it counts, and what guidance may and may not change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import DiTConfig
from configs.ditflow import GuidanceConfig, get_config
from configs.errors import RequestError
from configs.run import SamplerConfig
from omnitransfer_jax import samplers
from omnitransfer_jax.flow import time_grid
from omnitransfer_jax.methods import ditflow, motion_guides
from omnitransfer_jax.methods.ditflow import Source, counts, flow_loss, guided_steps, hard_flow, soft_flow
from omnitransfer_jax.models.omnitransfer import Conditions, denoise
from omnitransfer_jax.models.wan_dit import WanDiT
from tests.compare import relative_l2

GRID = (3, 4, 5)
DIT = DiTConfig(dim=24, ffn_dim=32, num_layers=3, num_heads=2, text_dim=8, image_dim=8, freq_dim=16, dtype="float32", remat="none")
LATENTS = (2, 3, 4, 6, 16)
CONFIG = replace(
    get_config("smoke"),
    sampler=SamplerConfig(solver="euler", steps=4, shift=3.0, guidance=2.0),
    ditflow=GuidanceConfig(block=1, updates=2, rate=0.02, window="steps", share=0.5, kv_injection=False),
)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def heads(features):
    """Features "F h w C" as queries or keys of two heads."""
    return features.reshape(1, -1, 2, features.shape[-1] // 2)


def shifted(dx, dy):
    """Queries and keys of frames that show one random picture, moved by (dx, dy) from each frame to the next, and back at the edges."""
    picture = 8 * np.asarray(draw(*GRID[1:], 16))
    frames = jnp.asarray(np.stack([np.roll(picture, (i * dy, i * dx), (0, 1)) for i in range(GRID[0])]))
    return heads(frames), heads(frames)


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (2, -1)])
def test_the_flow_of_shifted_features_is_the_shift(dx, dy):
    """Where the shifted place is in the picture; the others wrap around."""
    q, k = shifted(dx, dy)
    hard, soft = hard_flow(q, k, GRID), soft_flow(q, k, GRID, 5.0)
    places = np.asarray(ditflow.places(GRID))
    for i in range(GRID[0]):
        for j in range(GRID[0]):
            shift = (j - i) * np.array([dx, dy])
            inside = ((places + shift >= 0) & (places + shift < [GRID[2], GRID[1]])).all(-1)
            assert inside.any() or abs(j - i) == 2
            np.testing.assert_array_equal(hard[0, i, j][inside], np.broadcast_to(shift, (inside.sum(), 2)))
            np.testing.assert_allclose(soft[0, i, j][inside], np.broadcast_to(shift, (inside.sum(), 2)), atol=1e-3)


def test_a_frame_and_itself_and_still_places_do_not_count():
    q, k = draw(1, 60, 2, 4), draw(1, 60, 2, 4, seed=1)
    flow = np.array(hard_flow(q, k, GRID))
    flow[0, :, :, 3] = 0  # a still place
    counted = np.asarray(counts(jnp.asarray(flow)))
    assert not counted[0, :, :, 3].any()
    assert not counted[:, range(3), range(3)].any()
    assert counted[0, 0, 1].sum() > 10
    loss = float(flow_loss(q, k, jnp.asarray(flow), GRID, 2.0)[0])
    soft = np.asarray(soft_flow(q, k, GRID, 2.0))
    assert loss == pytest.approx(np.square(soft - flow)[counted].mean(), rel=1e-5)
    assert np.square(soft - flow).mean() != pytest.approx(loss, rel=1e-2)


def test_a_still_reference_guides_nothing():
    loss, gradient = jax.value_and_grad(lambda q: flow_loss(q, q, jnp.zeros((1, 3, 3, 20, 2)), GRID, 2.0).sum())(draw(1, 60, 2, 4))
    assert loss == 0
    assert (gradient == 0).all()


def test_the_flow_of_a_clip_is_never_held_for_all_tokens_against_all():
    """The largest arrays of the gradient are of one source frame against all frames."""
    grid = (16, 8, 8)
    tokens = int(np.prod(grid))
    q, flow = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1, 16, 16, 64, 2), jnp.float32)
    step = jax.jit(jax.grad(lambda q, k, flow: flow_loss(q, k, flow, grid, 2.0).sum(), argnums=(0, 1)))
    assert step.lower(q, q, flow).compile().memory_analysis().temp_size_in_bytes < tokens**2 * 4


@pytest.fixture(scope="module")
def request_():
    """Network, conditions, noise and reference of two samples."""
    dit = jax.jit(lambda: WanDiT(DIT, rngs=nnx.Rngs(0)))()
    *size, channels = LATENTS
    conditions = Conditions(draw(2, 4, 8), draw(2, 4, 8, seed=1), draw(2, 5, 8), draw(*size, channels + 4))
    source = Source(draw(*LATENTS, seed=2), draw(2, 4, 8, seed=3), draw(2, 5, 8, seed=4), draw(*size, channels + 4, seed=5))
    return dit, conditions, draw(*LATENTS, seed=6), source


def sampled(request, saved=None, **changes):
    config = replace(CONFIG, ditflow=replace(CONFIG.ditflow, **changes))
    dit, conditions, noise, source = request
    return jax.jit(lambda *args: ditflow.sample(*args, config))(dit, conditions, noise, source, saved)


VARIABLES = pytest.mark.parametrize("variable", ["latents", "positions"])


@VARIABLES
def test_no_update_is_the_unguided_sample(request_, variable):
    dit, conditions, noise, _ = request_
    expert = samplers.experts(CONFIG.sampler)[0]
    plain = jax.jit(lambda dit, *args: denoise(dit, *args, CONFIG.sampler, expert).latents)(dit, conditions, samplers.start(noise))
    assert (sampled(request_, variable=variable, updates=0).latents == plain).all()


@VARIABLES
def test_what_was_optimised_can_be_injected(request_, variable):
    """With the same prompt it gives the same video; without its reference, and another one with another prompt."""
    dit, conditions, noise, _ = request_
    guided = sampled(request_, variable=variable)
    unguided = sampled(request_, variable=variable, updates=0)
    assert relative_l2(guided.latents, unguided.latents) > 1e-3
    assert (guided.losses[:, :, 0] > guided.losses[:, :, -1]).all()  # each guided step lowers it
    again = sampled((dit, conditions, noise, None), guided.saved, variable=variable)
    assert (again.latents == guided.latents).all()
    other = conditions._replace(text_context=conditions.negative_context)
    assert (sampled((dit, other, noise, None), guided.saved, variable=variable).latents != guided.latents).any()


def test_positions_are_handed_on_and_then_dropped(request_):
    """Each guided step starts from the positions of the one before; behind the window the network has its own."""
    dit, conditions, noise, source = request_
    config = replace(CONFIG, ditflow=replace(CONFIG.ditflow, variable="positions"))

    @jax.jit
    def steps(dit, conditions, noise, source):
        steer, carry = ditflow.steering(dit, conditions, noise, source, None, config)

        def step(carry, index):
            _, carry = steer(index, jnp.array(0.9), noise, carry)
            return carry, carry.injection

        return carry.injection.rotations, jax.lax.scan(step, carry, jnp.arange(3))[1]

    own, stacked = steps(dit, conditions, noise, source)
    injections = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)]
    assert [bool(each.active) for each in injections] == [True, True, False]
    distances = [float(jnp.abs(each.rotations - own).max()) for each in injections[:2]]
    assert 0 < distances[0] <= 2 * 0.02 * 1.002  # two updates of Adam: the first at most the rate, the second at most .13 % more
    assert distances[1] > distances[0]


@pytest.mark.parametrize("guide", ["smm", "moft"])
def test_the_baselines_lower_their_own_loss(request_, guide):
    losses = sampled(request_, guide=guide, channels=0.3).losses
    assert (losses[:, :, 0] > losses[:, :, -1]).all()


def test_injection_alone_changes_the_guided_steps_alone(request_):
    dit, conditions, noise, source = request_
    plain, injected = (sampled(request_, guide="none", kv_injection=on).latents for on in (False, True))
    assert relative_l2(injected, plain) > 1e-3
    config = replace(CONFIG, ditflow=replace(CONFIG.ditflow, guide="none", kv_injection=True))

    @jax.jit
    def first_step(dit, conditions, noise, source):
        steer, carry = ditflow.steering(dit, conditions, noise, source, None, config)
        noised = jnp.concatenate([0.3 * source.latents + 0.7 * noise, source.condition], -1)
        timestep = jnp.full(2, 1000 * time_grid(4, 3.0)[0], jnp.float32)
        return steer(jnp.array(0), jnp.array(0.7), noise, carry)[1], dit.tap(0, noised, timestep, source.text_context)

    carry, wanted = first_step(dit, conditions, noise, source)
    for ours, theirs in zip(carry.injection.keys_values, wanted[1:3], strict=True):
        assert relative_l2(ours, theirs) <= 1e-5


def test_samples_of_a_batch_do_not_meet(request_):
    """A batch of clips is each clip alone: the optimiser's numbers are each sample's own."""
    both = sampled(request_, kv_injection=True)
    dit, *rest = request_
    alone = sampled((dit, *jax.tree.map(lambda x: x[1:], tuple(rest))), kv_injection=True)
    assert relative_l2(alone.latents[0], both.latents[1]) <= 1e-4
    assert relative_l2(alone.losses[0], both.losses[1]) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "steps", "found"),
    [
        ({"window": "steps", "share": 0.2}, 50, 10),  # the paper's
        ({"window": "steps", "share": 0.29}, 10, 2),
        ({"lowest": 0.9}, 50, 18),  # shift 5: t >= .643 of the unshifted grid
        ({"lowest": 0.9, "highest": 0.95}, 50, None),
    ],
)
def test_the_guided_window(changes, steps, found):
    sampler = SamplerConfig(solver="euler", steps=steps, shift=5.0)
    guided = guided_steps(sampler, GuidanceConfig(**changes))
    assert (np.diff(guided) == 1).all()
    if found is None:
        assert 0 < guided[0] < len(guided) + guided[0] <= 18
    else:
        assert guided.tolist() == list(range(found))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": "steps", "share": 0.05}, "ditflow.share=0.05: less than one of 10 steps; give at least 0.1"),
        ({"lowest": 0.9999}, "no step of the sampler is between these levels"),
    ],
)
def test_an_empty_window_is_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        guided_steps(SamplerConfig(steps=10), GuidanceConfig(**changes))


def test_the_network_is_given_the_timesteps_of_the_solver(request_, monkeypatch):
    """The reference is at time 0; UniPC's are whole numbers, as in the unguided sampler."""
    dit, conditions, noise, source = request_
    seen = []

    def compare(features, target, *_):
        return jnp.square(features - target)[..., 0].sum((1, 2, 3))

    def read(dit, block, latents, timestep, *args, **kwargs):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), timestep, ordered=True)
        return latents

    monkeypatch.setitem(ditflow.GUIDES, "flow", motion_guides.Guide(read, lambda features, *_: features, compare))
    config = replace(CONFIG, sampler=replace(CONFIG.sampler, solver="unipc"), ditflow=replace(CONFIG.ditflow, updates=1))
    steer, carry = ditflow.steering(dit, conditions, noise, source, None, config)
    steer(jnp.array(1), jnp.array(0.9), noise, carry)
    jax.effects_barrier()
    assert (seen[0] == 0).all()
    wanted = samplers.SOLVERS["unipc"](time_grid(4, 3.0))[1][1]
    assert wanted == int(wanted)
    assert (seen[1] == wanted).all()


def test_the_cosine_of_nothing_is_0_and_has_no_gradient():
    value, gradient = jax.value_and_grad(lambda a: motion_guides.cosine(a, jnp.ones(3)))(jnp.zeros(3))
    assert value == 0
    assert jnp.isfinite(gradient).all()
