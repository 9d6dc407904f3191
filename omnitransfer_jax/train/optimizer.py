"""How weights move: AdamW or Muon with clipped gradients, and a rate that rises linearly and then stays."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32
from optax.contrib import MuonDimensionNumbers

from configs.run import OptimizerConfig

# Stacked layers give biases two axes and modulations three, so the name tells what a matrix is, not the shape.
MATRIX = r"(.*\.)?(kernel|patch_embedding|lora\.down|lora\.up)"
ADAPTER = r"alignment\.(queries|mllm\..*)"


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Decoupled weight decay on matrices alone; epsilon is AdamW's usual 1e-8, outside the root."""
    make = muon if config.kind == "muon" else adamw
    clip, slow = optax.clip_by_global_norm(config.clip_norm), optax.stateless(partial(slow_adapters, config))
    return promoting(optax.chain(clip, *make(config), slow))


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` where numbers of several kinds may meet, which the rest of the code forbids."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer count
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adamw(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """AdamW as PyTorch has it (arXiv 1711.05101)."""
    return (
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(lambda updates: learning_rate(jnp.asarray(updates), config)),
    )


def muon(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """Muon (Jordan 2024): a matrix moves by its averaged gradient with all singular values near 1, times sqrt(max(1, out / in))."""
    return (
        optax.contrib.muon(
            lambda updates: learning_rate(jnp.asarray(updates), config),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=lambda updates: config.vector_learning_rate * warm_up(jnp.asarray(updates), config),
            muon_weight_dimension_numbers=dimension_numbers,
        ),
    )


def slow_adapters(config: OptimizerConfig, updates: Any, params: Any) -> Any:
    """The updates by path, those of adapters and queries `adapter_share` as large."""
    return {path: x * config.adapter_share if re.fullmatch(ADAPTER, path) else x for path, x in updates.items()}


def learning_rate(updates: Int32[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """The rate of the next update after so many; with Muon that of the matrices."""
    return config.learning_rate * warm_up(updates, config)


def warm_up(updates: Int32[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """The share of its rate an update has after so many; the first one already moves, the last of the warm-up has the full rate."""
    return jnp.minimum(1.0, (updates + 1) / max(1, config.warmup_steps))


def matrices(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters decay, and move by Muon if that is the optimizer, by path."""
    return {path: re.fullmatch(MATRIX, path) is not None for path in params}


def dimension_numbers(params: Any) -> Any:
    """By path the axes a matrix maps from and to, None for what is no matrix; the remaining axis of stacked layers is a batch."""
    axes = {path: (0, 1, 2, 3) if path.endswith("patch_embedding") else (-2,) for path in params}
    return {path: MuonDimensionNumbers(axes[path], (-1,)) if matrix else None for path, matrix in matrices(params).items()}
