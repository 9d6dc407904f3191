"""Suites are read row by row, or refused in one line; cases of the world have their truth."""

import json

import numpy as np
import pytest

from configs import wan
from configs.errors import RequestError
from configs.run import VideoConfig
from data_pipelines import clips
from evaluation import motion_cases
from world import pixels

VIDEO = VideoConfig(frames=5, height=32, width=48, fps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of 20 frames at 24 fps, frame n of grey 10 n and of 250 - 10 n, and a picture."""
    place = tmp_path_factory.mktemp("suite")
    for name, greys in (("up", 10 * np.arange(20)), ("down", 250 - 10 * np.arange(20))):
        clips.write_clip(place / f"{name}.mp4", np.broadcast_to(greys[:, None, None, None], (20, 64, 96, 3)).astype(np.uint8), 24)
    clips.Image.new("RGB", (96, 64), (200, 0, 0)).save(place / "red.png")
    return place


def write(folder, *rows):
    path = folder / "suite.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


ROW = {"clip": "up.mp4", "easy": "a", "medium": "b", "hard": "c", "start": 2, "end": 18, "step": 3, "first_frame": "red.png"}
OTHER = {"clip": "down.mp4", "easy": "d", "hard": "e"}


def test_a_suite_is_read(folder):
    path = write(folder, ROW, "", ROW, OTHER)
    first, again, last = motion_cases.of_suite(path, "hard", VIDEO, needs_frame=False)
    assert (first.prompt, first.caption, last.prompt, last.caption) == ("c", "a", "e", "d")
    assert len({first.id, again.id, last.id}) == 3
    assert first.first_frame is None
    greys = first.reference().astype(float).mean((1, 2, 3))
    assert np.allclose(greys, 10 * np.array([2, 5, 8, 11, 14]), atol=4)
    assert np.allclose(last.reference().mean((1, 2, 3)), 250 - 10 * np.arange(5.0), atol=4)
    assert np.array_equal(first.other(), last.reference())  # another clip, not the same one again
    assert np.array_equal(last.other(), first.reference())
    shown = motion_cases.of_suite(write(folder, ROW, OTHER | {"first_frame": "red.png"}), "easy", VIDEO, needs_frame=True)[0]
    assert shown.first_frame().shape == (32, 48, 3)
    assert (shown.first_frame() == [200, 0, 0]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1: no JSON object"),
        ([ROW, [1]], "line 2: no JSON object"),
        ([{**ROW, "fps": 3}], "fps: no such field"),
        ([{"clip": "up.mp4", "easy": "a"}], "no 'hard', and it is needed"),
        ([{"clip": "up.mp4", "hard": "a"}], "no 'easy', and it is needed"),
        ([{name: value for name, value in ROW.items() if name != "first_frame"}], "no 'first_frame'"),
        ([{**ROW, "hard": 3}], "hard=3: expected a text"),
        ([{**ROW, "start": True}], "start=True: expected a whole number"),
        ([{**ROW, "step": -1}], "step=-1: expected a whole number"),
        ([{**ROW, "step": 0}], "step=0: at least 1"),
        ([{**ROW, "end": 2}], "end=2: behind start=2"),
        ([{**ROW, "clip": "none.mp4"}], "none.mp4: no such file"),
        ([ROW, ROW], "at least two clips"),
        ([], "at least two clips"),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused(folder, rows, message):
    with pytest.raises(RequestError, match=message) as error:
        motion_cases.of_suite(write(folder, *rows), "hard", VIDEO, needs_frame=True)
    assert "\n" not in str(error.value)


def test_files_that_are_no_suite(folder):
    for path in (folder / "absent.jsonl", folder, folder / "red.png"):
        with pytest.raises(RequestError, match="cannot be read"):
            motion_cases.of_suite(str(path), "hard", VIDEO, needs_frame=False)
    short = motion_cases.of_suite(write(folder, {**ROW, "end": 10}, OTHER), "hard", VIDEO, needs_frame=False)[0]
    with pytest.raises(RequestError, match=r"up\.mp4: 3 frames"):
        short.reference()


def test_cases_of_the_world():
    """Their number changes none of them."""
    video = wan.get_config("tiny").video
    cases, more = motion_cases.of_world(video, 2), motion_cases.of_world(video, 4)
    for case, same in zip(cases, more, strict=False):
        assert case.id == same.id
        assert np.array_equal(case.other(), same.other())
        assert case.prompt == case.caption == ""
        assert np.array_equal(case.first_frame(), pixels.render(case.pair.target, video)[0])
        assert np.array_equal(case.reference(), pixels.render(case.pair.reference, video))
        assert not np.array_equal(case.other(), case.reference())


def test_another_reference_has_another_motion():
    """Where the next pair has the same motion, it is the next but one's."""
    video, motion = wan.get_config("tiny").video, [motion_cases.drawn(n).reference.motion for n in range(40)]
    index = next(n for n in range(38) if motion[n] == motion[n + 1] != motion[n + 2])
    case = motion_cases.of_world(video, index + 1)[index]
    assert np.array_equal(case.other(), pixels.render(motion_cases.drawn(index + 2).reference, video))
