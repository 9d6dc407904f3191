"""How a clip of stage 0 comes on a screen: one view, two columns in step, or two shots one after the other.

The positional bias of the paper rests on what a base knows of screens (its Figure 3): two things beside each other happen at the same time,
and what lies behind in time comes later. So the base meets both: the clips of a temporal pair side by side, those of an appearance pair one
after the other. The target comes first, for that is where the bias puts it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from configs.run import VideoConfig
from world import pixels
from world.pairs import SHARES, Draw, Example
from world.scenes import FACTORS, caption, phrase

BESIDE, THEN = WORDS = ("beside", "then")
"""What a prompt says between the scenes of a screen."""
LONG = 16
"""Frames from which two shots have room."""
FIRST = 1 / 2
"""The share of all clips that the first size gets; the others share the rest."""


def has_room(pair: Example, video: VideoConfig) -> bool:
    """Whether both clips of `pair` fit on a screen of this size: two columns of a temporal pair, two shots of an appearance pair."""
    return video.width >= 2 * video.height if pair.is_temporal else video.frames >= LONG


def is_for_two(video: VideoConfig) -> bool:
    return video.width >= 2 * video.height or video.frames >= LONG


def choose(pair: Example, sizes: Sequence[VideoConfig], two: bool) -> int:
    """Which of the sizes the clip gets. With `two`, a size with room for two gets only pairs that fill it."""
    fits = [i for i, video in enumerate(sizes) if not two or not is_for_two(video) or has_room(pair, video)]
    draw = Draw("screens", pair.id)
    if fits[0] == 0 and (len(fits) == 1 or draw.happens(FIRST, "first")):
        return 0
    return draw.choose(fits[1:] if fits[0] == 0 else fits, "size")


def prompt(pair: Example, both: bool) -> str:
    """A caption of the target; of `both` also what the reference shows and the target does not. A first frame tells where things are."""
    if not both:
        return caption(pair.target)
    factors = [f for f in FACTORS if f != SHARES[pair.task] and getattr(pair.reference, f) is not None]
    other = [phrase(pair.reference, factor) for factor in factors]
    return " ".join([caption(pair.target), *([BESIDE, *other] if pair.is_temporal else [THEN, *other, *pair.reference.start])])


def render(pair: Example, video: VideoConfig, both: bool) -> UInt8[np.ndarray, "T H W 3"]:
    """The target's clip; of `both` with the reference's to its right, or behind it."""
    if not both:
        return pixels.render(pair.target, video)
    if pair.is_temporal:
        halves, axis = [replace(video, width=video.width // 2)] * 2, 2
    else:
        first = (video.frames + 1) // 2  # odd, as a clip of its own would have: the cut lies between two latent frames
        halves, axis = [replace(video, frames=first), replace(video, frames=video.frames - first)], 0
    return np.concatenate([pixels.render(s, v) for s, v in zip((pair.target, pair.reference), halves, strict=True)], axis)
