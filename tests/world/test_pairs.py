"""Pairs of the procedural world share the factor of their task and no other; training has no held-out value."""

import pytest

from omnitransfer_jax import tasks
from world import scenes
from world.pairs import SHARES, Split, alternatives, draw_pair
from world.scenes import FACTORS

SPLITS = ("train", "held_out")


def test_another_key_gives_another_world():
    assert [draw_pair(0, i, "train") for i in range(5)] != [draw_pair(1, i, "train") for i in range(5)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_pair_shares_exactly_the_named_factor(split: Split):
    for index in range(1000):
        pair = draw_pair(3, index, split)
        assert pair.task == ("id", "style", "motion", "camera", "effect", "style", "motion", "camera")[index % 8]
        both = zip(FACTORS, *([getattr(side, factor) for factor in FACTORS] for side in (pair.reference, pair.target)), strict=True)
        assert [factor for factor, a, b in both if a is not None and a == b] == [SHARES[pair.task]]
        assert (pair.reference.start == pair.target.start) == (pair.task in ("motion", "camera"))


def test_nothing_but_the_shared_factor_happens_in_a_temporal_target():
    for index in range(1000):
        pair = draw_pair(3, index, "train")
        if tasks.TASKS[tasks.task_index(pair.task)].family == "temporal":
            happens = {factor for factor in ("motion", "camera", "effect") if getattr(pair.target, factor) is not None}
            assert happens == {SHARES[pair.task]}
            assert pair.prompt == ""
        else:
            assert pair.prompt == scenes.caption(pair.target, {SHARES[pair.task]})


@pytest.mark.parametrize("split", SPLITS)
def test_no_style_hides_an_identity(split: Split):
    for index in range(300):
        pair = draw_pair(3, index, split, "id")
        assert pair.reference.style is None
        assert pair.target.style is None


def test_training_never_sees_a_held_out_value():
    for index in range(5000):
        pair = draw_pair(0, index, "train")
        for scene in (pair.reference, pair.target):
            values = ((factor, getattr(scene, factor)) for factor in FACTORS)
            assert not [factor for factor, value in values if value is not None and scenes.is_held_out(factor, value)]
    for index in range(500):
        pair = draw_pair(0, index, "held_out")
        for scene in (pair.reference, pair.target):
            held_out = [f for f in FACTORS if getattr(scene, f) is not None and scenes.is_held_out(f, getattr(scene, f))]
            assert held_out == [SHARES[pair.task]]


def test_alternatives_differ_in_one_factor():
    scene = draw_pair(0, 2, "held_out").target
    others = alternatives(scene, "motion", key=0)
    assert len({other.motion for other in others} | {scene.motion}) == 8
    assert {other._replace(motion=scene.motion) for other in others} == {scene}
