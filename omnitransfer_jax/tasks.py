"""The five tasks as data (paper Table 1): the flag in a reference's mask channels, and the offset of its tokens.

A batch has its tasks as indices into `TASKS`. Flags and offsets are looked up by index, so one compiled step works for any mix of tasks.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from configs.errors import RequestError


class Task(NamedTuple):
    """One kind of transfer, from a reference video to the target."""

    name: str
    family: Literal["temporal", "appearance"]
    """Temporal: image-to-video, the reference's tokens are to the right of the target's. Appearance: text-to-video, they are after it."""
    flag: float
    """Value of the reference's mask channels (section 4.1)."""
    template: str
    """Instruction for the language model, before the prompt (section 4.4; the paper gives no text)."""


TASKS = (
    Task("id", "appearance", -2.0, "Keep the identity of the reference and place it in a new scene."),
    Task("style", "appearance", -3.0, "Take the style of the reference and keep none of its content."),
    Task("motion", "temporal", -1.0, "Take the motion of the reference and keep the look of the first frame."),
    Task("camera", "temporal", -1.0, "Take the camera movement of the reference and keep the scene of the first frame."),
    Task("effect", "temporal", -1.0, "Take the visual effect of the reference and keep the subject of the first frame."),
)
NAMES = tuple(task.name for task in TASKS)


def task_index(name: str) -> int:
    """The index of a task in `TASKS`; a `RequestError` for an unknown name."""
    if name not in NAMES:
        raise RequestError(f"task {name!r}: not one of {', '.join(NAMES)}")
    return NAMES.index(name)


def flags(task: Int[Array, " B"]) -> Float[Array, " B"]:
    """The flag of each sample's reference."""
    return jnp.asarray([t.flag for t in TASKS])[task]


def is_temporal(task: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether each sample is image-to-video, so that its target has a first frame and CLIP features."""
    return jnp.asarray([t.family == "temporal" for t in TASKS])[task]


def offsets(
    task: Int[Array, " B"], target_grid: tuple[int, int, int], rank: int = 1, by: Literal["task", "frames", "beside"] = "task"
) -> Int[Array, "B 3"]:
    """The offset of each reference from the target's origin, in patches (time, row, column) like `target_grid`; section 4.2, Eq. 2.

    The paper writes (time, width, height): temporal (0, width, 0), appearance (frames, 0, 0). `rank` k multiplies the offset by k, for
    the k-th of several references. `by` is `DiTConfig.offsets`: with "frames", the paper's baseline without positional bias, every task
    has the offset of appearance; with "beside", Wan-Animate-2's, every reference is one frame later and one width to the right.
    """
    frames, _, columns = target_grid
    beside, after = jnp.array([[0, 0, columns]]), jnp.array([[frames, 0, 0]])
    if by == "beside":
        return jnp.broadcast_to(jnp.array([[1, 0, rank * columns]]), (*task.shape, 3))
    return rank * jnp.where(is_temporal(task)[:, None] & (by == "task"), beside, after)
