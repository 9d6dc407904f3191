"""Weights whose numbers are all finite: one NaN makes every frame of a video black, and nothing else would say so."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RequestError

NAMED = 3  # how many leaves a message names; it counts the others


def require_finite(leaves: Mapping[str, Any], at: str, remedy: str) -> None:
    """A `RequestError` that begins with `at` if there is a NaN or an infinity among `leaves`: which have how many, then the `remedy`.

    It reads all values once, where they are. Arrays of JAX that lie on an accelerator or are divided over processes are counted there,
    by one program for all of them, and all processes raise the same error.
    """
    on_host = all(_is_on_host(leaf) for leaf in leaves.values())
    counts = {path: _count_on_host(leaf) for path, leaf in leaves.items()} if on_host else jax.device_get(_count_on_device(dict(leaves)))
    wrong = [f"{path} has {count:,} of {leaves[path].size:,}" for path, count in sorted(counts.items()) if count]
    if wrong:
        more = f" and {len(wrong) - NAMED} more tensors" if len(wrong) > NAMED else ""
        raise RequestError(f"{at}: numbers that are not finite (NaN or infinity): {', '.join(wrong[:NAMED])}{more}; {remedy}")


def _is_on_host(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()))


def _count_on_host(leaf: Any) -> int:
    """No program: to compile one for a model of hundreds of leaves takes longer than to read a small model."""
    pieces = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0] if isinstance(leaf, jax.Array) else [leaf]
    with np.errstate(invalid="ignore"):  # a signalling NaN of bfloat16 would warn
        return sum(piece.size - int(np.count_nonzero(np.isfinite(np.asarray(piece)))) for piece in pieces)


@jax.jit
def _count_on_device(leaves: dict[str, Any]) -> dict[str, Any]:
    return {path: jnp.sum(~jnp.isfinite(leaf), dtype=jnp.uint32) for path, leaf in leaves.items()}  # a leaf of 14B has 2.8e9 numbers
