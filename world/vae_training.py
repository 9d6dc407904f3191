"""Training of the autoencoder on the procedural world, from random weights to a file that holds it.

    clips -> posterior -> sample -> reconstruction -> squared error + divergence;   at the end: held-out PSNR, statistics of the latents

At the end there are

    WORKDIR/vae.safetensors    float32 parameters by path, as `flat_params` names them
    WORKDIR/vae.json           vae (its configuration, the statistics included), held_out_psnr in dB, held_out_clips, steps, seconds
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from optax.contrib import MuonDimensionNumbers

from configs.run import Config, VideoConfig
from configs.vae import VAETraining
from data_pipelines.clips import to_bytes, to_unit
from omnitransfer_jax.mesh import Shard, data_share
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.wan_vae import SHARDING, WanVAE
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.objective import Metrics, Objective, Params
from world import pixels, results
from world.pairs import Split, draw_pair


@partial(jax.tree_util.register_dataclass, data_fields=["video"], meta_fields=["crop"])
@dataclass(frozen=True)
class Clips:
    """A batch of clips, and how much of each a step uses."""

    video: Any
    """uint8 "B T H W 3"."""
    crop: int | None
    """Height and width of the part that the step uses, which it draws; None for whole clips. Static: each has its program."""


class Drawn(NamedTuple):
    """What a step sees of its clips, and the noise of the posterior's sample."""

    video: Float[Array, "B T H W 3"]
    noise: Float[Array, "B F h w Z"]


def train(config: VAETraining, workdir: Path, mesh: Mesh) -> None:
    """Trains up to `config.train.steps` and writes vae.safetensors and vae.json."""
    reconstruct = make_reconstruct(config)
    held_out = list(clips(config, "held_out", config.evaluate_clips))

    def evaluate(step: int, params: Params) -> dict[str, float]:
        return {"held_out_psnr": mean_psnr(reconstruct, params, held_out[: len(held_out) // 8])}

    params = loop.train(objective(config), config, workdir, mesh, batches(config, *data_share(mesh)), evaluate)
    if params is not None:
        finish(config, workdir.absolute(), params, mean_psnr(reconstruct, params, held_out))


def objective(config: VAETraining) -> Objective:
    """Squared error of the reconstruction, and `kl_weight` times the divergence of the posterior."""
    model = abstract(lambda rngs: WanVAE(config.vae, rngs=rngs))
    size, video = config.train.batch_size, config.video
    return Objective(
        params=flat_params(model),
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=Clips(jax.ShapeDtypeStruct((size, video.frames, video.height, video.width, 3), jnp.uint8), config.crop),
        draw=partial(draw, config),
        loss=partial(loss, config, model),
        # This generator compiles several times as fast as the default.
        init=lambda: flat_params(WanVAE(config.vae, rngs=nnx.Rngs(jax.random.key(config.seed, impl="unsafe_rbg")))),
        root_key=lambda: jax.random.key(config.seed),
        models=Config(vae=config.vae),
        imported={"": "vae"},
        matrices=kernels,
    )


def kernels(params: Any) -> dict[str, MuonDimensionNumbers | None]:
    """Kernels are matrices to Muon; their last axis is the output."""
    found = {path: MuonDimensionNumbers(tuple(range(x.ndim - 1)), (-1,)) for path, x in params.items() if path.endswith("kernel")}
    return dict.fromkeys(params) | found


def draw(config: VAETraining, key: Array, batch: Clips) -> Drawn:
    """The part of each clip, some clips grey after their first frame, and the noise."""
    key_place, key_grey, key_noise = jax.random.split(key, 3)
    size = config.video
    video = batch.video.astype(jnp.float32) / 127.5 - 1
    if batch.crop is not None:
        room = jnp.array(video.shape[2:4]) - batch.crop
        row, column = jax.random.randint(key_place, (2,), 0, room + 1)
        video = jax.lax.dynamic_slice(video, (0, 0, row, column, 0), (*video.shape[:2], batch.crop, batch.crop, 3))
        size = replace(size, height=batch.crop, width=batch.crop)
    grey = jax.random.bernoulli(key_grey, config.grey_share, (len(video), 1, 1, 1, 1))
    video = video.at[:, 1:].set(jnp.where(grey, 0.0, video[:, 1:]))
    return Drawn(video, jax.random.normal(key_noise, (len(video), *size.latent_shape(config.vae))))


def loss(config: VAETraining, model: WanVAE, params: Params, batch: Clips, drawn: Drawn, shard: Shard) -> tuple[Array, Metrics]:
    """The loss of each clip."""
    vae = with_params(model, params)
    mean, log_variance = vae.posterior(drawn.video)
    z = mean + jnp.exp(0.5 * log_variance) * drawn.noise
    axes = (1, 2, 3, 4)
    error = jnp.mean((vae.reconstruct(z) - drawn.video) ** 2, axes)
    divergence = jnp.mean(kl_divergence(mean, log_variance), axes)
    return error + config.kl_weight * divergence, {"squared_error": error, "divergence": divergence}


def batches(config: VAETraining, index: int = 0, count: int = 1) -> grain.DatasetIterator[Clips]:
    """Endless batches of new training clips, part `index` of `count` of each; the iterator's state is the number of batches it gave."""
    cropped = config.train.steps * (1 - config.whole_share)
    pairs = grain.MapDataset.range(2**40).map(partial(pair, config.video, config.seed, "train"))
    joined = pairs.batch(config.train.batch_size // 2 // count, batch_fn=np.concatenate)[index::count]
    numbered = joined.map_with_index(lambda step, video: Clips(video, config.crop if step + 1 <= cropped else None))
    return iter(numbered.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)))


def clips(config: VAETraining, split: Split, count: int) -> Iterator[UInt8[np.ndarray, "B T H W 3"]]:
    """The first `count` clips of the world in batches."""
    size = config.train.batch_size // 2
    for first in range(0, count // 2, size):
        yield np.concatenate([pair(config.video, config.seed, split, i) for i in range(first, first + size)])


def pair(video: VideoConfig, key: int, split: Split, index: int) -> UInt8[np.ndarray, "2 T H W 3"]:
    """Reference and target of one example."""
    example = draw_pair(key, index, split)
    return np.stack([pixels.render(scene, video) for scene in (example.reference, example.target)])


def kl_divergence(mean: Float[Array, "*N"], log_variance: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Of a normal distribution from the standard one, in nats, for each number."""
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)


def make_reconstruct(config: VAETraining) -> Callable[[Params, Any], Array]:
    """reconstruct(params, video): decoded from the mean of the posterior, both "B T H W 3" in [-1, 1]."""
    blank = abstract(lambda rngs: WanVAE(config.vae, rngs=rngs))

    @jax.jit
    def reconstruct(params: Params, video: Array) -> Array:
        vae = with_params(blank, params)
        return vae.decode(vae.encode(video))

    return reconstruct


def mean_psnr(reconstruct: Callable[[Params, Any], Array], params: Params, batches: Iterable[UInt8[np.ndarray, "B T H W 3"]]) -> float:
    """Mean over clips of the peak signal-to-noise ratio of their reconstructions, in dB."""
    pairs = ((batch, to_bytes(np.asarray(reconstruct(params, to_unit(batch))))) for batch in batches)
    return float(np.mean([psnr(a, b) for clips, copies in pairs for a, b in zip(clips, copies, strict=True)]))


def psnr(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio in dB, the peak being 255; infinite where the two are the same."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def statistics(latents: Iterable[Float[np.ndarray, "B F h w Z"]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all latents."""
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in latents]).astype(np.float64)
    return tuple(rows.mean(0).round(4).tolist()), tuple(rows.std(0).round(4).tolist())


def finish(config: VAETraining, workdir: Path, params: Params, held_out_psnr: float) -> None:
    """Takes the statistics of the latents and writes the two files."""
    vae = with_params(abstract(lambda rngs: WanVAE(config.vae, rngs=rngs)), params)
    encode = jax.jit(WanVAE.encode)
    mean, std = statistics(np.asarray(encode(vae, to_unit(x))) for x in clips(config, "train", config.statistics_clips))
    result = {
        "vae": asdict(replace(config.vae, latents_mean=mean, latents_std=std)),
        "held_out_psnr": held_out_psnr,
        "held_out_clips": config.evaluate_clips,
        "steps": config.train.steps,
    }
    results.write(workdir, "vae", params, result)
    print(f"{workdir / 'vae.safetensors'}: held-out PSNR {held_out_psnr:.2f} dB over {config.evaluate_clips} clips")
