"""The transformer's own laws: its size, one code path for any depth, and what rematerialisation may not change."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from configs.base import DiTConfig
from configs.errors import RequestError
from configs.wan import I2V_14B, T2V_1_3B, T2V_14B
from omnitransfer_jax.models.attend import plain
from omnitransfer_jax.models.flat_params import abstract, count, flat_params
from omnitransfer_jax.models.wan_dit import Injection, WanDiT
from tests.compare import relative_l2

TINY = DiTConfig(dim=24, ffn_dim=32, num_layers=3, num_heads=2, text_dim=8, image_dim=8, freq_dim=16, dtype="float32", remat="none")


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def batch():
    return {"latents": draw(1, 2, 4, 6, 36), "timestep": jnp.array([700.0]), "text": draw(1, 16, 8), "image": draw(1, 5, 8)}


@pytest.mark.parametrize(
    ("config", "size"), [(I2V_14B, 16_394_878_784), (T2V_14B, 14_288_491_584), (T2V_1_3B, 1_418_996_800)], ids=["i2v", "t2v", "t2v_1_3b"]
)
def test_published_sizes(config, size):
    assert count(abstract(lambda rngs: WanDiT(config, rngs=rngs))) == size


def test_scan_equals_loop(batch):
    model = WanDiT(TINY, rngs=nnx.Rngs(0))
    x, inputs, context, time = model.prepare(**batch)
    graphdef, layers = nnx.split(model.blocks)
    for i in range(TINY.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], layers))  # noqa: B023
        x, _ = block(x, inputs, context, partial(plain, kernel="auto"), None)
    assert relative_l2(model(**batch), model.project(x.target, time, (2, 2, 3))) <= 1e-6


def test_a_tap_is_what_a_layer_computes(batch):
    """The queries, keys and values that a strategy receives in each layer."""
    config = replace(TINY, num_layers=3)
    model = WanDiT(config, rngs=nnx.Rngs(0))
    received = []

    def spying(streams, cache):
        received.append(streams.target)
        return plain(streams, cache, "auto")

    x, inputs, context, _ = model.prepare(**batch)
    layers_graphdef, layers = nnx.split(model.blocks)
    for i in range(config.num_layers):
        block = nnx.merge(layers_graphdef, jax.tree.map(lambda leaf: leaf[i], layers))  # noqa: B023
        x, _ = block(x, inputs, context, spying, None)

    for layer, wanted in enumerate(received):
        for ours, theirs in zip(model.tap(layer, **batch), wanted, strict=True):
            assert relative_l2(ours, theirs) <= 1e-6
    assert relative_l2(model.tap(1, **batch).q, received[2].q) > 1e-2
    with pytest.raises(RequestError, match="layer 3: the network has blocks 0 to 2"):
        model.tap(3, **batch)


def test_what_is_injected_replaces_what_the_target_computes(batch):
    """Its own rotations, keys and values change nothing; others change it, in a tap too, unless they are inactive."""
    model = WanDiT(TINY, rngs=nnx.Rngs(0))
    _, inputs, _, _ = model.prepare(**batch)
    own = jnp.stack([inputs.target.rotation] * 2).transpose(2, 0, 1, 3, 4)

    @jax.jit
    def compute(model, injection):
        return model(**batch, injection=injection), model.tap(2, **batch, injection=injection).q

    keys_values = model.tap(0, **batch)[1:3]
    plain = compute(model, None)
    others = Injection(jnp.array(True), 1.1 * own, jax.tree.map(lambda x: x + 1, keys_values))
    for injection in (Injection(jnp.array(True), own, keys_values), others._replace(active=jnp.array(False))):
        for ours, theirs in zip(compute(model, injection), plain, strict=True):
            assert relative_l2(ours, theirs) <= 1e-6
    for part in (others, others._replace(rotations=None), others._replace(keys_values=None)):
        for ours, theirs in zip(compute(model, part), plain, strict=True):
            assert relative_l2(ours, theirs) > 1e-3


@pytest.mark.parametrize("remat", ["qkv", "attention", "full"])
def test_rematerialisation_changes_nothing(batch, remat):
    def gradients(config):
        graphdef, params = nnx.split(WanDiT(config, rngs=nnx.Rngs(0)))
        return flat_params(nnx.merge(graphdef, jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(**batch).var()))(params)))

    plain, saved = gradients(TINY), gradients(replace(TINY, remat=remat))
    assert all(relative_l2(saved[path] + 1e-12, plain[path] + 1e-12) <= 1e-5 for path in plain)


def test_rematerialisation_saves_memory(batch):
    def temporary_bytes(remat):
        graphdef, params = nnx.split(WanDiT(replace(TINY, num_layers=16, remat=remat), rngs=nnx.Rngs(0)))
        large = batch | {"latents": draw(1, 4, 16, 16, 36)}
        step = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(**large).var()))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, qkv, attention, full = (temporary_bytes(remat) for remat in ("none", "qkv", "attention", "full"))
    assert none > 2 * attention
    assert none > qkv > attention > full


def test_half_precision_is_near(batch):
    model = WanDiT(TINY, rngs=nnx.Rngs(0))
    half = nnx.merge(nnx.split(WanDiT(replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0)))[0], nnx.state(model))
    out = half(**batch)
    assert out.dtype == jnp.float32  # the head is one of the float32 islands
    assert 0 < relative_l2(out, model(**batch)) <= 2e-2


def through(latents):
    """The network at tiny width over latents "B F H W 16", noise in front of them as in sampling."""
    model = WanDiT(replace(TINY, num_layers=1), rngs=nnx.Rngs(0))
    batch, frames, height, width, _ = latents.shape
    noisy = jnp.concatenate([draw(*latents.shape), jnp.ones((batch, frames, height, width, 4)), latents], axis=-1)
    return jax.jit(lambda m, x: m(x, jnp.array([500.0]), draw(1, 16, 8), draw(1, 5, 8)))(model, noisy)


def test_latents_of_video_size():
    out = through(draw(1, 16, 40, 64, 16))  # 61 frames of 320 x 512: 10,240 tokens
    assert out.shape == (1, 16, 40, 64, 16)
    assert jnp.isfinite(out).all()


def test_a_real_latent(shared):
    """61 frames of 320 x 512, encoded by the published autoencoder and normalised: its channels are near unit size, as ours expect."""
    with safe_open(shared / "latents" / "wan_latent.safetensors", framework="flax") as file:
        latents = jnp.moveaxis(file.get_tensor("latent").astype(jnp.float32), 1, -1)
    assert 0.5 < latents.std() < 1.5
    out = through(latents)
    assert out.shape == latents.shape
    assert jnp.isfinite(out).all()
