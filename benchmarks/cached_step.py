"""A step that reads a cached reference, in PyTorch (omnitransfer_torch) and here, with the same weights on one pinned core.

    python -m benchmarks.cached_step

The two alternate within one run, so that only their ratio is meaningful. Results: docs/benchmarks.md.
"""

import os

CORE = max(os.sched_getaffinity(0))
if __name__ == "__main__":
    os.sched_setaffinity(0, {CORE})  # before any library counts the cores

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from flax import nnx

from configs.base import DiTConfig
from launch import command
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import make_reference
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights import lora, wan_dit
from omnitransfer_torch.references import install

FLAGS = flags.FlagValues()
ROUNDS = flags.DEFINE_integer("rounds", 5, "timed runs of each side, after one that is not counted", lower_bound=1, flag_values=FLAGS)

CONFIG = DiTConfig(dim=512, ffn_dim=1408, num_layers=2, num_heads=4, text_dim=512, image_dim=512, dtype="float32", remat="none")
GRID = (9, 16, 32)  # latent frames, rows, columns of target and reference: 1,152 tokens each


def main() -> None:
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    target, latents, text, image = draw(1, *GRID, 36), draw(1, *GRID, 16), draw(1, 512, 512), draw(1, 257, 512)
    model = WanDiT(CONFIG, rngs=nnx.Rngs(0))
    ours, theirs = here(model, target, latents, text, image), in_pytorch(model, target, latents, text, image)
    outputs, times = (ours(), theirs()), ([], [])
    for _ in range(ROUNDS.value):
        for side, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    difference = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    tokens = int(np.prod(GRID)) // 4
    print(f"core {CORE}, jax {jax.__version__}, torch {torch.__version__}, {ROUNDS.value} rounds, {tokens:,} + as many cached tokens")
    print(f"ours {statistics.median(times[0]):.3f} s   PyTorch {statistics.median(times[1]):.3f} s   PyTorch / ours {ratio:.2f}")
    print(f"relative difference of the velocities {difference:.1e}")


def here(model: WanDiT, target: np.ndarray, latents: np.ndarray, text: np.ndarray, image: np.ndarray) -> Callable[[], np.ndarray]:
    """Our step: the cache is made before."""
    graphdef, params = nnx.split(model)
    x, patches = jnp.asarray(target), model.grid(jnp.asarray(target))
    reference = make_reference(jnp.asarray(latents), jnp.array([2]), patches)
    cache = jax.jit(lambda p: nnx.merge(graphdef, p).make_kv_cache((reference,), patches))(params)
    conditions = jnp.array([500.0]), jnp.asarray(text), jnp.asarray(image)
    step = jax.jit(lambda p: nnx.merge(graphdef, p)(x, *conditions, kv_cache=cache))
    return lambda: np.asarray(step(params))


def in_pytorch(model: WanDiT, target: np.ndarray, latents: np.ndarray, text: np.ndarray, image: np.ndarray) -> Callable[[], np.ndarray]:
    """PyTorch's, of the same weights."""
    settings = {name: value for name, value in wan_dit.config_json(CONFIG).items() if not name.startswith("_")}
    transformer, leaves = WanTransformer3DModel(**settings).eval(), {path: np.asarray(x) for path, x in flat_params(model).items()}
    table = wan_dit.entries(CONFIG, "diffusers")
    transformer.load_state_dict({e.theirs: torch.tensor(np.ascontiguousarray(e.layout.to_theirs(lora.leaf_of(e, leaves)))) for e in table})
    streams = install(transformer, CONFIG.rope_base, CONFIG.rope_top)
    x, clean = (torch.from_numpy(each).permute(0, 4, 1, 2, 3) for each in (target, latents))
    flag = torch.full_like(clean[:, :4], -1.0)
    context, features, time_ = torch.from_numpy(text), torch.from_numpy(image), torch.full((1,), 500.0)
    with torch.no_grad(), streams.recording((0, 0, GRID[2] // 2)) as cache:
        transformer(torch.cat([clean, flag, clean], 1), torch.zeros(1), context[:, :1], return_dict=False)

    @torch.no_grad()
    def step() -> np.ndarray:
        with streams.reading([cache], features.shape[1]):
            return transformer(x, time_, context, features, return_dict=False)[0].permute(0, 2, 3, 4, 1).numpy()

    return step


if __name__ == "__main__":
    command.run(main, FLAGS)
