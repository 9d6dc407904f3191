"""The keys and values of references at every layer, computed once for a transfer and read at every step.

At full size they take 26.8 GB in bfloat16 for a reference as large as the target; `quantize` halves that.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Storage = Literal["full", "float8", "int8"]

# dtype and its largest value
NARROW = {"float8": (jnp.float8_e4m3fn, 448.0), "int8": (jnp.int8, 127.0)}


class CachedArray(NamedTuple):
    """An array, or an array of one byte a number and the factors that restore it."""

    values: Array
    scale: Float[Array, "*lead 1"] | None = None
    """One factor per token and head."""

    def read(self, dtype: jnp.dtype) -> Array:
        """The array in `dtype`."""
        if self.scale is None:
            return self.values.astype(dtype)
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["grid"])
@dataclass(frozen=True)
class KVCache:
    """Keys and values "layers B S N K" of all references, normalised and rotated, ready for any step and either guidance pass."""

    keys: CachedArray
    values: CachedArray
    grid: tuple[int, int, int]
    """The target's patches (time, rows, columns): the offsets, and so the keys, hold for this target alone."""


def quantize(kv_cache: KVCache, storage: Storage) -> KVCache:
    """`kv_cache` with one byte a number instead of two or four, scaled per token and head; `full` leaves it as it is."""
    if storage == "full":
        return kv_cache
    dtype, largest = NARROW[storage]

    def narrow(stored: CachedArray) -> CachedArray:
        x = stored.values.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-12) / largest
        x = x / scale
        return CachedArray((jnp.rint(x) if storage == "int8" else x).astype(dtype), scale)

    return KVCache(narrow(kv_cache.keys), narrow(kv_cache.values), kv_cache.grid)
