"""Training of the autoencoder on the procedural world, from random weights to a file that holds it.

    clips -> posterior -> sample -> reconstruction -> squared error + divergence -> update;   at the end: held-out PSNR, statistics

The loop is part_training.py. At the end there are

    WORKDIR/vae.safetensors    float32 parameters by path, as `params.flat_params` names them
    WORKDIR/vae.json           vae (its configuration, the statistics included), held_out_psnr in dB, held_out_clips, steps, seconds
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8
from optax.contrib import MuonDimensionNumbers

from configs.run import VideoConfig
from configs.vae import VAETraining
from data_pipelines.clips import to_bytes, to_unit
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.train.step import Params, TrainState
from world import part_training, scenes


def train(config: VAETraining, workdir: Path) -> None:
    """Trains up to `config.steps` and writes vae.safetensors and vae.json."""
    workdir = workdir.absolute()
    one_step, reconstruct = make_train_step(config), make_reconstruct(config)
    held_out, cropped = list(clips(config, "held_out", config.evaluate_clips)), config.steps * (1 - config.whole_share)

    def train_step(n: int, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        return one_step(state, jnp.asarray(batch), key, n <= cropped)

    def evaluate(params: Params) -> dict[str, float]:
        return {"held_out_psnr": mean_psnr(reconstruct, params, held_out[: len(held_out) // 8])}

    params = part_training.train(config, workdir, init_state(config), batches(config), train_step, evaluate)
    if params is not None:
        finish(config, workdir, params, mean_psnr(reconstruct, params, held_out))


def batches(config: VAETraining) -> grain.DatasetIterator[UInt8[np.ndarray, "B T H W 3"]]:
    """Endless batches of new training clips; the iterator's state is the number of batches it gave."""
    pairs = grain.MapDataset.range(2**40).map(partial(pair, config.video, config.seed, "train"))
    joined = pairs.batch(config.batch_size // 2, batch_fn=np.concatenate)
    return iter(joined.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)))


def clips(config: VAETraining, split: scenes.Split, count: int) -> Iterator[UInt8[np.ndarray, "B T H W 3"]]:
    """The first `count` clips of the world in batches."""
    size = config.batch_size // 2
    for first in range(0, count // 2, size):
        yield np.concatenate([pair(config.video, config.seed, split, i) for i in range(first, first + size)])


def pair(video: VideoConfig, key: int, split: scenes.Split, index: int) -> UInt8[np.ndarray, "2 T H W 3"]:
    """Reference and target of one example."""
    example = scenes.example(key, index, split)
    return np.stack([scenes.render(scene, video) for scene in (example.reference, example.target)])


def init_state(config: VAETraining) -> TrainState:
    """Random weights; everything trains, and nothing is averaged."""

    def draw() -> TrainState:
        rngs = nnx.Rngs(jax.random.key(config.seed, impl="unsafe_rbg"))  # it compiles several times as fast as the default
        params = flat_params(WanVAE(config.vae, rngs=rngs))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, {}, make_optimizer(config).init(params), {}, zero)

    return jax.jit(draw)()


def make_optimizer(config: VAETraining) -> optax.GradientTransformation:
    """Kernels, whose last axis is what they lead to, are matrices."""

    def axes(params: Any) -> Any:
        kernel = {path: MuonDimensionNumbers(tuple(range(x.ndim - 1)), (-1,)) for path, x in params.items() if path.endswith("kernel")}
        return dict.fromkeys(params) | kernel

    return part_training.make_optimizer(config, axes)


def make_train_step(config: VAETraining) -> Callable[[TrainState, Array, Array, bool], tuple[TrainState, dict[str, Array]]]:
    """train_step(state, clips uint8 "B T H W 3", key, crop): a step on whole clips, or on a part of each, `config.crop` high and wide."""
    optimizer, blank = make_optimizer(config), abstract(lambda rngs: WanVAE(config.vae, rngs=rngs))

    def loss_of(params: Params, video: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        vae = with_params(blank, params)
        mean, log_variance = vae.posterior(video)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = jnp.mean((vae.reconstruct(z) - video) ** 2)
        divergence = jnp.mean(kl_divergence(mean, log_variance))
        loss = error + config.kl_weight * divergence
        return loss, {"loss": loss, "squared_error": error, "divergence": divergence}

    def train_step(state: TrainState, clips: Array, key: Array, crop: bool) -> tuple[TrainState, dict[str, Array]]:
        key_place, key_grey, key_noise = jax.random.split(jax.random.fold_in(key, state.step), 3)
        video = clips.astype(jnp.float32) / 127.5 - 1
        if crop:
            size, room = config.crop, jnp.array(video.shape[2:4]) - config.crop
            row, column = jax.random.randint(key_place, (2,), 0, room + 1)
            video = jax.lax.dynamic_slice(video, (0, 0, row, column, 0), (*video.shape[:2], size, size, 3))
        grey = jax.random.bernoulli(key_grey, config.grey_share, (len(video), 1, 1, 1, 1))
        video = video.at[:, 1:].set(jnp.where(grey, 0.0, video[:, 1:]))
        grads, metrics = jax.grad(loss_of, has_aux=True)(state.trainable, video, key_noise)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        params: Any = optax.apply_updates(state.trainable, updates)
        return state._replace(step=state.step + 1, trainable=params, moments=moments), metrics

    return jax.jit(train_step, static_argnums=3, donate_argnums=0)


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
        "steps": config.steps,
    }
    part_training.finish(workdir, "vae", params, result)
    print(f"{workdir / 'vae.safetensors'}: held-out PSNR {held_out_psnr:.2f} dB over {config.evaluate_clips} clips")
