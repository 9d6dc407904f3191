"""Scores of transfers in the procedural world, where the true clip is known (world/pairs.py). Higher is better unless noted.

    retrieval   1 if, of the truth and 7 renders that differ from it in the transferred factor alone, the truth is nearest; chance .125
    psnr        of the clip against the truth, in dB, over 8-bit pixels
    leak        1 if the clip is nearer to the reference than to the truth; lower is better
    path        motion: distance of the sprite from its true place, in pixels of a picture 64 high, mean over frames; lower is better
    camera      camera: distance between where a pixel looks and where it should, as above; lower is better
    colour      id, style: distance of the mean colour from the truth's, 0 to 1, within sprite (id) or picture (style); lower is better
    texture     id, style: the same of the mean contrast between neighbouring pixels; lower is better

Distances between clips are mean squared differences of pixels. Compare every score with those of the controls (evaluation/transfer.py).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from configs.run import VideoConfig
from world import pixels, scenes
from world.pairs import SHARES, Example, alternatives
from world.scenes import Scene

Clip = UInt8[np.ndarray, "T H W 3"]
RETRIEVAL_KEY = 0  # the key of the renders that the truth is compared with
CAMERAS = (None, *scenes.VALUES["camera"])


def scores(pair: Example, clip: Clip, video: VideoConfig) -> dict[str, float]:
    """All scores that the pair's task has."""
    truth, *others = _candidates(pair.target, SHARES[pair.task], video)
    error = distance(clip, truth)
    found = {
        "retrieval": float(all(error < distance(clip, other) for other in others)),
        "psnr": float(10 * np.log10(255**2 / max(error, 1e-3))),
        "leak": float(distance(clip, pixels.render(pair.reference, video)) < error),
    }
    match pair.task:
        case "motion":
            apart = np.linalg.norm(find_sprite(pair.target, clip, video) - pixels.track(pair.target, video), axis=-1)
            found["path"] = float(apart[1:].mean() * 64 / video.height)
        case "camera":
            seen = pixels.places(pair.target._replace(camera=find_camera(pair.target, clip, video)), video)
            apart = np.linalg.norm(seen - pixels.places(pair.target, video), axis=-1)
            found["camera"] = float(apart[1:].mean() * 64 / video.height)
        case "id":
            found |= _appearance(clip, truth, pixels.coverage(pair.target, video) > 0.5)
        case "style":
            found |= _appearance(clip, truth, np.ones(truth.shape[:3], bool))
    return found


def distance(a: Clip, b: Clip) -> float:
    """Mean squared difference of pixels, 0 to 255^2."""
    return float(np.square(a.astype(np.float32) - b.astype(np.float32)).mean())


def find_sprite(scene: Scene, clip: Clip, video: VideoConfig) -> Float[np.ndarray, "T 2"]:
    """Where the sprite of `scene` is in each frame of a clip of it, column and row in pixels, whatever its path.

    The place whose render is nearest to the frame. Places are whole pixels from the start, so the true place is missed by .35 pixels on
    average. Only for scenes without camera movement and effect.
    """
    places, renders = _places(scene, video)
    flat = renders.reshape(len(renders), -1).astype(np.float32)
    errors = np.square(flat).sum(1) - 2 * clip.reshape(len(clip), -1).astype(np.float32) @ flat.T
    return places[errors.argmin(1)]


@lru_cache(maxsize=1)  # the controls of a pair are scored one after the other, against the same clips
def _candidates(scene: Scene, factor: str, video: VideoConfig) -> list[Clip]:
    """The render of a scene, then those of its alternatives."""
    return [pixels.render(each, video) for each in (scene, *alternatives(scene, factor, RETRIEVAL_KEY))]


@lru_cache(maxsize=1)
def _under_cameras(scene: Scene, video: VideoConfig) -> list[Clip]:
    """The scene under each of `CAMERAS`."""
    return [pixels.render(scene._replace(camera=camera), video) for camera in CAMERAS]


@lru_cache(maxsize=1)
def _places(scene: Scene, video: VideoConfig) -> tuple[Float[np.ndarray, "N 2"], UInt8[np.ndarray, "N H W 3"]]:
    """Places of the sprite, and the picture with it there."""
    start, reach = pixels.track(scene, video)[0], pixels.EDGE * video.height / 2 + 1
    middle = np.array([video.width, video.height]) / 2 - 0.5
    column, row = (np.arange(np.ceil(low), high) for low, high in zip(middle - reach - start, middle + reach - start, strict=True))
    moved = np.stack(np.meshgrid(column, row), -1).reshape(-1, 2)
    return start + moved, pixels.render_moved(scene, video, moved)


def find_camera(scene: Scene, clip: Clip, video: VideoConfig) -> scenes.Camera | None:
    """The camera with which a render of `scene` is nearest to the clip; None is one that does not move."""
    errors = [distance(clip, render) for render in _under_cameras(scene._replace(camera=None), video)]
    return CAMERAS[int(np.argmin(errors))]


def _appearance(clip: Clip, truth: Clip, where: Bool[np.ndarray, "T H W"]) -> dict[str, float]:
    """Differences of mean colour and mean contrast over a part of the picture."""

    def colour(x: np.ndarray) -> np.ndarray:
        return x[where].mean(0)

    def contrast(x: np.ndarray) -> np.ndarray:
        steps = [np.abs(np.diff(x, axis=axis, append=x.take([-1], axis))) for axis in (1, 2)]
        return (steps[0] + steps[1])[where].mean(0)

    a, b = clip.astype(np.float64) / 255, truth.astype(np.float64) / 255
    return {name: float(np.linalg.norm(f(a) - f(b)) / 3**0.5) for name, f in (("colour", colour), ("texture", contrast))}


def interval(values: Sequence[float] | Float[np.ndarray, " N"], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean over pairs, from a fixed seed."""
    x = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)
