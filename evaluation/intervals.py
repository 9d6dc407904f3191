"""Bootstrap intervals of means: clips are drawn with replacement, and of each drawn clip its prompts and seeds; of ratings, raters too.

Prompts and seeds of one clip are not independent, so drawing single values would make intervals too narrow.
"""

from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def interval(values: Sequence[float], clips: Sequence[str]) -> tuple[float, float]:
    """95% interval of the mean of `values`, `clips` says which clip each is of; from a fixed seed. NaN where there is one clip alone."""
    names = list(dict.fromkeys(clips))
    if len(names) < 2:
        return float("nan"), float("nan")
    x, of_clip = np.asarray(values, np.float64), np.asarray(clips)
    groups = [x[of_clip == name] for name in names]
    most = max(map(len, groups))
    counts = np.array([len(group) for group in groups])
    padded = np.stack([np.resize(group, most) for group in groups])
    random = np.random.default_rng(0)
    picks = random.integers(0, len(groups), (DRAWS, len(groups)))
    if most == 1:
        means = padded[picks, 0].mean(1)
    else:
        inner = np.floor(random.random((DRAWS, len(groups), most)) * counts[picks][..., None]).astype(int)
        used = np.arange(most) < counts[picks][..., None]
        drawn = padded[picks[..., None], inner]
        means = (drawn * used).sum((1, 2)) / used.sum((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def crossed_interval(values: Sequence[float], clips: Sequence[str], raters: Sequence[str]) -> tuple[float, float]:
    """95% interval of the mean of ratings: clips and raters are both drawn with replacement; NaN where there is one of either alone.

    A rater who is strict is so for all clips, so drawing single ratings would make intervals too narrow (Owen, The pigeonhole bootstrap,
    2007).
    """
    x, random = np.asarray(values, np.float64), np.random.default_rng(0)
    weights = np.ones((DRAWS, len(x)))
    for names in (clips, raters):
        known, place = np.unique(np.asarray(names), return_inverse=True)
        if len(known) < 2:
            return float("nan"), float("nan")
        weights *= random.multinomial(len(known), np.full(len(known), 1 / len(known)), DRAWS)[:, place]
    total = weights.sum(1)
    low, high = np.percentile((weights @ x)[total > 0] / total[total > 0], [2.5, 97.5])
    return float(low), float(high)
