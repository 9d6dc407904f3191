"""Tracks from a file, as CoTracker gives them: an npz with `tracks` (T N 2, columns and rows) and `visibility` (T N).

A first axis of 1, its batch, is taken off; without `visibility` all points are visible.
"""

import zipfile
from pathlib import Path

import numpy as np

from configs.errors import RequestError, require
from evaluation.metrics.tracks import Tracks

FORM = "an npz with `tracks` (T N 2) and `visibility` (T N)"


def read(path: Path, frames: int) -> Tracks:
    """The tracks of a clip of `frames` frames; a `RequestError` where the file is no such one.

    `seen` says of each frame whether the point is visible in it and in the frame before, for a motion needs both.
    """
    try:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path}: no tracks ({getattr(error, 'strerror', None) or error}); give {FORM}") from None
    require("tracks" in arrays, f"{path}: no array `tracks`; give {FORM}")
    places = without_batch(arrays["tracks"], 3)
    visible = without_batch(arrays["visibility"], 2).astype(bool) if "visibility" in arrays else np.ones(places.shape[:2], bool)
    right = places.ndim == 3 and places.shape[-1] == 2 and visible.shape == places.shape[:2]
    require(right, f"{path}: `tracks` {arrays['tracks'].shape}; give {FORM}")
    require(len(places) == frames, f"{path}: tracks of {len(places)} frames, {frames} needed")
    require(bool(np.isfinite(places[visible]).all()), f"{path}: a visible point without a place")
    seen = visible & np.concatenate([visible[:1], visible[:-1]])
    return Tracks(np.nan_to_num(places).transpose(1, 0, 2).astype(np.float32), seen.T)


def without_batch(x: np.ndarray, axes: int) -> np.ndarray:
    """The array without a first axis of 1."""
    return x[0] if x.ndim == axes + 1 and len(x) == 1 else x
