"""Tracks of points through a clip without trained weights: pyramidal Lucas-Kanade (OpenCV) on a grid, with a forward-backward check.

A point is tracked from each frame to the next and back again. It is lost, from that frame on, once it does not come back to where it
was, or leaves the picture.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from configs.errors import RequestError

COUNT = 55  # points of a side of the grid at most (DiTFlow's evaluation)
SPACING = 2  # pixels between them at least
APART = 1.0  # pixels that a point may be off when it comes back


class Tracks(NamedTuple):
    """Where the points of the first frame's grid are."""

    places: Float[np.ndarray, "N T 2"]
    """Column and row in pixels."""
    seen: Bool[np.ndarray, "N T"]
    """Whether the point has been followed up to this frame."""

    def standing(self) -> "Tracks":
        """The tracks of the first frame held."""
        return Tracks(np.repeat(self.places[:, :1], self.places.shape[1], 1), np.ones_like(self.seen))


def track(clip: UInt8[np.ndarray, "T H W 3"], points: Float[np.ndarray, "N 2"] | None = None) -> Tracks:
    """The tracks of points of the first frame, columns and rows, a grid if not given. Without OpenCV a `RequestError`."""
    cv2 = opencv()
    frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    side = window(clip.shape[1:3])
    options = dict(
        winSize=(side, side), maxLevel=3, criteria=(cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-3), minEigThreshold=1e-5
    )
    places = [grid(clip.shape[1:3]) if points is None else points.astype(np.float32)]
    seen = [np.ones(len(places[0]), bool)]
    limits = np.array([clip.shape[2], clip.shape[1]], np.float32) - 1
    for before, after in itertools.pairwise(frames):
        start = places[-1]
        end, found, _ = cv2.calcOpticalFlowPyrLK(before, after, start, None, **options)
        back, found_back, _ = cv2.calcOpticalFlowPyrLK(after, before, end, None, **options)
        kept = (found.ravel() & found_back.ravel()).astype(bool) & (np.linalg.norm(back - start, axis=-1) < APART)
        kept &= ((end >= 0) & (end <= limits)).all(-1)
        seen.append(seen[-1] & kept)
        places.append(np.where(seen[-1][:, None], end, start))
    return Tracks(np.stack(places, 1), np.stack(seen, 1))


def grid(shape: tuple[int, int]) -> Float[np.ndarray, "N 2"]:
    """The points of the first frame, evenly spaced, half a space from the edges: columns and rows, float32."""
    rows, columns = (min(COUNT, max(1, size // SPACING)) for size in shape)
    down, across = ((np.arange(count) + 0.5) * size / count - 0.5 for count, size in zip((rows, columns), shape, strict=True))
    return np.stack(np.meshgrid(across, down), -1).reshape(-1, 2).astype(np.float32)


def window(shape: tuple[int, int]) -> int:
    """Pixels of a side of the square around a point that is compared: an eighth of the shorter side, odd, 7 to 21."""
    return min(21, max(7, min(shape) // 8)) | 1


def opencv() -> Any:
    """The package cv2, which only the tracker needs."""
    try:
        import cv2
    except ImportError:
        raise RequestError("MF-LK: the tracker needs the package opencv-python-headless; pip install opencv-python-headless") from None
    return cv2
