"""Motion fidelity: how well the tracks of a clip find tracks of the reference that go the same way (Yatim et al., arXiv 2311.17009).

    sim[n, m]  = mean over steps of <d_n, d_m>, d the unit vector of a track's displacement from frame to frame
    fidelity   = (mean over tracks n of the clip of max_m sim[n, m] + mean over tracks m of the reference of max_n sim[n, m]) / 2

Both directions are counted, as in that paper; DiTFlow's code has the first alone and subtracts an identity matrix, which is left out
here. Ours: a displacement below `STILL` has no direction; the mean is over steps at which at least one of both tracks moves, and only
tracks that move at all are compared, so a still background tells nothing. Without a moving track in one of the clips the fidelity is 0,
without one in both it is 1.

The tracker is Lucas-Kanade (tracks.py), so the name is MF-LK. Figures are not comparable to those of other trackers.
"""

import numpy as np
from jaxtyping import Float

from evaluation.metrics.tracks import Tracks

NAME = "MF-LK"
STILL = 0.25  # pixels from one frame to the next
LEAST = 0.5  # the share of the steps over which a track must have been followed


def motion_fidelity(clip: Tracks, reference: Tracks) -> float:
    """-1 to 1, and 1 for a clip with itself; clips of unequal length are compared over the frames that both have."""
    frames = min(clip.seen.shape[1], reference.seen.shape[1])
    a, b = (directions(tracks, frames) for tracks in (clip, reference))
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    found = similarity(a, b)
    return float((found.max(1).mean() + found.max(0).mean()) / 2)


def directions(tracks: Tracks, frames: int) -> Float[np.ndarray, "N S 2"]:
    """Unit displacements of the tracks that move and are followed long enough: 0 where still, NaN where lost."""
    moved = np.diff(tracks.places[:, :frames].astype(np.float64), axis=1)
    length = np.linalg.norm(moved, axis=-1, keepdims=True)
    seen = tracks.seen[:, 1:frames]
    found = np.where(length > STILL, moved / np.maximum(length, STILL), 0.0)
    kept = (seen.mean(1) >= LEAST) & (found.any(-1) & seen).any(1)
    return np.where(seen[..., None], found, np.nan)[kept]


def similarity(a: Float[np.ndarray, "N S 2"], b: Float[np.ndarray, "M S 2"]) -> Float[np.ndarray, "N M"]:
    """The mean cosine of each two tracks; 0 where they share no step at which one moves."""
    seen = [~np.isnan(x[..., 0]) for x in (a, b)]
    known = [np.nan_to_num(x) for x in (a, b)]
    moves = [x.any(-1) for x in known]
    products = np.einsum("nsc,msc->nm", *known)  # steps that one track lacks are 0 in it
    both = np.einsum("ns,ms->nm", *(x.astype(float) for x in seen))
    neither = np.einsum("ns,ms->nm", *((x & ~y).astype(float) for x, y in zip(seen, moves, strict=True)))
    steps = both - neither
    return np.where(steps > 0, products / np.maximum(steps, 1), 0.0)
