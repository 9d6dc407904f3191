"""Low-rank adapters (arXiv 2106.09685) on any `Linear` of any model, chosen by path: y + (x down) up alpha / rank.

`up` starts at zero, so a model with fresh adapters is the model without, bit for bit.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from configs.base import LoRAConfig
from configs.errors import require
from omnitransfer_jax.models.layers import Linear


class LoRA(nnx.Module):
    """The adapter of one projection, or of a stack of them that a scan takes apart."""

    def __init__(self, kernel_shape: tuple[int, ...], config: LoRAConfig, *, rngs: nnx.Rngs):
        *stack, in_dim, out_dim = kernel_shape
        self.scale = config.alpha / config.rank
        bound = in_dim**-0.5  # as peft begins: Kaiming uniform with a = sqrt(5)
        self.down = nnx.Param(jax.random.uniform(rngs.params(), (*stack, in_dim, config.rank), jnp.float32, -bound, bound))
        self.up = nnx.Param(jnp.zeros((*stack, config.rank, out_dim), jnp.float32))

    def __call__(self, x: Float[Array, "L I"]) -> Float[Array, "L O"]:
        return x @ self.down.astype(x.dtype) @ self.up.astype(x.dtype) * self.scale


def add_lora(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Gives an adapter to every `Linear` of `model` whose path (`layers.attention.query`) one of `config.targets` matches whole.

    A target that matches nothing is a `RequestError`.
    """
    linears = {".".join(map(str, path)): module for path, module in nnx.iter_graph(model) if isinstance(module, Linear)}
    for pattern in config.targets:
        require(
            any(re.fullmatch(pattern, path) for path in linears),
            f"lora.targets: {pattern!r} matches no projection; the model has {', '.join(sorted(linears)[:8])}, ...",
        )
    for path, linear in linears.items():
        if any(re.fullmatch(pattern, path) for pattern in config.targets):
            linear.lora = LoRA(linear.kernel.shape, config, rngs=rngs)


def merge_lora(params: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """Flat parameters with every adapter added to its kernel and gone; kernels keep their dtype."""
    merged = {path: leaf for path, leaf in params.items() if ".lora." not in path}
    for path, down in params.items():
        if path.endswith(".lora.down"):
            base = path.removesuffix(".lora.down")
            kernel, up = merged[f"{base}.kernel"], params[f"{base}.lora.up"]
            merged[f"{base}.kernel"] = (kernel.astype(jnp.float32) + scale * jnp.matmul(down, up)).astype(kernel.dtype)
    return merged
