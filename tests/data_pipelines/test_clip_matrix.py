"""Clips of every kind that PyAV can write are read right, in colours, orientation, shape and times, or refused in one line.

A draw of every codec, container and pixel format runs in the suite; eight of each, about 900 clips, by
CLIP_MATRIX=8 python -m pytest -n 0 -s tests/data_pipelines/test_clip_matrix.py
"""

import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError

from configs.errors import RequestError
from data_pipelines import clips
from tests.data_pipelines import clip_matrix
from tests.data_pipelines.clip_matrix import Case

EACH = int(os.environ.get("CLIP_MATRIX", "1"))
ENOUGH = {1: 70, 8: 550}  # clips that are right or refused


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The clips that hold what was asked for, and how many could not be written, or lost their tags, by codec and container."""
    folder, found, lost = tmp_path_factory.mktemp("matrix"), {}, Counter()
    for case in clip_matrix.cases(EACH):
        path = folder / f"{case}.{case.container}"
        try:
            clip_matrix.write(path, case)
        except (FFmpegError, UnknownCodecError) as error:
            lost[f"not written: {case.codec.name} in {case.container}, {case.pixels}: {error}"] += 1
            continue
        if clip_matrix.is_stored(path, case):
            found[path] = case
        else:
            lost[f"tags not stored: {case.codec.name} in {case.container}"] += 1
    return found, lost


def read(path, case: Case) -> np.ndarray:
    """The colours of its patches, as they are read: "T rows columns 3"."""
    patches, frames, rate = clip_matrix.expected(case)
    height, width = clip_matrix.display_size(case)
    video = clips.read_clip(path, frames=len(frames), fps=float(rate), height=height, width=width)
    with pytest.raises(RequestError, match="take a longer clip"):  # and nothing comes after
        clips.read_clip(path, frames=len(frames) + 3, fps=float(rate), height=height, width=width)
    return clip_matrix.centres(video, *patches.shape[1:3])


def verdict(path, case: Case) -> str:
    patches, frames, _ = clip_matrix.expected(case)
    try:
        found = read(path, case)
    except RequestError as error:
        one_line = str(error).startswith(str(path)) and "\n" not in str(error)
        return f"refused: {case.refusal}" if one_line and case.refusal and case.refusal in str(error) else f"WRONG: {error}"
    off = np.abs(found - patches[frames]).max()
    if case.refusal:
        return "WRONG: not refused"
    return "right" if off <= case.codec.tolerance else f"WRONG: off by {off:.0f} of 255"


def test_every_clip_is_right_or_refused(written):
    found, lost = written
    verdicts = {case: verdict(path, case) for path, case in found.items()}
    counts = Counter(verdicts.values()) + lost
    print("", *(f"{number:5d} {words}" for words, number in sorted(counts.items())), sep="\n")
    assert {str(case): words for case, words in verdicts.items() if words.startswith("WRONG")} == {}
    assert len(found) >= ENOUGH.get(EACH, 0)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs Linux")
def test_writing_leaves_the_priority_of_this_process(written):
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs Debian's ffmpeg")
def test_colours_are_those_of_ffmpeg(written):
    """The first frame of what is right. ffmpeg itself shows HDR flat, and grey of the limited range as if it were full."""
    off = {}
    for path, case in written[0].items():
        if case.refusal or case.is_hdr or (case.is_grey and case.range == clip_matrix.LIMITED):
            continue
        patches = clip_matrix.expected(case)[0]
        height, width = clip_matrix.display_size(case)
        scaled = ["-frames:v", "1", "-vf", f"scale={width}:{height}:flags=bicubic", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        shown = subprocess.run(["ffmpeg", "-v", "error", "-i", path, *scaled], capture_output=True, check=True).stdout
        shown = clip_matrix.centres(np.frombuffer(shown, np.uint8).reshape(1, height, width, 3), *patches.shape[1:3])
        off[str(case)] = np.abs(shown - read(path, case)[:1]).max()
    print(f"{len(off)} clips as ffmpeg shows them")
    assert {name: by for name, by in off.items() if by > 3} == {}


PLAIN = clip_matrix.cases(1)[0]


@pytest.mark.parametrize(
    ("matrix", "limited", "red"), [(6, 1, (81, 90, 240)), (1, 1, (63, 102, 240)), (1, 2, (54, 99, 255)), (9, 1, (74, 97, 240))]
)
def test_the_truth_has_the_known_codes_of_red(monkeypatch, matrix, limited, red):
    """As BT.601, BT.709 and BT.2020 print them; full range BT.709 is 54.2, 98.8 and 255.5."""
    monkeypatch.setattr(clip_matrix, "COLOURS", np.broadcast_to([1.0, 0.0, 0.0], (2, 3, 3)))
    case = replace(PLAIN, pixels="yuv420p", matrix=matrix, range=limited, transfer=1)
    planes = [min(plane[0, 0], 255) for plane in clip_matrix.coded(case, 0)]
    assert np.abs(np.array(planes) - red).max() <= 1


@pytest.mark.parametrize(("transfer", "known"), [(clip_matrix.PQ, 0.5807), (clip_matrix.HLG, 0.75)])
def test_the_truth_has_the_known_level_of_white(monkeypatch, transfer, known):
    """BT.2408: white of 203 cd/m2 is 58% of PQ and 75% of HLG."""
    monkeypatch.setattr(clip_matrix, "shown", lambda case, frame: np.ones((2, 3, 3)))
    assert np.abs(clip_matrix.signal(replace(PLAIN, transfer=transfer), 0) - known).max() < 2e-3


def test_the_draws_reach_every_value():
    drawn = clip_matrix.cases(8)
    for values, field in (
        ({*clip_matrix.LUMA, *clip_matrix.OTHER_MATRICES, 0}, "matrix"),
        ({0, 1, 2}, "range"),
        ({*clip_matrix.SDR, clip_matrix.PQ, clip_matrix.HLG}, "transfer"),
        (set(clip_matrix.ORIENTATIONS), "orientation"),
        (set(clip_matrix.ASPECTS), "aspect"),
        (set(clip_matrix.TIMINGS), "timing"),
    ):
        assert {getattr(case, field) for case in drawn} == values
