"""What the language model reads of a pair (paper section 4.4): first frame, reference, template and prompt, padded to one length.

    <|im_start|>user
    <|vision_start|> image_pad x n <|vision_end|> <|vision_start|> video_pad x m <|vision_end|> TEMPLATE PROMPT <|im_end|>
    <|im_start|>assistant

The image is left out where there is no first frame. The placeholders (`image_pad`, `video_pad`) are replaced by features of the frozen
vision tower, which are encoded once; models/alignment.py appends the MetaQueries. The templates are those of `tasks.TASKS`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from transformers import PreTrainedTokenizerFast

from configs.errors import require
from configs.run import Config
from omnitransfer_jax import tasks
from omnitransfer_jax.models.alignment import ASSISTANT, BREAK, USER, Size, lengths, sizes
from omnitransfer_jax.models.qwen2_5_vision import QwenVision, patchify
from omnitransfer_jax.models.qwen2_5_vl import position_ids
from omnitransfer_jax.tokenizer import clean_prompt

START, END, VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip


def token_inputs(
    config: Config, vocabulary: PreTrainedTokenizerFast, task: str, prompt: str, has_first_frame: bool
) -> dict[str, np.ndarray]:
    """The fields of `MLLMInputs` but the features, of one sample: tokens "S", mask "S", positions "3 S", source "S".

    The first frame's features are rows 0 to n - 1, the reference's follow. Special tokens spelled in a prompt are read as plain text. A
    prompt is cut to the room there is; a template that does not fit, or another model's vocabulary, is a `RequestError`.
    """
    mllm, (image, video) = config.mllm, sizes(config)
    for name, token in ((IMAGE, mllm.image_token), (VIDEO, mllm.video_token), (VISION_START, mllm.vision_start)):
        found = vocabulary.convert_tokens_to_ids(name)
        require(found == token, f"{name} is {found} in the vocabulary and {token} in config.mllm; take the tokenizer of this model")
    clips = [(VIDEO, image.features, video.features)]  # placeholder, first row of features, their number
    clips = [(IMAGE, 0, image.features), *clips] if has_first_frame else clips
    tokens, source = [*_special(vocabulary, START), *_text(vocabulary, USER)], []
    for pad, first, count in clips:
        tokens += _special(vocabulary, VISION_START)
        source += [-1] * (len(tokens) - len(source)) + list(range(first, first + count))
        tokens += _special(vocabulary, pad) * count + _special(vocabulary, VISION_END)
    tokens += [*_instruction(config, vocabulary, task, prompt), *_special(vocabulary, END), *_text(vocabulary, BREAK)]
    tokens += [*_special(vocabulary, START), *_text(vocabulary, ASSISTANT)]

    length, _ = lengths(config)
    mask = np.arange(length) < len(tokens)
    ids, rows = np.zeros(length, np.int32), np.full(length, -1, np.int32)
    ids[: len(tokens)], rows[: len(source)] = tokens, source
    grids = [image.grid] if has_first_frame else []
    positions = position_ids(mllm, ids[None], mask[None], grids, [video.grid], [seconds_per_step(config)])[:, 0]
    return {"tokens": ids, "mask": mask, "positions": positions, "source": rows}


def vision_features(
    config: Config,
    vision: QwenVision,
    frames: Float[Array, "B H W 3"] | None,
    has_frame: Float[Array, " B"] | None,
    references: Float[Array, "B T h w 3"],
) -> Float[Array, "B V D"]:
    """Features of first frames (zeros where `has_frame` is 0, or where there are none at all) and of references, both in [-1, 1].

    All are resized to the sizes of the configuration; of a reference those `alignment.frames` frames are given that `picked_frames` picks.
    """
    image, video = sizes(config)
    if frames is None or has_frame is None:
        first = jnp.zeros((len(references), image.features, config.mllm.dim))
    else:
        first = jax.vmap(partial(_features, vision, size=image))(frames[:, None]) * has_frame[:, None, None]
    return jnp.concatenate([first, jax.vmap(partial(_features, vision, size=video))(references)], axis=1)


def instruction(vocabulary: PreTrainedTokenizerFast, task: str, prompt: str) -> list[int]:
    """The tokens of a task's template and a prompt, however many."""
    template, prompt = tasks.TASKS[tasks.task_index(task)].template, clean_prompt(prompt)
    return _text(vocabulary, f"{template} {prompt}" if prompt else template)


def picked_frames(available: int, wanted: int) -> np.ndarray:
    """The indices of the frames that are encoded, evenly spaced from the first to the last; some twice if there are too few."""
    return np.rint(np.linspace(0, available - 1, wanted)).astype(int)


def seconds_per_step(config: Config) -> float:
    """Seconds of the reference from one temporal step of its features to the next; as Qwen counts: duration / encoded frames."""
    reference = config.data.reference
    return reference.frames / reference.fps / config.alignment.frames * config.mllm.vision.temporal_patch


def _features(vision: QwenVision, clip: Float[Array, "T H W 3"], *, size: Size) -> Float[Array, "V D"]:
    """The features of a clip resized to `size`; the cubic interpolation overshoots [-1, 1], which pixels cannot."""
    resized = jax.image.resize(clip, (len(clip), size.height, size.width, 3), "cubic", antialias=True)
    return vision(patchify(jnp.clip(resized, -1, 1), vision.config), (size.grid,))


def _instruction(config: Config, vocabulary: PreTrainedTokenizerFast, task: str, prompt: str) -> list[int]:
    """The tokens of template and prompt, as many as there is room for."""
    room, needed = config.alignment.prompt_tokens, len(instruction(vocabulary, task, ""))
    require(
        needed <= room,
        f"alignment.prompt_tokens={room}: the template of {task} alone has {needed}; give --alignment.prompt_tokens={needed} or more",
    )
    return instruction(vocabulary, task, prompt)[:room]


def _special(vocabulary: PreTrainedTokenizerFast, name: str) -> list[int]:
    token: Any = vocabulary.convert_tokens_to_ids(name)
    return [token]


def _text(vocabulary: PreTrainedTokenizerFast, text: str) -> list[int]:
    return vocabulary(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
