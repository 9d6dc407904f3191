"""The ledger: what passes and steps of the full-size network cost."""

from dataclasses import replace

import pytest

from configs import stage1, stage2, stage3, wan
from omnitransfer_jax.methods import transfer_lora
from omnitransfer_jax.methods.omnitransfer import objective
from omnitransfer_jax.train import flops

N = 32_760  # tokens of 81 frames at 480 x 832


@pytest.mark.parametrize(
    ("operations", "peta"),
    [
        (flops.target_pass(wan.I2V_14B, N), 1.678),
        (flops.target_pass(wan.I2V_14B, N, reference_tokens=N), 2.558),
        (flops.reference_pass(wan.I2V_14B, N), 1.525),
        (flops.target_pass(wan.I2V_14B, N, N) + flops.reference_pass(wan.I2V_14B, N), 4.082),
        (flops.target_pass(wan.I2V_14B, 2 * N), 5.111),
    ],
    ids=["plain", "cached", "reference", "split", "joint"],
)
def test_published_passes(operations, peta):
    assert operations / 1e15 == pytest.approx(peta, rel=5e-4)  # the published rows are sums of rounded ones


def test_a_step_is_three_forward_passes_of_every_sample():
    config = stage1.get_config()
    assert flops.tokens(config, config.video) == N
    assert flops.train_step(config) / 1e15 == pytest.approx(16 * 12.25, rel=1e-3)
    halved = replace(config, train=replace(config.train, batch_size=8))
    assert 2 * flops.train_step(halved) == flops.train_step(config)


def test_what_a_target_reads_decides_the_cost():
    config, per_sample = stage1.get_config(), 3 * 16
    joint = replace(config, dit=replace(config.dit, references="bidirectional"))
    assert flops.train_step(joint) / 1e15 == pytest.approx(per_sample * 5.111, rel=5e-4)
    alone = replace(config, train=replace(config.train, references=False))
    assert flops.train_step(alone) / 1e15 == pytest.approx(per_sample * 1.678, rel=5e-4)


def test_a_frozen_transformer_has_no_gradients_of_weights_and_none_of_references():
    once = 2.558 + 1.525
    assert objective(stage2.get_config()).flops / 1e15 == pytest.approx(16 * (once + 2.558), rel=5e-4)
    assert objective(stage3.get_config()).flops / 1e15 == pytest.approx(16 * 3 * once, rel=5e-4)


def test_adapters_have_gradients_of_activations_in_references_too():
    lora = stage1.get_config("lora")
    assert lora.train.batch_size == 1
    assert transfer_lora.objective(lora).flops / 1e15 == pytest.approx(2 * (2.558 + 1.525), rel=5e-4)
