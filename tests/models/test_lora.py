"""Laws of adapters: fresh ones change nothing, several add up, merging and masks are exact, and each has a place on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from configs.base import LoRAConfig
from configs.errors import RequestError
from configs.run import MeshConfig
from omnitransfer_jax.mesh import specs
from omnitransfer_jax.models import lora, wan_dit
from omnitransfer_jax.models.flat_params import flat_params, with_params
from omnitransfer_jax.models.lora import add_lora, merge_lora, with_head_mask
from omnitransfer_jax.models.wan_dit import WanDiT
from tests.compare import relative_l2
from tests.models.test_wan_dit import TINY

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=(r"blocks\.self_attention\..*", r"blocks\.ffn\.up", "head"))
ADAPTED = {"blocks.self_attention.query", "blocks.self_attention.key", "blocks.self_attention.value", "blocks.self_attention.out"}
ADAPTED |= {"blocks.ffn.up", "head"}
HEADS = TINY.num_heads


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@jax.jit
def run(model):
    return model(draw(0, 1, 2, 4, 6, 36), jnp.array([700.0]), draw(1, 1, 16, 8), draw(2, 1, 5, 8))


def plain():
    return WanDiT(TINY, rngs=nnx.Rngs(0))


def adapted(*names, num_heads=None):
    model = plain()
    for i, name in enumerate(names):
        add_lora(model, CONFIG, name, num_heads, rngs=nnx.Rngs(1 + i))
    return model


def trained(model):
    """The model's parameters with adapters that do something."""
    params = flat_params(model)
    chosen = {path for path in params if lora.PATH.fullmatch(path) and not path.endswith("head_mask")}
    return {path: draw(i, *leaf.shape) * 0.1 if path in chosen else leaf for i, (path, leaf) in enumerate(params.items())}


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    model = adapted("lora", "lora_motion", num_heads=HEADS)
    assert (run(model) == run(plain())).all()
    for name in ("lora", "lora_motion"):
        assert {path.removesuffix(f".{name}.up") for path in flat_params(model) if path.endswith(f".{name}.up")} == ADAPTED


def test_adapters_add_up():
    """On one projection, where they are linear."""
    model, x = wan_dit.MLP(8, 12, 4, rngs=nnx.Rngs(0)).up, draw(0, 5, 8)
    base, outputs = model(x), []
    for name in ("lora", "lora_motion"):
        add_lora(holder := nnx.Dict(up=model), LoRAConfig(rank=2, alpha=4.0, targets=("up",)), name, rngs=nnx.Rngs(1))
        adapter = getattr(holder.up, name)
        adapter.up[...] = draw(len(name), *adapter.up.shape)
        outputs.append(adapter(x))
    np.testing.assert_allclose(model(x), base + outputs[0] + outputs[1], atol=1e-5)
    assert all(relative_l2(base + out, model(x)) > 1e-1 for out in outputs)


@pytest.mark.parametrize("num_heads", [None, HEADS])
def test_merged_equals_unmerged(num_heads):
    model = adapted("lora", "lora_motion", num_heads=num_heads)
    params = trained(model)
    if num_heads:
        params = with_head_mask(params, draw(9, HEADS), "lora_motion")
    wanted = run(with_params(model, params))
    assert relative_l2(run(plain()), wanted) > 1e-2
    assert relative_l2(run(with_params(plain(), merge_lora(params, scale=2.0))), wanted) <= 1e-5
    one = merge_lora(params, scale=2.0, name="lora_motion")
    assert not any(".lora_motion." in path for path in one)
    assert relative_l2(run(with_params(adapted("lora", num_heads=num_heads), one)), wanted) <= 1e-5
    folded = lora.fold_head_masks(params)
    assert relative_l2(run(with_params(adapted("lora", "lora_motion"), folded)), wanted) <= 1e-5


def test_a_head_mask_is_data():
    model = adapted("lora", num_heads=HEADS)
    params = trained(model)
    traces = []

    @jax.jit
    def call(params):
        traces.append(None)
        return run(with_params(model, params))

    unmasked = run(with_params(adapted("lora"), {path: x for path, x in params.items() if not path.endswith("head_mask")}))
    assert (call(params) == unmasked).all()
    assert (call(with_head_mask(params, jnp.zeros(HEADS))) == run(plain())).all()
    halves = call(with_head_mask(params, jnp.eye(HEADS)[0]))
    assert min(relative_l2(halves, unmasked), relative_l2(halves, run(plain()))) > 1e-3
    assert len(traces) == 1


def test_a_head_mask_selects_heads():
    adapter = lora.LoRA((8, 6), CONFIG, 3, rngs=nnx.Rngs(0))
    adapter.up[...], adapter.head_mask = draw(1, 3, 6), nnx.Param(jnp.array([0.0, 1.0, 2.0]))
    whole = draw(2, 5, 8) @ adapter.down @ adapter.up * 2.0
    np.testing.assert_allclose(adapter(draw(2, 5, 8)), whole * jnp.array([0, 0, 1, 1, 2, 2.0])[None], atol=1e-6)


def test_gradients_reach_adapters_and_no_mask():
    model = adapted("lora", "lora_motion", num_heads=HEADS)
    grads = jax.jit(jax.grad(lambda params: jnp.square(run(with_params(model, params))).sum()))(trained(model))
    still = {path for path in grads if not jnp.abs(grads[path]).max() > 0}
    assert {path for path in still if lora.PATH.fullmatch(path)} == {path for path in grads if re.fullmatch(lora.DATA, path)} != set()


def test_every_parameter_of_an_adapted_transformer_has_a_place():
    model = adapted("lora", "lora_motion", num_heads=HEADS)
    place = specs(flat_params(model), wan_dit.SHARDING, MeshConfig(data=2))
    assert place["blocks.self_attention.query.lora_motion.down"] == P(None, "data", None)
    assert place["blocks.self_attention.query.lora.up"] == P(None, None, None)
    assert place["blocks.ffn.up.lora.head_mask"] == P(None, None)
    assert (place["head.lora.down"], place["head.lora.up"], place["head.lora.head_mask"]) == (P("data", None), P(None, None), P(None))


def test_a_fault_is_refused_with_its_remedy():
    def add(model, *name, heads=None, targets=("head",)):
        add_lora(model, LoRAConfig(targets=targets), *name, num_heads=heads, rngs=nnx.Rngs(1))

    model = plain()
    with pytest.raises(RequestError, match=r"lora.targets: 'block' matches no projection; the model has blocks\."):
        add(model, targets=("block",))
    for name in ("motion", "lora_", "Lora", "lora-motion", "lora.up"):
        with pytest.raises(RequestError, match=f"adapter name '{name}': 'lora', or 'lora_' and small letters"):
            add(model, name)
    with pytest.raises(RequestError, match="num_heads=7: the 64 outputs of head do not divide"):
        add(model, heads=7)
    add(model)
    with pytest.raises(RequestError, match="adapter name 'lora': head already has lora; take another"):
        add(model)
