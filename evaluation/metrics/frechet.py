"""The Fréchet distance of two sets of features (Heusel et al., arXiv 1706.08500); on I3D's logits it is the Fréchet video distance.

    d = |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

With centred features A (n rows) and B (m rows), S = A^T A / (n - 1), and the last trace is the sum of the singular values of A B^T over
sqrt((n - 1) (m - 1)): no matrix of features times features is made, and no square root of a singular matrix.
"""

import numpy as np
from jaxtyping import Float

from configs.errors import require


def distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """0 for equal sets. The fewer features a set has, the larger it is, so compare sets of equal size; two of each at least."""
    require(min(len(a), len(b)) > 1, f"{len(a)} and {len(b)} clips: a distance of sets needs two of each")
    a, b = a.astype(np.float64), b.astype(np.float64)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    a, b = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt(n * m)
    return float(apart + np.square(a).sum() / n + np.square(b).sum() / m - 2 * shared)
