"""What a training would cost, from its abstract state: the same bytes that the real state has."""

from dataclasses import replace

import jax
import pytest

from configs.run import MeshConfig, OptimizerConfig
from omnitransfer_jax.mesh import axes_of, specs
from omnitransfer_jax.methods.omnitransfer import objective
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.plan import describe, memory
from omnitransfer_jax.train.step import init_state
from tests.train.tiny_run import TINY

PARTLY = replace(TINY, train=replace(TINY.train, trainable=("dit/blocks.*", "dit/head.*"), ema=0.5))


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_memory_is_that_of_the_real_state(kind):
    """AdamW keeps two moments of each parameter; Muon one of each matrix and two of the rest."""
    config = replace(PARTLY, optimizer=OptimizerConfig(kind=kind))
    of = objective(config)
    state = init_state(of.init(), of, config, make_optimizer(config.optimizer, config.train.steps, of.matrices))
    found = memory(of, config)
    assert found["parameters"] == size(state.trainable) + size(state.frozen)
    assert found["gradients"] == size(state.trainable) == found["average"]
    assert found["optimizer"] == size(state.moments)
    factor = found["optimizer"] / size(state.trainable)
    assert factor == pytest.approx(2, rel=1e-2) if kind == "adamw" else 1 < factor < 1.2


def test_devices_divide_what_is_sharded():
    config = replace(PARTLY, mesh=MeshConfig(data=2), optimizer=OptimizerConfig(kind="muon"))
    spec = specs(objective(config).params, objective(config).sharding, config.mesh)
    whole = {path for path, axes in spec.items() if not axes_of(axes)}
    one, each = memory(objective(PARTLY), PARTLY), memory(objective(config), config)
    rest = sum(4 * leaf.size for path, leaf in objective(config).params.items() if path in whole)
    assert 2 * each["parameters"] == one["parameters"] + rest
    assert each["optimizer"] < 0.7 * one["optimizer"]


def test_every_part_of_the_description():
    text = describe(objective(PARTLY), PARTLY)
    assert [f"\n{name}" in text for name in ("parameters", "dit/head ", "GiB per device", "optimizer", "FLOPs per step")] == [True] * 5
    assert "FLOPs" not in describe(replace(objective(PARTLY), flops=None), PARTLY)
