"""The accelerators that programs are compiled for: what one device has, and how XLA is told to compile for it.

Peaks and the network's rates are the vendor's (Google Cloud's TPU pages): dense bf16, and both directions of one axis of a torus together.
Memory is what the compiler lets a program use: its own limit, read off its refusals.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from configs.errors import require
from configs.run import MeshConfig

OVERLAP = {  # gathers that run while the device computes; without these v5p and v6e wait for each of them
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
ALL_TO_ALL = {"xla_tpu_enable_async_all_to_all": "true"}
SPARSE_CORE = {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true"}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device."""

    memory: float
    """GiB that a program may use."""
    peak: float
    """bf16 TFLOP/s."""
    link: float
    """GB/s along one axis of the torus."""
    between_slices: float
    """GB/s from one chip to those of other slices (Google Cloud's pages: data center network, a chip or a pod by its chips)."""
    attention: float
    """Share of the peak at which the stock attention kernel runs, forward at width 128 (tokamax's tuning files), where it is below what
    the roofline assumes; 0 elsewhere."""
    options: Mapping[str, str] = field(default_factory=dict)
    """XLA's compiler options."""


CHIPS = {
    "v5e": Chip(memory=15.75, peak=197, link=90, between_slices=3.125, attention=0, options=OVERLAP),  # refuses ALL_TO_ALL
    "v5p": Chip(memory=95.74, peak=459, link=180, between_slices=6.25, attention=0, options=OVERLAP | ALL_TO_ALL | SPARSE_CORE),
    "v6e": Chip(memory=31.25, peak=918, link=180, between_slices=12.5, attention=0.34, options=OVERLAP | ALL_TO_ALL | SPARSE_CORE),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
"""How JAX names these devices."""

MESHES = {
    "v5p:4x4x4": MeshConfig(data=16, heads=4),
    "v5p:4x4x8": MeshConfig(data=16, heads=8),
    "v6e:16x16": MeshConfig(data=16, heads=8, keys=2),
    "v5e:16x16": MeshConfig(data=16, heads=8, keys=2),
    "v5p:2x2x1": MeshConfig(heads=4),
    "v6e:2x4": MeshConfig(heads=8),
    "H100:8": MeshConfig(heads=8),
    "H200:8": MeshConfig(heads=8),
}
"""Topology, of GPUs their number -> the mesh of docs/pods.md, for 16 samples a step or for one in sampling."""


def chip_of(topology: str) -> Chip:
    """The device of a topology like `v5p:4x4x4`."""
    name = topology.partition(":")[0]
    require(name in CHIPS, f"--topology={topology}: the part before the colon is one of {', '.join(sorted(CHIPS))}")
    return CHIPS[name]


def documented_mesh(topology: str, slices: int = 1) -> MeshConfig:
    """The recommended mesh of a topology, or of several slices of it."""
    remedy = "give --mesh.data, --mesh.heads and --mesh.keys"
    require(topology in MESHES, f"{topology}: no mesh is recommended for it, there is one for {', '.join(MESHES)}; {remedy}")
    return replace(MESHES[topology], slices=slices)


def compiler_options(device_kind: str) -> dict[str, str]:
    """XLA's options for the devices that JAX names so; none for others."""
    return dict(CHIPS[KINDS[device_kind]].options) if device_kind in KINDS else {}
