"""From noise to latents: a grid of times, a solver, and one `lax.scan` around the network.

Both solvers are linear in what they combine, so a solver is a table of coefficients, worked out in float64 before anything runs:

    x_0 estimate  m_i = x_i - t_i velocity(x_i, t_i)
    correct       y_i = c0 x_i + c1 y_{i-1} + c2 m_{i-1} + c3 m_{i-2} + c4 m_i
    predict       x_{i+1} = p0 y_i + p1 m_i + p2 m_{i-1}
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.run import SamplerConfig
from omnitransfer_jax.flow import TIMESTEPS, time_grid

Velocity = Callable[[Array, Array], Array]
"""velocity(latents "B F H W C", timestep "B" in 0..1000) -> "B F H W C"."""


def sample(
    velocity: Velocity, noise: Float[Array, "B F H W C"], config: SamplerConfig, on_step: Callable[[int], None] | None = None
) -> Float[Array, "B F H W C"]:
    """Latents at t = 0 from `noise` at t = 1; `on_step(i)` is called on the host as each step ends."""
    times = time_grid(config.steps, config.shift)
    table, timesteps = SOLVERS[config.solver](times)
    rows = (np.arange(config.steps), times[:-1], timesteps, table)

    def step(state, row):
        x, y, m1, m2 = state
        i, t, timestep, (c0, c1, c2, c3, c4, p0, p1, p2) = row
        m = x - t * velocity(x, jnp.full(x.shape[:1], timestep))
        y = c0 * x + c1 * y + c2 * m1 + c3 * m2 + c4 * m
        x = p0 * y + p1 * m + p2 * m1
        if on_step is not None:
            # It is given x, so that it is called when the step is done.
            jax.debug.callback(lambda i, _, report=on_step: report(int(i)), i, x.ravel()[0])
        return (x, y, m, m1), None

    start = noise.astype(jnp.float32)
    zeros = jnp.zeros_like(start)
    rows = jax.tree.map(lambda r: jnp.asarray(r, jnp.float32 if r.dtype.kind == "f" else jnp.int32), rows)
    (x, *_), _ = jax.lax.scan(step, (start, zeros, zeros, zeros), rows)
    return x


def euler_table(times: Float[np.ndarray, " S"]) -> tuple[Float[np.ndarray, "s 8"], Float[np.ndarray, " s"]]:
    """Euler: x + (t' - t) velocity, written with the x_0 estimate; exact timesteps."""
    ratio = times[1:] / times[:-1]
    one, zero = np.ones_like(ratio), np.zeros_like(ratio)
    return np.stack([one, zero, zero, zero, zero, ratio, 1 - ratio, zero], -1), times[:-1] * TIMESTEPS


def unipc_table(times: Float[np.ndarray, " S"]) -> tuple[Float[np.ndarray, "s 8"], Float[np.ndarray, " s"]]:
    """UniPC of order 2, variant bh2 (arXiv 2302.04867), first order in the first and the last step; integer timesteps, as Wan2.1."""
    steps = len(times) - 1
    order = [min(2, i + 1, steps - i) for i in range(steps)]
    rows = []
    for i in range(steps):
        correct = [1, 0, 0, 0, 0]
        if i > 0:
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


SOLVERS = {"euler": euler_table, "unipc": unipc_table}
