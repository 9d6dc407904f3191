"""Flow matching: the line from data to noise, x_t = (1 - t) x_0 + t noise, its velocity noise - x_0, and the times to visit on it.

t is 0 at the data and 1 at noise; the network is told 1000 t.
"""

import numpy as np
from jaxtyping import Float

TIMESTEPS = 1000  # what t = 1 is called in front of the network (Wan2.1 num_train_timesteps)


def shift_time(t: Float[np.ndarray, " S"], shift: float) -> Float[np.ndarray, " S"]:
    """Bends times towards noise: larger videos keep their structure up to more noise."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """The `steps` times at which the network is asked and the final 0 (Wan2.1 fm_solvers_unipc.py: from 0.999, not 1)."""
    return shift_time(np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1), shift)
