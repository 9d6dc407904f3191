"""Compiles a program for a TPU pod that is not here, and says whether it fits and what it waits for. No weights, no data, no TPU.

    python -m launch.compile --config=stage3 --topology=v5p:4x4x4 --json=stage3.json
    python -m launch.compile --config=stage1 --topology=v6e:16x16 --meshes="16x8x2 16x16x1 8x8x4"
    python -m launch.compile --config=stage1 --topology=v6e:2x4 --program=sample

It needs TPU's compiler: pip install -e '.[tpu]'. A topology is a generation and the chips along each axis. The mesh is the configuration's
(`--mesh.data` and so on), or, where that is one device, the recommended one (configs/chips.py); `--meshes` compiles several, as
data x heads x keys, and prints a table. FLOPs and seconds are counted and bounded, not measured (docs/pods.md).
"""

import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from configs.chips import MESHES, Chip, chip_of
from configs.errors import RequestError, require
from configs.run import Config, MeshConfig
from launch import command
from launch.train import objective
from omnitransfer_jax import samplers
from omnitransfer_jax.compiled.collectives import Collective, collectives
from omnitransfer_jax.compiled.operations import Operations, operations
from omnitransfer_jax.compiled.roofline import ATTENTION, PRODUCTS, Roofline, roofline, seconds
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.mesh import batch_sharding, make_mesh, placed, replicated, specs
from omnitransfer_jax.models.omnitransfer import abstract_conditions, denoise_part, program_on
from omnitransfer_jax.train import flops, loop
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import placed_state

FLAGS = flags.FlagValues()
TOPOLOGY = flags.DEFINE_string("topology", None, "such as v5p:4x4x4, v6e:16x16, v5e:16x16", required=True, flag_values=FLAGS)
PROGRAM = flags.DEFINE_enum("program", "train", ["train", "sample"], "a training step, or a whole sampling", flag_values=FLAGS)
JSON = flags.DEFINE_string("json", "", "file for everything that is found", flag_values=FLAGS)
MESHES_FLAG = flags.DEFINE_string("meshes", "", "several meshes, each as data x heads x keys: '16x4x1 8x8x1'", flag_values=FLAGS)
HLO = flags.DEFINE_string("hlo", "", "file for the compiled program's text", flag_values=FLAGS)
GIB = 2**30
QUIET = {  # the compiler asks the machine what TPU it has; these answer
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at once
}


class Program(NamedTuple):
    """What is compiled."""

    traced: Any
    useful: float
    """Operations that the method needs, of all devices."""


class Report(NamedTuple):
    """What a compilation found."""

    mesh: MeshConfig
    memory: dict[str, float]
    """GiB of one device."""
    useful: float
    executed: Operations
    """Of one device."""
    sent: list[Collective]
    roofline: Roofline
    compiled_in: float
    """Seconds."""


def main(config: Config) -> None:
    if JSON.value:
        outputs.require_file("--json", JSON.value)
    if HLO.value:
        outputs.require_file("--hlo", HLO.value)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    chip, devices = chip_of(TOPOLOGY.value), devices_of(TOPOLOGY.value)
    meshes = [mesh_of(text) for text in MESHES_FLAG.value.split()] or [chosen_mesh(config, TOPOLOGY.value)]
    kernel = "splash" if config.dit.attention == "auto" else config.dit.attention  # `auto` is the kernel of this machine
    variants = [replace(config, mesh=mesh, dit=replace(config.dit, attention=kernel)) for mesh in meshes]
    for each in variants:
        each.validate()
        has = each.mesh.devices
        require(has == len(devices), f"--topology={TOPOLOGY.value}: {len(devices)} devices, but the mesh has {has}")
    found = []
    for each in variants:
        try:
            report = compile_for(each, chip, devices)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found.append({"topology": TOPOLOGY.value, "mesh": asdict(each.mesh), "fits": False, "refused": refusal(error)})
            print(f"{name_of(each.mesh):<12} does not fit: {refusal(error)}", flush=True)
        else:
            found.append(as_json(report, chip, each))
            print(row(report, chip) if len(meshes) > 1 else summary(report, chip), flush=True)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found if len(meshes) > 1 else found[0], indent=2) + "\n")


def devices_of(topology: str) -> Any:
    """The devices of a topology, as the compiler describes them."""
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        said = str(error).splitlines()[0][:120]
        remedy = "TPU's compiler is needed, pip install -e '.[tpu]', and a generation with the chips along each axis, as v5p:4x4x4"
        raise RequestError(f"--topology={topology}: {said}; {remedy}") from None


def mesh_of(text: str) -> MeshConfig:
    """The mesh that `16x4x1` names."""
    sizes = text.split("x")
    require(len(sizes) == 3 and all(size.isdigit() for size in sizes), f"--meshes={text}: expected data x heads x keys, as 16x4x1")
    data, heads, keys = map(int, sizes)
    return MeshConfig(data=data, heads=heads, keys=keys)


def name_of(mesh: MeshConfig) -> str:
    """The mesh as `--meshes` has it."""
    return f"{mesh.data}x{mesh.heads}x{mesh.keys}"


def chosen_mesh(config: Config, topology: str) -> MeshConfig:
    """The configuration's mesh, or the recommended one if that is a single device."""
    if config.mesh.devices > 1:
        return config.mesh
    require(topology in MESHES, f"--topology={topology}: no mesh is recommended for it; give --mesh.data, --mesh.heads and --mesh.keys")
    return MESHES[topology]


def compile_for(config: Config, chip: Chip, devices: Any) -> Report:
    """Traces, lowers and compiles."""
    mesh, started = make_mesh(config.mesh, devices), time.perf_counter()
    program = {"train": train_program, "sample": sample_program}[PROGRAM.value](config, mesh)
    compiled = program.traced.lower().compile(dict(chip.options))
    seconds_taken = time.perf_counter() - started
    used = compiled.memory_analysis()
    # `temp_size_in_bytes` is left out: the compiler takes programs whose temporaries by it are above the limit it was given.
    memory = {"arguments": used.argument_size_in_bytes, "outputs": used.output_size_in_bytes - used.alias_size_in_bytes}
    memory["temporaries"] = used.peak_memory_in_bytes - sum(memory.values())
    memory["program"] = used.generated_code_size_in_bytes
    text = compiled.as_text()
    if HLO.value:
        Path(HLO.value).write_text(text)
    executed, sent = operations(text), collectives(text)
    found = roofline(chip, program.useful, executed, sent, coordinates(config.mesh))
    gib = {name: size / GIB for name, size in memory.items()}
    return Report(config.mesh, gib, program.useful, executed, sent, found, seconds_taken)


def train_program(config: Config, mesh: Mesh) -> Program:
    """A training step, as the loop compiles it."""
    trained = objective(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained.matrices)
    spec = specs({**trained.params, **trained.base}, trained.sharding, config.mesh)
    like = placed_state(trained, config, optimizer, mesh, spec)
    base = placed(mesh, dict(trained.base), {path: spec[path] for path in trained.base})
    key = placed(mesh, jax.eval_shape(trained.root_key), PartitionSpec())
    places = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(mesh)
    step = jax.jit(loop.make_step(trained, config, optimizer, mesh, spec), donate_argnums=0, out_shardings=places)
    traced = step.trace(like, placed(mesh, trained.batch, batch_sharding(mesh).spec), key, base)
    require(trained.flops is not None, "--config: the operations of this training are not counted")
    return Program(traced, float(trained.flops or 0))


def sample_program(config: Config, mesh: Mesh) -> Program:
    """A whole sampling of one video from one reference, with the reference's cache and guidance."""
    expert = samplers.experts(config.sampler)[0]
    run, params = program_on(mesh, config, partial(denoise_part, config, None))
    trees = placed(mesh, abstract_conditions(config), PartitionSpec())
    return Program(run.trace(params, trees, batched=config.mesh.data == 1, static=(expert,)), float(flops.sampling(config)))


def summary(report: Report, chip: Chip) -> str:
    """For a person: whether it fits, what takes the memory, and what it waits for."""
    total, times = sum(report.memory.values()), report.roofline
    lines = [
        f"{PROGRAM.value} on {TOPOLOGY.value}, mesh data {report.mesh.data} x heads {report.mesh.heads} x keys {report.mesh.keys}, "
        f"compiled in {report.compiled_in:.0f} s",
        f"memory    {total:.1f} of {chip.memory} GiB a device: " + ", ".join(f"{name} {size:.1f}" for name, size in report.memory.items()),
        f"FLOPs     {report.useful:.4g} useful, {executed_of(report):.4g} executed, {executed_of(report) / report.useful:.3f} times",
        f"seconds   {times.compute:.2f} computing, {times.exposed:.2f} waiting for others, {times.overlapped:.2f} sending beside it",
        "MFU       " + ", ".join(f"{share:.1%} {name}" for name, share in times.mfu.items()),
        f"{'collective':<20} {'group':>6} {'type':>5} {'count':>6} {'GB':>8} {'seconds':>8}  overlaps",
    ]
    return "\n".join([*lines, *map(collective_row, sent_by_kind(report, chip))])


class Sent(NamedTuple):
    """Collectives of one kind together."""

    kind: str
    group: int
    dtype: str
    overlaps: bool
    count: int
    gigabytes: float
    seconds: float


def sent_by_kind(report: Report, chip: Chip) -> list[Sent]:
    """The collectives, those of one kind together, the slowest first."""
    places = coordinates(report.mesh)
    found: dict[Any, Sent] = {}
    for each in report.sent:
        key = each.kind, len(each.group), each.dtype, each.overlaps
        before = found.get(key, Sent(*key, 0, 0.0, 0.0))
        size, time = each.count * each.bytes / 1e9, seconds(each, chip, places)
        found[key] = Sent(*key, before.count + each.count, before.gigabytes + size, before.seconds + time)
    return sorted(found.values(), key=lambda sent: -sent.seconds)


def collective_row(sent: Sent) -> str:
    """A line of the table of collectives."""
    overlaps = "yes" if sent.overlaps else "no"
    return f"{sent.kind:<20} {sent.group:>6} {sent.dtype:>5} {sent.count:>6} {sent.gigabytes:>8.2f} {sent.seconds:>8.3f}  {overlaps}"


def coordinates(mesh: MeshConfig) -> list[Any]:
    """The place of every device of the mesh in the torus, in the mesh's order."""
    return [device.coords for device in make_mesh(mesh, devices_of(TOPOLOGY.value)).devices.flat]


def executed_of(report: Report) -> float:
    """Operations that all devices execute."""
    return sum(report.executed) * report.mesh.devices


def row(report: Report, chip: Chip) -> str:
    """A line of a table of meshes."""
    shares = " / ".join(f"{share:.1%}" for share in report.roofline.mfu.values())
    total = sum(report.memory.values())
    return (
        f"{name_of(report.mesh):<12} {total:>6.1f} GiB of {chip.memory}  {executed_of(report) / report.useful:.3f} executed/useful"
        f"  MFU {shares}  compiled in {report.compiled_in:.0f} s"
    )


def refusal(error: Exception) -> str:
    """What the compiler says when a program does not fit."""
    text = str(error)
    start = text.find("Ran out of memory")
    return (text[start:] if start >= 0 else text).splitlines()[0][:200]


def as_json(report: Report, chip: Chip, config: Config) -> dict[str, Any]:
    """Everything that was found."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for each in report.sent:
        kinds[each.kind]["count"] += each.count
        kinds[each.kind]["bytes"] += each.count * each.bytes
    total = sum(report.memory.values())
    return {
        "topology": TOPOLOGY.value,
        "devices": report.mesh.devices,
        "mesh": asdict(report.mesh),
        "program": PROGRAM.value,
        "params": sum(leaf.size for leaf in objective(config).params.values()),
        "hbm_gib_per_device": round(total, 2),
        "hbm_limit_gib": chip.memory,
        "fits": True,  # the compiler refuses what does not
        "memory_gib": {name: round(size, 2) for name, size in report.memory.items()},
        "model_flops": report.useful,
        "executed_flops": executed_of(report),
        "executed_attention_flops": report.executed.attention * report.mesh.devices,
        "collectives": kinds,
        "collectives_by_group": [each._asdict() for each in sent_by_kind(report, chip)],
        "roofline_seconds": report.roofline.compute + report.roofline.exposed,
        "mfu_bound": report.roofline.mfu,
        "compile_seconds": round(report.compiled_in, 1),
        "assumptions": f"{chip.peak} TFLOP/s, {chip.link} GB/s an axis; products at {PRODUCTS} of the peak, attention at {ATTENTION}",
    }


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tracing needs no accelerator, and one that is here would be taken
    command.run(main, FLAGS)
