"""The state of a training, and the step that turns a batch into the next state. The loop around it is loop.py.

    draw the random numbers -> loss of each sample -> mean over all devices -> gradients -> update, unless it is not finite

Everything a step needs is in its arguments: state, batch, key. What is trained, on what, is the objective's.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from configs.errors import require
from configs.run import RunConfig
from omnitransfer_jax.mesh import Specs, mean_and_gradients, placed, specs_of
from omnitransfer_jax.models import lora
from omnitransfer_jax.train.objective import Objective, Params


class TrainState(NamedTuple):
    """What a checkpoint holds of a run. Parameters are flat: path -> array."""

    step: Int32[Array, ""]
    trainable: Params
    frozen: Params
    moments: Any
    """The optimizer's state, for the trainable parameters alone."""
    ema: Params
    """Running average of the trainable parameters; empty if there is none."""
    skipped: Int32[Array, ""]
    """Updates left out because they were not finite."""

    @property
    def params(self) -> Params:
        """All parameters by path."""
        return self.trainable | self.frozen


def split_trainable(params: Mapping[str, Any], objective: Objective) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen); an expression of `objective.trainable` that names no parameter is a `RequestError`."""
    names = {path: path.replace(".", "/", 1) for path in objective.params}
    for pattern in objective.trainable:
        require(
            any(re.fullmatch(pattern, name) for name in names.values()),
            f"train.trainable: {pattern!r} matches no parameter; they are named like {min(names.values())}",
        )
    chosen = {
        path
        for path in params
        if not re.fullmatch(lora.DATA, names[path]) and any(re.fullmatch(pattern, names[path]) for pattern in objective.trainable)
    }
    return {p: x for p, x in params.items() if p in chosen}, {p: x for p, x in params.items() if p not in chosen}


def init_state(params: Params, objective: Objective, config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    trainable, frozen = split_trainable(params, objective)
    frozen = {path: x.astype(objective.frozen_dtype) for path, x in frozen.items()}  # nothing accumulates in them
    ema = jax.tree.map(jnp.copy, trainable) if config.train.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), ema, jnp.zeros((), jnp.int32))


def abstract_state(objective: Objective, config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shape and dtype of everything in the state."""
    return jax.eval_shape(lambda params: init_state(params, objective, config, optimizer), dict(objective.params))


def placed_state(objective: Objective, config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, specs: Specs) -> TrainState:
    """`abstract_state` on a mesh. Moments and averages have the sharding of their parameter."""
    state = abstract_state(objective, config, optimizer)
    return placed(mesh, state, specs_of(state, specs))


def make_train_step(
    objective: Objective, config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, specs: Specs
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """train_step(state, batch, key, base) -> (state, metrics), pure, to be compiled once; `base` are the arrays of `objective.base`."""
    parts = config.optimizer.accumulate

    def means(params: Params, batch: Any, drawn: Any, shard: Any) -> tuple[Array, dict[str, Array]]:
        losses, metrics = objective.loss(params, batch, drawn, shard)
        return losses.mean(), {name: values.mean() for name, values in metrics.items()}

    mean_of_devices = mean_and_gradients(means, mesh, specs, objective.stacks)

    def gradients(state: TrainState, batch: Any, drawn: Any, base: Params) -> tuple[tuple[Array, dict[str, Array]], Params]:
        """Mean loss, metrics and gradients; `parts` pieces of the batch one after the other."""
        value_and_grad = partial(mean_of_devices, state.trainable, state.frozen | base)
        if parts == 1:
            return value_and_grad(batch, drawn)

        def add(total, piece):
            return jax.tree.map(lambda a, b: a + b / parts, total, value_and_grad(*piece)), None

        # Every piece takes an equal part of each device's samples.
        pieces = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, drawn))
        first = jax.tree.map(lambda x: x[0], pieces)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, *first))
        return jax.lax.scan(add, zero, pieces)[0]

    def train_step(state: TrainState, batch: Any, key: Array, base: Params | None = None) -> tuple[TrainState, dict[str, Array]]:
        (loss, metrics), grads = gradients(state, batch, objective.draw(key, batch), base or {})
        norm = optax.tree.norm(grads)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        number = state.step - state.skipped + 1  # of this update
        decay = jnp.minimum(config.train.ema, (1 + number) / (10 + number))
        ema = {p: decay * old + (1 - decay) * trainable[p] for p, old in state.ema.items()}
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated, kept = (trainable, moments, ema), (state.trainable, state.moments, state.ema)
        trainable, moments, ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        state = TrainState(state.step + 1, trainable, state.frozen, moments, ema, skipped)
        return state, {"loss": loss, **metrics, "grad_norm": norm, "skipped": skipped}

    return train_step
