"""What methods of motion transfer are compared on: a reference, a prompt and a first frame each, from the procedural world or from a file.

A suite of real clips is a file with one JSON object a line, in the form of DiTFlow's data (50 clips of DAVIS, three prompts each):

    {"clip": "camel.mp4", "easy": "a camel walks ...", "medium": "a giraffe ...", "hard": "...", "start": 0, "end": 48, "step": 2}

`easy` describes the clip itself, `medium` another subject, `hard` another scene too. start, end and step count the clip's own frames; they
may be absent (0, the end, 1). Image-to-video networks need `first_frame` too, a picture. Paths are relative to the file.
"""

import json
from collections.abc import Callable
from itertools import count as count_from
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from configs.errors import RequestError, require
from configs.run import VideoConfig
from data_pipelines import clips, streams
from world import pixels
from world.pairs import Example, draw_pair

Clip = UInt8[np.ndarray, "T H W 3"]
Picture = UInt8[np.ndarray, "H W 3"]
LEVELS = ("easy", "medium", "hard")
FIELDS = {"clip": str, **dict.fromkeys(LEVELS, str), "start": int, "end": int, "step": int, "first_frame": str}
KEY = 1  # of the held-out pairs


class Case(NamedTuple):
    """One transfer. Clips are read when they are asked for."""

    id: str
    prompt: str
    caption: str
    """Of the reference, for methods that learn from it."""
    reference: Callable[[], Clip]
    other: Callable[[], Clip]
    """A reference with another motion."""
    first_frame: Callable[[], Picture] | None = None
    pair: Example | None = None
    """The pair of the world that it is."""
    truth: Callable[[], Clip] | None = None
    """What is to be made, where it is known."""


def of_world(video: VideoConfig, count: int, first: int = 0) -> list[Case]:
    """`count` held-out motion pairs from `first` on; prompts and captions are empty: first frame and reference tell everything."""
    found = []
    for index in range(first, first + count):
        pair = drawn(index)
        other = next(each for each in map(drawn, count_from(index + 1)) if each.reference.motion != pair.reference.motion)
        found.append(
            Case(
                pair.id,
                pair.prompt,
                "",
                lambda pair=pair: pixels.render(pair.reference, video),
                lambda other=other: pixels.render(other.reference, video),
                lambda pair=pair: pixels.render(pair.target, video)[0],
                pair,
                lambda pair=pair: pixels.render(pair.target, video),
            )
        )
    return found


def drawn(index: int) -> Example:
    """Held-out motion pair `index`."""
    return draw_pair(KEY, index, "held_out", "motion")


def of_suite(path: str, level: str, video: VideoConfig, needs_frame: bool) -> list[Case]:
    """The rows of a suite with the prompts of `level`. The first row that cannot be used is a `RequestError`."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--suite={path}: cannot be read ({getattr(error, 'strerror', None) or 'no text'}); give a JSON lines file"
        ) from None
    rows = [
        _row(f"--suite={path}, line {n}", text, Path(path).parent, level, needs_frame) for n, text in enumerate(lines, 1) if text.strip()
    ]
    require(len({row["clip"] for row in rows}) > 1, f"--suite={path}: at least two clips, for a control takes another one's reference")
    found = []
    for i, row in enumerate(rows):
        later = (rows[(i + k) % len(rows)] for k in range(1, len(rows)))
        other = next(each for each in later if each["clip"] != row["clip"])
        found.append(
            Case(
                f"{i:03}-{Path(row['clip']).stem}-{level}",
                row[level],
                row["easy"],
                lambda row=row: read(row, video),
                lambda other=other: read(other, video),
                (lambda row=row: clips.fit(clips.read_image(row["first_frame"]), video.height, video.width)) if needs_frame else None,
            )
        )
    return found


def _row(at: str, text: str, folder: Path, level: str, needs_frame: bool) -> dict[str, Any]:
    """A row with whole paths and all counts."""
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    require(isinstance(row, dict), f"{at}: no JSON object; give one a line")
    assert isinstance(row, dict)
    unknown = sorted(set(row) - set(FIELDS))
    require(not unknown, f"{at}: {', '.join(unknown)}: no such field; there are {', '.join(FIELDS)}")
    for name in ("clip", "easy", level, *(["first_frame"] if needs_frame else [])):
        require(name in row, f"{at}: no {name!r}, and it is needed; add it")
    for name, value in row.items():
        right = isinstance(value, FIELDS[name]) and not isinstance(value, bool) and (value != "" if FIELDS[name] is str else value >= 0)
        require(right, f"{at}: {name}={value!r}: expected {'a text' if FIELDS[name] is str else 'a whole number from 0 on'}")
    row = {"start": 0, "step": 1, "end": None, **row}
    require(row["step"] > 0, f"{at}: step=0: at least 1")
    require(row["end"] is None or row["end"] > row["start"], f"{at}: end={row['end']}: behind start={row['start']}")
    for name in ("clip", "first_frame"):
        if name in row:
            row[name] = str(folder / row[name])
            require(Path(row[name]).is_file(), f"{at}: {name}={row[name]}: no such file")
    return row


def read(row: dict[str, Any], video: VideoConfig) -> Clip:
    """Every `step`-th frame of a row's clip, `video.frames` of them."""
    with streams.open_clip(row["clip"]) as container:
        rate = float(streams.video_stream(container, row["clip"]).average_rate or video.fps)
    end = None if row["end"] is None else row["end"] / rate
    start, fps = row["start"] / rate, rate / row["step"]
    return clips.read_clip(row["clip"], frames=video.frames, fps=fps, height=video.height, width=video.width, start=start, end=end)
