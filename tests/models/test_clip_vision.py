"""Laws of the image tower, its preprocessing and its tables that need no oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import CLIPVisionConfig
from configs.errors import RequestError
from configs.wan import get_config
from omnitransfer_jax.models.clip_vision import MEAN, STD, CLIPVision, preprocess
from omnitransfer_jax.models.flat_params import abstract, count, flat_params, with_params
from omnitransfer_jax.weights.clip_vision import config_from_json, config_json

SMOKE = get_config("smoke").image


@pytest.fixture(scope="module")
def model():
    return CLIPVision(SMOKE, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(1), (2, SMOKE.image_size, SMOKE.image_size, 3))


@jax.jit
def encode(model, pixels):
    return model(pixels)


def test_last_layer_and_norm_are_not_run(model, pixels):
    features = encode(model, pixels)
    assert features.shape == (2, 5, SMOKE.dim)
    other = nnx.clone(model)
    other.post_norm.scale[...] = jnp.zeros(SMOKE.dim)
    other.last_layer.mlp.up.kernel[...] = jnp.zeros((SMOKE.dim, SMOKE.ffn_dim))
    np.testing.assert_array_equal(encode(other, pixels), features)
    kernels = other.layers.mlp.down.kernel
    kernels[...] = kernels.at[-1].set(0.0)
    assert np.abs(encode(other, pixels) - features).max() > 1e-2


def test_bfloat16_weights_and_projections_stay_near_float32(model, pixels):
    params = {path: x.astype(jnp.bfloat16) for path, x in flat_params(model).items()}
    half = with_params(abstract(lambda rngs: CLIPVision(replace(SMOKE, dtype="bfloat16"), rngs=rngs)), params)
    exact, rounded = encode(model, pixels), encode(half, pixels)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 3e-2


def test_preprocess_of_flat_colour():
    """-1 is black and 1 is white; the whole image is kept, whatever its shape."""
    image = jnp.stack([jnp.full((20, 50, 3), level) for level in (-1.0, 1.0)])
    out = preprocess(image, 28)
    assert out.shape == (2, 28, 28, 3)
    for row, level in zip(out, (0.0, 1.0), strict=True):
        np.testing.assert_allclose(row, np.broadcast_to((level - np.array(MEAN)) / np.array(STD), row.shape), rtol=1e-5)


def test_preprocess_keeps_the_border():
    """A crop would lose the edges of a wide image."""
    image = jnp.full((1, 28, 112, 3), -1.0).at[:, :, :8].set(1.0)
    columns = preprocess(image, 28)[0, 14, :, 0]
    assert columns[0] > 1.5
    assert columns[-1] < -1.5


def test_full_size():
    assert count(abstract(lambda rngs: CLIPVision(CLIPVisionConfig(), rngs=rngs))) == 630_766_080


def test_config_json_goes_both_ways():
    assert config_from_json(config_json(replace(SMOKE, eps=1e-4))) == replace(SMOKE, eps=1e-4, dtype="bfloat16")


@pytest.mark.parametrize(("key", "value"), [("model_type", "siglip"), ("hidden_act", "quick_gelu"), ("patch_size", None)])
def test_config_of_another_model_is_refused(key, value):
    json = config_json(SMOKE) | {key: value}
    if value is None:
        del json[key]
    with pytest.raises(RequestError, match=key):
        config_from_json(json)
