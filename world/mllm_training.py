"""Training of the language model on the procedural world: it is shown what stages 2 and 3 show it, and has to say what that is.

    [first frame, reference, template, prompt] <|im_start|>assistant  ->  the prompt, a caption of the reference, one of the first frame

It learns to see and to read, not to transfer: what the target shows is never told. It says everything at once: at the places of the answer
stands noise, so that a state knows its word by its place alone, as those of the alignment's queries have to, which stand there later.
The loop is part_training.py. At the end there are

    WORKDIR/mllm.safetensors   float32 parameters by path, as `params.flat_params` names them
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
from jaxtyping import Array, Bool, Float, Int, UInt8
from transformers import PreTrainedTokenizerFast

from configs.mllm import MLLMTraining
from configs.run import Config
from data_pipelines import mllm_inputs
from omnitransfer_jax import load_models
from omnitransfer_jax.models.alignment import MLLMInputs, embed
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.tokenizer import clean_prompt
from omnitransfer_jax.train import optimizer
from omnitransfer_jax.train.step import Params, TrainState
from world import part_training, scenes
from world.scenes import Example


class Lesson(NamedTuple):
    """A batch of pairs as the language model is shown them, and what it should say; of NumPy until a step takes it."""

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


def train(config: MLLMTraining, encoders: str, workdir: Path) -> None:
    """Trains up to `config.steps` from the weights and words of the folder `encoders`, and writes mllm.safetensors and mllm.json."""
    workdir, vocabulary = workdir.absolute(), load_models.load_mllm_vocabulary(encoders)
    held_out = [lesson(config, vocabulary, "held_out", i) for i in range(config.evaluate_clips // config.batch_size)]
    correct = make_correct(config)

    def evaluate(params: Params, lessons: list[Lesson]) -> dict[str, float]:
        right = [np.asarray(correct(params, each))[each.answer] for each in lessons]
        return {"held_out_accuracy": float(np.concatenate(right).mean())}

    state = init_state(config, flat_params(load_models.load_mllm(encoders, config.model)))
    data, some = batches(config, vocabulary), held_out[: len(held_out) // 8]
    params = part_training.train(config, workdir, state, data, make_train_step(config), partial(evaluate, lessons=some))
    if params is not None:
        result = {**evaluate(params, held_out), "held_out_pairs": config.evaluate_clips, "steps": config.steps}
        part_training.finish(workdir, "mllm", params, result)
        print(f"{workdir / 'mllm.safetensors'}: {result['held_out_accuracy']:.1%} of the words right over {config.evaluate_clips} pairs")


def says(pair: Example) -> str:
    """The answer: the prompt if there is one, the reference, and the first frame if there is one."""
    frame = scenes.caption(pair.target._replace(motion=None, camera=None, effect=None)) if pair.is_temporal else ""
    return " ".join(words for words in (pair.prompt, scenes.caption(pair.reference), frame) if words)


def read(config: Config, vocabulary: PreTrainedTokenizerFast, pair: Example) -> dict[str, np.ndarray]:
    """The tokens that `mllm_inputs.token_inputs` gives and those of the answer behind them, unpadded."""
    arrays = mllm_inputs.token_inputs(config, vocabulary, pair.task, pair.prompt, pair.is_temporal)
    begin = int(arrays["mask"].sum())
    before = {name: array[..., :begin] for name, array in arrays.items()}
    words = np.array(vocabulary(clean_prompt(says(pair)), add_special_tokens=False)["input_ids"], np.int32)
    following = before["positions"].max() + 1 + np.arange(len(words), dtype=np.int32)
    return {
        "tokens": np.concatenate([before["tokens"], words]),
        "mask": np.ones(begin + len(words), bool),
        "positions": np.concatenate([before["positions"], np.tile(following, (3, 1))], axis=1),
        "source": np.concatenate([before["source"], np.full(len(words), -1, np.int32)]),
        "answer": np.arange(begin + len(words)) >= begin,
    }


def lesson(config: MLLMTraining, vocabulary: PreTrainedTokenizerFast, split: scenes.Split, index: int) -> Lesson:
    """Batch `index` of the world, padded to its longest pair; with some of every task that is always one length."""
    first = index * config.batch_size
    pairs = [scenes.example(config.seed, i, split) for i in range(first, first + config.batch_size)]
    texts = [read(config.model, vocabulary, pair) for pair in pairs]
    longest = max(len(text["tokens"]) for text in texts)

    def together(name: str) -> np.ndarray:
        fill = -1 if name == "source" else 0
        room = [longest - text[name].shape[-1] for text in texts]
        return np.stack(
            [np.pad(t[name], [(0, 0)] * (t[name].ndim - 1) + [(0, r)], constant_values=fill) for t, r in zip(texts, room, strict=True)]
        )

    reference = config.model.data.reference
    picked = mllm_inputs.picked_frames(reference.frames, config.model.alignment.frames)
    arrays: dict[str, Any] = {name: together(name) for name in texts[0]}
    arrays["frames"] = np.stack([scenes.render(pair.target, config.model.video)[0] for pair in pairs])
    arrays["has_frame"] = np.array([pair.is_temporal for pair in pairs], np.float32)
    arrays["references"] = np.stack([scenes.render(pair.reference, reference)[picked] for pair in pairs])
    return Lesson(**arrays)


def batches(config: MLLMTraining, vocabulary: PreTrainedTokenizerFast) -> grain.DatasetIterator[Lesson]:
    """Endless lessons of new training pairs; the iterator's state is the number of those it gave."""
    lessons = grain.MapDataset.range(2**40).map(partial(lesson, config, vocabulary, "train"))
    return iter(lessons.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)))


def init_state(config: MLLMTraining, params: Params) -> TrainState:
    """Everything trains, and nothing is averaged."""

    def begin(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, {}, make_optimizer(config).init(params), {}, zero)

    return jax.jit(begin)(params)


def make_optimizer(config: MLLMTraining) -> optax.GradientTransformation:
    """The matrices are those of the stages' trainings."""
    return part_training.make_optimizer(config, optimizer.dimension_numbers)


def make_train_step(config: MLLMTraining) -> part_training.TrainStep:
    """A step on a lesson; the loss is the mean cross-entropy of the answer's words, in nats."""
    update = make_optimizer(config).update

    def loss_of(params: Params, batch: Lesson, key: Array) -> Array:
        each = optax.softmax_cross_entropy_with_integer_labels(scores(config, params, batch, key), batch.tokens)
        return jnp.mean(each, where=batch.answer)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Lesson, key: Array) -> tuple[TrainState, dict[str, Array]]:
        loss, grads = jax.value_and_grad(loss_of)(state.trainable, batch, jax.random.fold_in(key, state.step))
        updates, moments = update(grads, state.moments, state.trainable)
        params: Any = optax.apply_updates(state.trainable, updates)
        return state._replace(step=state.step + 1, trainable=params, moments=moments), {"loss": loss}

    return lambda n, state, batch, key: step(state, batch, key)


def make_correct(config: MLLMTraining) -> Callable[[Params, Lesson], Bool[Array, "B S"]]:
    """correct(params, lesson): whether the likeliest word of a place is the one that is there; of use where the answer is."""

    @jax.jit
    def correct(params: Params, batch: Lesson) -> Bool[Array, "B S"]:
        return scores(config, params, batch, jax.random.key(config.seed)).argmax(-1) == batch.tokens

    return correct


def scores(config: MLLMTraining, params: Params, batch: Lesson, key: Array) -> Float[Array, "B S V"]:
    """Score of every word at every place; `key` is that of the noise in the answer's places, as large as queries are at first."""
    mllm = with_params(abstract(lambda rngs: Qwen2_5VL(config.model.mllm, rngs=rngs)), params)
    frames, references = (x.astype(jnp.float32) / 127.5 - 1 for x in (batch.frames, batch.references))
    features = mllm_inputs.vision_features(config.model, mllm.vision, frames, batch.has_frame, references)
    x = embed(mllm, MLLMInputs(batch.tokens, batch.mask, batch.positions, features, batch.source))
    x = jnp.where(batch.answer[..., None], jax.random.normal(key, x.shape) * x.shape[-1] ** -0.5, x)
    return mllm.logits(mllm(x, batch.positions.swapaxes(0, 1), batch.mask))
