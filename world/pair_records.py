"""Pairs of the procedural world as the network reads them: rendered and encoded a batch at a time, the same arrays as real clips have."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from configs.run import Config
from data_pipelines import clips, mllm_inputs
from data_pipelines.records import shapes, to_bits
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import clean_prompt, tokenize
from world import pixels, scenes
from world.pairs import Example, Split, draw_pair


def example(config: Config, key: int, index: int, split: Split, task: str | None = None) -> Example:
    """Pair `index` of the world; for a network that reads no reference the prompt tells everything there is in the target."""
    pair = draw_pair(key, index, split, task)
    return pair if config.train.references else pair._replace(prompt=scenes.caption(pair.target))


class Drawn(NamedTuple):
    """The clips of a batch of pairs, in [-1, 1]."""

    targets: Float[np.ndarray, "B T H W 3"]
    references: Float[np.ndarray, "B t h w 3"]


class Encoder:
    """The frozen encoders of a checkpoint over batches of pairs; every batch size is compiled once."""

    def __init__(self, config: Config, folder: str):
        """`folder` as in `load_models`."""
        self.config = config
        self.vocabulary = load_models.load_vocabulary(folder)
        self.encode_video = partial(jax.jit(WanVAE.encode), load_models.load_vae(folder, config))
        self.encode_first_frame = partial(jax.jit(omnitransfer.encode_first_frame, static_argnames="shape"), self.encode_video.args[0])
        self.encode_image = partial(jax.jit(omnitransfer.encode_image), load_models.load_image_encoder(folder, config))
        self.encode_text = partial(jax.jit(omnitransfer.encode_text), load_models.load_text_encoder(folder, config))
        size = config.video
        self.video_shape = (size.frames, size.height, size.width)
        self.no_condition = np.asarray(self.encode_first_frame(None, shape=(1, *self.video_shape)))[0]
        if config.alignment.enabled:
            self.show = partial(mllm_inputs.show, config, load_models.load_mllm_vocabulary(folder))
            self.look = mllm_inputs.look_at_many(config, load_models.load_mllm(folder, config))

    def text(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features "B S E", zero rows beyond a prompt's end, and how many rows each prompt has."""
        tokens, mask = tokenize(self.vocabulary, [clean_prompt(prompt) for prompt in prompts], self.config.dit.text_len)
        return np.asarray(self.encode_text(jnp.asarray(tokens), jnp.asarray(mask))), mask.sum(1)

    def draw(self, pairs: Sequence[Example]) -> Drawn:
        """The clips of `pairs`; no accelerator takes part, so that it can be done while another batch is encoded."""
        target, reference = self.config.video, self.config.data.reference
        return Drawn(
            clips.to_unit(np.stack([pixels.render(pair.target, target) for pair in pairs])),
            clips.to_unit(np.stack([pixels.render(pair.reference, reference) for pair in pairs])),
        )

    def __call__(self, pairs: Sequence[Example], drawn: Drawn | None = None) -> dict[str, Any]:
        """The arrays of `training.Batch` but target (`shown` a dictionary), text_rows and first_frame, for pairs in any mix of tasks."""
        config, (targets, references) = self.config, drawn or self.draw(pairs)
        task = np.array([tasks.task_index(pair.task) for pair in pairs], np.int32)
        temporal = [i for i, pair in enumerate(pairs) if pair.is_temporal]
        text, rows = self.text([pair.prompt for pair in pairs])
        arrays: dict[str, Any] = {
            "first_frame": targets[:, 0],
            "task": task,
            "has_image": np.isin(np.arange(len(pairs)), temporal).astype(np.float32),
        }
        arrays |= {"text": text, "text_rows": rows}
        arrays["condition"] = np.repeat(self.no_condition[None], len(pairs), 0)
        arrays["image"] = np.zeros((len(pairs), *shapes(config)["image"]), np.float32)
        if temporal:
            first = jnp.asarray(targets[temporal, 0])
            arrays["condition"][temporal] = self.encode_first_frame(first, shape=(len(temporal), *self.video_shape))
            arrays["image"][temporal] = self.encode_image(first)
        if not config.train.references:
            return arrays | {"reference": np.zeros((len(pairs), *shapes(config)["reference"]), np.float32)}
        arrays["reference"] = np.asarray(self.encode_video(jnp.asarray(references)))
        if config.alignment.enabled:
            told = [self.show(pair.task, pair.prompt, bool(i)) for pair, i in zip(pairs, arrays["has_image"], strict=True)]
            arrays["mllm_inputs"] = {name: np.stack([each[name] for each in told]) for name in told[0]}
            arrays["mllm_inputs"]["features"] = self.look(targets[:, 0], arrays["has_image"], references)
        return arrays

    def records(self, pairs: Sequence[Example], drawn: Drawn | None = None) -> list[dict[str, Any]]:
        """The records (`records.schema`) of `pairs`."""
        drawn = drawn or self.draw(pairs)
        arrays = self(pairs, drawn)
        arrays["target"] = np.asarray(self.encode_video(jnp.asarray(drawn.targets)))
        shown_arrays = {f"shown_{name}": array for name, array in arrays.pop("mllm_inputs", {}).items()}
        bits = {name: to_bits(arrays[name]) for name in ("target", "condition", "reference", "image", "text")}
        if "shown_features" in shown_arrays:
            bits["shown_features"] = to_bits(shown_arrays.pop("shown_features"))
        records = []
        for i, pair in enumerate(pairs):
            own = {name: array[i] for name, array in (bits | shown_arrays).items()}
            own["text"] = own["text"][: arrays["text_rows"][i]]
            records.append({"id": pair.id, "task": int(arrays["task"][i]), "has_image": arrays["has_image"][i], **own})
        return records
