"""Devices: the mesh, which axes of which parameter are spread over which part of it, and what one device holds. The one file that knows it.

    slices    groups of devices with a slow network between them; each has all parameters, and they divide the batch
    data      divides the batch
    heads     divides the tokens of each sample; around self-attention its devices exchange tokens for heads (all-to-all)
    keys      divides the tokens too; in self-attention each device gathers everyone's keys and values

All axes of a slice hold the parameters together: every matrix is spread over all of them and gathered layer by layer (FSDP). Target and
reference are divided in equal parts each, so that all devices have equal work. Models name their parameters' axes (`SHARDING` in each
model's file) and receive a `Shard`; the commands take a mesh and pass it on.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey

from configs.chips import KINDS, MESHES, documented_mesh
from configs.errors import require
from configs.run import MeshConfig, RunConfig

SLICES, DATA, HEADS, KEYS = AXES = "slices", "data", "heads", "keys"
BATCH = (SLICES, DATA)
TOKENS = (KEYS, HEADS)  # of consecutive parts, the first `mesh.heads` are on the devices that exchange heads
SPREAD = (DATA, HEADS, KEYS)
MESH_AXES = {"in": SPREAD, "out": (), "layers": (), "vector": (), None: ()}
"""Logical axis -> mesh axes, the outermost first."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""(regular expression of a path, its axes' names)."""
AnyRun = TypeVar("AnyRun", bound=RunConfig)
Specs = Mapping[str, P]
"""Where each parameter lives, by path."""


class Shard(NamedTuple):
    """What one device computes inside a `shard_map`: a part of every sample's tokens, with a part of the parameters."""

    heads: int = 1
    """Devices that exchange heads."""
    keys: int = 1
    """Devices that gather keys and values."""
    gather_layer: Callable[[nnx.State], nnx.State] = lambda layer: layer
    """One layer's whole parameters, of which this device holds a part."""

    @property
    def devices(self) -> int:
        """The devices that divide the tokens of every stream."""
        return self.heads * self.keys

    def part(self, tokens: int) -> int:
        """How many of a stream's tokens each device has; the last ones have padding behind theirs."""
        return -(-tokens // self.devices)

    def local(self, x: jax.Array) -> jax.Array:
        """This device's part of the tokens, the second axis; padding is zero."""
        if self.devices == 1:
            return x
        part = self.part(x.shape[1])
        x = jnp.pad(x, ((0, 0), (0, part * self.devices - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return jax.lax.dynamic_slice_in_dim(x, self.index * part, part, axis=1)

    @property
    def index(self) -> Any:
        """Which part of the tokens this device has."""
        return 0 if self.devices == 1 else jax.lax.axis_index(TOKENS)

    def gather(self, x: jax.Array, tokens: int) -> jax.Array:
        """All `tokens` tokens, the second axis, of which each device has a part."""
        return x if self.devices == 1 else jax.lax.all_gather(x, TOKENS, axis=1, tiled=True)[:, :tokens]

    def tokens_for_heads(self, x: jax.Array) -> jax.Array:
        """A part of the heads of more tokens "B l N K", in exchange for all heads of this device's own."""
        return x if self.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=2, concat_axis=1, tiled=True)

    def heads_for_tokens(self, x: jax.Array) -> jax.Array:
        """The way back from `tokens_for_heads`."""
        return x if self.heads == 1 else jax.lax.all_to_all(x, HEADS, split_axis=1, concat_axis=2, tiled=True)

    def gather_keys(self, x: jax.Array, tokens: int) -> jax.Array:
        """All `tokens` tokens after `tokens_for_heads`."""
        x = x if self.keys == 1 else jax.lax.all_gather(x, KEYS, axis=1, tiled=True)
        return x[:, :tokens]

    def start(self, tokens: int) -> Any:
        """After `tokens_for_heads`: the index of this device's first token, where each had `tokens` of them."""
        return 0 if self.keys == 1 else jax.lax.axis_index(KEYS) * tokens * self.heads


UNSHARDED = Shard()
"""One device computes everything."""


def with_found_mesh(config: AnyRun) -> AnyRun:
    """The configuration; with `mesh.auto` it has the documented mesh of the devices that JAX finds, which is printed."""
    if not config.mesh.auto:
        return config
    devices = jax.devices()
    slices = len({place_of(device)[0] for device in devices})
    topology = topology_of(devices, slices)
    found = MeshConfig() if len(devices) == 1 else documented_mesh(topology, slices)
    several = f"{slices} x {topology}" if slices > 1 else topology
    if jax.process_index() == 0:
        print(f"mesh.auto: {several} is found, the mesh is {described(found)}; --mesh.data and so on choose another", flush=True)
    config = replace(config, mesh=found)
    config.validate()
    return config


def topology_of(devices: Sequence[Any], slices: int) -> str:
    """What `configs.chips.MESHES` calls such devices: `v5p:4x4x4`, or `H100:8`."""
    kind = devices[0].device_kind
    if kind not in KINDS:
        name = next((name for name in ("H100", "H200") if name in kind), kind)
        return f"{name}:{len(devices)}"
    axes = zip(*(place_of(device)[1:] for device in devices), strict=True)
    sides = sorted(len(set(axis)) for axis in axes)
    grids = {topology: topology.partition(":")[2].split("x") for topology in MESHES if topology.startswith(f"{KINDS[kind]}:")}
    alike = [topology for topology, grid in grids.items() if sorted(map(int, [*grid, "1"][:3])) == sides]
    return alike[0] if alike else f"{KINDS[kind]}:{'x'.join(map(str, sides))}"


def place_of(device: Any) -> tuple[int, ...]:
    """The slice of a device, and its coordinates in the torus of that slice."""
    return getattr(device, "slice_index", 0) or 0, *(getattr(device, "coords", None) or ())


def described(config: MeshConfig) -> str:
    """A mesh for people."""
    slices = f"slices {config.slices} x " if config.slices > 1 else ""
    return f"{slices}data {config.data} x heads {config.heads} x keys {config.keys}"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run over the first of `devices`, or of those of this machine; neighbours in it are neighbours in the network."""
    require(not config.auto, "mesh.auto=True: this command does not choose a mesh; give --mesh.data, --mesh.heads and --mesh.keys")
    devices = jax.devices() if devices is None else devices
    shape, needed = (config.slices, config.data, config.heads, config.keys), config.devices
    names = " times ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1 or axis == DATA)
    require(needed <= len(devices), f"{names} is {needed} devices: this machine has {len(devices)}")
    together = jax.process_count() == 1 or needed == len(devices)
    require(
        together, f"{names} is {needed} devices, and {jax.process_count()} processes have {len(devices)}; give --mesh.auto=True, or others"
    )
    devices = list(devices[:needed])
    found = len({getattr(device, "slice_index", 0) for device in devices})
    require(found in (1, config.slices), f"mesh.slices={config.slices}: the devices are of {found} slices; give --mesh.slices={found}")
    if found > 1:
        inner, outer = (1, *shape[1:]), (config.slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    elif len(devices) == needed and devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def specs(params: Mapping[str, Any], rules: Rules, config: MeshConfig) -> dict[str, P]:
    """Where each parameter lives; every path matches exactly one rule.

    An axis that the devices do not divide is spread over as many of the mesh's axes as do, and repeated over the others.
    """
    found = {}
    for path, leaf in params.items():
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, path)]
        if len(matches) != 1 or len(matches[0]) != len(leaf.shape):
            raise ValueError(f"{path} {leaf.shape}: {matches} of its sharding rules apply; exactly one with {len(leaf.shape)} axes must")
        axes = [dividing(MESH_AXES[name], size, config) for name, size in zip(matches[0], leaf.shape, strict=True)]
        used = [axis for several in axes for axis in several]
        if len(used) != len(set(used)):
            raise ValueError(f"{path}: its axes {matches[0]} use an axis of the mesh twice, {used}")
        found[path] = P(*(several or None for several in axes))
    return found


def dividing(axes: tuple[str, ...], size: int, config: MeshConfig) -> tuple[str, ...]:
    """Those of `axes`, from the first on, whose devices divide `size`."""
    found: tuple[str, ...] = ()
    for axis in axes:
        if getattr(config, axis) > 1 and size % count((*found, axis), config) == 0:
            found = (*found, axis)
    return found


def count(axes: Sequence[str], config: MeshConfig) -> int:
    """The devices along these axes."""
    return math.prod(getattr(config, axis) for axis in axes)


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


def axes_by_dimension(spec: P) -> list[tuple[str, ...]]:
    """The axes of the mesh over which each dimension of an array is spread, the outermost first."""
    return [(several,) if isinstance(several, str) else tuple(several or ()) for several in spec]


def axes_of(spec: P) -> tuple[str, ...]:
    """All axes of the mesh over which an array is spread."""
    return tuple(axis for several in axes_by_dimension(spec) for axis in several)


def bytes_per_device(tree: Any, specs: Any, config: MeshConfig) -> int:
    """Bytes of `tree`, laid out by `specs` (a tree of the same form), that one device holds."""
    sizes = jax.tree.map(lambda leaf, spec: leaf.size * leaf.dtype.itemsize // count(axes_of(spec), config), tree, specs)
    return sum(jax.tree.leaves(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the samples of a batch live: divided along the first axis."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(mesh, P())


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of every batch this process reads.

    Processes that hold the same samples and divide their tokens read the same part.
    """
    parts = mesh.devices.reshape(mesh.shape[SLICES] * mesh.shape[DATA], -1)
    rows = sorted({row for row, devices in enumerate(parts) for device in devices if device.process_index == jax.process_index()})
    return rows[0] // len(rows), len(parts) // len(rows)


def to_mesh(batch: Any, mesh: Mesh) -> Any:
    """This process's samples, a tree of numpy arrays, as its part of the batch over all devices.

    Arrays of bfloat16, as records have them, become float32 there: half as many bytes travel. It returns before they have arrived.
    """
    arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), batch)
    narrow = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(arrays))
    return _widen(arrays, batch_sharding(mesh)) if narrow else arrays


@partial(jax.jit, static_argnums=1)
def _widen(arrays: Any, sharding: NamedSharding) -> Any:
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    return jax.lax.with_sharding_constraint(wide, sharding)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def unshard(x: jax.Array, spec: P, dtype: Any) -> jax.Array:
    """The whole parameter in `dtype`, of which this device holds the part `spec` says, inside a `shard_map`.

    It is gathered along one axis of the mesh after the other: a gather over all devices of a pod at once becomes an all-reduce. The
    gradient is the sum over the devices, in float32, of which each gets its part.
    """
    x = x.astype(dtype)
    for axis, several in enumerate(axes_by_dimension(spec)):
        for name in reversed(several):
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def _unshard_forward(x: jax.Array, spec: P, dtype: Any) -> tuple[jax.Array, Any]:
    return unshard(x, spec, dtype), jnp.zeros((), x.dtype)


def _unshard_backward(spec: P, dtype: Any, like: Any, gradient: jax.Array) -> tuple[jax.Array]:
    gradient = gradient.astype(jnp.float32)
    for axis, several in enumerate(axes_by_dimension(spec)):
        for name in several:
            gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=axis, tiled=True)
    return (gradient.astype(like.dtype),)


unshard.defvjp(_unshard_forward, _unshard_backward)

Stacks = Mapping[str, str]
"""Where the paths of stacked layers begin -> the dtype in which their matrices are used."""


def layer_gatherer(specs: Specs, stacks: Stacks) -> Callable[[nnx.State], nnx.State]:
    """`Shard.gather_layer` for stacked modules whose leaves (layer axis first) live as `specs` says."""
    where: dict[str, tuple[P, str]] = {}
    for stack, dtype in stacks.items():
        found = {path.removeprefix(stack): (P(*spec[1:]), dtype) for path, spec in specs.items() if path.startswith(stack)}
        if found.keys() & where.keys():
            raise ValueError(f"{stack}: layers of two stacks have leaves of one name, {sorted(found.keys() & where.keys())[0]}")
        where |= found

    def whole(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        spec, dtype = where[".".join(map(str, path))]
        return unshard(x, spec, dtype) if axes_of(spec) else x

    def gather(layer: nnx.State) -> nnx.State:
        return nnx.from_flat_state([(path, leaf.replace(whole(path, leaf.get_value()))) for path, leaf in nnx.to_flat_state(layer)])

    return gather


def per_device(function: Callable[..., Any], mesh: Mesh, specs: Specs, stacks: Stacks, batched: bool = True) -> Callable[..., Any]:
    """`function(params, *trees, shard)` computed by all devices: a function of whole parameters by path, and of trees.

    Each device gets its part of the tokens (`shard`) and, if `batched`, its samples of the trees, whose first axis is the batch; else the
    trees are whole. Parameters of `stacks` arrive as this device's parts, for `shard.gather_layer`; the others arrive whole. The result
    has the batch first, or is whole if not `batched`.
    """
    shard, rows = shard_of(mesh, specs, stacks), P(BATCH) if batched else P()

    def local(params: Mapping[str, jax.Array], *trees: Any) -> Any:
        return function(beside_stacks(params, specs, stacks), *trees, shard)

    def compute(params: Mapping[str, jax.Array], *trees: Any) -> Any:
        placement = dict(specs), *(rows for _ in trees)
        return jax.shard_map(local, mesh=mesh, in_specs=placement, out_specs=rows, check_vma=False)(params, *trees)

    return compute


def shard_of(mesh: Mesh, specs: Specs, stacks: Stacks) -> Shard:
    """What a device of this mesh computes."""
    return Shard(mesh.shape[HEADS], mesh.shape[KEYS], layer_gatherer(specs, stacks))


def beside_stacks(params: Mapping[str, jax.Array], specs: Specs, stacks: Stacks) -> dict[str, jax.Array]:
    """The parameters, whole but for those of `stacks`."""
    return {path: x if path.startswith(tuple(stacks)) else unshard(x, specs[path], x.dtype) for path, x in params.items()}


def mean_and_gradients(function: Callable[..., Any], mesh: Mesh, specs: Specs, stacks: Stacks) -> Callable[..., Any]:
    """((mean, means of the metrics), gradients) of `function(params, *trees, shard) -> (loss, metrics)` by all devices.

    Returns a function of (trainable, frozen, *trees); parameters and trees arrive as in `per_device`. The gradients are of the mean loss
    of all devices with respect to `trainable`, and live as it does. They are taken inside the `shard_map`: what one device's loss has of
    another's parameters comes back through the exchange that brought it, and what is repeated is summed at the end.
    """
    shard, devices = shard_of(mesh, specs, stacks), mesh.size

    def local(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], *trees: Any) -> Any:
        def part(trainable: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
            loss, metrics = function(beside_stacks({**trainable, **frozen}, specs, stacks), *trees, shard)
            return loss / devices, jax.tree.map(lambda x: x / devices, metrics)

        parts, gradients = jax.value_and_grad(part, has_aux=True)(trainable)
        return jax.lax.psum(parts, AXES), {path: summed(x, specs[path]) for path, x in gradients.items()}

    def compute(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], *trees: Any) -> Any:
        where = {path: specs[path] for path in trainable}
        placement = where, {path: specs[path] for path in frozen}, *(P(BATCH) for _ in trees)
        return jax.shard_map(local, mesh=mesh, in_specs=placement, out_specs=(P(), where), check_vma=False)(trainable, frozen, *trees)

    return compute


def summed(gradient: jax.Array, spec: P) -> jax.Array:
    """The sum over the axes of the mesh along which a parameter is repeated; along the others `unshard` made it."""
    axes = tuple(axis for axis in AXES if axis not in axes_of(spec))
    return jax.lax.psum(gradient, axes) if axes else gradient
