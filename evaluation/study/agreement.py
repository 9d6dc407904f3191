"""Agreement between raters: Krippendorff's alpha for ordinal values (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).

1 is perfect agreement, 0 what chance gives. Answers may be missing, and raters need not have seen the same clips.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np


def alpha(units: Collection[Sequence[float]]) -> float:
    """Ordinal alpha of the values that each unit was given; NaN if no unit has two, or if all values are equal."""
    rated = [values for values in units if len(values) > 1]
    grades = sorted({value for values in rated for value in values})
    if len(grades) < 2:
        return math.nan
    counts = np.array([[sum(value == grade for value in values) for grade in grades] for values in rated], np.float64)
    weights = 1 / (counts.sum(1) - 1)
    observed = np.einsum("u,uc,uk->ck", weights, counts, counts) - np.diag(weights @ counts)  # coincidences of values in a unit
    total = observed.sum(0)
    expected = (np.outer(total, total) - np.diag(total)) / (total.sum() - 1)
    ends = np.cumsum(total) - total / 2  # the distance of two grades is the number of values between their middles
    distance = (ends[:, None] - ends) ** 2
    return float(1 - (observed * distance).sum() / (expected * distance).sum())
