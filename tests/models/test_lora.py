"""Adapters: nothing at first, mergeable later, and only where they were asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import LoRAConfig
from configs.errors import RequestError
from omnitransfer_jax.models.flat_params import flat_params, with_params
from omnitransfer_jax.models.lora import add_lora, merge_lora
from omnitransfer_jax.models.wan_dit import WanDiT
from tests.compare import relative_l2
from tests.models.test_wan_dit import TINY

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=(r"blocks\.self_attention\..*", r"blocks\.ffn\.up", "head"))
ADAPTED = {"blocks.self_attention.query", "blocks.self_attention.key", "blocks.self_attention.value", "blocks.self_attention.out"}
ADAPTED |= {"blocks.ffn.up", "head"}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(model):
    return jax.jit(lambda m: m(draw(0, 1, 2, 4, 6, 36), jnp.array([700.0]), draw(1, 1, 16, 8), draw(2, 1, 5, 8)))(model)


def adapted():
    model = WanDiT(TINY, rngs=nnx.Rngs(0))
    add_lora(model, CONFIG, rngs=nnx.Rngs(1))
    return model


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    model = adapted()
    assert (run(model) == run(WanDiT(TINY, rngs=nnx.Rngs(0)))).all()
    assert {path.removesuffix(".lora.up") for path in flat_params(model) if path.endswith(".lora.up")} == ADAPTED


def test_merged_equals_unmerged():
    params = flat_params(adapted())
    params = {path: draw(i, *leaf.shape) * 0.1 if ".lora." in path else leaf for i, (path, leaf) in enumerate(params.items())}
    trained = run(with_params(adapted(), params))
    plain = WanDiT(TINY, rngs=nnx.Rngs(0))
    assert relative_l2(run(plain), trained) > 1e-2
    assert relative_l2(run(with_params(plain, merge_lora(params, scale=2.0))), trained) <= 1e-5


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(RequestError, match=r"lora.targets: 'block' matches no projection; the model has blocks\."):
        add_lora(WanDiT(TINY, rngs=nnx.Rngs(0)), LoRAConfig(targets=("block",)), rngs=nnx.Rngs(1))
