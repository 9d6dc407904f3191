"""Laws of the text encoder and its tables that need no oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import UMT5Config
from configs.errors import RequestError
from configs.wan import get_config
from omnitransfer_jax.models.flat_params import abstract, count, flat_params, with_params
from omnitransfer_jax.models.umt5 import UMT5Encoder, position_buckets
from omnitransfer_jax.weights.umt5 import config_from_json, config_json

SMOKE = get_config("smoke").text
TOKENS = np.random.default_rng(0).integers(2, SMOKE.vocab_size, (2, 9)).astype(np.int32)
LENGTHS = np.array([[9], [5]])


@pytest.fixture(scope="module")
def model():
    return UMT5Encoder(SMOKE, rngs=nnx.Rngs(0))


@jax.jit
def encode(model, tokens, mask):
    return model(tokens, mask)


def padded(length: int, filler: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.pad(TOKENS, ((0, 0), (0, length - TOKENS.shape[1])))
    mask = np.arange(length)[None] < LENGTHS
    return jnp.asarray(np.where(mask, tokens, filler).astype(np.int32)), jnp.asarray(mask)


def test_padding_is_not_attended_to_and_its_rows_are_zero(model):
    short, long = encode(model, *padded(9, 0)), encode(model, *padded(14, 7))
    assert np.abs(long[:, :9] - short).max() <= 1e-5
    assert np.abs(short[0]).min(-1).max() > 0
    assert not np.any(long[0, 9:])
    assert not np.any(long[1, 5:])


def test_prompts_of_a_batch_are_independent(model):
    tokens, mask = padded(9, 0)
    alone = encode(model, tokens[1:], mask[1:])
    assert np.abs(encode(model, tokens, mask)[1:] - alone).max() <= 1e-5


def test_order_of_tokens_matters(model):
    tokens, mask = padded(9, 0)
    turned = encode(model, tokens[:, ::-1], jnp.ones_like(mask))[:, ::-1]
    assert np.abs(turned - encode(model, tokens, jnp.ones_like(mask))).max() > 1e-2


def test_bfloat16_weights_and_projections_stay_near_float32(model):
    params = {path: x.astype(jnp.bfloat16) for path, x in flat_params(model).items()}
    half = with_params(abstract(lambda rngs: UMT5Encoder(replace(SMOKE, dtype="bfloat16"), rngs=rngs)), params)
    exact, rounded = encode(model, *padded(9, 0)), encode(half, *padded(9, 0))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 3e-2


def test_buckets_use_every_row_and_stop_at_the_greatest_distance():
    rows = position_buckets(300, 32, 128)
    after, before = rows[0], rows[:, 0]
    assert set(rows.ravel()) == set(range(32)) - {16}  # distance 0 is "not after", so the first row of the second half is unused
    np.testing.assert_array_equal(after[1:], before[1:] + 16)
    assert np.all(np.diff(before) >= 0)
    np.testing.assert_array_equal(before[:8], np.arange(8))
    assert set(before[128:]) == {15}
    np.testing.assert_array_equal(rows[5:, 5:], rows[:-5, :-5])  # only the difference of positions counts


def test_full_size():
    assert count(abstract(lambda rngs: UMT5Encoder(UMT5Config(), rngs=rngs))) == 5_680_910_336


def test_config_json_goes_both_ways():
    config = replace(SMOKE, relative_buckets=8, relative_max_distance=20, eps=1e-4)
    assert config_from_json(config_json(config)) == replace(config, dtype="bfloat16")


@pytest.mark.parametrize(("key", "value"), [("model_type", "t5"), ("feed_forward_proj", "relu"), ("d_kv", None)])
def test_config_of_another_model_is_refused(key, value):
    json = config_json(SMOKE) | {key: value}
    if value is None:
        del json[key]
    with pytest.raises(RequestError, match=key):
        config_from_json(json)
