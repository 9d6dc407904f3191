"""Flow matching: the line from data to noise, x_t = (1 - t) x_0 + t noise, its velocity noise - x_0, and the times to visit on it.

t is 0 at the data and 1 at noise; the network is told 1000 t.
"""

from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Times = TypeVar("Times", np.ndarray, jax.Array)

TIMESTEPS = 1000  # what t = 1 is called in front of the network (Wan2.1 num_train_timesteps)


def shift_time(t: Times, shift: float) -> Times:
    """Bends times towards noise: larger videos keep their structure up to more noise."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """The `steps` times at which the network is asked and the final 0 (Wan2.1 fm_solvers_unipc.py: from 0.999, not 1)."""
    return shift_time(np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1), shift)


def draw_time(key: jax.Array, batch: int, shift: float) -> Float[Array, " B"]:
    """Times of a training batch: uniform, then bent as in sampling."""
    return shift_time(jax.random.uniform(key, (batch,)), shift)


def interpolate(x0: Float[Array, "B F H W C"], noise: Float[Array, "B F H W C"], t: Float[Array, " B"]) -> Float[Array, "B F H W C"]:
    """The point on each sample's line at its time."""
    t = t[:, None, None, None, None]
    return (1 - t) * x0 + t * noise


def loss_per_example(
    velocity: Float[Array, "B F H W C"], x0: Float[Array, "B F H W C"], noise: Float[Array, "B F H W C"]
) -> Float[Array, " B"]:
    """Mean squared error of the velocity in float32, one number a sample."""
    error = velocity.astype(jnp.float32) - (noise - x0).astype(jnp.float32)
    return jnp.square(error).mean(axis=(1, 2, 3, 4))


def loss_weight(t: Float[Array, " B"], kind: Literal["velocity", "clean"]) -> Float[Array, " B"]:
    """What a sample's squared velocity error counts for: 1, or by `clean` min(1, 2t)^2, little where hardly any noise is left to remove."""
    # As x_0 = x_t - t v, the clean estimate is off by t times the velocity's error. `clean` is its squared error over max(t, 0.5)^2:
    # the velocity's own in the noisier half, and fading with t^2 in the other, where a small network would spend itself on details.
    return jnp.ones_like(t) if kind == "velocity" else jnp.minimum(1.0, 2 * t) ** 2
