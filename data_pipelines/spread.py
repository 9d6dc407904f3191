"""The frozen encoders on all devices of a process: each device encodes samples of its own, and holds a part of every network.

A network's arrays lie divided over the devices; each device gathers them when it uses the network, and then computes what it would compute
alone, one sample at a time: the same bytes, whatever the number of devices.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = "devices"


class Spread:
    """Functions of (network, batch) on devices."""

    def __init__(self, devices: Sequence[Any]):
        self.mesh = Mesh(np.asarray(devices), (DEVICES,))
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def place(self, network: Any) -> Any:
        """The network with each array divided along its longest axis that divides, and whole on every device if none does."""
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, self._spec(x))), network)

    def __call__(self, name: Hashable, function: Callable[..., Any], network: Any, *batch: np.ndarray) -> np.ndarray:
        """`function(network, *batch)` sample by sample; one of `name` is always the same function. A batch of any size."""
        count, size = len(batch[0]), self.mesh.size
        rows = np.arange(-(-count // size) * size) % count  # the last devices may have a sample of the first ones
        if name not in self._compiled:
            self._compiled[name] = self._program(function, network, len(batch))
        leaves, found = jax.tree.leaves(network), []
        for first in range(0, len(rows), size):
            found.append(np.asarray(self._compiled[name](leaves, *[x[rows[first : first + size]] for x in batch])))
        return np.concatenate(found)[:count]

    def _program(self, function: Callable[..., Any], network: Any, arguments: int) -> Callable[..., Any]:
        leaves, tree = jax.tree.flatten(network)
        specs = [self._spec(leaf) for leaf in leaves]

        def one(leaves: list[jax.Array], *batch: jax.Array) -> jax.Array:
            whole = [_gather(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
            return function(jax.tree.unflatten(tree, whole), *batch)

        places = (specs, *[P(DEVICES)] * arguments)
        return jax.jit(jax.shard_map(one, mesh=self.mesh, in_specs=places, out_specs=P(DEVICES), check_vma=False))

    def _spec(self, x: Any) -> P:
        axes = [axis for axis, length in enumerate(x.shape) if length % self.mesh.size == 0]
        if not axes:
            return P()
        longest = max(axes, key=lambda axis: x.shape[axis])
        return P(*[DEVICES if axis == longest else None for axis in range(x.ndim)])


def _gather(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.all_gather(x, DEVICES, axis=spec.index(DEVICES), tiled=True) if DEVICES in spec else x
