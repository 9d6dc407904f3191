"""Devices: the mesh, and which axis of which parameter is spread over which part of it.

    data      shares the batch; every parameter's `in` axis is spread over it and completed layer by layer (FSDP)
    context   shares the tokens of each sample, target and reference in equal parts; parameters are repeated along it

Models name their parameters' axes (`SHARDING` in each model's file); this file alone knows the mesh.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.errors import require
from configs.run import MeshConfig

DATA, CONTEXT = "data", "context"
MESH_AXIS = {"in": DATA, "out": None, "layers": None, "vector": None, None: None}
"""Logical axis -> mesh axis."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""(regular expression of a path, its axes' names)."""


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a run over the first data * context devices."""
    needed, devices = config.data * config.context, jax.devices()
    require(
        needed <= len(devices),
        f"mesh.data={config.data} times mesh.context={config.context} is {needed} devices: this machine has {len(devices)}",
    )
    return Mesh(np.array(devices[:needed]).reshape(config.data, config.context), (DATA, CONTEXT), axis_types=(AxisType.Auto,) * 2)


def specs(params: Mapping[str, Any], rules: Rules, size: int) -> dict[str, P]:
    """Where each parameter lives on a mesh with `size` devices along `data`; every path matches exactly one rule.

    An axis that `size` does not divide is repeated instead.
    """
    found = {}
    for path, leaf in params.items():
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
        if len(matches) != 1 or len(matches[0]) != len(leaf.shape):
            raise ValueError(f"{path} {leaf.shape}: {matches} of its sharding rules apply; exactly one with {len(leaf.shape)} axes must")
        names = [MESH_AXIS[name] for name in matches[0]]
        found[path] = P(*(axis if axis and n % size == 0 else None for axis, n in zip(names, leaf.shape, strict=True)))
    return found


def shardings(mesh: Mesh, specs: Mapping[str, P]) -> dict[str, NamedSharding]:
    """The same as shardings of `mesh`."""
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def unshard(x: jax.Array, spec: Iterable[str | None]) -> jax.Array:
    """The whole of a parameter of which this device holds the part `spec` says, inside a `shard_map`."""
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def layer_gatherer(specs: Mapping[str, P]) -> Callable[[nnx.State], nnx.State]:
    """Completes one layer of a stacked module whose leaves (layer axis first) live as `specs` says."""

    def gather(layer: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(layer)
        return nnx.from_flat_state(
            [(path, leaf.replace(unshard(leaf.get_value(), tuple(specs[".".join(map(str, path))])[1:]))) for path, leaf in flat]
        )

    return gather
