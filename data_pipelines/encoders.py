"""The frozen networks around the transformer, wired once: every prompt, picture and clip is encoded here.

pairs.py: pixels and prompts of pairs -> Batch -> records         (launch.encode, launch.encode_world)
contexts, first frame, latents -> place_references -> Conditions  (launch.sample, evaluation)
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerFast

from configs.run import Config, VideoConfig, encoder_names
from data_pipelines import mllm_inputs
from data_pipelines.records import RANDOM
from data_pipelines.spread import Spread
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.batch import sample_spec
from omnitransfer_jax.folders import fingerprint, model_folder, run_folder
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import Alignment, MLLMInputs
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.omnitransfer import Reference
from omnitransfer_jax.models.qwen2_5_vision import QwenVision
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import clean_prompt, token_count, tokenize
from omnitransfer_jax.weights.parts import MLLM_TOKENIZER, TOKENIZERS

NETWORKS = ("vision", "vae", "text_encoder", "image_encoder")  # the vision tower first, while there is memory for its language model

align = jax.jit(Alignment.__call__)
decode_clips = jax.jit(WanVAE.decode)
encode_clips = jax.jit(WanVAE.encode)
encode_first_frames = jax.jit(omnitransfer.encode_first_frame, static_argnames="shape")
encode_images = jax.jit(omnitransfer.encode_image)
encode_text = jax.jit(omnitransfer.encode_text)
encode_vision = jax.jit(mllm_inputs.vision_features, static_argnums=0)


class Encoders:
    """The frozen networks of a folder, as functions of batches of NumPy arrays; pixels are in [-1, 1].

    A network is loaded when it is first needed and kept until `release`; it is compiled once for every shape.
    """

    def __init__(self, config: Config, folder: str, devices: Sequence[Any] = ()):
        """`folder` as in `load_models`. With several `devices` each encodes samples of its own (spread.py).

        Weights of other models than those of `config`, templates that do not fit and a wrong vocabulary are a `RequestError` before
        anything is loaded."""
        self.config, self.folder = config, folder
        self.spread = Spread(devices) if len(devices) > 1 else None
        if source := run_folder.imported_weights(folder):
            model_folder.require_model(source, config)
        if config.alignment.enabled:
            for task in tasks.NAMES:
                mllm_inputs.token_inputs(config, self.mllm_vocabulary, task, "", has_first_frame=True)

    def of_size(self, config: Config) -> "Encoders":
        """The same networks, as far as they are loaded, for videos of the sizes of `config`, which differs in nothing else."""
        found = copy(self)
        found.config = config
        found.spread = self.spread and Spread(self.spread.mesh.devices.tolist())
        vars(found).pop("no_condition", None)
        return found

    @property
    def together(self) -> int:
        """How many samples are best given at once."""
        return 1 if self.spread is None else self.spread.mesh.size

    @cached_property
    def vae(self) -> WanVAE:
        return self._placed(load_models.load_vae(self.folder, self.config))

    @cached_property
    def text_encoder(self) -> UMT5Encoder:
        return self._placed(load_models.load_text_encoder(self.folder, self.config))

    @cached_property
    def image_encoder(self) -> CLIPVision:
        return self._placed(load_models.load_image_encoder(self.folder, self.config))

    @cached_property
    def vision(self) -> QwenVision:
        return self._placed(load_models.load_mllm(self.folder, self.config).vision)

    @cached_property
    def vocabulary(self) -> PreTrainedTokenizerFast:
        return load_models.load_vocabulary(self.folder)

    @cached_property
    def mllm_vocabulary(self) -> PreTrainedTokenizerFast:
        return load_models.load_mllm_vocabulary(self.folder)

    def load(self) -> None:
        """Loads every network that a record needs, so that an absent one is an error before the first record."""
        unused = {"vision"} if not self.config.alignment.enabled else set()
        unused |= {"image_encoder"} if self.config.dit.image_dim is None else set()
        for name in NETWORKS:
            if name not in unused:
                getattr(self, name)

    def release(self, keep: Sequence[str] = ()) -> None:
        """Lets the networks go, but for those to `keep`; they are loaded again if they are needed again."""
        for name in NETWORKS:
            if name not in keep:
                vars(self).pop(name, None)

    def _placed(self, network: Any) -> Any:
        return network if self.spread is None else self.spread.place(network)

    def _run(self, function: Callable[..., Any], network: Any, *batch: np.ndarray) -> np.ndarray:
        """`function(network, *batch)`, one of those above, on the devices."""
        if self.spread is None:
            return np.asarray(function(network, *map(jnp.asarray, batch)))
        return self.spread(function, function, network, *batch)

    def latents(self, videos: Float[np.ndarray, "B T H W 3"]) -> Float[np.ndarray, "B F h w C"]:
        """Clips to latents."""
        return self._run(encode_clips, self.vae, videos)

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[np.ndarray, "B T H W 3"]:
        """Latents to clips."""
        return np.asarray(decode_clips(self.vae, latents))

    def text(self, prompts: Sequence[str]) -> tuple[Float[np.ndarray, "B S E"], Int[np.ndarray, " B"]]:
        """UMT5's features, zero rows beyond a prompt's end, and how many rows each prompt has."""
        tokens, mask = tokenize(self.vocabulary, [clean_prompt(prompt) for prompt in prompts], self.config.dit.text_len)
        return self._run(encode_text, self.text_encoder, tokens, mask), mask.sum(1)

    def cut_prompts(self, prompts: Mapping[str, str], task: str | None = None) -> list[str]:
        """A sentence for each of `prompts`, by the name it has there, that is longer than what its encoder reads.

        The text encoder reads them, or with a `task` the language model, behind the task's template.
        """
        config, found = self.config, []
        for name, prompt in prompts.items():
            if task is None:
                count, room, field = token_count(self.vocabulary, clean_prompt(prompt)), config.dit.text_len, "dit.text_len"
            else:
                count = len(mllm_inputs.instruction(self.mllm_vocabulary, task, prompt))
                room, field = config.alignment.prompt_tokens, "alignment.prompt_tokens"
            if count > room:
                found.append(f"{name} has {count} tokens: {room} are read ({field}), the end is cut off")
        return found

    def image(self, frames: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B I J"]:
        """CLIP's features of first frames."""
        return self._run(encode_images, self.image_encoder, frames)

    def condition(self, frames: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B F h w c"]:
        """Mask and latents of videos that start with these frames."""
        shape = (self.config.video.frames, *frames.shape[1:3])
        if self.spread is None:
            return np.asarray(encode_first_frames(self.vae, jnp.asarray(frames), shape=(len(frames), *shape)))
        return self.spread("condition", lambda vae, frame: encode_first_frames(vae, frame, shape=(1, *shape)), self.vae, frames)

    @cached_property
    def no_condition(self) -> Float[np.ndarray, "1 F h w c"]:
        """Mask and latents of a video without a first frame: the mask is 0, and all frames are grey."""
        size = self.config.video
        shape = (1, size.frames, size.height, size.width)
        if self.spread is None:
            return np.asarray(encode_first_frames(self.vae, None, shape=shape))
        return self.spread("no condition", lambda vae, _: encode_first_frames(vae, None, shape=shape), self.vae, np.zeros((1, 1)))

    def first_frames(
        self, frames: Float[np.ndarray, "B H W 3"], has_frame: Float[np.ndarray, " B"]
    ) -> tuple[Float[np.ndarray, "B I J"] | None, Float[np.ndarray, "B F h w c"]]:
        """`image` and `condition` of each sample; zeros and `no_condition` where `has_frame` is 0. No image without an image branch."""
        spec = sample_spec(self.config).image
        image = None if spec is None else np.zeros((len(frames), *spec.shape), np.float32)
        condition, given = np.repeat(self.no_condition, len(frames), 0), np.flatnonzero(has_frame)
        if len(given):
            condition[given] = self.condition(frames[given])
        if len(given) and image is not None:
            image[given] = self.image(frames[given])
        return image, condition

    def mllm_inputs(
        self,
        task: Int[np.ndarray, " B"],
        prompts: Sequence[str],
        frames: Float[np.ndarray, "B H W 3"],
        has_frame: Float[np.ndarray, " B"],
        references: Float[np.ndarray, "B T h w 3"],
    ) -> MLLMInputs:
        """What the language model reads of each sample; the first frame is left out where `has_frame` is 0."""
        picked = references[:, mllm_inputs.picked_frames(references.shape[1], self.config.alignment.frames)]
        features: Any = self._vision(frames, has_frame, picked)
        texts = [
            mllm_inputs.token_inputs(self.config, self.mllm_vocabulary, tasks.NAMES[index], prompt, bool(has))
            for index, prompt, has in zip(task, prompts, has_frame, strict=True)
        ]
        stacked: dict[str, Any] = {name: np.stack([text[name] for text in texts]) for name in texts[0]}
        return MLLMInputs(**stacked, features=features)

    def _vision(self, frames: np.ndarray, has_frame: np.ndarray, picked: np.ndarray) -> np.ndarray:
        """Features of the vision tower, of references and of the first frames that there are."""
        if self.spread is None:
            given = (jnp.asarray(frames), jnp.asarray(has_frame)) if has_frame.any() else (None, None)
            return np.asarray(encode_vision(self.config, self.vision, *given, jnp.asarray(picked)))
        features: Any = None
        for name, rows in (("frame and reference", np.flatnonzero(has_frame)), ("reference", np.flatnonzero(has_frame == 0))):
            if len(rows):  # alone, a sample without a frame would not be computed with one either

                def vision(network: Any, frame: Any, has: Any, clip: Any, name: str = name) -> Any:
                    return encode_vision(self.config, network, *((frame, has) if name != "reference" else (None, None)), clip)

                found = self.spread(name, vision, self.vision, frames[rows], has_frame[rows], picked[rows])
                features = np.zeros((len(frames), *found.shape[1:]), found.dtype) if features is None else features
                features[rows] = found
        return features

    def contexts(
        self,
        prompts: Sequence[str],
        alignment: Alignment | None = None,
        references: Sequence[tuple[Int[np.ndarray, " B"], MLLMInputs]] = (),
    ) -> tuple[Float[Array, "B S E"], Float[Array, "B S E"]]:
        """(text context, negative context): what the cross-attention reads in the two passes of guidance.

        Without `alignment` these are the encoded prompts and the encoded negative prompt; training replaces a dropped prompt by the encoded
        empty one. With `alignment` they are the contexts of all references (task, inputs), concatenated, and zeros; training replaces a
        dropped context by zeros too.
        """
        if alignment is None:
            text = jnp.asarray(self.text([*prompts, self.config.sampler.negative_prompt])[0])
            return text[:-1], jnp.repeat(text[-1:], len(prompts), 0)
        contexts = [align(alignment, jax.tree.map(jnp.asarray, inputs), jnp.asarray(task)) for task, inputs in references]
        context = jnp.concatenate(contexts, axis=1)
        return context, jnp.zeros_like(context)


def place_references(
    config: Config, video: VideoConfig, references: Sequence[tuple[Int[np.ndarray, " B"], Float[np.ndarray, "B F h w C"]]]
) -> tuple[Reference, ...]:
    """The references (task, latents) of a target of size `video`, side by side.

    With `sampler.stack_references` the k-th reference of a family is k times as far away.
    """
    target = video.patches(config.vae, config.dit.patch)
    together = config.dit.offsets == "frames"  # all references are then in one place, whatever their family
    families = [together or tasks.TASKS[task[0]].family for task, _ in references]
    ranks = [families[: k + 1].count(family) if config.sampler.stack_references else 1 for k, family in enumerate(families)]
    return tuple(
        omnitransfer.make_reference(jnp.asarray(latents), jnp.asarray(task), target, rank, config.dit.offsets, config.dit.reference_flag)
        for rank, (task, latents) in zip(ranks, references, strict=True)
    )


def weights_of(config: Config) -> str | dict[str, str]:
    """Which weights and vocabularies the encoders have, as records.json says it: a digest of each, or `RANDOM`."""
    folder = run_folder.imported_weights(config.train.init_from)
    if not folder:
        return RANDOM
    model_folder.require_model(folder, config)
    aligned = (MLLM_TOKENIZER,) if config.alignment.enabled else ()
    return fingerprint.of_model(folder, encoder_names(config), (TOKENIZERS["diffusers"], *aligned))
