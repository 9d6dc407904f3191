"""Transfers of held-out pairs of the procedural world, many at a time, and the controls that tell what a score is worth.

transfer   the model with the pair's reference
swapped    the model with the reference of another pair of the same task, scored against this pair's truth
none       the model without a reference; where the language model tells what to do, it is shown a grey clip
still      the true first frame, held
copied     the reference itself
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from configs.errors import RequestError
from configs.run import Config
from data_pipelines import clips
from omnitransfer_jax import load_models
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import Alignment, MLLMInputs
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from world import pixels
from world.pair_records import Encoder, example
from world.pairs import SHARES, Example
from world.scores import interval, scores

CONTROLS = ("transfer", "swapped", "none", "still", "copied")
Clips = UInt8[np.ndarray, "B T H W 3"]
BATCH = 40


class Networks(NamedTuple):
    """What trained."""

    dit: WanDiT
    alignment: Alignment | None


def load(config: Config, folder: str) -> Networks:
    """The networks of a run or of an imported folder."""
    return Networks(load_models.load_dit(folder, config), load_models.load_alignment(folder, config) if config.alignment.enabled else None)


def held_out(config: Config, task: str, count: int, key: int = 1) -> list[Example]:
    """`count` pairs of one task whose shared value training never saw."""
    return [example(config, key, index, "held_out", task) for index in range(count)]


class Transfer:
    """Makes clips from pairs with the networks of one configuration; one program for all tasks of a family."""

    def __init__(self, config: Config, encoder: Encoder):
        self.config, self.encoder = config, encoder
        vae = encoder.encode_video.args[0]
        self.decode = partial(jax.jit(WanVAE.decode), vae)
        self.sample = jax.jit(self._sample)

    def __call__(
        self, networks: Networks, pairs: Sequence[Example], with_reference: bool = True, on_batch: Callable[[int], object] | None = None
    ) -> Clips:
        """A clip for every pair; each pair's noise depends on its place in `pairs` alone."""
        made = []
        for i in range(0, len(pairs), BATCH):
            batch = list(pairs[i : i + BATCH])
            conditions = self.conditions(networks, batch + batch[-1:] * (BATCH - len(batch)), with_reference)
            made.append(self.make(networks, conditions, i)[: len(batch)])
            if on_batch is not None:
                on_batch(len(batch))
        return np.concatenate(made)

    def make(self, networks: Networks, conditions: Conditions, seed: int) -> Clips:
        """Clips from the conditions of a batch."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), seed)
        return clips.to_bytes(np.asarray(self.decode(self.sample(networks, conditions, key))))

    def conditions(self, networks: Networks, pairs: Sequence[Example], with_reference: bool = True) -> Conditions:
        """What the transformer reads of pairs that are all of one family."""
        arrays = self.encoder(pairs)
        if not with_reference and "mllm_inputs" in arrays:
            size, first = self.config.data.reference, arrays["first_frame"]
            grey = np.zeros((len(pairs), size.frames, size.height, size.width, 3), np.float32)
            arrays["mllm_inputs"]["features"] = self.encoder.look(first, arrays["has_image"], grey)
        task, text = jnp.asarray(arrays["task"]), jnp.asarray(arrays["text"])
        if networks.alignment is not None:
            text = self.tell(networks.alignment, MLLMInputs(**jax.tree.map(jnp.asarray, arrays["mllm_inputs"])), task)
        references = ()
        if with_reference and self.config.train.references:
            references = (self.open(jnp.asarray(arrays["reference"]), task),)
        image = jnp.asarray(arrays["image"]) if arrays["has_image"].any() else None
        return Conditions(text, jnp.zeros_like(text), image, jnp.asarray(arrays["condition"]), references)

    def combined(self, networks: Networks, *asked: Sequence[Example]) -> Clips:
        """Clips that follow several references at once: one list of at most `BATCH` pairs for each, of equal targets and prompts."""
        count = len(asked[0])
        told = [self.conditions(networks, [*pairs, *[pairs[-1]] * (BATCH - count)]) for pairs in asked]
        text = told[0].text_context if networks.alignment is None else jnp.concatenate([each.text_context for each in told], axis=1)
        references = tuple(reference for each in told for reference in each.references)
        return self.make(networks, told[0]._replace(text_context=text, negative_context=jnp.zeros_like(text), references=references), 0)[
            :count
        ]

    def open(self, latents: jax.Array, task: jax.Array) -> omnitransfer.Reference:
        """Encoded references, flagged and placed."""
        target = self.config.video.patches(self.config.vae, self.config.dit.patch)
        return omnitransfer.make_reference(latents, task, target, by=self.config.dit.offsets)

    @staticmethod
    @jax.jit
    def tell(alignment: Alignment, seen: MLLMInputs, task: jax.Array) -> jax.Array:
        """The language model's context."""
        return alignment(seen, task)

    def _sample(self, networks: Networks, conditions: Conditions, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (conditions.text_context.shape[0], *self.config.video.latent_shape(self.config.vae)))
        embed_text = omnitransfer.embeds_text(self.config)
        return omnitransfer.denoise(networks.dit, conditions, noise, self.config.sampler, embed_text=embed_text)


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
    """What came of held-out pairs: by task, then control, then score; one number a pair."""

    pairs: dict[str, list[Example]]
    clips: dict[str, dict[str, Clips]]
    scores: dict[str, dict[str, dict[str, Float[np.ndarray, " N"]]]]

    def mean(self, task: str, score: str, control: str = "transfer") -> float:
        """Over the pairs of a task."""
        return float(self.scores[task][control][score].mean())

    def table(self) -> dict[str, Any]:
        """Means with their 95% bootstrap intervals over pairs, in words of JSON."""

        def told(values: Float[np.ndarray, " N"]) -> dict[str, Any]:
            return {"mean": float(values.mean()), "interval": interval(values), "pairs": len(values)}

        return {
            task: {control: {name: told(values) for name, values in found.items()} for control, found in controls.items()}
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
