"""A model's parameters as a flat dictionary, path -> array, the form in which weights, checkpoints and training have them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """The model that `make(rngs)` would build, with shapes and dtypes instead of arrays, so that no memory is allocated."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def flat_params(model: nnx.Module, prefix: str = "") -> dict[str, Any]:
    """Every parameter of `model` (arrays, or shapes if it is abstract) by `prefix` and its path, such as
    `blocks.self_attention.query.kernel`."""
    return {prefix + ".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def with_params(model: Model, params: Mapping[str, Any]) -> Model:
    """`model` (often abstract) with `params` instead of its own parameters; the paths must be the same."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def count(model: nnx.Module) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(flat_params(model)))
