"""The language model's training: what it is asked to say, that it learns to, and that it goes on where it stopped."""

import json
from contextlib import contextmanager
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
from configs.run import CheckpointConfig
from data_pipelines import mllm_inputs
from omnitransfer_jax import load_models
from omnitransfer_jax.models.flat_params import flat_params
from world import mllm_training, part_training, scenes
from world.pairs import SHARES, draw_pair

MODEL = stage3.get_config("smoke")
SMALL = replace(
    configs_mllm.TINY,
    model=MODEL, steps=30, batch_size=4, warmup_steps=2, log_every=2, evaluate_every=10, evaluate_clips=32,
    checkpoint=CheckpointConfig(every=100), threads=1,
)  # fmt: skip
VOCABULARY = load_models.load_mllm_vocabulary("")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    mllm_training.train(SMALL, "", workdir)
    return workdir


@pytest.fixture(scope="module")
def first():
    """Weights nobody trained, and a lesson that has every task."""
    lesson = mllm_training.lesson(replace(SMALL, batch_size=5), VOCABULARY, "train", 0)
    return flat_params(load_models.load_mllm("", MODEL)), jax.tree.map(jnp.asarray, lesson)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", list(SHARES))
def test_what_it_is_asked_to_say(task):
    """All that it is shown; of the target nothing but its first frame and the prompt."""
    pair = draw_pair(3, 0, "held_out", task)
    told, temporal = mllm_training.read(MODEL, VOCABULARY, pair), task in ("motion", "camera", "effect")
    said = VOCABULARY.decode(told["tokens"][told["answer"]])
    still = scenes.caption(pair.target._replace(motion=None, camera=None, effect=None))
    assert said == (f"{scenes.caption(pair.reference)} {still}" if temporal else f"{pair.prompt} {scenes.caption(pair.reference)}")
    before = mllm_inputs.token_inputs(MODEL, VOCABULARY, task, pair.prompt, temporal)
    count = int(before["mask"].sum())
    for name in ("tokens", "positions", "source"):
        np.testing.assert_array_equal(told[name][..., :count], before[name][..., :count])
    assert not told["answer"][:count].any()
    assert told["answer"][count:].all()
    assert (told["source"][count:] == -1).all()
    following = told["positions"][:, count - 1 :]  # the words count on behind the last of the turn, as queries do
    assert (following == following[0, 0] + np.arange(len(said.encode()) + 1)).all()


def test_the_loss_is_of_the_answer_alone(first):
    """The cross-entropy of each of its words, by hand."""
    params, lesson = first
    key = jax.random.key(0)
    log_p = jax.nn.log_softmax(mllm_training.scores(SMALL, params, lesson, jax.random.fold_in(key, 0)))
    rows, columns = np.nonzero(np.asarray(lesson.answer))
    expected = -log_p[rows, columns, lesson.tokens[rows, columns]].mean()
    state = mllm_training.init_state(SMALL, jax.tree.map(jnp.copy, params))
    _, metrics = mllm_training.make_train_step(SMALL)(1, state, lesson, key)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_it_does_not_see_what_it_has_to_say(first):
    """The scores are the same whatever words stand in the answer's places, and others with other noise."""
    params, lesson = first
    score = jax.jit(lambda tokens, key: mllm_training.scores(SMALL, params, lesson._replace(tokens=tokens), key))
    one = score(lesson.tokens, jax.random.key(1))
    assert (score(jnp.where(lesson.answer, 7, lesson.tokens), jax.random.key(1)) == one).all()
    assert not (score(jnp.where(lesson.answer, lesson.tokens, 7), jax.random.key(1)) == one).all()
    assert not (score(lesson.tokens, jax.random.key(2)) == one).all()


def test_it_sees_frame_and_reference(first):
    """The answer's first word depends on both clips where there are both, and on the reference alone where there is no frame."""
    params, lesson = first
    score = jax.jit(
        lambda frames, references: mllm_training.scores(
            SMALL, params, lesson._replace(frames=frames, references=references), jax.random.key(0)
        )
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
        each = mllm_training.scores(SMALL, params, lesson, jax.random.key(0))
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


def test_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    """Bit for bit: weights and losses."""

    @contextmanager
    def after_seven():
        yield lambda step: step == 7

    with monkeypatch.context() as patch:
        patch.setattr(part_training, "stop_signals", after_seven)
        mllm_training.train(SMALL, "", tmp_path)
    assert not (tmp_path / "mllm.json").exists()
    mllm_training.train(SMALL, "", tmp_path)
    ours, theirs = (load_file(folder / "mllm.safetensors") for folder in (tmp_path, whole))
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []
    ours, theirs = ({line["step"]: line["loss"] for line in lines(folder)} for folder in (tmp_path, whole))
    assert ours == theirs


def test_wrong_requests(whole):
    with pytest.raises(RequestError, match=r"learning_rate=0\.5: the run in .* was started with 0\.01"):
        mllm_training.train(replace(SMALL, learning_rate=0.5), "", whole)
    with pytest.raises(RequestError, match=r"evaluate_clips=20: a multiple of 32"):
        replace(SMALL, evaluate_clips=20).validate()
    with pytest.raises(RequestError, match=r"at full size the model is Qwen2\.5-VL, imported"):
        configs_mllm.get_config("")
