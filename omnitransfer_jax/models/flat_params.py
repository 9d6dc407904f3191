"""A model's parameters as a flat dictionary: path -> array. What weights, checkpoints and the tests all speak."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """The model `make(rngs)` would build, its leaves shapes and dtypes: no memory, no time, any size."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """Every parameter of `model` (arrays, or shapes if it is abstract) by its path, `blocks.self_attention.query.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def with_params(model: Model, params: Mapping[str, Any]) -> Model:
    """`model` (often abstract) holding `params` instead of its own; the paths must be the same."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def count(model: nnx.Module) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(flat_params(model)))
