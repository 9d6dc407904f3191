"""Devices: the mesh, which axis of which parameter is spread over which part of it, and what one device holds. The one file that knows it.

    data      divides the batch; every parameter's `in` axis is spread over it and gathered layer by layer (FSDP)
    context   divides the tokens of each sample, target and reference in equal parts; parameters are repeated along it

Models name their parameters' axes (`SHARDING` in each model's file) and receive a `Shard`; the commands take a mesh and pass it on.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from configs.errors import require
from configs.run import MeshConfig

DATA, CONTEXT = "data", "context"
MESH_AXIS = {"in": DATA, "out": None, "layers": None, "vector": None, None: None}
"""Logical axis -> mesh axis."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""(regular expression of a path, its axes' names)."""
Specs = Mapping[str, P]
"""Where each parameter lives, by path."""


class Shard(NamedTuple):
    """What one device computes inside a `shard_map`: a part of every sample's tokens, with a part of the parameters."""

    axis: str | None = None
    """Mesh axis over which the tokens of every stream are divided in equal parts."""
    gather_layer: Callable[[nnx.State], nnx.State] = lambda layer: layer
    """One layer's whole parameters, of which this device holds a part."""

    def local(self, x: jax.Array) -> jax.Array:
        """This device's part of the tokens, the second axis."""
        if self.axis is None:
            return x
        size = jax.lax.axis_size(self.axis)
        require(x.shape[1] % size == 0, f"{x.shape[1]} tokens: not a multiple of mesh.context={size}, so the devices' parts would differ")
        part = x.shape[1] // size
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * part, part, axis=1)

    def start(self, tokens: int) -> Any:
        """The index of this device's first token, where each has `tokens` of them."""
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * tokens

    def gather(self, x: jax.Array) -> jax.Array:
        """The tokens of all devices, the second axis."""
        return x if self.axis is None else jax.lax.all_gather(x, self.axis, axis=1, tiled=True)


UNSHARDED = Shard()
"""One device computes everything."""


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a run over the first data * context devices."""
    needed, devices = config.data * config.context, jax.devices()
    require(
        needed <= len(devices),
        f"mesh.data={config.data} times mesh.context={config.context} is {needed} devices: this machine has {len(devices)}",
    )
    return Mesh(np.array(devices[:needed]).reshape(config.data, config.context), (DATA, CONTEXT), axis_types=(AxisType.Auto,) * 2)


def specs(params: Mapping[str, Any], rules: Rules, config: MeshConfig) -> dict[str, P]:
    """Where each parameter lives; every path matches exactly one rule. An axis that `mesh.data` does not divide is repeated instead."""
    found = {}
    for path, leaf in params.items():
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
        if len(matches) != 1 or len(matches[0]) != len(leaf.shape):
            raise ValueError(f"{path} {leaf.shape}: {matches} of its sharding rules apply; exactly one with {len(leaf.shape)} axes must")
        names = [MESH_AXIS[name] for name in matches[0]]
        found[path] = P(*(axis if axis and n % config.data == 0 else None for axis, n in zip(names, leaf.shape, strict=True)))
    return found


def specs_of(tree: Any, specs: Specs) -> Any:
    """The specs of a tree: a leaf under the key of a parameter (a moment, an average) has that parameter's, any other is repeated."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        return specs[path[-1].key] if path and isinstance(path[-1], DictKey) and path[-1].key in specs else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def placed(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Shape, dtype and sharding of every leaf of `tree`; `specs` is a tree of the same form, or one spec for all leaves."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda leaf: specs, tree)
    return jax.tree.map(lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, specs)


def bytes_per_device(tree: Any, specs: Any, config: MeshConfig) -> int:
    """Bytes of `tree`, laid out by `specs` (a tree of the same form), that one device holds."""
    sizes = jax.tree.map(lambda leaf, spec: leaf.size * leaf.dtype.itemsize // (config.data if DATA in tuple(spec) else 1), tree, specs)
    return sum(jax.tree.leaves(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the samples of a batch live: divided along the first axis."""
    return NamedSharding(mesh, P(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(mesh, P())


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of every batch this process reads.

    Processes that hold the same samples and divide their tokens read the same part.
    """
    rows = sorted({row for row, devices in enumerate(mesh.devices) for device in devices if device.process_index == jax.process_index()})
    return rows[0] // len(rows), mesh.shape[DATA] // len(rows)


def to_mesh(batch: Any, mesh: Mesh) -> Any:
    """This process's samples, a tree of numpy arrays, as its part of the batch over all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), batch)


def unshard(x: jax.Array, spec: Iterable[str | None]) -> jax.Array:
    """The whole parameter of which this device holds the part `spec` says, inside a `shard_map`."""
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def layer_gatherer(specs: Specs) -> Callable[[nnx.State], nnx.State]:
    """`Shard.gather_layer` for a stacked module whose leaves (layer axis first) live as `specs` says."""

    def gather(layer: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(layer)
        return nnx.from_flat_state(
            [(path, leaf.replace(unshard(leaf.get_value(), tuple(specs[".".join(map(str, path))])[1:]))) for path, leaf in flat]
        )

    return gather


def per_device(
    function: Callable[..., Any], mesh: Mesh, specs: Specs, stack: str | None, batched: bool = True, mean: bool = False
) -> Callable[..., Any]:
    """`function(params, *trees, shard)` computed by all devices: a function of whole parameters by path, and of trees.

    Each device gets its part of the tokens (`shard`) and, if `batched`, its samples of the trees, whose first axis is the batch; else the
    trees are whole. Parameters under `stack` arrive as this device's parts, for `shard.gather_layer`; the others arrive whole. The result
    has the batch first, or is whole if not `batched`, or with `mean` is the mean over all devices.
    """
    layers = {path.removeprefix(stack): spec for path, spec in specs.items() if path.startswith(stack)} if stack else {}
    shard = Shard(CONTEXT, layer_gatherer(layers))
    rows = P(DATA) if batched else P()

    def local(params: Mapping[str, jax.Array], *trees: Any) -> Any:
        params = {path: x if stack and path.startswith(stack) else unshard(x, specs[path]) for path, x in params.items()}
        result = function(params, *trees, shard)
        return jax.tree.map(mean_of_devices, result) if mean else result

    def compute(params: Mapping[str, jax.Array], *trees: Any) -> Any:
        placement = dict(specs), *(rows for _ in trees)
        return jax.shard_map(local, mesh=mesh, in_specs=placement, out_specs=P() if mean else rows, check_vma=mean)(params, *trees)

    return compute


def mean_of_devices(x: jax.Array) -> jax.Array:
    """The mean over all devices, inside a `shard_map`. An axis along which all devices computed the same `x` is left out."""
    axes = tuple(axis for axis in (DATA, CONTEXT) if axis in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pmean(x, axes) if axes else x
