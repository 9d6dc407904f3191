"""Kernels of frozen `Linear`s in one byte a number: int8 with a factor for each output, so that the product is scaled and not the matrix.

    hold_int8(model.dit, r"blocks\\..*")                    blocks.ffn.up.{kernel: int8, kernel_scale: float32}
    params = dict(to_int8(path, kernel))

A value is off by at most half a step, 1/254 of the largest of its output.
"""

import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from omnitransfer_jax.models.layers import Linear

LARGEST, SMALLEST = 127, 1e-12


def hold_int8(model: nnx.Module, pattern: str) -> None:
    """Makes every `Linear` whose path `pattern` matches whole hold an int8 kernel and its factors, all zero and one."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, Linear) and re.fullmatch(pattern, ".".join(map(str, path))):
            shape = module.kernel.shape
            module.kernel = nnx.Param(jnp.zeros(shape, jnp.int8))
            module.kernel_scale = nnx.data(nnx.Param(jnp.ones((*shape[:-2], shape[-1]), jnp.float32)))  # it was None, so static


def to_int8(path: str, kernel: Float[np.ndarray, "*stack I O"]) -> Iterator[tuple[str, np.ndarray]]:
    """The kernel at `path` and the factors at `path` + "_scale", on the host."""
    values = np.asarray(kernel, np.float32)
    scale = np.maximum(np.abs(values).max(-2), SMALLEST) / LARGEST
    yield path, np.rint(values / scale[..., None, :]).astype(np.int8)
    yield f"{path}_scale", scale.astype(np.float32)
