"""The prompts file of a training: a file of JSON lines, one sample of the grid a line (launch/sampling/grid.py).

    {"task": "motion", "prompt": "", "reference": "dance.mp4", "first_frame": "person.png"}
    {"task": "id", "prompt": "a cup on a table", "reference": "cup.mp4", "start": 2}

Paths are relative to the file. Temporal tasks need a "first_frame", the others have none. "start" is where in the reference to begin, in
seconds. A training without references (`train.references=False`) has none here either.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import clips, decoding
from data_pipelines.manifest import read_lines, read_object
from omnitransfer_jax import tasks

REQUIRED, OPTIONAL = ("task", "prompt"), ("reference", "first_frame", "start")
MOST = 64  # samples of a grid; more is a manifest given by mistake


class Prompt(NamedTuple):
    """What to sample."""

    task: str
    prompt: str
    reference: Path | None = None
    first_frame: Path | None = None
    start: float = 0.0
    """Seconds into the reference."""


class Pictures(NamedTuple):
    """The pixels of a prompt, uint8, in the sizes of the training."""

    reference: np.ndarray | None
    """ "T H W 3"."""
    first_frame: np.ndarray | None
    """ "H W 3"."""


def read_prompts(path: str | Path, has_references: bool) -> list[Prompt]:
    """The prompts of a file in its order; one `RequestError` lists what is wrong in it, by file and line."""
    path = Path(path)
    found = read_lines(path, lambda line, number: _parse(line, path.parent, has_references), "a prompts file", REQUIRED)
    require(len(found) <= MOST, f"{path}: {len(found)} prompts, and each is sampled again and again; give at most {MOST}")
    return found


def read_pictures(prompt: Prompt, config: Config) -> Pictures:
    """The clip and the picture of a prompt, decoded in a process with limits. What cannot be used is a `RequestError`."""
    size, video, reference, frame = config.data.reference, config.video, None, None
    with decoding.decoder() as decoder:
        if prompt.reference is not None:
            shape = {"frames": size.frames, "fps": size.fps, "height": size.height, "width": size.width}
            reference = decoder.clip(prompt.reference, **shape, start=prompt.start)
        if prompt.first_frame is not None:
            frame = clips.fit(decoder.image(prompt.first_frame), video.height, video.width)
    return Pictures(reference, frame)


def require_prompts(config: Config) -> list[Prompt]:
    """The prompts of `train.sample_prompts`, none without it; a file that cannot be used is a `RequestError`."""
    given = config.train.sample_prompts
    if not given:
        return []
    try:
        return read_prompts(given, config.train.references)
    except RequestError as error:
        raise RequestError(f"train.sample_prompts: {error}") from None


def _parse(line: str, folder: Path, has_references: bool) -> tuple[Prompt | None, list[str]]:
    """The prompt of one line, or what is wrong with it."""
    content, wrong = read_object(line, REQUIRED, OPTIONAL)
    if not wrong and isinstance(content.get("start"), dict):
        wrong = ["start: of the reference, in seconds; give a number"]
    if wrong:
        return None, wrong
    task = tasks.TASKS[tasks.task_index(content["task"])]
    for key, needed, why in (
        ("reference", has_references, "this training reads references" if has_references else "this training reads no references"),
        ("first_frame", task.family == "temporal", f"{task.name} starts from {'a picture' if task.family == 'temporal' else 'none'}"),
    ):
        if (key in content) != needed:
            wrong.append(f"{key}: {why}; {'give one' if needed else 'leave it out'}")
    paths = {key: folder / content[key] for key in ("reference", "first_frame") if key in content}
    return (None, wrong) if wrong else (Prompt(task.name, content["prompt"], **paths, start=content.get("start") or 0.0), [])
