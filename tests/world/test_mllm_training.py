"""The language model's training: its answers, its loss, that it learns, and that it goes on where it stopped."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from configs import mllm as configs_mllm
from configs import stage3
from configs.errors import RequestError
from configs.run import CheckpointConfig, TrainConfig
from data_pipelines import mllm_inputs
from omnitransfer_jax import load_models
from omnitransfer_jax.folders.lock import alone
from omnitransfer_jax.mesh import UNSHARDED, make_mesh
from omnitransfer_jax.models.flat_params import flat_params
from tests.world.every_training import assert_not_finite_is_refused, assert_same_run, lines, stop_after_first_step
from world import mllm_training, scenes
from world.pairs import SHARES, draw_pair

MODEL = stage3.get_config("smoke")
SMALL = replace(
    configs_mllm.TINY,
    model=MODEL, train=TrainConfig(steps=30, batch_size=4, log_every=2, evaluate_every=10),
    optimizer=replace(configs_mllm.TINY.optimizer, warmup_steps=2),
    evaluate_clips=32, checkpoint=CheckpointConfig(every=100), threads=1,
)  # fmt: skip
VOCABULARY = load_models.load_mllm_vocabulary("")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir)
    return workdir


def train(workdir, config=SMALL):
    mllm_training.train(config, workdir, make_mesh(config.mesh))


def of_five(config):
    return replace(config, train=replace(config.train, batch_size=5))


@pytest.fixture(scope="module")
def first():
    """Weights nobody trained, and a lesson that has every task."""
    lesson = mllm_training.lesson(of_five(SMALL), VOCABULARY, "train", 0)
    return flat_params(load_models.load_mllm("", MODEL)), jax.tree.map(jnp.asarray, lesson)


@pytest.mark.parametrize("task", list(SHARES))
def test_the_answer(task):
    """Captions of its inputs; of the target only the prompt and the first frame are inputs."""
    pair = draw_pair(3, 0, "held_out", task)
    inputs, temporal = mllm_training.tokens_of(MODEL, VOCABULARY, pair), task in ("motion", "camera", "effect")
    words = VOCABULARY.decode(inputs["tokens"][inputs["answer"]])
    still = scenes.caption(pair.target._replace(motion=None, camera=None, effect=None))
    assert words == (f"{scenes.caption(pair.reference)} {still}" if temporal else f"{pair.prompt} {scenes.caption(pair.reference)}")
    before = mllm_inputs.token_inputs(MODEL, VOCABULARY, task, pair.prompt, temporal)
    count = int(before["mask"].sum())
    for name in ("tokens", "positions", "source"):
        np.testing.assert_array_equal(inputs[name][..., :count], before[name][..., :count])
    assert not inputs["answer"][:count].any()
    assert inputs["answer"][count:].all()
    assert (inputs["source"][count:] == -1).all()
    following = inputs["positions"][:, count - 1 :]  # the words count on behind the last of the turn, as queries do
    assert (following == following[0, 0] + np.arange(len(words.encode()) + 1)).all()


def test_the_loss_is_of_the_answer_alone(first):
    """The cross-entropy of each of its words, by hand; every word counts the same, whatever the length of its answer."""
    params, lesson = first
    objective = mllm_training.objective(of_five(SMALL), VOCABULARY)
    drawn = objective.draw(jax.random.key(0), lesson)
    log_p = jax.nn.log_softmax(mllm_training.scores(SMALL, params, lesson, drawn.noise))
    rows, columns = np.nonzero(np.asarray(lesson.answer))
    expected = -log_p[rows, columns, lesson.tokens[rows, columns]].mean()
    losses, _ = objective.loss(params, lesson, drawn, UNSHARDED)
    assert losses.mean() == pytest.approx(float(expected), rel=1e-5)


def test_the_answer_is_no_input(first):
    """The scores are the same whatever words stand in the answer's places, and others with other noise."""
    params, lesson = first
    noise = jax.random.normal(jax.random.key(1), (2, *lesson.tokens.shape, MODEL.mllm.dim))
    score = jax.jit(lambda tokens, noise: mllm_training.scores(SMALL, params, lesson._replace(tokens=tokens), noise))
    one = score(lesson.tokens, noise[0])
    assert (score(jnp.where(lesson.answer, 7, lesson.tokens), noise[0]) == one).all()
    assert not (score(jnp.where(lesson.answer, lesson.tokens, 7), noise[0]) == one).all()
    assert not (score(lesson.tokens, noise[1]) == one).all()


def test_frame_and_reference_are_inputs(first):
    """The answer's first word depends on both clips where there are both, and on the reference alone where there is no frame."""
    params, lesson = first
    noise = jnp.zeros((*lesson.tokens.shape, MODEL.mllm.dim))
    score = jax.jit(
        lambda frames, references: mllm_training.scores(SMALL, params, lesson._replace(frames=frames, references=references), noise)
    )
    at = np.asarray(lesson.answer).argmax(1)

    def moved(**other) -> np.ndarray:
        both = {"frames": lesson.frames, "references": lesson.references}
        one, two = (np.asarray(score(**clips))[np.arange(5), at] for clips in (both, both | other))
        return np.abs(one - two).max(-1)

    assert (moved(references=255 - lesson.references) > 1e-5).all()
    assert ((moved(frames=255 - lesson.frames) > 1e-5) == (lesson.has_frame == 1)).all()
    assert sorted(lesson.has_frame.tolist()) == [0, 0, 1, 1, 1]


def test_every_parameter_trains(first):
    params, lesson = first

    def loss(params):
        each = mllm_training.scores(SMALL, params, lesson, jnp.ones((*lesson.tokens.shape, MODEL.mllm.dim)))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(each, lesson.tokens), where=lesson.answer)

    grads = jax.jit(jax.grad(loss))(params)
    assert [path for path, g in grads.items() if not np.abs(g).max() > 0 and not path.endswith("key.bias")] == []  # softmax cancels those


def test_it_learns(whole, first):
    """Words of pairs that it never saw; letters here, for the vocabulary is of bytes."""
    held_out = [mllm_training.lesson(SMALL, VOCABULARY, "held_out", i) for i in range(8)]
    correct = mllm_training.make_correct(SMALL)

    def share(params) -> float:
        return float(np.concatenate([np.asarray(correct(params, each))[each.answer] for each in held_out]).mean())

    trained = share(load_file(whole / "mllm.safetensors"))
    assert trained > share(first[0]) + 0.05
    assert json.loads((whole / "mllm.json").read_text())["held_out_accuracy"] == pytest.approx(trained, abs=1e-6)
    assert [line["step"] for line in lines(whole) if "held_out_accuracy" in line] == [10, 20, 30]


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(whole, tmp_path, capsys):
    """Bit for bit: weights, losses, and the reported result."""
    objective = mllm_training.objective(SMALL, VOCABULARY)
    stop_after_first_step(objective, SMALL, tmp_path, mllm_training.batches(SMALL, VOCABULARY), capsys)
    train(tmp_path)
    assert_same_run(tmp_path, whole, "mllm")


def test_a_second_training_is_refused(tmp_path):
    with alone(tmp_path), pytest.raises(RequestError, match=f"{tmp_path}: a training runs there, process {os.getpid()} on host"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training.lock"]


def test_updates_that_are_not_finite_end_the_run(tmp_path):
    objective = mllm_training.objective(SMALL, VOCABULARY)
    assert_not_finite_is_refused(objective, SMALL, tmp_path, mllm_training.batches(SMALL, VOCABULARY))


def test_wrong_requests(whole):
    with pytest.raises(RequestError, match=r"learning_rate=0\.5: the run in .* was started with 0\.01"):
        train(whole, replace(SMALL, optimizer=replace(SMALL.optimizer, learning_rate=0.5)))
    with pytest.raises(RequestError, match=r"evaluate_clips=20: a multiple of 32"):
        replace(SMALL, evaluate_clips=20).validate()
    with pytest.raises(RequestError, match=r"at full size the model is Qwen2\.5-VL, imported"):
        configs_mllm.get_config("")
