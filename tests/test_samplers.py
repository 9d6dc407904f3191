"""Laws of the sampler's loop: scan and host loop agree, what steering may and may not change, and two experts share the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import wan
from configs.errors import RequestError
from configs.run import SamplerConfig
from omnitransfer_jax.flow import time_grid
from omnitransfer_jax.samplers import experts, sample
from tests.compare import relative_l2

NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16)), jnp.float32)
SOLVERS = pytest.mark.parametrize(
    "config", [SamplerConfig(solver="unipc", steps=8), SamplerConfig(solver="euler", steps=8)], ids=["unipc", "euler"]
)


def velocity(x, timestep):
    """A smooth function of everything it is given."""
    scale = timestep.reshape(-1, 1, 1, 1, 1) / 1000
    return (x * 1.7 + 0.3 * scale) / (1 + x * x) ** 0.5 - 0.4 * x * scale


def pull(step, time, latents):
    """A steering that depends on everything it is given."""
    return latents + 0.1 * time * jnp.sin(latents + step.astype(jnp.float32))


@SOLVERS
@pytest.mark.parametrize("steer", [None, pull])
def test_the_scan_equals_the_host_loop(config, steer):
    scanned = sample(velocity, NOISE, config, steer=steer, trajectory=True)
    steps = []
    walked = sample(velocity, NOISE, config, steps.append, steer=steer, trajectory=True, host_loop=True)
    assert relative_l2(walked, scanned) <= 1e-6
    jax.effects_barrier()
    assert steps == list(range(8))


@SOLVERS
def test_steering_to_the_same_latents_changes_no_bit(config):
    plain = sample(velocity, NOISE, config)
    assert (sample(velocity, NOISE, config, steer=lambda step, time, x: x) == plain).all()
    assert relative_l2(sample(velocity, NOISE, config, steer=pull), plain) > 1e-2


@SOLVERS
def test_a_steered_path_stays_where_it_was_put(config):
    """Where the velocity does not depend on the latents, moving them in the middle of the path moves the result by the same amount."""

    def uniform(x, timestep):
        return jnp.broadcast_to(jnp.sin(timestep)[:, None, None, None, None], x.shape)

    moved = sample(uniform, NOISE, config, steer=lambda step, time, x: jnp.where(step == 4, x + 3.0, x))
    np.testing.assert_allclose(moved, sample(uniform, NOISE, config) + 3.0, atol=1e-5)


@SOLVERS
@pytest.mark.parametrize("host_loop", [False, True])
def test_a_trajectory_begins_with_the_noise_and_ends_with_the_result(config, host_loop):
    path = sample(velocity, NOISE, config, trajectory=True, host_loop=host_loop)
    assert path.shape == (9, *NOISE.shape)
    assert (path[0] == NOISE).all()
    assert (path[-1] == sample(velocity, NOISE, config, host_loop=host_loop)).all()
    steered = sample(velocity, NOISE, config, steer=lambda step, time, x: 2 * x, trajectory=True, host_loop=host_loop)
    assert (steered[0] == 2 * NOISE).all()


@SOLVERS
def test_what_steering_is_given(config):
    """Step and time of the grid, and in a host loop numbers that Python can read."""
    seen = []

    def note(step, time, latents):
        seen.append((int(step), float(time), np.asarray(latents)))
        return latents

    path = sample(velocity, NOISE, config, steer=note, trajectory=True, host_loop=True)
    assert [step for step, _, _ in seen] == list(range(8))
    np.testing.assert_allclose([time for _, time, _ in seen], time_grid(8, config.shift)[:-1], rtol=1e-6)
    assert all((latents == before).all() for (_, _, latents), before in zip(seen, path, strict=False))
    scanned = sample(velocity, NOISE, config, steer=lambda step, time, x: x * 0 + time + step.astype(jnp.float32), trajectory=True)
    np.testing.assert_allclose(scanned[:-1, 0, 0, 0, 0, 0], [step + time for step, time, _ in seen], rtol=1e-6)


def test_a_host_loop_traces_the_network_once():
    traces = []
    weights = jnp.full(NOISE.shape[1:], 0.5)

    def network(x, timestep):
        traces.append(None)
        return x * weights[None]

    sample(network, NOISE, SamplerConfig(steps=8), host_loop=True)
    assert len(traces) == 1


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize(("host_loop", "steer"), [(False, None), (True, None), (False, pull)])
def test_two_experts_are_one_network_that_switches(solver, host_loop, steer):
    """The history, the step's number and the steering cross the border, as if one network looked at the timestep."""
    config = SamplerConfig(solver=solver, steps=8, boundary=0.9)
    assert [(part, len(steps)) for part, steps, _ in experts(config)] == [("dit", 2), ("dit_low_noise", 6)]

    def other(x, timestep):
        return 0.5 * velocity(-x, timestep)

    def switching(x, timestep):
        return jnp.where(timestep[:, None, None, None, None] >= 900, velocity(x, timestep), other(x, timestep))

    steps = []
    made = sample(velocity, NOISE, config, steps.append, low_noise=other, steer=steer, trajectory=True, host_loop=host_loop)
    expected = sample(switching, NOISE, SamplerConfig(solver=solver, steps=8), steer=steer, trajectory=True)
    assert relative_l2(made, expected) <= 1e-6
    assert relative_l2(made, sample(velocity, NOISE, SamplerConfig(solver=solver, steps=8), steer=steer, trajectory=True)) > 1e-2
    jax.effects_barrier()
    assert steps == list(range(8))


@pytest.mark.parametrize(("variant", "high", "low"), [("i2v_2_2_14b", (15, 3.5), (25, 3.5)), ("t2v_2_2_14b", (26, 4.0), (14, 3.0))])
def test_the_published_boundaries(variant, high, low):
    """Counted by hand in the timesteps of the original's scheduler: 902 and 892 around 900, 877 and 865 around 875."""
    made = experts(wan.get_config(variant).sampler)
    assert [(len(steps), guidance) for _, steps, guidance in made] == [high, low]
    assert [steps.start for _, steps, _ in made] == [0, high[0]]


@pytest.mark.parametrize(("boundary", "parts"), [(0.0, [4]), (0.899, [2, 2]), (0.8991, [1, 3]), (0.1, [4]), (0.9999, [4])])
def test_a_timestep_at_the_boundary_is_at_high_noise(boundary, parts):
    """The timesteps are 999, 899, 749, 499; an expert without a step is left out."""
    assert [len(steps) for _, steps, _ in experts(SamplerConfig(steps=4, boundary=boundary))] == parts


def test_a_second_expert_needs_a_boundary():
    for config, low in ((SamplerConfig(), velocity), (SamplerConfig(boundary=0.9), None)):
        with pytest.raises(RequestError, match=r"sampler\.boundary=.*: above 0 with two experts, else 0"):
            sample(velocity, NOISE, config, low_noise=low)


@pytest.mark.parametrize("host_loop", [False, True])
def test_a_carry_goes_from_steer_to_the_velocity_and_to_the_next_step(host_loop):
    """The velocity of step i is i + 1, counted by the carry alone; Euler's sum of it is known."""
    config = SamplerConfig(solver="euler", steps=5)

    def count(step, time, latents, carry):
        return latents, carry + 1.0

    def counted(latents, timestep, carry):
        return jnp.broadcast_to(carry, latents.shape)

    latents, last = sample(counted, NOISE, config, steer=count, carry=jnp.zeros(()), host_loop=host_loop)
    assert last == 5
    moved = np.diff(time_grid(5, config.shift)) @ np.arange(1, 6)
    np.testing.assert_allclose(latents - NOISE, np.broadcast_to(moved, NOISE.shape), atol=1e-5)
