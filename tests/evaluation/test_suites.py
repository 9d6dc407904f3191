"""Suites: what a file's rows become, what is wrong with one, and how large the paper's test sets are."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import stage1
from configs.errors import RequestError
from evaluation import suites, videos
from world import pixels, scenes
from world.pairs import SHARES

CONFIG = stage1.get_config("tiny")
SIZE = CONFIG.video


@pytest.fixture
def folder(tmp_path):
    """Two clips and a picture."""
    for seed, name in enumerate(("a", "b")):
        clip = np.random.default_rng(seed).integers(0, 256, (SIZE.frames, 32, 32, 3), dtype=np.uint8)
        videos.write(tmp_path / f"{name}.mp4", clip, SIZE.fps)
    Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def load(folder, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "suite.jsonl").write_text(text)
    return suites.load(str(folder / "suite.jsonl"), CONFIG)


MOTION = {"id": "kite", "task": "motion", "reference": "a.mp4", "first_frame": "a.png"}


def test_every_prompt_with_every_seed_is_a_case(folder):
    suite = load(folder, MOTION | {"prompts": ["one", "two"], "seeds": [3, 5]}, MOTION | {"id": "plain"})
    assert [(case.id, case.prompt, case.seed, case.clip) for case in suite.cases] == [
        ("kite-p0-s3", "one", 3, "kite"),
        ("kite-p0-s5", "one", 5, "kite"),
        ("kite-p1-s3", "two", 3, "kite"),
        ("kite-p1-s5", "two", 5, "kite"),
        ("plain", "", CONFIG.seed, "plain"),
    ]
    assert (suite.cases[0].first_frame(SIZE) == 77).all()
    assert (suite.cases[0].reference(SIZE) == videos.read(folder / "a.mp4", SIZE)).all()
    assert suite.problems == []


def test_without_a_picture_the_first_frame_is_the_true_clips(folder):
    case = load(folder, {"id": "x", "task": "effect", "reference": "a.mp4", "target": "b.mp4"}).cases[0]
    assert (case.first_frame(SIZE) == videos.read(folder / "b.mp4", SIZE)[0]).all()
    assert (case.truth(SIZE) == videos.read(folder / "b.mp4", SIZE)).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "task": "id"}, "reference: absent"),
        ({"id": "x", "task": "id", "reference": "none.mp4"}, "none.mp4: no such file"),
        ({"id": "x", "task": "dance", "reference": "a.mp4"}, "task 'dance': not one of"),
        ({"id": "x", "task": "motion", "reference": "a.mp4"}, "needs first_frame"),
        ({"id": "../x", "task": "id", "reference": "a.mp4"}, "it names files"),
        ({"id": "x", "task": "id", "reference": "a.mp4", "seeds": [-1]}, "whole numbers"),
        ({"id": "x", "task": "id", "reference": "a.mp4", "promts": []}, "promts: no such key"),
        ({"id": "kite", "task": "id", "reference": "a.mp4"}, "another row has it"),
        ("not json", "not a JSON object"),
    ],
)
def test_a_row_that_cannot_be_used_is_said_and_the_others_go_on(folder, row, message):
    suite = load(folder, MOTION, row)
    assert [case.id for case in suite.cases] == ["kite"]
    (problem,) = suite.problems
    assert ":2: " in problem
    assert message in problem
    if row != {"id": "kite", "task": "id", "reference": "a.mp4"}:
        with pytest.raises(RequestError, match="no row can be used"):
            load(folder, row)


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "cannot be read"), ("world:x", "2 or more"), ("world:1", "2 or more")])
def test_a_suite_that_is_none(name, message):
    with pytest.raises(RequestError, match=message):
        suites.load(name, CONFIG)


def test_the_world_has_its_truth():
    suite = suites.load("world:3", CONFIG)
    assert len(suite.cases) == 15
    for case in suite.cases:
        assert (case.reference(SIZE) == pixels.render(case.pair.reference, SIZE)).all()
        assert (case.truth(SIZE) == pixels.render(case.pair.target, SIZE)).all()
        assert (case.first_frame is not None) == case.is_temporal
        assert getattr(case.pair.target, SHARES[case.task]) in scenes.HELD_OUT[SHARES[case.task]]


def test_a_motion_suite_has_all_its_prompts(folder):
    rows = [{"clip": f"{name}.mp4", "first_frame": "a.png", "easy": "e", "medium": "m", "hard": "h"} for name in "ab"]
    suite = load(folder, *rows)
    assert [case.prompt for case in suite.cases] == ["e", "e", "m", "m", "h", "h"]
    assert len({case.id for case in suite.cases}) == 6
    assert len({case.clip for case in suite.cases}) == 2
    assert (suite.cases[1].reference(SIZE) == videos.read(folder / "b.mp4", SIZE)).all()


def test_the_papers_test_sets_by_count(folder):
    def rows(count, prompts, task="style"):
        return [{"id": f"{task}{i}", "task": task, "reference": "a.mp4", "prompts": [f"{k}" for k in range(prompts)]} for i in range(count)]

    assert suites.protocols(load(folder, *rows(20, 2), *rows(50, 1, "id"))) == {
        "id": "incomplete: 50 of 50 clips, 1 of 2 prompts a clip",
        "style": "complete: 20 of 20 clips, 2 of 2 prompts a clip",
    }
    assert suites.protocols(load(folder, *rows(19, 2)))["style"].startswith("incomplete: 19 of 20")
    assert suites.PROTOCOLS == {"id": (50, 2), "style": (20, 2), "effect": (50, 1), "camera": (50, 1), "motion": (50, 1)}


def test_another_reference_is_of_another_clip(folder):
    suite = load(folder, MOTION | {"prompts": ["one", "two"]}, MOTION | {"id": "b"}, {"id": "s", "task": "style", "reference": "a.mp4"})
    found = {case: other.id for case, other in suites.others(suite.cases).items()}
    assert found == {"kite-p0": "b", "kite-p1": "b", "b": "kite-p0"}  # the only style case has none


def test_another_reference_is_of_another_kind(folder):
    rows = [MOTION | {"id": name, "kind": name[0]} for name in ("a1", "a2", "b1")]
    suite = load(folder, *rows, {"id": "s", "task": "style", "reference": "a.mp4", "kind": 3})
    assert {case: other.id for case, other in suites.others(suite.cases).items()} == {"a1": "b1", "a2": "b1", "b1": "a1"}
    assert "kind 3: not a text" in suite.problems[0]


def test_each_prompt_may_have_a_first_frame_of_its_own(folder):
    Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(folder / "b.png")
    row = MOTION | {"prompts": ["one", "two"]}
    suite = load(folder, row | {"first_frame": ["a.png", "b.png"]}, row | {"id": "short", "first_frame": ["a.png"]})
    assert [int(case.first_frame(SIZE)[0, 0, 0]) for case in suite.cases] == [77, 99]
    assert "not a picture, nor a list with one for each of 2 prompts" in suite.problems[0]
