"""One row of the manifest to one record: the clips decoded, then everything the training reads encoded once by the frozen encoders."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RequestError
from configs.run import Config, VideoConfig
from data_pipelines import clips, mllm_inputs
from data_pipelines.manifest import Clip, Row, refuse_same
from data_pipelines.records import shapes, to_bits
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import clean_prompt, tokenize


class Pixels(NamedTuple):
    """A row read from the disk, uint8."""

    reference: np.ndarray
    """ "T H W 3"."""
    target: np.ndarray
    """ "T H W 3"."""
    first_frame: np.ndarray | None
    """ "H W 3", as large as the target; None for appearance tasks."""


class Encoders(NamedTuple):
    """The frozen encoders as functions of numpy arrays without a batch axis; each is compiled once for every shape."""

    video: Callable[[np.ndarray], np.ndarray]
    """ "T H W 3" in [-1, 1] -> "F h w C"."""
    condition: Callable[[np.ndarray], np.ndarray]
    """First frame "H W 3" in [-1, 1] -> mask and latents "F h w c" of a video that starts with it."""
    no_condition: np.ndarray
    """The same of a target that starts from no frame: mask 0, and the latents of grey."""
    image: Callable[[np.ndarray], np.ndarray]
    """First frame "H W 3" in [-1, 1] -> features "I J"."""
    text: Callable[[str], np.ndarray]
    """Prompt -> features "S E", the rows of its tokens alone."""
    shown: Callable[[str, str, np.ndarray | None, np.ndarray], dict[str, np.ndarray]] | None
    """Task, prompt, first frame or None and reference in [-1, 1] -> the arrays of `shown.shapes`; None without alignment."""


def load_encoders(config: Config, folder: str) -> Encoders:
    """The encoders of a checkpoint; with random weights if `folder` is empty."""
    encode_shown = load_shown(config, folder) if config.alignment.enabled else None  # first: all but the vision tower is let go
    vae, text_encoder = load_models.load_vae(folder, config), load_models.load_text_encoder(folder, config)
    image_encoder, vocabulary = load_models.load_image_encoder(folder, config), load_models.load_vocabulary(folder)
    size = config.video
    encode_video = partial(jax.jit(WanVAE.encode), vae)
    encode_first_frame = partial(
        jax.jit(omnitransfer.encode_first_frame, static_argnames="shape"), vae, shape=(1, size.frames, size.height, size.width)
    )
    encode_image = partial(jax.jit(omnitransfer.encode_image), image_encoder)
    encode_text = partial(jax.jit(omnitransfer.encode_text), text_encoder)

    def text(prompt: str) -> np.ndarray:
        tokens, mask = tokenize(vocabulary, [clean_prompt(prompt)], config.dit.text_len)
        return np.asarray(encode_text(jnp.asarray(tokens), jnp.asarray(mask)))[0, : mask.sum()]

    def one(encode: Callable[[Any], jax.Array]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: np.asarray(encode(jnp.asarray(x)[None]))[0]

    return Encoders(
        one(encode_video),
        one(encode_first_frame),
        np.asarray(encode_first_frame(None))[0],
        one(encode_image),
        text,
        encode_shown,
    )


def load_shown(config: Config, folder: str) -> Callable[[str, str, np.ndarray | None, np.ndarray], dict[str, np.ndarray]]:
    """`Encoders.shown` with the weights and the vocabulary of a checkpoint."""
    show = partial(mllm_inputs.show, config, load_models.load_mllm_vocabulary(folder))
    for task in tasks.NAMES:  # what is wrong with templates or vocabulary is wrong with every record, so it is said now
        show(task, "", True)
    look = mllm_inputs.look(config, load_models.load_mllm(folder, config))

    def encode_shown(task: str, prompt: str, first_frame: np.ndarray | None, reference: np.ndarray) -> dict[str, np.ndarray]:
        return show(task, prompt, first_frame is not None) | {"features": look(first_frame, reference)}

    return encode_shown


def read_pixels(row: Row, config: Config) -> Pixels:
    """The clips of a row in the sizes of the configuration. What cannot be used is a `RequestError` that begins with its path."""
    refuse_same(row)
    reference, target = _read(row.reference, config.data.reference), _read(row.target, config.video)
    if not row.is_temporal:
        return Pixels(reference, target, None)
    if row.first_frame is None:
        return Pixels(reference, target, target[0])
    return Pixels(reference, target, clips.fit(clips.read_image(row.first_frame), config.video.height, config.video.width))


def encode(row: Row, pixels: Pixels, encoders: Encoders, config: Config) -> dict[str, Any]:
    """The record of a row (`records.schema`). Encodings that are not finite are a `RequestError`."""
    first_frame = None if pixels.first_frame is None else clips.to_unit(pixels.first_frame)
    reference = clips.to_unit(pixels.reference)
    arrays = {
        "target": encoders.video(clips.to_unit(pixels.target)),
        "reference": encoders.video(reference),
        "text": encoders.text(row.prompt),
    }
    if first_frame is None:
        arrays |= {"condition": encoders.no_condition, "image": np.zeros(shapes(config)["image"], np.float32)}
    else:
        arrays |= {"condition": encoders.condition(first_frame), "image": encoders.image(first_frame)}
    others: dict[str, Any] = {"id": row.id, "task": tasks.task_index(row.task), "has_image": np.float32(first_frame is not None)}
    if encoders.shown is not None:
        others |= {f"shown_{name}": array for name, array in encoders.shown(row.task, row.prompt, first_frame, reference).items()}
        arrays["shown_features"] = others.pop("shown_features")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise RequestError(f"{row.target.path}: the {name} of {row.id!r} is encoded as NaN or infinity; encode in float32")
    return others | {name: to_bits(array) for name, array in arrays.items()}


def _read(clip: Clip, size: VideoConfig) -> np.ndarray:
    return clips.read_clip(
        clip.path, frames=size.frames, fps=size.fps, height=size.height, width=size.width, start=clip.start, end=clip.end
    )
