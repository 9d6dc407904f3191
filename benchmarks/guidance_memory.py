"""Memory of guided sampling (DiTFlow and its baselines) at full size, from a compilation without arrays.

    python -m benchmarks.guidance_memory
    python -m benchmarks.guidance_memory --config=ditflow:i2v_14b --frames=81

The program is the one that launch.sample runs after the encoders: all steps, plain and guided. `arguments` are the weights, of two bytes
a number, and what the encoders made. `temporary` is everything else at the peak, as XLA plans it for this machine's backend, computing in
float32: an upper bound, because XLA for CPUs would keep float32 copies of bf16 weights. Results: docs/methods.md.
"""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from configs.ditflow import DiTFlow
from launch import command
from omnitransfer_jax import samplers
from omnitransfer_jax.methods import ditflow
from omnitransfer_jax.methods.ditflow import Source
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import Conditions, denoise
from omnitransfer_jax.models.wan_dit import WanDiT

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string("config", "ditflow:i2v_14b", "a configuration of DiTFlow", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("frames", 21, "frames of the video, 4n+1", lower_bound=1, flag_values=FLAGS)
ROWS = {  # changes of the guidance
    "latents, keys injected": {},
    "positions, keys injected": {"variable": "positions"},
    "SMM": {"guide": "smm", "kv_injection": False},
    "MOFT": {"guide": "moft", "kv_injection": False},
}


def arrays(config: DiTFlow) -> tuple:
    """Shapes of the network's weights, of the conditions, the noise and the reference of one video."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), jnp.float32)

    dit = abstract(lambda rngs: WanDiT(config.dit, rngs=rngs))
    weights = {path: jax.ShapeDtypeStruct(leaf.shape, config.dit.dtype) for path, leaf in flat_params(dit).items()}
    size, text = config.video.latent_shape(config.vae), shape(config.dit.text_len, config.dit.text_dim)
    image = None if config.dit.image_dim is None else shape(257, config.dit.image_dim)
    condition = None if image is None else shape(*size[:3], config.dit.in_channels - size[3])
    conditions = Conditions(text, text, image, condition)
    return with_params(dit, weights), conditions, shape(*size), Source(shape(*size), text, image, condition)


def main(config: DiTFlow) -> None:
    config = replace(config, video=replace(config.video, frames=FRAMES.value), dit=replace(config.dit, dtype="float32"))
    config.validate()
    given = arrays(config)
    numbers = sum(leaf.size for leaf in flat_params(given[0]).values())
    expert = samplers.experts(config.sampler)[0]

    def not_guided(dit, conditions, noise, source):
        return denoise(dit, conditions, samplers.start(noise), config.sampler, expert).latents

    programs: dict[str, Any] = {"not guided": not_guided}
    for name, changes in ROWS.items():
        changed = replace(config, ditflow=replace(config.ditflow, **changes))
        programs[name] = lambda *args, changed=changed: ditflow.sample(*args, None, changed)
    video = config.video
    print(f"{CONFIG.value}, {video.frames} frames of {video.height} x {video.width}, {jax.default_backend()}; GB = 10^9 bytes")
    print(f"{'':26}{'arguments':>11}{'temporary':>11}{'sum':>8}{'compiled in s':>15}")
    for name, program in programs.items():
        start = time.perf_counter()
        memory = jax.jit(program).lower(*given).compile().memory_analysis()
        sizes = (memory.argument_size_in_bytes - 2 * numbers) / 1e9, memory.temp_size_in_bytes / 1e9
        print(f"{name:26}{sizes[0]:11.1f}{sizes[1]:11.1f}{sum(sizes):8.1f}{time.perf_counter() - start:15.0f}", flush=True)


if __name__ == "__main__":
    command.run(main, FLAGS)
