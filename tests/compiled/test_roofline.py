"""The bound by hand, and the meshes that the table recommends."""

import math
from dataclasses import replace

import pytest

from configs import stage1, stage3
from configs.chips import CHIPS, KINDS, MESHES, Chip, chip_of, compiler_options
from configs.errors import RequestError
from omnitransfer_jax.compiled.collectives import Collective
from omnitransfer_jax.compiled.operations import Operations
from omnitransfer_jax.compiled.roofline import roofline, seconds

CHIP = Chip(memory=1, peak=1, link=1, between_slices=0.1, attention=0.3)  # TFLOP/s, GB/s
SQUARE = [(0, x, y, 0) for x in range(4) for y in range(4)]  # a slice, and places in it


def sent(kind: str, group: tuple[int, ...], overlaps: bool = False) -> Collective:
    return Collective(kind, "bf16", 10**9, group, 2, overlaps, "")


def test_seconds_on_a_torus():
    line, square = (0, 1, 2, 3), tuple(range(16))
    assert seconds(sent("all-gather", line), CHIP, SQUARE) == pytest.approx(2 * 3 / 4)  # one axis of links
    assert seconds(sent("all-gather", square), CHIP, SQUARE) == pytest.approx(2 * 15 / 16 / 2)  # two
    assert seconds(sent("all-reduce", line), CHIP, SQUARE) == pytest.approx(2 * 2 * 3 / 4)
    assert seconds(sent("all-to-all", line), CHIP, SQUARE) == pytest.approx(2 * 4 / 4)
    assert seconds(sent("collective-permute", (0, 1)), CHIP, SQUARE) == pytest.approx(2)


def test_seconds_between_slices():
    both = [*SQUARE, *((1, *place[1:]) for place in SQUARE)]
    assert seconds(sent("all-reduce", (0, 16)), CHIP, both) == pytest.approx(2 * 2 * (1 / 2) / 0.1)
    assert seconds(sent("all-gather", (0, 16)), CHIP, both) == pytest.approx(2 * (1 / 2) / 0.1)
    assert seconds(sent("all-gather", (16, 17, 18, 19)), CHIP, both) == pytest.approx(2 * 3 / 4)  # within the second


def test_the_share_of_the_peak():
    executed = Operations(products=8 * 10**11, attention=6 * 10**11)  # 1 s each at the assumed rates
    collectives = [sent("all-gather", (0, 1, 2, 3)), sent("all-gather", (0, 1, 2, 3), overlaps=True)]  # 1.5 s each
    found = roofline(CHIP, 16e12, executed, collectives, SQUARE)  # at the peak 1 s
    assert (found.compute, found.exposed, found.overlapped) == pytest.approx((2, 1.5, 1.5))
    assert list(found.mfu.values()) == pytest.approx([1 / 5, 1 / 3.5, 1 / 3, 1 / (1 + 2 + 1.5)])


@pytest.mark.parametrize("topology", MESHES)
def test_a_recommended_mesh_is_one_of_its_topology(topology):
    mesh = MESHES[topology]
    assert mesh.devices == math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    for stage in (stage1, stage3):
        replace(stage.get_config(), mesh=mesh).validate()


def test_every_kind_of_device_has_options():
    assert set(KINDS.values()) == set(CHIPS)
    assert compiler_options("TPU v5") == dict(CHIPS["v5p"].options)
    assert compiler_options("cpu") == {}


def test_a_topology_that_is_none():
    with pytest.raises(RequestError, match="--topology=v9:2x2: the part before the colon is one of v5e, v5p, v6e"):
        chip_of("v9:2x2")
