"""Training of the language model on the procedural world: from the inputs of stages 2 and 3 it predicts captions of what they show.

    [first frame, reference, template, prompt] <|im_start|>assistant  ->  the prompt, a caption of the reference, one of the first frame

It learns to recognise and to read, not to transfer: nothing of the target is among its answers. The language model predicts all words
at once; each position predicts one word, from noise in the place of the word's embedding. So a state finds its word by its position
alone, as the states of the alignment's queries have to, which stand at these positions later. At the end there are

    WORKDIR/mllm.safetensors   float32 parameters by path, as `flat_params` names them
    WORKDIR/mllm.json          held_out_accuracy: share of the words, in pairs that share held-out values; held_out_pairs, steps, seconds
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from transformers import PreTrainedTokenizerFast

from configs.mllm import MLLMTraining
from configs.run import Config
from data_pipelines import mllm_inputs
from omnitransfer_jax import load_models
from omnitransfer_jax.mesh import Shard, data_share
from omnitransfer_jax.models.alignment import MLLMInputs, embed
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.qwen2_5_vl import SHARDING, Qwen2_5VL
from omnitransfer_jax.tokenizer import clean_prompt
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.objective import Metrics, Objective, Params
from world import pixels, results, scenes
from world.pairs import Example, Split, draw_pair

PADDED = 32  # tokens: each length of a lesson is a program of its own


class Lesson(NamedTuple):
    """A batch of pairs: the inputs of the language model, and the answers it should give."""

    tokens: Int[Array, "B S"]
    """Up to the last word of the answer, which the network does not see; placeholders where vision features go."""
    mask: Bool[Array, "B S"]
    positions: Int[Array, "B 3 S"]
    source: Int[Array, "B S"]
    """The row of features that stands in a token's place, or -1."""
    answer: Bool[Array, "B S"]
    """Where the answer's tokens are."""
    frames: UInt8[Array, "B H W 3"]
    """First frames."""
    has_frame: Float[Array, " B"]
    references: UInt8[Array, "B T h w 3"]


def train(config: MLLMTraining, workdir: Path, mesh: Mesh) -> None:
    """Trains up to `config.train.steps` from the weights and words of train.init_from, and writes mllm.safetensors and mllm.json."""
    vocabulary = load_models.load_mllm_vocabulary(config.train.init_from)
    held_out = [lesson(config, vocabulary, "held_out", i) for i in range(config.evaluate_clips // config.train.batch_size)]
    correct = make_correct(config)

    def evaluate(params: Params, lessons: list[Lesson]) -> dict[str, float]:
        right = [np.asarray(correct(params, each))[each.answer] for each in lessons]
        return {"held_out_accuracy": float(np.concatenate(right).mean())}

    data, some = batches(config, vocabulary, *data_share(mesh)), held_out[: len(held_out) // 8]
    params = loop.train(objective(config, vocabulary), config, workdir, mesh, data, lambda step, params: evaluate(params, some))
    if params is not None:
        result = {**evaluate(params, held_out), "held_out_pairs": config.evaluate_clips, "steps": config.train.steps}
        results.write(workdir.absolute(), "mllm", params, result)
        print(f"{workdir / 'mllm.safetensors'}: {result['held_out_accuracy']:.1%} of the words right over {config.evaluate_clips} pairs")


def answer(pair: Example) -> str:
    """The answer: the prompt if there is one, the reference, and the first frame if there is one."""
    frame = scenes.caption(pair.target._replace(motion=None, camera=None, effect=None)) if pair.is_temporal else ""
    return " ".join(words for words in (pair.prompt, scenes.caption(pair.reference), frame) if words)


def tokens_of(config: Config, vocabulary: PreTrainedTokenizerFast, pair: Example) -> dict[str, np.ndarray]:
    """The input tokens of stages 2 and 3, followed by those of the answer, unpadded."""
    arrays = mllm_inputs.token_inputs(config, vocabulary, pair.task, pair.prompt, pair.is_temporal)
    begin = int(arrays["mask"].sum())
    before = {name: array[..., :begin] for name, array in arrays.items()}
    words = np.array(vocabulary(clean_prompt(answer(pair)), add_special_tokens=False)["input_ids"], np.int32)
    following = before["positions"].max() + 1 + np.arange(len(words), dtype=np.int32)
    return {
        "tokens": np.concatenate([before["tokens"], words]),
        "mask": np.ones(begin + len(words), bool),
        "positions": np.concatenate([before["positions"], np.tile(following, (3, 1))], axis=1),
        "source": np.concatenate([before["source"], np.full(len(words), -1, np.int32)]),
        "answer": np.arange(begin + len(words)) >= begin,
    }


def lesson(config: MLLMTraining, vocabulary: PreTrainedTokenizerFast, split: Split, number: int, part: int = 0, parts: int = 1) -> Lesson:
    """Batch `number` of the world, or one of `parts` equal parts of it, padded to a multiple of `PADDED` tokens."""
    first, size = number * config.train.batch_size, config.train.batch_size // parts
    pairs = [draw_pair(config.seed, i, split) for i in range(first, first + config.train.batch_size)]
    texts = [tokens_of(config.model, vocabulary, pair) for pair in pairs]
    length = -(-max(len(text["tokens"]) for text in texts) // PADDED) * PADDED
    own = slice(part * size, (part + 1) * size)
    pairs, texts = pairs[own], texts[own]

    def together(name: str) -> np.ndarray:
        fill = -1 if name == "source" else 0
        room = [length - text[name].shape[-1] for text in texts]
        return np.stack(
            [np.pad(t[name], [(0, 0)] * (t[name].ndim - 1) + [(0, r)], constant_values=fill) for t, r in zip(texts, room, strict=True)]
        )

    reference = config.model.data.reference
    picked = mllm_inputs.picked_frames(reference.frames, config.model.alignment.frames)
    arrays: dict[str, Any] = {name: together(name) for name in texts[0]}
    arrays["frames"] = np.stack([pixels.render(pair.target, config.model.video)[0] for pair in pairs])
    arrays["has_frame"] = np.array([pair.is_temporal for pair in pairs], np.float32)
    arrays["references"] = np.stack([pixels.render(pair.reference, reference)[picked] for pair in pairs])
    return Lesson(**arrays)


def batches(config: MLLMTraining, vocabulary: PreTrainedTokenizerFast, part: int = 0, parts: int = 1) -> grain.DatasetIterator[Lesson]:
    """Endless lessons of new training pairs, or a part of each; the iterator's state is the number of those it gave."""
    make = partial(lesson, config, vocabulary, "train")
    lessons = grain.MapDataset.range(2**40).map(lambda number: make(number, part, parts))
    return iter(lessons.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)))


def objective(config: MLLMTraining, vocabulary: PreTrainedTokenizerFast) -> Objective:
    """The mean cross-entropy of the answers' words, in nats."""
    model = abstract(lambda rngs: Qwen2_5VL(config.model.mllm, rngs=rngs))
    return Objective(
        params=flat_params(model),
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lesson(config, vocabulary, "train", 0)),
        draw=partial(draw, config),
        loss=partial(loss, config),
        init=lambda: flat_params(Qwen2_5VL(config.model.mllm, rngs=nnx.Rngs(jax.random.key(config.seed)))),
        root_key=lambda: jax.random.key(config.seed),
        models=config.model,
        imported={"": "mllm"},
    )


class Drawn(NamedTuple):
    """The noise at the answer's places, and what a word counts for."""

    noise: Float[Array, "B S D"]
    weight: Float[Array, " B"]
    """Such that the mean over samples of the weighted sums over words is the mean over all words of the batch."""


def draw(config: MLLMTraining, key: Array, batch: Lesson) -> Drawn:
    """The random numbers of a step; a word counts the same whether its answer is short or long."""
    size = len(batch.answer)
    weight = jnp.full((size,), size / batch.answer.sum())
    return Drawn(jax.random.normal(key, (*batch.tokens.shape, config.model.mllm.dim)), weight)


def loss(config: MLLMTraining, params: Params, batch: Lesson, drawn: Drawn, shard: Shard) -> tuple[Float[Array, " B"], Metrics]:
    """The loss of each pair."""
    each = optax.softmax_cross_entropy_with_integer_labels(scores(config, params, batch, drawn.noise), batch.tokens)
    return jnp.sum(each, axis=1, where=batch.answer) * drawn.weight, {}


def make_correct(config: MLLMTraining) -> Callable[[Params, Lesson], Bool[Array, "B S"]]:
    """correct(params, lesson): whether the likeliest word of a place is the one that is there; of use where the answer is."""

    @jax.jit
    def correct(params: Params, batch: Lesson) -> Bool[Array, "B S"]:
        noise = draw(config, jax.random.key(config.seed), batch).noise
        return scores(config, params, batch, noise).argmax(-1) == batch.tokens

    return correct


def scores(config: MLLMTraining, params: Params, batch: Lesson, noise: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Score of every word at every place. The answer's places hold noise, as large as the MetaQueries are at first."""
    mllm = with_params(abstract(lambda rngs: Qwen2_5VL(config.model.mllm, rngs=rngs)), params)
    frames, references = (x.astype(jnp.float32) / 127.5 - 1 for x in (batch.frames, batch.references))
    features = mllm_inputs.vision_features(config.model, mllm.vision, frames, batch.has_frame, references)
    x = embed(mllm, MLLMInputs(batch.tokens, batch.mask, batch.positions, features, batch.source))
    x = jnp.where(batch.answer[..., None], noise * x.shape[-1] ** -0.5, x)
    return mllm.logits(mllm(x, batch.positions.swapaxes(0, 1), batch.mask))
