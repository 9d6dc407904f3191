"""UniPC, DPM-Solver++ and Euler against diffusers' schedulers on the original's grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from configs.run import SamplerConfig
from omnitransfer_jax.flow import time_grid
from omnitransfer_jax.samplers import sample
from tests.compare import relative_l2


def velocity(x, timestep):
    """Something smooth that depends on all it is given; the same expression serves both libraries."""
    scale = timestep.reshape(-1, 1, 1, 1, 1) / 1000
    return (x * 1.7 + 0.3 * scale) / (1 + x * x) ** 0.5 - 0.4 * x * scale


def run_theirs(scheduler, noise):
    x = torch.tensor(noise)
    for t in scheduler.timesteps:
        v = velocity(x, t.expand(x.shape[0]).to(torch.float32))
        x = scheduler.step(v, t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize(("steps", "shift"), [(40, 3.0), (40, 5.0), (8, 8.0), (2, 3.0), (1, 3.0)])
def test_unipc(steps, shift):
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16), np.float32)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    seen = []
    ours = sample(velocity, jnp.asarray(noise), SamplerConfig(solver="unipc", steps=steps, shift=shift), seen.append)
    assert relative_l2(ours, run_theirs(theirs, noise)) <= 1e-5
    jax.effects_barrier()
    assert seen == list(range(steps))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers gives NumPy a tensor
@pytest.mark.parametrize("steps", [40, 10, 2, 1])
def test_dpm(steps):
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16), np.float32)
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(steps)
    ours = sample(velocity, jnp.asarray(noise), SamplerConfig(solver="dpm++", steps=steps, shift=5.0))
    assert relative_l2(ours, run_theirs(theirs, noise)) <= 1e-5


def test_euler():
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16), np.float32)
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(sigmas=time_grid(40, 3.0)[:-1])  # already shifted; its own set_timesteps(N) would shift twice
    ours = sample(velocity, jnp.asarray(noise), SamplerConfig(solver="euler", steps=40, shift=3.0))
    assert relative_l2(ours, run_theirs(theirs, noise)) <= 1e-5
