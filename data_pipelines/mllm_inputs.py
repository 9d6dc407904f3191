"""What the language model is shown of a pair (paper section 4.4): first frame, reference, template and prompt, in one fixed length.

    <|im_start|>user
    <|vision_start|> image_pad x n <|vision_end|> <|vision_start|> video_pad x m <|vision_end|> TEMPLATE PROMPT <|im_end|>
    <|im_start|>assistant

The image is there only with a first frame. Placeholders are replaced by features of the frozen vision tower, which are encoded once;
the MetaQueries come behind, in models/alignment.py. Templates are those of `tasks.TASKS`.
"""

from collections.abc import Callable
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
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL, position_ids
from omnitransfer_jax.tokenizer import clean_prompt

START, END, VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
Look = Callable[[np.ndarray | None, np.ndarray], np.ndarray]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The arrays of a sample: those of `show`, and the features of `look`."""
    length, features = lengths(config)
    return {
        "tokens": (length,),
        "mask": (length,),
        "positions": (3, length),
        "source": (length,),
        "features": (features, config.mllm.dim),
    }


def show(config: Config, vocabulary: PreTrainedTokenizerFast, task: str, prompt: str, has_first_frame: bool) -> dict[str, np.ndarray]:
    """tokens int32 "S", mask bool "S", positions int32 "3 S", source int32 "S": the row of `look`'s features at a token, or -1.

    The first frame's features are rows 0 to n - 1, the reference's come after. Special tokens that a prompt spells are plain text. A
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


def look(config: Config, mllm: Qwen2_5VL) -> Look:
    """A function of a first frame "H W 3" (None: zeros) and a reference "T H W 3", in [-1, 1], to their features float32 "V D".

    Both are resized to the sizes of the configuration, and the reference is reduced to `alignment.frames` frames.
    """
    image, video = sizes(config)
    see = partial(jax.jit(_see, static_argnames="size"), mllm.vision)

    def features(first_frame: np.ndarray | None, reference: np.ndarray) -> np.ndarray:
        if first_frame is None:
            of_image = np.zeros((image.features, config.mllm.dim), np.float32)
        else:
            of_image = np.asarray(see(jnp.asarray(first_frame)[None], size=image))
        picked = reference[picked_frames(len(reference), config.alignment.frames)]
        return np.concatenate([of_image, np.asarray(see(jnp.asarray(picked), size=video))])

    return features


def look_at_many(config: Config, mllm: Qwen2_5VL) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """`look` over batches: first frames "B H W 3", 1 where there is one "B", references "B T H W 3" -> features float32 "B V D"."""
    compiled = partial(jax.jit(partial(features, config)), mllm.vision)

    def look(frames: np.ndarray, has_frame: np.ndarray, references: np.ndarray) -> np.ndarray:
        picked = references[:, picked_frames(references.shape[1], config.alignment.frames)]
        return np.asarray(compiled(*map(jnp.asarray, (frames, has_frame, picked))))

    return look


def features(
    config: Config,
    vision: QwenVision,
    frames: Float[Array, "B H W 3"],
    has_frame: Float[Array, " B"],
    references: Float[Array, "B T h w 3"],
) -> Float[Array, "B V D"]:
    """Of first frames, 0 where there is none, and of references that are reduced to the frames that are seen."""
    image, video = sizes(config)
    of_image = jax.vmap(partial(_see, vision, size=image))(frames[:, None]) * has_frame[:, None, None]
    return jnp.concatenate([of_image, jax.vmap(partial(_see, vision, size=video))(references)], axis=1)


def picked_frames(available: int, wanted: int) -> np.ndarray:
    """Which frames of a clip are seen, evenly spaced from the first to the last; some twice if there are too few."""
    return np.rint(np.linspace(0, available - 1, wanted)).astype(int)


def seconds_per_step(config: Config) -> float:
    """Seconds of the reference from one temporal step of its features to the next, counted as Qwen's: duration / frames seen."""
    reference = config.data.reference
    return reference.frames / reference.fps / config.alignment.frames * config.mllm.vision.temporal_patch


def _see(vision: QwenVision, clip: jax.Array, *, size: Size) -> jax.Array:
    """The features of a clip "T H W 3" in its size; cubic interpolation leaves [-1, 1], which pixels cannot."""
    resized = jax.image.resize(clip, (len(clip), size.height, size.width, 3), "cubic", antialias=True)
    return vision(patchify(jnp.clip(resized, -1, 1), vision.config), (size.grid,))


def _instruction(config: Config, vocabulary: PreTrainedTokenizerFast, task: str, prompt: str) -> list[int]:
    """The tokens of template and prompt, as many as there is room for."""
    room, template, prompt = config.alignment.prompt_tokens, tasks.TASKS[tasks.task_index(task)].template, clean_prompt(prompt)
    needed = len(_text(vocabulary, template))
    require(
        needed <= room,
        f"alignment.prompt_tokens={room}: the template of {task} alone has {needed}; give --alignment.prompt_tokens={needed} or more",
    )
    return _text(vocabulary, f"{template} {prompt}" if prompt else template)[:room]


def _special(vocabulary: PreTrainedTokenizerFast, name: str) -> list[int]:
    token: Any = vocabulary.convert_tokens_to_ids(name)
    return [token]


def _text(vocabulary: PreTrainedTokenizerFast, text: str) -> list[int]:
    return vocabulary(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
