"""Flow matching: the line from data to noise, x_t = (1 - t) x_0 + t noise, its velocity noise - x_0, and times on it.

t is 0 at the data and 1 at the noise; the network's timestep is 1000 t.
"""

from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Times = TypeVar("Times", np.ndarray, jax.Array)

TIMESTEPS = 1000  # the network's timestep at t = 1 (Wan2.1 num_train_timesteps)


def shift_time(t: Times, shift: float) -> Times:
    """Moves times towards noise, because larger videos keep their structure up to higher noise levels."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """The times of the `steps` calls of the network, then 0; the first is 0.999, not 1, as in Wan2.1 (fm_solvers_unipc.py)."""
    return shift_time(np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1), shift)


def draw_time(key: jax.Array, batch: int, shift: float) -> Float[Array, " B"]:
    """Times of a training batch: uniform, then shifted as in sampling."""
    return shift_time(jax.random.uniform(key, (batch,)), shift)


def interpolate(x0: Float[Array, "B F H W C"], noise: Float[Array, "B F H W C"], t: Float[Array, " B"]) -> Float[Array, "B F H W C"]:
    """x_t of each sample at its time."""
    t = t[:, None, None, None, None]
    return (1 - t) * x0 + t * noise


def loss_per_example(
    velocity: Float[Array, "B F H W C"], x0: Float[Array, "B F H W C"], noise: Float[Array, "B F H W C"]
) -> Float[Array, " B"]:
    """Mean squared error of the velocity in float32, one number for each sample."""
    error = velocity.astype(jnp.float32) - (noise - x0).astype(jnp.float32)
    return jnp.square(error).mean(axis=(1, 2, 3, 4))


def loss_weight(t: Float[Array, " B"], kind: Literal["velocity", "clean", "bell"], shift: float = 1.0) -> Float[Array, " B"]:
    """The weight of each sample's loss at its time: 1 for `velocity`, min(1, 2t)^2 for `clean`.

    `bell` is exp(-2 (t - 0.5)^2) less its value at t = 1, over its mean on 1,000 times that `shift` bends (DiffSynth-Studio flow_match.py).
    """
    match kind:
        case "velocity":
            return jnp.ones_like(t)
        case "clean":
            # As x_0 = x_t - t v, the error of the clean estimate is t times that of the velocity. `clean` is the squared error of the clean
            # estimate over max(t, 0.5)^2: 1 for t above 0.5, and falling with t^2 below, where a small network would learn only details.
            return jnp.minimum(1.0, 2 * t) ** 2
        case _:
            grid = shift_time(np.linspace(1, 0, TIMESTEPS + 1)[:-1], shift)
            mean = float(np.mean(np.exp(-2 * (grid - 0.5) ** 2) - np.exp(-0.5)))
            return (jnp.exp(-2 * (t - 0.5) ** 2) - float(np.exp(-0.5))) / mean
