"""Forward and forward+backward of the diffusion transformer, ours against diffusers, on one pinned core.

    python -m benchmarks.dit_step

4 layers, width 512, 8 heads, 2,304 tokens, float32, image branch on, gradients of every parameter; the two alternate within
one run, so that only their ratios are meaningful. Results: docs/benchmarks.md.
"""

import os

CORE = max(os.sched_getaffinity(0))
if __name__ == "__main__":
    os.sched_setaffinity(0, {CORE})  # before any library counts the cores

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from diffusers import WanTransformer3DModel
from flax import nnx

from configs.base import DiTConfig
from launch import command
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights.wan_dit import config_json

FLAGS = flags.FlagValues()
ROUNDS = flags.DEFINE_integer("rounds", 7, "timed runs of each program, after one that is not counted", lower_bound=1, flag_values=FLAGS)

CONFIG = DiTConfig(
    dim=512, ffn_dim=2048, num_layers=4, num_heads=8, text_dim=512, image_dim=512, freq_dim=256, dtype="float32", remat="none"
)
GRID = (9, 32, 32)  # latent frames, rows, columns: 9 x 16 x 16 = 2,304 tokens


def ours(batch):
    """Two compiled programs without arguments: forward, and forward with the gradients of all parameters."""
    graphdef, params = nnx.split(WanDiT(CONFIG, rngs=nnx.Rngs(0)))
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    forward = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(**batch))
    backward = jax.jit(jax.grad(lambda params, batch: jnp.square(nnx.merge(graphdef, params)(**batch)).mean()))
    return lambda: jax.block_until_ready(forward(params, batch)), lambda: jax.block_until_ready(backward(params, batch))


def theirs(batch):
    """The same two programs in PyTorch."""
    torch.set_num_threads(1)
    model = WanTransformer3DModel(**{k: v for k, v in config_json(CONFIG).items() if not k.startswith("_")})
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    batch = {name: torch.tensor(value) for name, value in zip(names, batch.values(), strict=True)}
    batch["hidden_states"] = batch["hidden_states"].permute(0, 4, 1, 2, 3).contiguous()

    def forward():
        with torch.no_grad():
            return model(**batch).sample

    def backward():
        model.zero_grad()
        model(**batch).sample.square().mean().backward()

    return forward, backward


def main() -> None:
    draw = np.random.default_rng(0)
    batch = {
        "latents": draw.standard_normal((1, *GRID, CONFIG.in_channels), np.float32),
        "timestep": np.array([500.0], np.float32),
        "text": draw.standard_normal((1, 512, CONFIG.text_dim), np.float32),
        "image": draw.standard_normal((1, 257, CONFIG.image_dim), np.float32),
    }
    print(f"core {CORE}, jax {jax.__version__}, torch {torch.__version__}, {ROUNDS.value} rounds")
    print(f"{'':18}{'ours s':>9}{'diffusers s':>13}{'ratio':>8}   (ratio: median over rounds)")
    for name, program, oracle in zip(("forward", "forward+backward"), ours(batch), theirs(batch), strict=True):
        program(), oracle()
        times = []
        for _ in range(ROUNDS.value):
            start = time.perf_counter()
            program()
            middle = time.perf_counter()
            oracle()
            times.append((middle - start, time.perf_counter() - middle))
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:18}{a:9.3f}{b:13.3f}{statistics.median(x / y for x, y in times):8.2f}")


if __name__ == "__main__":
    command.run(main, FLAGS)
