"""How weights move: AdamW with clipped gradients, and a rate that rises linearly and then stays."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from configs.base import OptimizerConfig

# Stacked layers give biases two axes and modulations three, so the name tells what a matrix is, not the shape.
MATRIX = r"(.*\.)?(kernel|patch_embedding|lora\.down|lora\.up)"


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Decoupled weight decay on matrices alone; epsilon is AdamW's usual 1e-8, outside the root."""
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(lambda updates: learning_rate(jnp.asarray(updates), config)),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer count
            return adamw.update(updates, state, params)

    return optax.GradientTransformation(adamw.init, update)


def learning_rate(updates: Int32[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """The rate of the next update after so many; the first one already moves, the last of the warm-up has the full rate."""
    return config.learning_rate * jnp.minimum(1.0, (updates + 1) / max(1, config.warmup_steps))


def matrices(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters decay, by path."""
    return {path: re.fullmatch(MATRIX, path) is not None for path in params}
