"""Factors of the procedural world: which values are held out, and captions."""

from collections import Counter

from world import scenes
from world.pairs import draw_pair
from world.scenes import HELD_OUT, TRAINED, VALUES


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
        scene = draw_pair(5, index, "train").target
        words = scenes.caption(scene).replace(",", "").split()
        assert set(words) <= set(scenes.WORDS)
        captions.setdefault(" ".join(words), scene)
        assert captions[" ".join(words)] == scene
    assert len({len(text.split()) for text in captions}) == 1
    uses = Counter(word for factor in VALUES for word in {w for value in VALUES[factor] for w in value})
    assert max(uses.values()) == 1
