"""The video autoencoder against diffusers' AutoencoderKLWan: it takes 4 frames, or 1 latent, at a time after the first."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from configs.base import VAEConfig
from data_pipelines.clips import read_clip, to_unit
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.weights.wan_vae import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import gradients, port, randomise, to_ours

WAN = VAEConfig(base_dim=8)
TWO_STEPS = VAEConfig(
    base_dim=8, z_dim=4, dim_mult=(1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False), encode_frames=6, decode_frames=3,
    latents_mean=(0.1, -0.4, 0.3, 0.7), latents_std=(1.2, 0.6, 2.5, 1.6),
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}  # nearly all the time of these tests is the compiler's


@cache
def oracle(config: VAEConfig) -> torch.nn.Module:
    return randomise(AutoencoderKLWan.from_config(config_json(config)))


def ours(config: VAEConfig) -> WanVAE:
    return port(lambda rngs: WanVAE(config, rngs=rngs), oracle(config), entries(config, "diffusers"))


def example(config: VAEConfig, batch: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A video and normalised latents of a video of the same size."""
    draw, stride = np.random.default_rng(1), config.space_stride
    latents = (batch, (frames - 1) // config.time_stride + 1, height // stride, width // stride, config.z_dim)
    video = draw.uniform(-1, 1, (batch, frames, height, width, 3)).astype(np.float32)
    return video, draw.standard_normal(latents, np.float32)


def encode_and_decode(config: VAEConfig, video: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's normalised latents and its video, in our layout."""
    theirs = oracle(config)
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    mode = theirs.encode(video.permute(0, 4, 1, 2, 3)).latent_dist.mode().permute(0, 2, 3, 4, 1)
    decoded = theirs.decode((latents * std + mean).permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1)
    return (mode - mean) / std, decoded


@pytest.mark.parametrize(
    ("config", "batch", "frames", "height", "width"),
    [(WAN, 2, 1, 40, 24), (WAN, 1, 5, 24, 40), (WAN, 1, 9, 32, 32), (WAN, 1, 17, 32, 48), (TWO_STEPS, 2, 17, 12, 20)],
    ids=["1_frame", "5_frames", "9_frames", "17_frames", "two_steps"],
)
def test_forward(config, batch, frames, height, width):
    video, latents = example(config, batch, frames, height, width)
    with torch.no_grad():
        mode, decoded = encode_and_decode(config, torch.tensor(video), torch.tensor(latents))
    assert 0.5 < (decoded.abs() < 1).float().mean() < 1, "most pixels free of the clamp, and some under it"
    model = ours(config)
    for method, x, wanted in ((WanVAE.encode, video, mode), (WanVAE.decode, latents, decoded)):
        assert relative_l2(jax.jit(method, compiler_options=QUICK)(model, jnp.asarray(x)), wanted) <= 1e-5


def test_a_real_clip(shared):
    """Pixels of a real clip, and the latents that come of them; `test_forward` is the twin."""
    pixels = read_clip(shared / "clips" / "omnitransfer" / "Style__ref1.mp4", frames=9, fps=16, height=40, width=64)
    video = to_unit(pixels)[None]
    latents = np.asarray(jax.jit(WanVAE.encode, compiler_options=QUICK)(ours(WAN), jnp.asarray(video)))
    with torch.no_grad():
        mode, decoded = encode_and_decode(WAN, torch.tensor(video), torch.tensor(latents))
    assert relative_l2(latents, mode) <= 1e-5
    assert relative_l2(jax.jit(WanVAE.decode, compiler_options=QUICK)(ours(WAN), jnp.asarray(latents)), decoded) <= 1e-5


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-11, 1e-14, 0.0])
def test_norm_of_faint_pixels(size):
    """The bound under the norm is no added epsilon: down to 1e-12 the size of a pixel does not matter."""
    theirs, norm = oracle(WAN).decoder.norm_out, ours(WAN).decoder.norm_out
    x = np.random.default_rng(1).standard_normal((1, 2, 3, 3, 8), np.float32) * np.float32(size)
    with torch.no_grad():
        wanted = theirs(torch.tensor(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, rtol=1e-5, atol=0)


def test_gradients():
    config = replace(WAN, num_res_blocks=1)
    inputs = example(config, 1, 13, 16, 24)
    probes = inputs[::-1]
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = encode_and_decode(config, *leaves)
    sum((out * torch.tensor(probe)).sum() for out, probe in zip(outputs, probes, strict=True)).backward()

    def loss(model, video, latents):
        return (model.encode(video) * probes[0]).sum() + (model.decode(latents) * probes[1]).sum()

    slope = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK)
    grads, *input_grads = slope(ours(config), *map(jnp.asarray, inputs))
    grads = flat_params(grads)
    for path, wanted in to_ours(gradients(oracle(config)), entries(config, "diffusers")).items():
        assert relative_l2(grads[path], wanted) <= 1e-4, path
    for ours_grad, leaf in zip(input_grads, leaves, strict=True):
        assert relative_l2(ours_grad, leaf.grad) <= 1e-4
