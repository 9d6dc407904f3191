"""Two clips of a pair on one screen: side by side and in step, or one behind the other; and nothing held out among them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from configs import stage0
from configs.buckets import bucket_configs
from world import pixels, scenes, screens
from world.pairs import SHARES, draw_pair
from world.scenes import FACTORS

CONFIG = stage0.get_config("tiny")
SIZES = [each.video for each in bucket_configs(CONFIG).values()]
WIDE = replace(CONFIG.video, width=2 * CONFIG.video.height)
LONG = replace(CONFIG.video, frames=17)
PAIRS = [draw_pair(5, index, "train") for index in range(200)]


@pytest.mark.parametrize("pair", PAIRS[:8], ids=lambda pair: pair.id)
def test_columns_are_the_two_clips_side_by_side(pair):
    clip = screens.render(pair, WIDE, both=screens.has_room(pair, WIDE))
    if not pair.is_temporal:
        assert (clip == pixels.render(pair.target, WIDE)).all()
        return
    assert (clip[:, :, :32] == pixels.render(pair.target, CONFIG.video)).all()
    assert (clip[:, :, 32:] == pixels.render(pair.reference, CONFIG.video)).all()


@pytest.mark.parametrize("pair", PAIRS[:8], ids=lambda pair: pair.id)
def test_shots_are_the_two_clips_one_behind_the_other(pair):
    clip = screens.render(pair, LONG, both=screens.has_room(pair, LONG))
    if pair.is_temporal:
        assert (clip == pixels.render(pair.target, LONG)).all()
        return
    assert (clip[:9] == pixels.render(pair.target, CONFIG.video)).all()
    assert (clip[9:] == pixels.render(pair.reference, replace(CONFIG.video, frames=8))).all()
    assert (9 - 1) % CONFIG.vae.time_stride == 0  # the cut lies between two latent frames


def test_a_prompt_says_what_the_second_scene_shows_and_the_first_does_not():
    for pair in PAIRS:
        first, word, second = screens.prompt(pair, both=True).rpartition(" beside " if pair.is_temporal else " then ")
        assert first == scenes.caption(pair.target) == screens.prompt(pair, both=False)
        assert word
        said = [f for f in FACTORS if getattr(pair.reference, f) is not None and " ".join(getattr(pair.reference, f)) in second]
        assert said == [f for f in FACTORS if getattr(pair.reference, f) is not None and f != SHARES[pair.task]]
        assert second.endswith(" ".join(pair.reference.start)) != pair.is_temporal


def test_prompts_fit_into_the_text():
    assert not set(screens.WORDS) & set(scenes.WORDS)
    longest = max(len(screens.prompt(pair, both=True).replace(",", " ,").split()) for pair in PAIRS)
    assert longest + 1 <= CONFIG.dit.text_len  # and the mark of the end


def test_sizes_take_what_fills_them():
    assert any(screens.is_for_two(video) for video in SIZES)
    chosen = {pair.id: screens.choose(pair, SIZES, two=True) for pair in PAIRS}
    for pair in PAIRS:
        video = SIZES[chosen[pair.id]]
        assert screens.has_room(pair, video) or not screens.is_for_two(video)
    counts = Counter(chosen.values())
    assert set(counts) == set(range(len(SIZES)))
    assert 0.4 < counts[0] / len(PAIRS) < 0.6
    alone = Counter((screens.choose(pair, SIZES, two=False), pair.is_temporal) for pair in PAIRS)
    assert set(alone) == {(i, temporal) for i in range(len(SIZES)) for temporal in (False, True)}


def test_nothing_held_out_is_on_a_screen():
    """Both scenes of a screen are scenes of a training pair; the words of its prompt are those of their values."""
    held_out = {" ".join(value) for factor in ("identity", "motion", "camera", "effect", "style") for value in scenes.HELD_OUT[factor]}
    for pair in PAIRS:
        for scene in (pair.target, pair.reference):
            assert not [f for f in FACTORS if getattr(scene, f) is not None and scenes.is_held_out(f, getattr(scene, f))]
        assert not [words for words in held_out if f" {words} " in f" {screens.prompt(pair, both=True).replace(',', '')} "]


def test_the_second_scene_is_in_step():
    """The sprites of a motion pair stay half a screen apart."""
    pair = next(pair for pair in PAIRS if pair.task == "motion")
    tracks = [pixels.track(scene, CONFIG.video) for scene in (pair.target, pair.reference)]
    np.testing.assert_array_equal(*tracks)
