"""What a target reads of references at every layer, computed once for a transfer and read at every step.

At full size keys and values take 26.8 GB in bfloat16 for a reference as large as the target. Two things halve that: the activations
from which both are projected, which costs the projections again at every step and no accuracy, or one byte a number (`quantize`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.run import ReferenceCache
from omnitransfer_jax.models.attend import Frames

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


@partial(jax.tree_util.register_dataclass, data_fields=["kept", "rotations", "frames"], meta_fields=["grid", "tokens"])
@dataclass(frozen=True)
class KVCache:
    """What is kept of each reference, ready for any step and either guidance pass."""

    kept: tuple[tuple[CachedArray, ...], ...]
    """Of each reference: keys and values "layers B S N K", normalised and rotated; or what they are projected from, "layers B S D"."""
    rotations: tuple[Float[Array, "2 B S k"], ...]
    """Of each reference: cosines and sines of its positions."""
    frames: tuple[Frames, ...]
    """Of each reference: which of its tokens are at which time."""
    grid: tuple[int, int, int]
    """The target's patches (time, rows, columns): the offsets, and so the keys, hold for this target alone."""
    tokens: tuple[int, ...]
    """Of each reference: how many tokens it has, of which a device may have a part."""


def quantize(kv_cache: KVCache, storage: ReferenceCache) -> KVCache:
    """`kv_cache` with one byte a number instead of two or four, scaled per token and head, for `float8` and `int8`; else as it is."""
    if storage not in NARROW:
        return kv_cache
    dtype, largest = NARROW[storage]

    def narrow(stored: CachedArray) -> CachedArray:
        x = stored.values.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-12) / largest
        x = x / scale
        return CachedArray((jnp.rint(x) if storage == "int8" else x).astype(dtype), scale)

    return replace(kv_cache, kept=jax.tree.map(narrow, kv_cache.kept, is_leaf=lambda x: isinstance(x, CachedArray)))
