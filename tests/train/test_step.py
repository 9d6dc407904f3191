"""The training step: which inputs decide its loss, and which parameters it changes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage1
from configs.errors import RequestError
from configs.run import MeshConfig
from omnitransfer_jax.batch import batch_spec
from omnitransfer_jax.flow import draw_time
from omnitransfer_jax.mesh import UNSHARDED, make_mesh, specs
from omnitransfer_jax.methods.omnitransfer import Drawn, draw, objective
from omnitransfer_jax.models.omnitransfer import SHARDING
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import init_state, make_train_step, placed_state, split_trainable
from tests.train import tiny_run
from tests.train.tiny_run import EMPTY_TEXT, TINY, batches, sample

PARTLY = replace(TINY, train=replace(TINY.train, trainable=(r"dit/blocks\..*attention.*", "dit/head.*"), ema=0.2))
PARAMS = objective(TINY).params


def batch_of(*numbers, **fields):
    return jax.tree.map(jnp.asarray, tiny_run.batch_of(*numbers, **fields))


def draw_params():
    normal = np.random.default_rng(0).standard_normal
    params = {path: 0.2 * normal(leaf.shape) for path, leaf in PARAMS.items()}
    return {path: jnp.asarray(path.endswith("scale") + x, jnp.float32) for path, x in params.items()}


class Stepper:
    """The step of a configuration, compiled when first called, and a state to begin with."""

    def __init__(self, config):
        trained, mesh = objective(config, EMPTY_TEXT), make_mesh(config.mesh)
        optimizer, spec = make_optimizer(config.optimizer, config.train.steps), specs(PARAMS, SHARDING, config.mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, placed_state(trained, config, optimizer, mesh, spec))
        self.state = jax.device_put(init_state(draw_params(), trained, config, optimizer), places)
        self.jitted = jax.jit(make_train_step(trained, config, optimizer, mesh, spec), out_shardings=(places, None))

    def __call__(self, state, batch, key=0):
        return self.jitted(state, batch, jax.random.key(key))

    def compilations(self):
        return self.jitted._cache_size()


@pytest.fixture(scope="module")
def step():
    return Stepper(PARTLY)


def test_one_program_for_every_mix_of_tasks(step):
    seen = {float(step(step.state, batch_of(i, j))[1]["loss"]) for i, j in [(0, 1), (2, 3), (4, 0), (1, 4)]}
    assert len(seen) == 4
    assert step.compilations() == 1


def test_only_the_chosen_parameters_move(step):
    after, _ = step(step.state, batch_of(0, 2))
    assert 0 < len(after.trainable) < len(PARAMS)
    assert {path.split(".")[1] for path in after.frozen} >= {"patch_embedding", "text_embedder", "time_projection"}
    assert [path for path, x in after.frozen.items() if not np.array_equal(x, step.state.frozen[path])] == []
    assert [path for path, x in after.trainable.items() if np.array_equal(x, step.state.trainable[path])] == []
    _, adam, *_ = after.moments
    assert adam.mu.keys() == adam.nu.keys() == after.ema.keys() == after.trainable.keys()


def test_the_average_follows(step):
    """Its decay warms up: (1 + 1) / (10 + 1) at the first update, and the full 0.2 at the second, where 3 / 12 is more."""
    once, _ = step(step.state, batch_of(0, 2))
    twice, _ = step(once, batch_of(1, 3))
    for path, start in step.state.trainable.items():
        first = 2 / 11 * np.float64(start) + 9 / 11 * np.float64(once.trainable[path])
        expected = 0.2 * first + 0.8 * np.float64(twice.trainable[path])
        np.testing.assert_allclose(twice.ema[path], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["target", "reference", "text"])
def test_what_is_not_finite_changes_nothing(step, field, value):
    before, _ = step(step.state, batch_of(0, 2))
    bad = np.stack([sample(1)[field], sample(3)[field]])
    bad[1, ..., 0] = value
    after, metrics = step(before, batch_of(1, 3, **{field: bad}))
    assert not np.isfinite(metrics["loss"])
    for name in ("trainable", "frozen", "moments", "ema"):
        same = jax.tree.map(np.array_equal, getattr(after, name), getattr(before, name))
        assert jax.tree.all(same), name
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert int(step(after, batch_of(0, 2))[0].skipped) == 1


def test_losses_fall(step):
    state, seen = step.state, []
    for _ in range(100):
        state, metrics = step(state, batch_of(0, 2))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.5 * seen[0]
    assert step.compilations() == 1


@partial(jax.jit, static_argnums=3)
def evaluate(params, batch, drawn, config=TINY):
    return objective(config, EMPTY_TEXT).loss(params, batch, drawn, UNSHARDED)[0]


def test_the_loss_is_of_the_velocity_at_the_drawn_time():
    """By the definition: where the network's output is 0, the loss is the mean square of noise - target."""
    params = draw_params() | {"dit.head.kernel": jnp.zeros((24, 64)), "dit.head.bias": jnp.zeros(64)}
    batch = batch_of(0, 2)
    drawn = draw(TINY, jax.random.key(3), batch)
    np.testing.assert_allclose(evaluate(params, batch, drawn), np.square(drawn.noise - batch.target).mean((1, 2, 3, 4)), rtol=1e-6)


def test_small_times_count_less_by_choice():
    """The squared error of the clean estimate, t^2 times the velocity's, over max(t, 0.5)^2."""
    params, batch = draw_params(), batch_of(0, 2)
    noise, clean = draw(TINY, jax.random.key(3), batch).noise, replace(TINY, train=replace(TINY.train, weighting="clean"))
    for times, weights in [((0.1, 0.25), (1 / 25, 1 / 4)), ((0.5, 0.75), (1, 1))]:
        drawn = Drawn(jnp.array(times), noise, jnp.zeros(2))
        plain, weighted = evaluate(params, batch, drawn), evaluate(params, batch, drawn, clean)
        np.testing.assert_allclose(weighted / plain, weights, rtol=1e-6)


def test_references_are_left_out_by_choice():
    """Plain Wan, whose loss knows neither the reference nor the task; and where references stand is the configuration's choice."""
    params, batch, drawn = draw_params(), batch_of(0, 2), draw(TINY, jax.random.key(3), batch_of(0, 2))
    other = batch._replace(reference=batch.reference + 1, task=batch.task[::-1])
    without, moved = replace(TINY, train=replace(TINY.train, references=False)), replace(TINY, dit=replace(TINY.dit, offsets="frames"))
    plain = evaluate(params, batch, drawn, without)
    np.testing.assert_array_equal(plain, evaluate(params, other, drawn, without))
    read = evaluate(params, batch, drawn)
    assert (plain != read).all()
    assert (evaluate(params, batch, drawn, moved) != read).tolist() == [False, True]  # the appearance task was there already


def test_what_a_sample_reads():
    params = draw_params()
    noise = jnp.asarray(np.stack([sample(8)["target"], sample(9)["target"]]))
    plain = Drawn(jnp.array([0.3, 0.7]), noise, jnp.zeros(2))
    batch = batch_of(0, 2)  # id, an appearance task, and motion, a temporal one
    base = evaluate(params, batch, plain)
    image = evaluate(params, batch._replace(image=batch.image + jnp.arange(8.0)[None, None]), plain)
    assert (image != base).tolist() == [False, True]
    dropped = evaluate(params, batch, plain._replace(drop_text=jnp.array([0.0, 1.0])))
    empty = evaluate(params, batch._replace(text=jnp.stack([batch.text[0], jnp.asarray(EMPTY_TEXT)])), plain)
    assert (dropped != base).tolist() == [False, True]
    np.testing.assert_array_equal(dropped, empty)
    for field in ("target", "condition", "reference", "text", "task"):
        value = getattr(batch, field)
        other = evaluate(params, batch._replace(**{field: value.at[0].set(value[0] + 1)}), plain)
        assert (other != base).tolist() == [True, False], field


def test_random_numbers_are_drawn_as_configured():
    batch = jax.tree.map(lambda leaf: jnp.zeros((2000, *leaf.shape[1:]), leaf.dtype), batch_spec(TINY))
    drawn = draw(TINY, jax.random.key(0), batch)
    assert float(drawn.drop_text.mean()) == pytest.approx(TINY.data.text_drop, abs=0.03)
    assert float(drawn.noise.std()) == pytest.approx(1, abs=0.01)
    key_time, *_ = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(drawn.time, draw_time(key_time, 2000, TINY.train.shift))
    assert float(jnp.median(drawn.time)) == pytest.approx(0.75, abs=0.02)  # shift 3 sends 1/2 there


def test_batches_are_as_expected():
    def form(batch):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch)

    assert form(next(batches(TINY))) == form(batch_spec(TINY))


def test_parameters_are_chosen_by_path():
    trainable, frozen = split_trainable(PARAMS, objective(PARTLY))
    assert trainable.keys() | frozen.keys() == PARAMS.keys()
    assert set(trainable) == {p for p in PARAMS if p.startswith("dit.head") or (p.startswith("dit.blocks.") and "attention" in p)}
    with pytest.raises(RequestError, match=r"'dit/nothing' matches no parameter; they are named like dit/blocks\."):
        split_trainable(PARAMS, replace(objective(TINY), trainable=("dit/head.*", "dit/nothing")))


def test_moments_have_the_sharding_of_their_parameter():
    config = stage1.get_config()
    full, optimizer = objective(config), make_optimizer(config.optimizer, config.train.steps)
    spec = specs(full.params, SHARDING, MeshConfig())
    state = placed_state(full, config, optimizer, make_mesh(config.mesh), spec)
    path = "dit.blocks.ffn.up.kernel"
    _, adam, *_ = state.moments
    assert state.trainable[path].sharding == adam.mu[path].sharding == adam.nu[path].sharding
    assert state.trainable[path].sharding.spec == spec[path]
    assert state.ema == {}  # the full size keeps none
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) == 2 * 16_394_878_784 + 2
