"""The clips of the procedural world: the same bytes everywhere, and everything is where the scene says."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.run import VideoConfig
from world import pixels, scenes
from world.pairs import draw_pair
from world.scenes import FACTORS, VALUES

SMALL = VideoConfig(frames=9, height=32, width=32, fps=8)
WIDE = VideoConfig(frames=17, height=64, width=96, fps=8)
SPLITS = ("train", "held_out")


DIGESTED = [draw_pair(7, index, SPLITS[index // 8 % 2]) for index in range(112)]


def digest() -> str:
    """Of `DIGESTED`, at two sizes."""
    total = hashlib.sha256()
    for pair in DIGESTED:
        total.update(repr(pair).encode())
        total.update(pixels.render(pair.reference, SMALL).tobytes())
        total.update(pixels.render(pair.target, WIDE).tobytes())
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
    code = "from tests.world.test_pixels import digest; print(digest())"
    root = Path(__file__).parents[2]
    env = os.environ | {"NPY_DISABLE_CPU_FEATURES": features, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    plain = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert plain.stdout.strip() == digest()


@pytest.mark.parametrize("factor", FACTORS)
def test_every_value_of_a_factor_looks_its_own_way(factor: str):
    scene = draw_pair(2, 2, "train").target._replace(start=scenes.Start("upper", "midleft"))
    clips = [pixels.render(scene._replace(**{factor: value}), SMALL).astype(np.float32) for value in VALUES[factor]]
    nearest = min(float(np.abs(a - b).mean()) for a, b in itertools.combinations(clips, 2))
    assert nearest > 0.2  # of 255: a tenth of what the autoencoder loses


@pytest.mark.parametrize("factor", ["motion", "camera", "effect"])
def test_what_happens_over_time_begins_with_nothing(factor: str):
    scene = draw_pair(2, 0, "train").target._replace(motion=None, camera=None, effect=None)
    still = pixels.render(scene, SMALL)
    assert (still == still[:1]).all()
    for value in VALUES[factor]:
        clip = pixels.render(scene._replace(**{factor: value}), SMALL)
        assert (clip[0] == still[0]).all()
        assert (clip[-1] != still[0]).any() or value[0] in ("circles", "swings")
        assert (clip[4] != still[0]).any()


def test_the_track_is_where_the_sprite_is_drawn():
    for index in range(40):
        scene = draw_pair(4, index, "train").target._replace(style=None, effect=None)
        scene = scene._replace(identity=scene.identity._replace(shape="disc"))
        cover = pixels.coverage(scene, WIDE)
        track = pixels.track(scene, WIDE)
        rows, columns = np.mgrid[: WIDE.height, : WIDE.width]
        for t, (column, row) in enumerate(track):
            if 19 < column < WIDE.width - 20 and 19 < row < WIDE.height - 20:  # all of it is in the picture, however near
                weights = cover[t] / cover[t].sum()
                assert np.hypot((weights * columns).sum() - column, (weights * rows).sum() - row) < 0.3


def test_places_follow_the_camera():
    still = draw_pair(1, 3, "train").target._replace(camera=None)
    assert np.ptp(pixels.places(still, SMALL), axis=0).max() == 0
    pan = pixels.places(still._replace(camera=scenes.Camera("pans", "three")), SMALL)
    moved = pan[-1] - pan[0]
    assert moved[..., 0] == pytest.approx(0.75 * 16, rel=2e-3)
    assert moved[..., 1] == pytest.approx(0, abs=0.02)
