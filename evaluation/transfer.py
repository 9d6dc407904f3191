"""Transfers of held-out pairs of the procedural world, many at a time, and the controls that their scores are compared with.

transfer   the model with the pair's reference
swapped    the model with the reference of another pair of the same task, scored against this pair's target
none       the model without a reference; with alignment the language model reads a grey clip in its place
still      the target's first frame, in all frames
copied     the reference itself
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from configs.errors import RequestError
from configs.run import Config
from data_pipelines import clips
from data_pipelines.encoders import Encoders, place_references
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from world import pixels
from world.pair_records import example, render
from world.pairs import SHARES, Example
from world.scores import interval, scores

CONTROLS = ("transfer", "swapped", "none", "still", "copied")
Clips = UInt8[np.ndarray, "B T H W 3"]
BATCH = 40


class Networks(NamedTuple):
    """The networks that were trained."""

    dit: WanDiT
    alignment: Alignment | None


def load(config: Config, folder: str) -> Networks:
    """The networks of a run or of an imported folder."""
    alignment = load_models.load_alignment(folder, config) if config.alignment.enabled else None
    return Networks(load_models.load_dit(folder, config, make_mesh(config.mesh)), alignment)


def held_out(config: Config, task: str, count: int, key: int = 1) -> list[Example]:
    """`count` pairs of one task whose shared value does not occur in training."""
    return [example(config, key, index, "held_out", task) for index in range(count)]


def padded(pairs: Sequence[Example]) -> list[Example]:
    """A batch of pairs: `pairs`, and the last of them again up to `BATCH`."""
    return [*pairs, *[pairs[-1]] * (BATCH - len(pairs))]


class Transfer:
    """Makes clips from pairs with the networks of one configuration; one program for all tasks of a family."""

    def __init__(self, config: Config, encoders: Encoders):
        self.config, self.encoders = config, encoders
        self.denoise = omnitransfer.denoise_on(make_mesh(config.mesh), config)

    def __call__(
        self, networks: Networks, pairs: Sequence[Example], with_reference: bool = True, on_batch: Callable[[int], object] | None = None
    ) -> Clips:
        """A clip for every pair; each pair's noise depends on its place in `pairs` alone."""
        made = []
        for i in range(0, len(pairs), BATCH):
            batch = pairs[i : i + BATCH]
            conditions = self.conditions(networks, padded(batch), with_reference=with_reference)
            made.append(self.make(networks, conditions, i)[: len(batch)])
            if on_batch is not None:
                on_batch(len(batch))
        return np.concatenate(made)

    def combined(self, networks: Networks, *lists: Sequence[Example]) -> Clips:
        """Clips that follow several references at once: one list of at most `BATCH` pairs for each, of equal targets and prompts."""
        return self.make(networks, self.conditions(networks, *map(padded, lists)), 0)[: len(lists[0])]

    def make(self, networks: Networks, conditions: Conditions, seed: int) -> Clips:
        """Clips from the conditions of a batch."""
        return clips.to_bytes(self.encoders.decode(self.sample(networks, conditions, seed)))

    def sample(self, networks: Networks, conditions: Conditions, seed: int) -> jax.Array:
        """Latents from the conditions of a batch."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), seed)
        noise = jax.random.normal(key, (len(conditions.text_context), *self.config.video.latent_shape(self.config.vae)))
        return self.denoise(lambda _: networks.dit, conditions, noise)

    def conditions(self, networks: Networks, *lists: Sequence[Example], with_reference: bool = True) -> Conditions:
        """What the transformer reads of a batch with one list of pairs for each reference, of equal targets and prompts.

        The first frame is given if the task of any list needs it. Without references the language model reads grey clips.
        """
        indices = [np.array([tasks.task_index(pair.task) for pair in pairs], np.int32) for pairs in lists]
        videos = [render(self.encoders.config, pairs) for pairs in lists]
        has_frame = np.max([each.has_first_frame for each in videos], axis=0)
        given = [(task, each.references) for task, each in zip(indices, videos, strict=True) if each.references is not None]
        prompts = [pair.prompt for pair in lists[0]]
        return conditions_of(self.encoders, networks.alignment, prompts, videos[0].first_frames, has_frame, given, with_reference)


def conditions_of(
    encoders: Encoders,
    alignment: Alignment | None,
    prompts: Sequence[str],
    frames: Float[np.ndarray, "B H W 3"],
    has_frame: Float[np.ndarray, " B"],
    references: Sequence[tuple[Int[np.ndarray, " B"], Float[np.ndarray, "B T h w 3"]]],
    with_reference: bool = True,
) -> Conditions:
    """What the transformer reads of a batch with `references` (task, clips); pixels are in [-1, 1].

    `has_frame` is 0 where there is no first frame. Without references the language model reads grey clips in their place.
    """
    config, inputs, latents = encoders.config, [], []
    for task, clips_of in references:
        if with_reference and config.train.references:
            latents.append((task, encoders.latents(clips_of)))
        if alignment is not None:
            given = clips_of if with_reference else np.zeros_like(clips_of)
            inputs.append((task, encoders.mllm_inputs(task, prompts, frames, has_frame, given)))
    context, negative = encoders.contexts(prompts, alignment, inputs)
    image, condition = encoders.first_frames(frames, has_frame)
    placed = place_references(config, config.video, latents)
    given = jnp.asarray(image) if image is not None and has_frame.any() else None
    return Conditions(context, negative, given, jnp.asarray(condition), placed)


def with_control(
    control: str, transfer: Transfer, networks: Networks, pairs: Sequence[Example], on_batch: Callable[[int], object] | None = None
) -> Clips:
    """The clips of one of `CONTROLS` for pairs of one task."""
    config = transfer.config
    match control:
        case "transfer":
            return transfer(networks, pairs, on_batch=on_batch)
        case "swapped":
            return transfer(networks, swapped(pairs), on_batch=on_batch)
        case "none":
            return transfer(networks, pairs, with_reference=False, on_batch=on_batch)
        case "still":
            return np.stack([np.repeat(pixels.render(pair.target, config.video)[:1], config.video.frames, 0) for pair in pairs])
        case _:
            return np.stack([pixels.render(pair.reference, config.video) for pair in pairs])


def swapped(pairs: Sequence[Example]) -> list[Example]:
    """Each pair with the reference of the next one that shares another value; a `RequestError` if all share the same."""
    found = []
    for i, pair in enumerate(pairs):
        factor = SHARES[pair.task]
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((o for o in others if getattr(o.target, factor) != getattr(pair.target, factor)), None)
        if other is None:
            raise RequestError(f"{len(pairs)} pairs of task {pair.task!r} that all share one {factor}: nothing to swap; give more pairs")
        found.append(pair._replace(reference=other.reference))
    return found


class Results(NamedTuple):
    """Clips and scores of held-out pairs: by task, then control, then score; one number a pair."""

    pairs: dict[str, list[Example]]
    clips: dict[str, dict[str, Clips]]
    scores: dict[str, dict[str, dict[str, Float[np.ndarray, " N"]]]]

    def mean(self, task: str, score: str, control: str = "transfer") -> float:
        """The mean over the pairs of a task."""
        return float(self.scores[task][control][score].mean())

    def table(self) -> dict[str, Any]:
        """Means with their 95% bootstrap intervals over pairs, as JSON has them."""

        def entry(values: Float[np.ndarray, " N"]) -> dict[str, Any]:
            return {"mean": float(values.mean()), "interval": interval(values), "pairs": len(values)}

        return {
            task: {control: {name: entry(values) for name, values in found.items()} for control, found in controls.items()}
            for task, controls in self.scores.items()
        }


def measure(
    transfer: Transfer,
    networks: Networks,
    pairs: dict[str, list[Example]],
    controls: Sequence[str] = CONTROLS,
    on_batch: Callable[[int], object] | None = None,
) -> Results:
    """Every control of every task; `psnr gain` is the PSNR above that of the same network without a reference."""
    made, found = {}, {}
    for task, of_task in pairs.items():
        made[task] = {control: with_control(control, transfer, networks, of_task, on_batch) for control in controls}
        each = [
            {control: scores(pair, clips_of[i], transfer.config.video) for control, clips_of in made[task].items()}
            for i, pair in enumerate(of_task)
        ]
        found[task] = {control: {name: np.array([row[control][name] for row in each]) for name in each[0][control]} for control in controls}
        if "none" in controls:
            for of_control in found[task].values():
                of_control["psnr gain"] = of_control["psnr"] - found[task]["none"]["psnr"]
    return Results(pairs, made, found)
