"""Low-rank adapters (arXiv 2106.09685) on any `Linear` of any model, chosen by path: y + (x down) up alpha / rank.

    add_lora(model, config, name="lora_motion", num_heads=12, rngs=rngs)
    blocks.self_attention.query.lora_motion.{down, up, head_mask}

A projection may have several adapters under different names; their outputs add up. `up` starts at zero, so fresh adapters change
no bit of the model's output. A head mask holds one factor for each head of the adapter's output. It is data: it never trains, and
another mask does not compile another program.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from configs.base import LoRAConfig
from configs.errors import require
from omnitransfer_jax.models.layers import Linear

NAME = r"lora(?:_[a-z0-9_]+)?"  # what an adapter may be called
PATH = re.compile(rf"(?P<linear>.+)\.(?P<name>{NAME})\.(?P<leaf>down|up|head_mask)")  # a parameter of an adapter
DATA = r".*\.head_mask"  # parameters that never train


def sharding(stacked: str) -> list[tuple[str, tuple[str | None, ...]]]:
    """The axes of all adapters' parameters, for a model's `SHARDING`; paths of stacked layers begin with the expression `stacked`."""
    axes: dict[str, tuple[str | None, ...]] = {"down": ("in", "out"), "up": (None, "out"), "head_mask": (None,)}
    rules = [(rf"{stacked}.*\.{NAME}\.{leaf}", ("layers", *names)) for leaf, names in axes.items()]
    return rules + [(rf"(?!{stacked}).*\.{NAME}\.{leaf}", names) for leaf, names in axes.items()]


class LoRA(nnx.Module):
    """The adapter of one projection, or of a stack of them that `lax.scan` takes layer by layer."""

    def __init__(self, kernel_shape: tuple[int, ...], config: LoRAConfig, num_heads: int | None = None, *, rngs: nnx.Rngs):
        *stack, in_dim, out_dim = kernel_shape
        self.scale = config.alpha / config.rank
        bound = in_dim**-0.5  # PEFT's initial values: Kaiming uniform with a = sqrt(5)
        self.down = nnx.Param(jax.random.uniform(rngs.params(), (*stack, in_dim, config.rank), jnp.float32, -bound, bound))
        self.up = nnx.Param(jnp.zeros((*stack, config.rank, out_dim), jnp.float32))
        self.head_mask = None if num_heads is None else nnx.Param(jnp.ones((*stack, num_heads), jnp.float32))

    def __call__(self, x: Float[Array, "L I"]) -> Float[Array, "L O"]:
        y = x @ self.down.astype(x.dtype) @ self.up.astype(x.dtype) * self.scale
        if self.head_mask is None:
            return y
        mask = jax.lax.stop_gradient(self.head_mask.astype(x.dtype))
        return (y.reshape(len(y), mask.size, -1) * mask[None, :, None]).reshape(y.shape)


def add_lora(model: nnx.Module, config: LoRAConfig, name: str = "lora", num_heads: int | None = None, *, rngs: nnx.Rngs) -> None:
    """Gives an adapter `name` to every `Linear` of `model` whose path (`layers.attention.query`) one of `config.targets` matches whole.

    With `num_heads` each gets a head mask, all ones. A `RequestError` for a name that `NAME` does not match or that a projection
    already has, for a target that matches no projection, and for an output that does not divide into the heads.
    """
    require(
        re.fullmatch(NAME, name) is not None,
        f"adapter name {name!r}: 'lora', or 'lora_' and small letters, digits or underscores, as in 'lora_motion'",
    )
    linears = {".".join(map(str, path)): module for path, module in nnx.iter_graph(model) if isinstance(module, Linear)}
    for pattern in config.targets:
        require(
            any(re.fullmatch(pattern, path) for path in linears),
            f"lora.targets: {pattern!r} matches no projection; the model has {', '.join(sorted(linears)[:8])}, ...",
        )
    for path, linear in linears.items():
        if any(re.fullmatch(pattern, path) for pattern in config.targets):
            require(name not in linear.adapters, f"adapter name {name!r}: {path} already has {', '.join(linear.adapters)}; take another")
            width = linear.kernel.shape[-1]
            require(
                num_heads is None or width % num_heads == 0,
                f"num_heads={num_heads}: the {width} outputs of {path} do not divide into so many heads; name other lora.targets",
            )
            setattr(linear, name, LoRA(linear.kernel.shape, config, num_heads, rngs=rngs))
            linear.adapters += (name,)


def with_head_mask(params: Mapping[str, Any], mask: Float[Array, "*lead N"], name: str = "lora") -> dict[str, Any]:
    """Flat parameters in which every head mask of the adapter `name` is `mask`: one row "N" for all layers, or a row a layer "layers N"."""
    suffix = f".{name}.head_mask"
    return {path: jnp.broadcast_to(mask, leaf.shape).astype(leaf.dtype) if path.endswith(suffix) else leaf for path, leaf in params.items()}


def fold_head_masks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flat parameters without head masks, whose factors are in `up` instead; the model's output is the same."""
    folded = {path: leaf for path, leaf in params.items() if not re.fullmatch(DATA, path)}
    for path in params.keys() - folded.keys():
        target = path.removesuffix("head_mask") + "up"
        up, mask = folded[target], params[path]
        folded[target] = up * jnp.repeat(mask, up.shape[-1] // mask.shape[-1], axis=-1)[..., None, :]
    return folded


def merge_lora(params: Mapping[str, Any], scale: float, name: str | None = None) -> dict[str, Any]:
    """Flat parameters with the adapters `name`, or all of them, added to their kernels and gone; kernels keep their dtype.

    `scale` is alpha / rank, so adapters of different configurations are merged one name after the other.
    """
    found = {path: match for path in params if (match := PATH.fullmatch(path)) and name in (None, match["name"])}
    merged = {path: leaf for path, leaf in params.items() if path not in found}
    adapters = fold_head_masks({path: params[path] for path in found})
    for path, match in found.items():
        if match["leaf"] == "down":
            kernel = merged[f"{match['linear']}.kernel"]
            delta = jnp.matmul(adapters[path], adapters[f"{match['linear']}.{match['name']}.up"])
            merged[f"{match['linear']}.kernel"] = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
    return merged
