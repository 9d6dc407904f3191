"""Scores of transfers: the truth has the best ones, what is wrong in one factor has not, and errors of sprite and camera are pixels."""

import math

import numpy as np
import pytest

from configs.run import VideoConfig
from world import pixels, scenes, scores
from world.pairs import SHARES, alternatives, draw_pair
from world.scenes import VALUES

VIDEO = VideoConfig(frames=9, height=32, width=32, fps=8)
TASKS = tuple(SHARES)
PERFECT = {"retrieval": 1.0, "leak": 0.0, "camera": 0.0, "colour": 0.0, "texture": 0.0}


def pairs(task, count, split="held_out"):
    return [draw_pair(5, index, split, task) for index in range(count)]


def degraded(clip, seed=0):
    """As an autoencoder leaves it: blurred over 3 x 3 pixels, with noise."""
    height, width = clip.shape[1:3]
    wide = np.pad(clip.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = sum(wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    noise = np.random.default_rng(seed).normal(0, 8, clip.shape)
    return np.rint(np.clip(blurred + noise, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_has_the_best_scores(task):
    expected = {"retrieval", "psnr", "leak", *{"motion": ["path"], "camera": ["camera"], "effect": []}.get(task, ["colour", "texture"])}
    for pair in pairs(task, 8):
        found = scores.scores(pair, pixels.render(pair.target, VIDEO), VIDEO)
        assert found.keys() == expected
        assert {name: found[name] for name in found.keys() & PERFECT} == {name: PERFECT[name] for name in found.keys() & PERFECT}
        assert found["psnr"] > 70
        assert found.get("path", 0) < 1


@pytest.mark.parametrize("task", TASKS)
def test_another_value_of_the_factor_is_not_retrieved(task):
    for pair in pairs(task, 6):
        for wrong in alternatives(pair.target, SHARES[task], scores.RETRIEVAL_KEY)[::3]:
            found = scores.scores(pair, pixels.render(wrong, VIDEO), VIDEO)
            assert found["retrieval"] == 0
            assert found["psnr"] < 50
            assert all(found[name] > 0 for name in found.keys() & {"path", "camera", "colour"})


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_to_choose_from_look_different(task):
    """A truth that looked like one of them could never be retrieved."""
    factor = SHARES[task]
    for pair, value in zip(pairs(task, 10, "train"), VALUES[factor][:: max(1, len(VALUES[factor]) // 9)], strict=False):
        target = pair.target._replace(**{factor: value})
        truth, others = pixels.render(target, VIDEO), alternatives(target, factor, scores.RETRIEVAL_KEY)
        assert len(others) == 7
        assert min(scores.distance(truth, pixels.render(other, VIDEO)) for other in others) > 0.5, value


@pytest.mark.parametrize("task", TASKS)
def test_a_copy_of_the_reference_leaks(task):
    for pair in pairs(task, 8):
        assert scores.scores(pair, pixels.render(pair.reference, VIDEO), VIDEO)["leak"] == 1


def test_a_tie_is_not_retrieved(monkeypatch):
    pair = pairs("effect", 1)[0]
    monkeypatch.setattr(scores, "alternatives", lambda scene, factor, key: [scene])
    assert scores.scores(pair, pixels.render(pair.target, VIDEO), VIDEO)["retrieval"] == 0


def moving(step):
    """Scenes that move, by every `step`-th path and direction, in all kinds of looks."""
    moved, styles = [], (None, *VALUES["style"])
    for k, motion in list(enumerate(VALUES["motion"]))[::step]:
        starts = [start for start in VALUES["start"] if pixels.stays_inside(start, motion)]
        looks = VALUES["identity"][37 * k % len(VALUES["identity"])], VALUES["background"][7 * k % len(VALUES["background"])]
        moved.append(scenes.Scene(*looks, starts[k % len(starts)], motion, style=styles[5 * k % len(styles)]))
    return moved


def errors(scene, clip, video=VIDEO):
    """Of each frame, in pixels of a picture 64 high."""
    return np.linalg.norm(scores.find_sprite(scene, clip, video) - pixels.track(scene, video), axis=-1) * 64 / video.height


def test_the_sprite_is_found_on_every_path():
    for k, scene in enumerate(moving(1)):
        clip = pixels.render(scene, VIDEO)
        found, blurred = errors(scene, clip), errors(scene, degraded(clip, k))
        # Places are whole pixels of 32, so that sqrt(2) of 64 is missed at most; and a little more where a shape's edge decides.
        assert found.max() < 2**0.5 + 0.5, scene
        assert found[1:].mean() < 2**0.5, scene
        assert found[0] == 0, scene
        assert blurred.max() < 4, scene  # a fifth of the sprite
        assert blurred[1:].mean() < 2.2, scene


def test_a_wide_picture_has_its_sprite_found_too():
    video = VideoConfig(frames=5, height=32, width=64, fps=8)
    for scene in moving(16):
        assert errors(scene, pixels.render(scene, video), video).max() < 2**0.5 + 0.5


def test_a_sprite_elsewhere_is_found_there():
    target = pairs("motion", 1)[0].target
    for motion in (None, *VALUES["motion"][::9]):
        if pixels.stays_inside(target.start, motion):
            other = target._replace(motion=motion)
            apart = scores.find_sprite(target, pixels.render(other, VIDEO), VIDEO) - pixels.track(other, VIDEO)
            assert np.linalg.norm(apart, axis=-1).max() < 1


def test_a_moved_sprite_is_the_same_sprite():
    scene = pairs("motion", 1)[0].target._replace(style=None)
    assert (pixels.render_moved(scene, VIDEO, np.zeros((1, 2))) == pixels.render(scene, VIDEO)[:1]).all()
    path = pixels.track(scene, VIDEO)
    apart = pixels.render_moved(scene, VIDEO, path - path[0]).astype(int) - pixels.render(scene, VIDEO)
    assert np.abs(apart).max() <= 1  # rounding
    styled = scene._replace(style=VALUES["style"][0])
    assert (pixels.render_moved(styled, VIDEO, np.zeros((1, 2))) == pixels.render(styled, VIDEO)[:1]).all()


def test_every_camera_is_found_in_what_an_autoencoder_leaves():
    examples = pairs("camera", 5)
    for k, camera in enumerate((None, *VALUES["camera"])):
        scene = examples[k % 5].target._replace(camera=camera)
        assert scores.find_camera(scene, degraded(pixels.render(scene, VIDEO), k), VIDEO) == camera


def test_the_error_of_a_camera_is_in_pixels():
    """A pan that is missed is missed by as much as it had come: .75 of half a picture at the end, in equal steps."""
    pair = next(pair for pair in pairs("camera", 60) if pair.target.camera.view == "pans")
    still = pixels.render(pair.target._replace(camera=None), VIDEO)
    expected = (0.75 * 32 * np.arange(1, 9) / 8).mean()
    assert scores.scores(pair, still, VIDEO)["camera"] == pytest.approx(expected, rel=2e-3)


def test_the_error_of_a_path_is_in_pixels():
    """A sprite that rests is as far from its path as that is from the start: .9 of half a picture at the end, in equal steps."""
    pair = next(pair for pair in pairs("motion", 60) if pair.target.motion.path == "glides")
    resting = pixels.render(pair.target._replace(motion=None), VIDEO)
    assert scores.scores(pair, resting, VIDEO)["path"] == pytest.approx((0.9 * 32 * np.arange(1, 9) / 8).mean(), rel=2e-3)


def test_distances_are_mean_squares():
    a, b = np.zeros((2, 1, 2, 3), np.uint8), np.zeros((2, 1, 2, 3), np.uint8)
    a[0, 0, 0], b[1, 0, 1, 2] = (3, 4, 0), 200
    assert scores.distance(a, b) == pytest.approx((9 + 16 + 200**2) / 12)
    pair = pairs("effect", 1)[0]
    truth = pixels.render(pair.target, VIDEO)
    off = np.where(truth < 128, truth + 10, truth - 10).astype(np.uint8)
    assert scores.scores(pair, off, VIDEO)["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-6)


def contrast(clip):
    """Steps to the next pixel below and to the right, none beyond the edge, in units of white."""
    down, right = np.zeros(clip.shape), np.zeros(clip.shape)
    x = clip.astype(float) / 255
    down[:, :-1], right[:, :, :-1] = np.abs(x[:, 1:] - x[:, :-1]), np.abs(x[:, :, 1:] - x[:, :, :-1])
    return down + right


def test_colour_and_texture_of_an_identity_are_those_of_the_sprite():
    pair = pairs("id", 1)[0]
    truth = pixels.render(pair.target, VIDEO)
    sprite = pixels.coverage(pair.target, VIDEO) > 0.5
    read = sprite | np.roll(sprite, 1, 1) | np.roll(sprite, 1, 2)  # a step to the next pixel may lead out of it
    behind = np.where(read[..., None], truth, 255 - truth)
    found = scores.scores(pair, behind, VIDEO)
    assert (found["colour"], found["texture"]) == (0, 0)
    changed = np.where(sprite[..., None], truth // 2, truth)
    found = scores.scores(pair, changed, VIDEO)
    colour = (changed[sprite].astype(float) - truth[sprite]).mean(0) / 255
    texture = (contrast(changed) - contrast(truth))[sprite].mean(0)
    assert found["colour"] == pytest.approx(np.sqrt(np.square(colour).mean()))
    assert found["texture"] == pytest.approx(np.sqrt(np.square(texture).mean()))
    assert found["colour"] > 0.05


def test_colour_and_texture_of_a_style_are_those_of_the_picture():
    pair = pairs("style", 1)[0]
    truth = pixels.render(pair.target, VIDEO)
    flat = np.broadcast_to(np.rint(truth.mean((0, 1, 2), keepdims=True)).astype(np.uint8), truth.shape)
    found = scores.scores(pair, flat, VIDEO)
    assert found["colour"] < 0.5 / 255
    assert found["texture"] == pytest.approx(np.sqrt(np.square(contrast(truth).mean((0, 1, 2))).mean()))


def test_intervals_of_few_numbers():
    assert scores.interval([0.0, 1.0]) == (0.0, 1.0)  # a draw is (0, 0) or (1, 1) with probability 1/4 each
    assert scores.interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert scores.interval([1.0, 2.0, 4.0]) == scores.interval(np.array([1.0, 2.0, 4.0]))
    # How often a draw of 15 has a 1 is binomial with p = 2/15: P(0) = .117, P(at most 4) = .960, P(at most 5) = .990.
    assert scores.interval([1.0] * 2 + [0.0] * 13) == pytest.approx((0, 5 / 15))


def test_an_interval_covers_the_true_mean_nearly_as_often_as_it_says():
    rng = np.random.default_rng(0)
    ends = [scores.interval(rng.normal(0.6, 1, 40)) for _ in range(200)]
    assert 0.89 <= np.mean([low <= 0.6 <= high for low, high in ends]) <= 0.985  # .95, less a little for so few; standard error .015
