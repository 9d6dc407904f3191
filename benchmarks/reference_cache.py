"""What one denoising step costs when the target reads a reference as large as itself, on one pinned core and in FLOPs.

    python -m benchmarks.reference_cache

    joint     every token attends to every token, as if the reference were more target
    split     the reference attends to itself, the target to both; the reference is computed at every step
    cached    the target attends to both; the reference's keys and values are computed once, before the first step
    projected cached, but what is kept is the activations, half the size; keys and values are projected from them at every step
    frames    cached, and a token of the target reads the frame of the reference at its own time alone

The five alternate within one run, so that only their ratios are meaningful. The last table is a whole sampling of 40 steps with guidance,
the reference's own pass included. Results: docs/benchmarks.md.
"""

import os

CORE = max(os.sched_getaffinity(0))
if __name__ == "__main__":
    os.sched_setaffinity(0, {CORE})  # before any library counts the cores

import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from configs.base import DiTConfig
from configs.wan import I2V_14B
from launch import command
from omnitransfer_jax.models.omnitransfer import make_reference
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import flops

FLAGS = flags.FlagValues()
ROUNDS = flags.DEFINE_integer("rounds", 5, "timed runs of each form, after one that is not counted", lower_bound=1, flag_values=FLAGS)

CONFIG = DiTConfig(dim=512, ffn_dim=1408, num_layers=2, num_heads=4, text_dim=512, image_dim=512, dtype="float32", remat="none")
GRID = (9, 32, 64)  # latent frames, rows, columns of target and reference: 9 x 16 x 32 = 4,608 tokens


PASSES = 80  # 40 steps, and guidance


def operations(config: DiTConfig, tokens: int, frame: int) -> dict[str, int]:
    """Floating-point operations of one pass of each form, target and reference of `tokens` tokens, `frame` a frame."""
    cached = flops.target_pass(config, tokens, tokens)
    return {
        "joint": flops.target_pass(config, 2 * tokens),
        "split": cached + flops.reference_pass(config, tokens),
        "cached": cached,
        "projected": cached + flops.read_again(config, tokens),
        "frames": flops.target_pass(config, tokens, frame),
    }


def main() -> None:
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    model = WanDiT(CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    frames, rows, columns = GRID
    latents, time_, text, image = draw(1, *GRID, 36), jnp.array([500.0]), draw(1, 512, 512), draw(1, 257, 512)
    patches = model.grid(latents)
    reference = make_reference(draw(1, *GRID, 16), jnp.array([2]), patches)
    kv_cache = jax.jit(lambda p: nnx.merge(graphdef, p).make_kv_cache((reference,), patches))(params)
    kept = jax.jit(lambda p: nnx.merge(graphdef, p).make_kv_cache((reference,), patches, activations=True))(params)
    near, _ = nnx.split(WanDiT(replace(CONFIG, reach="same_frame"), rngs=nnx.Rngs(0)))
    both = jnp.concatenate([latents, reference.latents], axis=1)
    conditions = (time_, text, image)
    forms = {
        "joint": jax.jit(lambda p: nnx.merge(graphdef, p)(both, *conditions)),
        "split": jax.jit(lambda p: nnx.merge(graphdef, p)(latents, *conditions, references=(reference,))),
        "cached": jax.jit(lambda p: nnx.merge(graphdef, p)(latents, *conditions, kv_cache=kv_cache)),
        "projected": jax.jit(lambda p: nnx.merge(graphdef, p)(latents, *conditions, kv_cache=kept)),
        "frames": jax.jit(lambda p: nnx.merge(near, p)(latents, *conditions, kv_cache=kv_cache)),
    }
    outputs = {name: form(params).block_until_ready() for name, form in forms.items()}
    times = {name: [] for name in forms}
    for _ in range(ROUNDS.value):
        for name, form in forms.items():
            start = time.perf_counter()
            form(params).block_until_ready()
            times[name].append(time.perf_counter() - start)

    tokens = frames * rows * columns // 4
    here, full = (operations(c, n, frame) for c, n, frame in ((CONFIG, tokens, rows * columns // 4), (I2V_14B, 21 * 30 * 52, 30 * 52)))
    print(f"core {CORE}, jax {jax.__version__}, {ROUNDS.value} rounds, {tokens:,} + as many tokens")
    print(f"{'form':10}{'seconds':>9}{'time':>8}{'FLOPs':>8}{'FLOPs of 14B, 480p x 81 frames':>34}   (ratios to joint)")
    for name in forms:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["joint"], strict=True))
        a, b = here[name] / here["joint"], full[name] / full["joint"]
        print(f"{name:10}{statistics.median(times[name]):9.3f}{ratio:8.2f}{a:8.2f}{b:34.2f}")
    error = jnp.linalg.norm(outputs["cached"] - outputs["split"]) / jnp.linalg.norm(outputs["split"])
    print(f"cached against split, relative L2: {error:.1e}")
    print(f"{'form':10}{'PFLOP of 40 guided steps at 14B':>34}{'joint over it':>16}")
    for name in forms:
        once = flops.reference_pass(I2V_14B, 21 * 30 * 52) if name in ("cached", "projected", "frames") else 0
        whole = PASSES * full[name] + once
        print(f"{name:10}{whole / 1e15:34.1f}{PASSES * full['joint'] / whole:16.2f}")


if __name__ == "__main__":
    command.run(main, FLAGS)
