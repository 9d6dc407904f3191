"""Pairs of scenes that share exactly one factor, which makes transfer a number: the target of a pair is known.

A pair of task X shares the factor of X and no other. Positions are seen on the screen, so the sprites of a motion or camera pair start
from the same place; those of all other pairs do not. Temporal tasks (motion, camera, effect) give the target's first frame, and the
factor of X is all that changes over time in the target, so reference and first frame determine it. Appearance tasks (id, style) give a
caption of every other factor. A held-out pair shares a held-out value; its other factors are drawn as in training.

The same key gives the same pairs on every machine, for every choice is a hash.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from omnitransfer_jax import tasks
from world.pixels import stays_inside
from world.scenes import FACTORS, HELD_OUT, TRAINED, VALUES, Scene, caption

Split = Literal["train", "held_out"]

SHARES = {"id": "identity", "style": "style", "motion": "motion", "camera": "camera", "effect": "effect"}  # task -> factor
TURNS = (*tasks.NAMES, "style", "motion", "camera")  # a network learns the last three late, so they come twice

# How often a scene has a factor that its pair does not share: references and the targets of appearance tasks. Never camera or effect.
PRESENT = {"motion": 1 / 4, "style": 1 / 4}


class Example(NamedTuple):
    """One pair."""

    id: str
    task: str
    reference: Scene
    target: Scene
    prompt: str
    """Empty in temporal tasks; in appearance tasks a caption of all but the shared factor."""

    @property
    def is_temporal(self) -> bool:
        """Whether the target's first frame is given."""
        return tasks.TASKS[tasks.task_index(self.task)].family == "temporal"


def draw_pair(key: int, index: int, split: Split, task: str | None = None) -> Example:
    """Pair `index` of the endless list of pairs with this `key`; the tasks take turns unless `task` names one."""
    task = TURNS[index % len(TURNS)] if task is None else task
    shared, temporal = SHARES[task], tasks.TASKS[tasks.task_index(task)].family == "temporal"
    draw = Draw("world", key, split, task, index)
    value = draw.choose((TRAINED if split == "train" else HELD_OUT)[shared], "shared")
    sides = {}
    for side, presence in (("reference", PRESENT), ("target", {} if temporal else PRESENT)):
        presence = presence | {"identity": 1, "background": 1}
        if task == "id":
            presence = presence | {"style": 0}  # it would hide the colours that are to be kept
        if side == "target" and temporal:
            presence = presence | {"style": PRESENT["style"]}  # the first frame has it
        other = sides.get("reference")
        factors = {shared: value}
        for factor in (f for f in FACTORS if f != shared):
            if draw.happens(presence.get(factor, 0), side, factor, "present"):
                options = [v for v in TRAINED[factor] if other is None or v != getattr(other, factor)]
                factors[factor] = draw.choose(options, side, factor)
        starts = [s for s in VALUES["start"] if stays_inside(s, factors.get("motion")) and (other is None or s != other.start)]
        if other is not None and task in ("motion", "camera"):
            starts = [other.start]
        sides[side] = Scene(start=draw.choose(starts, side, "start"), **factors)
    prompt = "" if temporal else caption(sides["target"], {shared})
    return Example(f"{task}-{split}-{key}-{index}", task, sides["reference"], sides["target"], prompt)


def alternatives(scene: Scene, factor: str, key: int, count: int = 7) -> list[Scene]:
    """`count` scenes that differ from `scene` in one factor, each by another value of it."""
    draw, found = Draw("alternatives", key, caption(scene)), []
    options = [v for v in VALUES[factor] if v != getattr(scene, factor)]
    for k in range(count):
        found.append(options.pop(draw.number(k) % len(options)))
    return [scene._replace(**{factor: value}) for value in found]


class Draw:
    """Random choices that are hashes of a path of words, so they are the same on every machine."""

    def __init__(self, *path: Any):
        self.path = path

    def number(self, *name: Any) -> int:
        """64 random bits."""
        text = "/".join(map(str, (*self.path, *name)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def choose(self, options: Sequence[Any], *name: Any) -> Any:
        """One of `options`."""
        return options[self.number(*name) % len(options)]

    def happens(self, probability: float, *name: Any) -> bool:
        """True with this probability."""
        return self.number(*name) < probability * 2**64
