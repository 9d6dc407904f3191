"""Laws of the video autoencoder: chunks change no result, the future changes no past, impossible sizes are refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import VAEConfig
from configs.errors import RequestError
from omnitransfer_jax.models.flat_params import abstract, count, flat_params, with_params
from omnitransfer_jax.models.wan_vae import WanVAE

SMALL = VAEConfig(
    base_dim=8, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True),
    latents_mean=(0.1, -0.4, 0.3, 0.7), latents_std=(1.2, 0.6, 2.5, 1.6),
)  # fmt: skip
ONE_STEP_IN_TIME = replace(SMALL, temporal_downsample=(False, True))

QUICK = {"xla_backend_optimization_level": 0}  # nearly all the time of these tests is the compiler's
encode, decode = (jax.jit(method, compiler_options=QUICK) for method in (WanVAE.encode, WanVAE.decode))


def model(config: VAEConfig) -> WanVAE:
    """Random weights, biases and scales included; the same for all chunk sizes."""
    draw, empty = np.random.default_rng(0), abstract(lambda rngs: WanVAE(config, rngs=rngs))

    def value(path: str, shape: tuple[int, ...]) -> jax.Array:
        noise = draw.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return jnp.asarray(noise / np.float32(np.prod(shape[:-1]) ** 0.5))
        return jnp.asarray(np.float32(path.endswith("scale")) + np.float32(0.2) * noise)

    return with_params(empty, {path: value(path, leaf.shape) for path, leaf in flat_params(empty).items()})


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))


def test_parameters_at_full_size():
    assert count(abstract(lambda rngs: WanVAE(VAEConfig(), rngs=rngs))) == 126_892_531


def test_chunked_is_whole():
    whole = replace(SMALL, encode_frames=20, decode_frames=20)
    exact, uneven, even = model(whole), model(replace(whole, encode_frames=8, decode_frames=3)), model(SMALL)
    for run, x in ((encode, normal(1, 21, 16, 24, 3)), (decode, normal(1, 6, 4, 6, 4))):
        for chunked in (uneven, even):
            a, b = run(chunked, x), run(exact, x)
            assert jnp.linalg.norm(a - b) / jnp.linalg.norm(b) <= 1e-5


@pytest.mark.parametrize("config", [SMALL, ONE_STEP_IN_TIME, replace(SMALL, encode_frames=16, decode_frames=4)])
def test_the_future_does_not_change_the_past(config):
    """Bit for bit: a latent does not depend on later frames, nor a frame on later latents."""
    vae, stride = model(config), config.time_stride
    video = normal(1, 17, 16, 24, 3)
    latents = normal(1, 16 // stride + 1, 4, 6, 4)
    for index in (1, 2, 3):
        frame = stride * (index - 1) + 1  # the first one of latent `index`
        a, b = encode(vae, video), encode(vae, video.at[:, frame:].add(1.0))
        assert (a[:, :index] == b[:, :index]).all()
        assert (a[:, index] != b[:, index]).any()
        a, b = decode(vae, latents), decode(vae, latents.at[:, index:].add(1.0))
        assert (a[:, :frame] == b[:, :frame]).all()
        assert (a[:, frame] != b[:, frame]).any()


@pytest.mark.parametrize("config", [SMALL, ONE_STEP_IN_TIME, replace(SMALL, dim_mult=(2,), temporal_downsample=())])
def test_shapes(config):
    vae, steps = model(config), 2
    frames, height, width = steps * config.time_stride + 1, 3 * config.space_stride, 2 * config.space_stride
    latents = jax.eval_shape(WanVAE.encode, vae, normal(2, frames, height, width, 3))
    assert latents.shape == (2, steps + 1, 3, 2, 4)
    assert jax.eval_shape(WanVAE.decode, vae, latents).shape == (2, frames, height, width, 3)


def test_program_does_not_grow_with_the_clip():
    """Longer clips compile to the same convolutions on arrays of the same size."""
    vae = model(SMALL)

    def convolutions(latents: int) -> list[str]:
        video = jnp.zeros((1, 4 * latents - 3, 8, 8, 3))
        programs = (jax.make_jaxpr(WanVAE.encode)(vae, video), jax.make_jaxpr(WanVAE.decode)(vae, jnp.zeros((1, latents, 2, 2, 4))))
        lines = [line for program in programs for line in str(program).splitlines() if "conv_general_dilated[" in line]
        return [line.split("=")[0].split(":")[1].strip() for line in lines]  # f32[5,8,8,16]

    assert len(convolutions(4)) > 50
    assert convolutions(4) == convolutions(16)


def test_latents_are_normalised_and_video_is_clamped():
    plain = replace(SMALL, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    video, latents = normal(1, 1, 8, 8, 3), normal(1, 2, 4, 4, 4)
    mean, std = jnp.asarray(SMALL.latents_mean), jnp.asarray(SMALL.latents_std)
    of_channel = (None,) * 4
    a, b = encode(model(SMALL), video), encode(model(plain), video)
    np.testing.assert_allclose(a * std[of_channel] + mean[of_channel], b, rtol=0, atol=1e-5)
    a, b = decode(model(SMALL), latents), decode(model(plain), latents * std[of_channel] + mean[of_channel])
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert a.min() == -1
    assert a.max() == 1


def test_grey_video_has_ordinary_gradients():
    """A new encoder does not map a grey video to zero, where the gradient of a norm is 1e12 and its powers overflow."""

    config = replace(SMALL, dim_mult=(1,), temporal_downsample=(), encode_frames=1)

    @partial(jax.jit, compiler_options=QUICK)
    def slope(video: jax.Array) -> jax.Array:
        grads = jax.grad(lambda vae: vae.encode(video).sum())(WanVAE(config, rngs=nnx.Rngs(0)))
        return sum(jnp.linalg.norm(leaf) for leaf in flat_params(grads).values())

    assert slope(jnp.zeros((1, 1, 4, 4, 3))) < 100 * slope(normal(1, 1, 4, 4, 3))


def test_bfloat16_convolutions():
    """Half-precision convolutions stay near float32 ones; latents and video are float32 either way."""
    config = replace(SMALL, dim_mult=(1, 2), temporal_downsample=(True,))
    for run, x in ((encode, normal(1, 3, 8, 8, 3)), (decode, normal(1, 2, 4, 4, 4))):
        exact, half = run(model(config), x), run(model(replace(config, dtype="bfloat16")), x)
        assert half.dtype == jnp.float32
        assert 1e-5 < jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact) < 5e-2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 42, 8, 8, 3), "42 frames: the causal autoencoder needs 4n[+]1, the nearest is 41"),
        ((1, 2, 8, 8, 3), "2 frames: .* the nearest is 1"),
        ((1, 5, 18, 8, 3), "height 18: the autoencoder needs a multiple of 4, the nearest is 16"),
        ((1, 5, 8, 2, 3), "width 2: .* the nearest is 4"),
    ],
)
def test_sizes_are_checked(shape, message):
    with pytest.raises(RequestError, match=message):
        model(SMALL).encode(jnp.zeros(shape))
