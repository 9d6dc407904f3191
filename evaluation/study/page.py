"""The page of one rater: one file of HTML with all its clips, which loads nothing else. Its form is page.html.j2.

It holds no name of a system, a case or a file, so it can be given to raters; its clips are numbered in the order in which it shows them.
"""

import base64
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_pipelines import clips
from evaluation.study.questions import GRADES, SIDES, WORDS, Question, text

Clip = UInt8[np.ndarray, "T H W 3"]
SMALLEST = 256  # pixels of the shorter side, below which a clip is enlarged: a codec would blur its few pixels
CRF = 20  # of x264: 39 frames of DAVIS at 480 x 832 have 0.6 MB
Grade = tuple[str | int, str]
"""The value of an answer, and its label."""


class Media(NamedTuple):
    """What is shown of one case: contents of files."""

    prompt: str
    reference: bytes
    first_frame: bytes | None
    made: Mapping[str, bytes]
    """By system."""

    @property
    def size(self) -> int:
        """Bytes on a page, as base64."""
        return sum(len(content) for content in (self.reference, self.first_frame or b"", *self.made.values())) * 4 // 3


def write(name: str, study: str, questions: Sequence[Question], media: Mapping[str, Media]) -> bytes:
    """The page `name` of a study; `media` is by case."""
    contents: list[str] = []
    numbers: dict[tuple[str, str], int] = {}

    def number(case: str, what: str, content: bytes) -> int:
        if (case, what) not in numbers:
            numbers[case, what] = len(contents)
            contents.append(base64.b64encode(content).decode())
        return numbers[case, what]

    shown = [_shown(each, media[each.case], number) for each in questions]
    loader = PackageLoader("evaluation.study", ".")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    about = {"study": study, "page": name, "questions": shown}
    return template.get_template("page.html.j2").render(name=name, about=about, contents=contents).encode()


def _shown(question: Question, media: Media, number: Callable[[str, str, bytes], int]) -> dict[str, Any]:
    """A question as the script of the page reads it."""
    case, first = question.case, media.first_frame
    return {
        "prompt": media.prompt,
        "reference": number(case, "reference", media.reference),
        "first": None if first is None else number(case, "first frame", first),
        "clips": [number(case, f"system {system}", media.made[system]) for system in question.systems],
        "asked": [{"scale": scale, "text": text(question.task, scale), "grades": _grades(question)} for scale in question.scales],
    }


def _grades(question: Question) -> list[Grade]:
    if len(question.systems) == 2:
        return [(side, label) for side, label in zip(SIDES, ("clip A", "no difference", "clip B"), strict=True)]
    return [(grade, f"{grade} {word}") for grade, word in zip(GRADES, WORDS, strict=True)]


def video(clip: Clip, fps: float) -> bytes:
    """A clip as a file that every browser plays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        clips.write_clip(path, _enlarged(clip), fps, crf=CRF)
        return path.read_bytes()


def picture(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """An image as a PNG."""
    file = io.BytesIO()
    Image.fromarray(_enlarged(image[None])[0]).save(file, "png")
    return file.getvalue()


def _enlarged(clip: Clip) -> Clip:
    """A small clip with each pixel several times; the codec needs an even height and width, so an odd edge is doubled."""
    times = -(-SMALLEST // min(clip.shape[1:3]))
    clip = clip.repeat(times, 1).repeat(times, 2) if times > 1 else clip
    return np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
