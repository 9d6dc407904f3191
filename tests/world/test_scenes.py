"""The procedural world: the same bytes everywhere, factors that are what they are called, held-out values that training never sees."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs.run import VideoConfig
from omnitransfer_jax import tasks
from world import scenes
from world.scenes import FACTORS, HELD_OUT, SHARES, TRAINED, VALUES

SMALL = VideoConfig(frames=9, height=32, width=32, fps=8)
WIDE = VideoConfig(frames=17, height=64, width=96, fps=8)
SPLITS = ("train", "held_out")


DIGESTED = [scenes.example(7, index, SPLITS[index // 8 % 2]) for index in range(112)]


def digest() -> str:
    """Of `DIGESTED`, at two sizes."""
    total = hashlib.sha256()
    for pair in DIGESTED:
        total.update(repr(pair).encode())
        total.update(scenes.render(pair.reference, SMALL).tobytes())
        total.update(scenes.render(pair.target, WIDE).tobytes())
    return total.hexdigest()


def test_the_same_key_gives_the_same_bytes_on_every_machine():
    # Written down on one machine (x86-64, NumPy 2) and checked on every other that runs this test.
    assert digest() == "c9ccbc41a8e85b7e921864b9c6fd9d83e69bd992340aa62aa2ba3ad42714d6a4"


def test_the_digest_is_of_every_way_to_draw():
    drawn = [scene for pair in DIGESTED for scene in (pair.reference, pair.target)]
    for names, factor, part in (
        (scenes.SHAPES, "identity", "shape"),
        (scenes.TEXTURES, "identity", "texture"),
        (scenes.PATTERNS, "background", "pattern"),
        (scenes.PATHS, "motion", "path"),
        (scenes.VIEWS, "camera", "view"),
        (scenes.EFFECTS, "effect", "kind"),
        (scenes.DRAWINGS, "style", "drawing"),
    ):
        assert {getattr(getattr(scene, factor), part) for scene in drawn if getattr(scene, factor)} == set(names)


def test_bytes_do_not_depend_on_the_instructions_of_the_processor():
    features = " ".join(np._core._multiarray_umath.__cpu_dispatch__)  # type: ignore[attr-defined]
    code = "from tests.world.test_scenes import digest; print(digest())"
    root = Path(__file__).parents[2]
    env = os.environ | {"NPY_DISABLE_CPU_FEATURES": features, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    plain = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert plain.stdout.strip() == digest()


def test_another_key_gives_another_world():
    assert [scenes.example(0, i, "train") for i in range(5)] != [scenes.example(1, i, "train") for i in range(5)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_pair_shares_exactly_the_named_factor(split: scenes.Split):
    for index in range(1000):
        pair = scenes.example(3, index, split)
        assert pair.task == ("id", "style", "motion", "camera", "effect", "style", "motion", "camera")[index % 8]
        both = zip(FACTORS, *([getattr(side, factor) for factor in FACTORS] for side in (pair.reference, pair.target)), strict=True)
        assert [factor for factor, a, b in both if a is not None and a == b] == [SHARES[pair.task]]
        assert (pair.reference.start == pair.target.start) == (pair.task in ("motion", "camera"))


def test_nothing_but_the_shared_factor_happens_in_a_temporal_target():
    for index in range(1000):
        pair = scenes.example(3, index, "train")
        if tasks.TASKS[tasks.task_index(pair.task)].family == "temporal":
            happens = {factor for factor in ("motion", "camera", "effect") if getattr(pair.target, factor) is not None}
            assert happens == {SHARES[pair.task]}
            assert pair.prompt == ""
        else:
            assert pair.prompt == scenes.caption(pair.target, {SHARES[pair.task]})


@pytest.mark.parametrize("split", SPLITS)
def test_no_style_hides_an_identity(split: scenes.Split):
    for index in range(300):
        pair = scenes.example(3, index, split, "id")
        assert pair.reference.style is None
        assert pair.target.style is None


def test_training_never_sees_a_held_out_value():
    for index in range(5000):
        pair = scenes.example(0, index, "train")
        for scene in (pair.reference, pair.target):
            values = ((factor, getattr(scene, factor)) for factor in FACTORS)
            assert not [factor for factor, value in values if value is not None and scenes.is_held_out(factor, value)]
    for index in range(500):
        pair = scenes.example(0, index, "held_out")
        for scene in (pair.reference, pair.target):
            held_out = [f for f in FACTORS if getattr(scene, f) is not None and scenes.is_held_out(f, getattr(scene, f))]
            assert held_out == [SHARES[pair.task]]


def test_training_sees_every_part_of_held_out_combinations():
    for factor in ("identity", "effect", "style"):
        assert HELD_OUT[factor]
        for i in range(len(VALUES[factor][0])):
            assert {value[i] for value in HELD_OUT[factor]} <= {value[i] for value in TRAINED[factor]}
    assert {m.direction for m in HELD_OUT["motion"]}.isdisjoint({m.direction for m in TRAINED["motion"]})
    assert {c.hour for c in HELD_OUT["camera"]}.isdisjoint({c.hour for c in TRAINED["camera"]})


def test_captions_tell_all_and_are_of_one_length():
    captions = {}
    for index in range(2000):
        scene = scenes.example(5, index, "train").target
        words = scenes.caption(scene).replace(",", "").split()
        assert set(words) <= set(scenes.WORDS)
        captions.setdefault(" ".join(words), scene)
        assert captions[" ".join(words)] == scene
    assert len({len(text.split()) for text in captions}) == 1
    uses = Counter(word for factor in VALUES for word in {w for value in VALUES[factor] for w in value})
    assert max(uses.values()) == 1


@pytest.mark.parametrize("factor", FACTORS)
def test_every_value_of_a_factor_looks_its_own_way(factor: str):
    scene = scenes.example(2, 2, "train").target._replace(start=scenes.Start("upper", "midleft"))
    clips = [scenes.render(scene._replace(**{factor: value}), SMALL).astype(np.float32) for value in VALUES[factor]]
    nearest = min(float(np.abs(a - b).mean()) for a, b in itertools.combinations(clips, 2))
    assert nearest > 0.2  # of 255: a tenth of what the autoencoder loses


@pytest.mark.parametrize("factor", ["motion", "camera", "effect"])
def test_what_happens_over_time_begins_with_nothing(factor: str):
    scene = scenes.example(2, 0, "train").target._replace(motion=None, camera=None, effect=None)
    still = scenes.render(scene, SMALL)
    assert (still == still[:1]).all()
    for value in VALUES[factor]:
        clip = scenes.render(scene._replace(**{factor: value}), SMALL)
        assert (clip[0] == still[0]).all()
        assert (clip[-1] != still[0]).any() or value[0] in ("circles", "swings")
        assert (clip[4] != still[0]).any()


def test_the_track_is_where_the_sprite_is_drawn():
    for index in range(40):
        scene = scenes.example(4, index, "train").target._replace(style=None, effect=None)
        scene = scene._replace(identity=scene.identity._replace(shape="disc"))
        cover = scenes.coverage(scene, WIDE)
        track = scenes.track(scene, WIDE)
        rows, columns = np.mgrid[: WIDE.height, : WIDE.width]
        for t, (column, row) in enumerate(track):
            if 19 < column < WIDE.width - 20 and 19 < row < WIDE.height - 20:  # all of it is in the picture, however near
                weights = cover[t] / cover[t].sum()
                assert np.hypot((weights * columns).sum() - column, (weights * rows).sum() - row) < 0.3


def test_places_follow_the_camera():
    still = scenes.example(1, 3, "train").target._replace(camera=None)
    assert np.ptp(scenes.places(still, SMALL), axis=0).max() == 0
    pan = scenes.places(still._replace(camera=scenes.Camera("pans", "three")), SMALL)
    moved = pan[-1] - pan[0]
    assert moved[..., 0] == pytest.approx(0.75 * 16, rel=2e-3)
    assert moved[..., 1] == pytest.approx(0, abs=0.02)


def test_alternatives_differ_in_one_factor():
    scene = scenes.example(0, 2, "held_out").target
    others = scenes.alternatives(scene, "motion", key=0)
    assert len({other.motion for other in others} | {scene.motion}) == 8
    assert {other._replace(motion=scene.motion) for other in others} == {scene}
