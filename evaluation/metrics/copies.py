"""How near a clip is to what it was given: a copy of the reference or of the first frame is no transfer.

All distances are root mean squares of differences of pixels, 0 to 1, of pictures of at most `SIDE` pixels a side.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 64
COPY = 0.06
"""Below this copy distance a clip counts as a copy of its reference."""

Clip = UInt8[np.ndarray, "T H W 3"]


def copy_distance(clip: Clip, reference: UInt8[np.ndarray, "t h w 3"]) -> float:
    """The distance of each frame to the nearest frame of the reference, whichever its time, mean over the clip; higher is better."""
    a, b = small(clip), small(reference, clip.shape[1:3])
    return float(np.mean([np.sqrt(np.square(b - frame).mean((1, 2, 3)).min()) for frame in a]))


def distance(a: Clip, b: Clip) -> float:
    """The distance of two clips, frame by frame, over the frames that both have."""
    frames = min(len(a), len(b))
    return float(np.sqrt(np.square(small(a[:frames]) - small(b[:frames], a.shape[1:3])).mean()))


def first_frame_error(clip: Clip, picture: UInt8[np.ndarray, "H W 3"]) -> float:
    """The distance of the first frame to the one that was given; lower is better."""
    return distance(clip[:1], picture[None])


def caption_share(clip: Clip, without_prompt: Clip, another_reference: Clip) -> float:
    """What an empty prompt changes, as a share of what it and another reference change; lower is better.

    1 if the reference changes nothing, NaN where neither changes anything.
    """
    prompt, reference = distance(clip, without_prompt), distance(clip, another_reference)
    return prompt / (prompt + reference) if prompt + reference > 0 else float("nan")


def small(clip: Clip, shape: tuple[int, ...] | None = None) -> Float[np.ndarray, "T h w 3"]:
    """The clip in [0, 1], averaged down to at most `SIDE` pixels a side; `shape` is the height and width that give the aspect."""
    height, width = (clip.shape[1:3] if shape is None else shape)[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    same = clip.shape[1:3] == (size[1], size[0])
    pictures = clip if same else np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip])
    return pictures.astype(np.float64) / 255
