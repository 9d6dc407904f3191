"""From noise to latents: a grid of times, a solver, and one loop around the network, a `lax.scan` or a loop on the host.

All solvers are linear in what they combine, so a solver is a table of coefficients, computed in float64 before the loop:

    x_0 estimate  m_i = x_i - t_i velocity(x_i, t_i)
    correct       y_i = c0 x_i + c1 y_{i-1} + c2 m_{i-1} + c3 m_{i-2} + c4 m_i
    predict       x_{i+1} = p0 y_i + p1 m_i + p2 m_{i-1}

Wan2.2's two experts share these steps: each runs some of them (`experts`), and the next goes on from its `State`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from configs.errors import require
from configs.run import SamplerConfig
from omnitransfer_jax.flow import TIMESTEPS, time_grid

Velocity = Callable[..., Array]
"""velocity(latents "B F H W C", timestep "B" in 0..1000) -> "B F H W C"; with a carry it is the third argument."""

Steer = Callable[..., Any]
"""steer(step, time, latents "B F H W C") -> the latents from which this step starts instead.

`step` is 0, 1, ...; `time` is the step's entry of `flow.time_grid`, from nearly 1 down. Both are scalar arrays. With a carry:
steer(step, time, latents, carry) -> (latents, the carry that this step's velocity and the next step's `steer` get).
"""


class State(NamedTuple):
    """What a solver carries from one step to the next, and so from one expert to the next."""

    latents: Float[Array, "B F H W C"]
    corrected: Float[Array, "B F H W C"]
    """y of the step before."""
    clean: Float[Array, "B F H W C"]
    """The x_0 estimate of the step before."""
    clean_before: Float[Array, "B F H W C"]
    """That of the step before it."""
    carried: tuple[Any, ...] = ()
    """What `steer` hands on (`sample`)."""


class Expert(NamedTuple):
    """Which network makes which steps."""

    part: Literal["dit", "dit_low_noise"]
    """Its name in a model folder; `dit` is the high-noise expert, or the only network."""
    steps: range
    guidance: float


def experts(config: SamplerConfig) -> tuple[Expert, ...]:
    """The networks of all steps, in their order; one that would make no step is left out.

    As in Wan2.2, the high-noise expert makes the steps whose timestep is at least 1000 `config.boundary`.
    """
    _, timesteps = SOLVERS[config.solver](time_grid(config.steps, config.shift))
    first = int((timesteps >= config.boundary * TIMESTEPS).sum())
    low = config.guidance if config.low_noise_guidance is None else config.low_noise_guidance
    found = Expert("dit", range(first), config.guidance), Expert("dit_low_noise", range(first, config.steps), low)
    return tuple(expert for expert in found if expert.steps)


def start(noise: Float[Array, "B F H W C"], *carried: Any) -> State:
    """The state before the first step; `carried` is nothing, or what `sample` calls the carry."""
    latents = noise.astype(jnp.float32)
    zeros = jnp.zeros_like(latents)
    return State(latents, zeros, zeros, zeros, carried)


def sample(
    velocity: Velocity,
    noise: Float[Array, "B F H W C"],
    config: SamplerConfig,
    on_step: Callable[[int], None] | None = None,
    *,
    low_noise: Velocity | None = None,
    steer: Steer | None = None,
    trajectory: bool = False,
    host_loop: bool = False,
    carry: Any = None,
) -> Any:
    """Latents at t = 0 from `noise` at t = 1, of `velocity` and, with two experts, of `low_noise` below `config.boundary`.

    `on_step(i)` is called on the host as each step ends, and `steer` before the network in each step. With `trajectory`, returns
    S = steps + 1 latents: those that the network read in each step, then the result. With `host_loop` the steps are a Python loop, so
    `steer` need not be traceable; call it outside jit. With a `carry`, any tree of arrays, `steer` and the velocities get it too, and the
    result is (latents, the last carry).
    """
    require((low_noise is not None) == (config.boundary > 0), f"sampler.boundary={config.boundary}: above 0 with two experts, else 0")
    state, reads = start(noise, *(() if carry is None else (carry,))), []
    for part, steps, _ in experts(config):
        each = low_noise if part == "dit_low_noise" and low_noise is not None else velocity
        state, read = advance(each, state, steps, config, on_step, steer=steer, trajectory=trajectory, host_loop=host_loop)
        reads += [] if read is None else [read]
    latents = jnp.concatenate([*reads, state.latents[None]]) if trajectory else state.latents
    return (latents, *state.carried) if state.carried else latents


def advance(
    velocity: Velocity,
    state: State,
    steps: range,
    config: SamplerConfig,
    on_step: Callable[[int], None] | None = None,
    *,
    steer: Steer | None = None,
    trajectory: bool = False,
    host_loop: bool = False,
) -> tuple[State, Float[Array, "s B F H W C"] | None]:
    """The state after `steps` from that before them, and with `trajectory` the latents that the network read; the rest as in `sample`."""
    times = time_grid(config.steps, config.shift)
    table, timesteps = SOLVERS[config.solver](times)
    rows = tuple(row[steps.start : steps.stop] for row in (np.arange(config.steps), times[:-1], timesteps, table))

    def step(state, row):
        x, y, m1, m2, carried = state
        i, t, timestep, (c0, c1, c2, c3, c4, p0, p1, p2) = row
        if steer is not None:
            steered, *carried = steer(i, t, x, *carried) if carried else (steer(i, t, x),)
            # The history moves by the same amount: UniPC computes y from it and not from x, so it would undo most of the change.
            y, m1, m2 = (past + (steered - x) for past in (y, m1, m2))
            x = steered
        m = x - t * velocity(x, jnp.full(x.shape[:1], timestep), *carried)
        y = c0 * x + c1 * y + c2 * m1 + c3 * m2 + c4 * m
        new = p0 * y + p1 * m + p2 * m1
        if on_step is not None:
            # It is given the new latents, so that it is called when the step is done.
            jax.debug.callback(lambda i, _, report=on_step: report(int(i)), i, new.ravel()[0])
        return State(new, y, m, m1, tuple(carried)), x if trajectory else None

    rows = jax.tree.map(lambda r: jnp.asarray(r, jnp.float32 if r.dtype.kind == "f" else jnp.int32), rows)
    if host_loop:
        velocity = _compiled(velocity, state.latents, *state.carried)
    return (_host_scan if host_loop else jax.lax.scan)(step, state, rows)


def _host_scan(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, rows: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a Python loop."""
    outputs = []
    for i in range(len(rows[0])):
        state, output = step(state, jax.tree.map(lambda r, i=i: r[i], rows))
        outputs.append(output)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _compiled(velocity: Velocity, x: Float[Array, "B F H W C"], *carried: Any) -> Velocity:
    """`velocity` compiled once, with the arrays it closes over (a network's parameters) as arguments; jit would copy them as constants."""
    traced = jax.make_jaxpr(velocity)(x, jnp.zeros(x.shape[:1]), *carried)
    run = jax.jit(lambda consts, *args: jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, consts))(*jax.tree.leaves(args))[0])
    return partial(run, traced.consts)


def euler_table(times: Float[np.ndarray, " S"]) -> tuple[Float[np.ndarray, "s 8"], Float[np.ndarray, " s"]]:
    """Euler: x + (t' - t) velocity, written with the x_0 estimate; exact timesteps."""
    ratio = times[1:] / times[:-1]
    one, zero = np.ones_like(ratio), np.zeros_like(ratio)
    return np.stack([one, zero, zero, zero, zero, ratio, 1 - ratio, zero], -1), times[:-1] * TIMESTEPS


def unipc_table(times: Float[np.ndarray, " S"], corrects: bool = True) -> tuple[Float[np.ndarray, "s 8"], Float[np.ndarray, " s"]]:
    """UniPC of order 2, variant bh2 (arXiv 2302.04867), first order in the first and the last step; integer timesteps, as Wan2.1.

    Its predictor alone is DPM-Solver++ of order 2 (arXiv 2211.01095, 2M midpoint).
    """
    steps = len(times) - 1
    order = [min(2, i + 1, steps - i) for i in range(steps)]
    rows = []
    for i in range(steps):
        correct = [1, 0, 0, 0, 0]
        if i > 0 and corrects:
            base, m1, m2, m0 = _bh2(times, i - 1, order[i - 1], corrector=True)
            correct = [0, base, m1, m2, m0]
        predict = _bh2(times, i, order[i], corrector=False)[:3]
        rows.append([*correct, *predict])
    return np.asarray(rows), np.trunc(times[:-1] * TIMESTEPS)


def _bh2(times: np.ndarray, i: int, order: int, corrector: bool) -> tuple[float, float, float, float]:
    """One update from times[i] to times[i+1]: the weights of y_i, m_i, m_{i-1} and, for the corrector, m_{i+1}."""
    with np.errstate(divide="ignore"):  # the last time is 0, where log(alpha / t) is infinite
        half_log_snr = np.log1p(-times) - np.log(times)
    h = half_log_snr[i + 1] - half_log_snr[i]
    bh = np.expm1(-h)  # B(h) of variant bh2
    previous = following = 0.0  # weights of the differences (m_{i-1} - m_i) / r and m_{i+1} - m_i
    r = (half_log_snr[i - 1] - half_log_snr[i]) / h if order == 2 else 1.0
    if corrector and order == 2:
        first = -bh / h - 1
        previous, following = np.linalg.solve([[1, 1], [r, 1]], [first / bh, (-2 * first / h - 1) / bh])
    elif corrector:
        following = 0.5
    elif order == 2:
        previous = 0.5
    previous, scale = previous / r, -(1 - times[i + 1]) * bh
    return times[i + 1] / times[i], scale * (1 - previous - following), scale * previous, scale * following


SOLVERS = {"euler": euler_table, "unipc": unipc_table, "dpm++": partial(unipc_table, corrects=False)}
