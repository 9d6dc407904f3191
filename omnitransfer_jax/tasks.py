"""The five tasks as data (paper Table 1): what a reference gives, how it is flagged, and where its tokens stand.

A batch names its tasks by index; flags, offsets and switches are looked up, never branched on, so one compiled step serves any mix.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from configs.errors import RequestError


class Task(NamedTuple):
    """One kind of transfer."""

    name: str
    family: Literal["temporal", "appearance"]
    """Temporal: image-to-video, the reference stands beside the target. Appearance: text-to-video, the reference comes after it."""
    flag: float
    """What the reference's mask channels hold (section 4.1)."""
    takes: str
    """What is taken from the reference."""
    template: str
    """What the language model is told of the task, before the prompt (section 4.4; the paper gives no text)."""


TASKS = (
    Task("id", "appearance", -2.0, "identity", "Keep the identity of the reference and place it in a new scene."),
    Task("style", "appearance", -3.0, "style", "Take the style of the reference and keep none of its content."),
    Task("motion", "temporal", -1.0, "motion", "Take the motion of the reference and keep the look of the first frame."),
    Task("camera", "temporal", -1.0, "camera movement", "Take the camera movement of the reference and keep the scene of the first frame."),
    Task("effect", "temporal", -1.0, "visual effect", "Take the visual effect of the reference and keep the subject of the first frame."),
)
NAMES = tuple(task.name for task in TASKS)


def task_index(name: str) -> int:
    """The place of a task in `TASKS`; an unknown one is a `RequestError`."""
    if name not in NAMES:
        raise RequestError(f"task {name!r}: not one of {', '.join(NAMES)}")
    return NAMES.index(name)


def flags(task: Int[Array, " B"]) -> Float[Array, " B"]:
    """The flag of each sample's reference."""
    return jnp.asarray([t.flag for t in TASKS])[task]


def is_temporal(task: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether each sample is image-to-video: its target has a first frame and CLIP features."""
    return jnp.asarray([t.family == "temporal" for t in TASKS])[task]


def offsets(
    task: Int[Array, " B"], target_grid: tuple[int, int, int], rank: int = 1, by: Literal["task", "frames"] = "task"
) -> Int[Array, "B 3"]:
    """How far each reference is moved from the target's origin, in patches (time, row, column); section 4.2, Eq. 2.

    The paper writes (time, width, height): temporal (0, width, 0), appearance (frames, 0, 0). `target_grid` is in patches
    (time, row, column), and so is the result. `rank` k puts a reference k times as far, for several of one family. `by` "frames" is the
    paper's baseline, without positional bias: every reference stands as an appearance reference does.
    """
    frames, _, columns = target_grid
    beside, after = jnp.array([[0, 0, columns]]), jnp.array([[frames, 0, 0]])
    return rank * jnp.where(is_temporal(task)[:, None] & (by == "task"), beside, after)
