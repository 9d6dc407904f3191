"""How weights move: AdamW or Muon with clipped gradients, and a rate that rises linearly and then stays or falls."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32
from optax.contrib import MuonDimensionNumbers

from configs.run import OptimizerConfig

# Stacked layers give biases two axes and modulations three, so the name tells what a matrix is, not the shape.
MATRIX = r"(.*\.)?(kernel|patch_embedding|lora\w*\.down|lora\w*\.up)"
ADAPTER = r"alignment\.(queries|mllm\..*)"


def make_optimizer(config: OptimizerConfig, steps: int, matrices: Callable[[Any], Any] | None = None) -> optax.GradientTransformation:
    """The optimizer of a training of so many steps. Decoupled weight decay on matrices alone; AdamW's epsilon is 1e-8, outside the root.

    `matrices` gives by path the axes that Muon takes for a matrix, None for what is no matrix; `dimension_numbers` if it is not given.
    """
    rules = muon(config, steps, matrices or dimension_numbers) if config.kind == "muon" else adamw(config, steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    optimizer = optax.chain(clip, *rules, optax.stateless(partial(slow_adapters, config)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer count
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adamw(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, ...]:
    """AdamW as PyTorch has it (arXiv 1711.05101)."""
    return (
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(lambda updates: learning_rate(jnp.asarray(updates), config, steps)),
    )


def muon(config: OptimizerConfig, steps: int, matrices: Callable[[Any], Any]) -> tuple[optax.GradientTransformation, ...]:
    """Muon (Jordan 2024): a matrix moves by its averaged gradient with all singular values near 1, times sqrt(max(1, out / in))."""
    return (
        optax.contrib.muon(
            lambda updates: learning_rate(jnp.asarray(updates), config, steps),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=lambda updates: schedule(config.vector_learning_rate, jnp.asarray(updates), config, steps),
            muon_weight_dimension_numbers=matrices,
        ),
    )


def slow_adapters(config: OptimizerConfig, updates: Any, params: Any) -> Any:
    """The updates by path, those of adapters and queries `adapter_share` as large."""
    return {path: x * config.adapter_share if re.fullmatch(ADAPTER, path) else x for path, x in updates.items()}


def learning_rate(updates: Int32[Array, ""], config: OptimizerConfig, steps: int) -> Float[Array, ""]:
    """The rate of the next update after so many; with Muon that of the matrices."""
    return schedule(config.learning_rate, updates, config, steps)


def schedule(highest: float, updates: Int32[Array, ""], config: OptimizerConfig, steps: int) -> Float[Array, ""]:
    """The rate after so many updates of `steps`: a linear rise to `highest`, then that, half a cosine down to 0 (`cosine`), or that and at
    the end a line down to 0 (`wsd`).

    Without a cosine the first update already moves and the last of the warm-up has the full rate.
    """
    if config.schedule == "cosine":
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(optax.warmup_cosine_decay_schedule(0.0, highest, config.warmup_steps, steps)(updates))
    share = jnp.minimum(1.0, (updates + 1) / max(1, config.warmup_steps))
    if config.schedule == "wsd":
        share = jnp.minimum(share, (steps - updates) / max(1, round(config.decay_share * steps)))
    return highest * share


def is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters decay, and are matrices to Muon, by path."""
    return {path: re.fullmatch(MATRIX, path) is not None for path in params}


def dimension_numbers(params: Any) -> Any:
    """By path the axes a matrix maps from and to, None for what is no matrix; the remaining axis of stacked layers is a batch."""
    axes = {path: (0, 1, 2, 3) if path.endswith("patch_embedding") else (-2,) for path in params}
    return {path: MuonDimensionNumbers(axes[path], (-1,)) if matrix else None for path, matrix in is_matrix(params).items()}
