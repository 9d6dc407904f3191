"""What a clip has of a reference's look, and how steady it is; no weights.

Colours and pixels say less than features of a network would: compare rows of one table with each other, not with published figures.
"""

import numpy as np
from jaxtyping import Float, UInt8

LEVELS = 8  # of each colour channel


def appearance_leak(clip: UInt8[np.ndarray, "T H W 3"], reference: UInt8[np.ndarray, "t h w 3"]) -> float:
    """The share of pixels whose colour, in steps of 1/8 of each channel, both clips have equally often: 0 to 1, lower is better."""
    return float(np.minimum(colours(clip), colours(reference)).sum())


def colours(clip: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, " K"]:
    """How often each colour occurs; the sum is 1."""
    red, green, blue = np.moveaxis(clip.astype(np.int64) * LEVELS // 256, -1, 0)
    index = (red * LEVELS + green) * LEVELS + blue
    return np.bincount(index.ravel(), minlength=LEVELS**3) / index.size


def temporal_consistency(clip: UInt8[np.ndarray, "T H W 3"]) -> float:
    """The correlation of each frame's pixels with the next frame's, mean over the clip; 1 for a frozen one, which is no merit.

    Frames of one colour have no correlation: two of them count as 1, one as 0.
    """
    x = clip.reshape(len(clip), -1).astype(np.float64)
    x -= x.mean(1, keepdims=True)
    size = np.linalg.norm(x, axis=1)
    flat = size < 1e-6
    steps = (x[1:] * x[:-1]).sum(1) / np.maximum(size[1:] * size[:-1], 1e-12)
    return float(np.where(flat[1:] | flat[:-1], flat[1:] & flat[:-1], steps).mean())
