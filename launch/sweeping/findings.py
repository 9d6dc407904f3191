"""What the trials of a sweep say: how much each field matters, and how the loss falls with compute."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

FEWEST = 4  # trials, below which nothing is said
GROUPS = 4  # into which the values of a range are cut
CONFIDENCE = 0.95


def importance(points: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """By field, the share of the variance of the objective's ranks that the field alone explains, from 0 to 1, the largest first.

    The trials are grouped by the field's value, numbers in at most four groups of equal size; the share is epsilon squared of one-way
    analysis of variance (Kelley 1935), which is eta squared corrected for what groups explain by chance. Empty for fewer than four trials.
    """
    if len(values) < FEWEST:
        return {}
    ranks = np.argsort(np.argsort(values)).astype(float)
    found = {name: _explained(_groups([point[name] for point in points]), ranks) for name in points[0]}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(values: Sequence[Any]) -> list[int]:
    """The group of each value."""
    kinds = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(kinds) <= GROUPS or not all(isinstance(value, int | float) for value in kinds):
        return [kinds.index(value) for value in values]
    edges = np.quantile(np.array(values, float), np.arange(1, GROUPS) / GROUPS)
    return np.searchsorted(edges, np.array(values, float), side="right").tolist()


def _explained(groups: Sequence[int], ranks: np.ndarray) -> float:
    names = sorted(set(groups))
    if not 1 < len(names) < len(ranks):
        return 0.0
    parts = [ranks[np.array(groups) == name] for name in names]
    within = sum(((part - part.mean()) ** 2).sum() for part in parts)
    whole = ((ranks - ranks.mean()) ** 2).sum()
    between, freedom = whole - within, len(names) - 1
    return float(max((between - freedom * within / (len(ranks) - len(names))) / whole, 0.0))


class PowerLaw(NamedTuple):
    """loss = factor * FLOPs ** -exponent, fitted to the best trial of each size."""

    factor: float
    exponent: float
    low: float
    high: float
    """The exponent's interval at 95%, if the logarithms' errors are normal."""
    points: tuple[tuple[float, float], ...]
    """Total FLOPs and loss of the trials that it is fitted to."""

    def at(self, flops: float) -> float:
        return self.factor * flops**-self.exponent


def power_law(flops: Sequence[float], values: Sequence[float]) -> PowerLaw | None:
    """A straight line through the logarithms by least squares; None for fewer than three sizes, or values that are not positive."""
    best: dict[float, float] = {}
    for cost, value in zip(flops, values, strict=True):
        best[cost] = min(value, best.get(cost, math.inf))
    if len(best) < 3 or min(best) <= 0 or min(best.values()) <= 0:
        return None
    points = sorted(best.items())
    x, y = np.log(np.array(points)).T
    line: Any = stats.linregress(x, y)
    slope, intercept = float(line.slope), float(line.intercept)
    reach = float(line.stderr) * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2))
    return PowerLaw(math.exp(intercept), -slope, -slope - reach, -slope + reach, tuple(points))
