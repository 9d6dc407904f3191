"""Compiles a program for a TPU pod that is not here, and says whether it fits and what it waits for. No weights, no data, no TPU.

    python -m launch.compile --config=stage3 --topology=v5p:4x4x4 --json=stage3.json
    python -m launch.compile --config=stage1 --topology=v6e:16x16 --meshes="16x8x2 16x16x1 8x8x4"
    python -m launch.compile --config=stage1 --topology=v6e:2x4 --program=sample
    python -m launch.compile --config=stage3 --topology=v5e:2x4 --program=encode

It needs TPU's compiler: pip install -e '.[tpu]'. A topology is a generation and the chips along each axis. The mesh is the configuration's
(`--mesh.data` and so on), or, where that is one device, the recommended one (configs/chips.py); `--meshes` compiles several, as
data x heads x keys, and prints a table. `encode` are the frozen networks of launch.encode, each a program of one device over one pair; they
are in memory together. FLOPs and seconds are counted and bounded, not measured (docs/pods.md).
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from configs.chips import Chip, chip_of, documented_mesh
from configs.errors import RequestError, require
from configs.run import Config, MeshConfig
from launch import command
from launch.compiling import programs
from launch.compiling.programs import Program
from omnitransfer_jax.compiled.collectives import Collective, collectives
from omnitransfer_jax.compiled.operations import Operations, operations
from omnitransfer_jax.compiled.roofline import ATTENTION, PRODUCTS, Roofline, roofline, seconds
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.mesh import described, make_mesh, place_of
from omnitransfer_jax.models.attend import compiled_for

FLAGS = flags.FlagValues()
TOPOLOGY = flags.DEFINE_string("topology", None, "such as v5p:4x4x4, v6e:16x16, v5e:16x16", required=True, flag_values=FLAGS)
PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "sample", "encode"], "a training step, a whole sampling, or the encoders", flag_values=FLAGS
)
JSON = flags.DEFINE_string("json", "", "file for everything that is found", flag_values=FLAGS)
SLICES = flags.DEFINE_integer("slices", 1, "of that topology, which divide the batch", lower_bound=1, flag_values=FLAGS)
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


class Report(NamedTuple):
    """What a compilation found."""

    mesh: MeshConfig
    memory: dict[str, float]
    """GiB of one device."""
    program: Program
    executed: Operations
    """Of one device."""
    sent: list[Collective]
    places: list[Any]
    """Every device's place in the torus, in the mesh's order."""
    roofline: Roofline
    compiled_in: float
    """Seconds."""
    text: str
    """Of the compiled program."""


def main(config: Config) -> None:
    if JSON.value:
        outputs.require_file("--json", JSON.value)
    if HLO.value:
        outputs.require_file("--hlo", HLO.value)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    chip, devices = chip_of(TOPOLOGY.value), devices_of(TOPOLOGY.value, SLICES.value)
    with compiled_for("tpu"):
        found, texts = (encoders if PROGRAM.value == "encode" else on_meshes)(config, chip, devices)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    if HLO.value:
        Path(HLO.value).write_text("".join(texts))


def on_meshes(config: Config, chip: Chip, devices: Any) -> tuple[Any, list[str]]:
    """Compiles for each mesh and prints what is found; what there is for --json and --hlo."""
    meshes = [mesh_of(text) for text in MESHES_FLAG.value.split()] or [chosen_mesh(config, TOPOLOGY.value)]
    variants = [replace(config, mesh=mesh) for mesh in meshes]
    for each in variants:
        each.validate()
        has = each.mesh.devices
        require(has == len(devices), f"--topology={TOPOLOGY.value}: {len(devices)} devices, but the mesh has {has}")
    found, texts = [], []
    for each in variants:
        try:
            mesh, started = make_mesh(each.mesh, devices), time.perf_counter()
            program = {"train": programs.train, "sample": programs.sample}[PROGRAM.value](each, mesh)
            report = compiled(program, each.mesh, mesh, chip, started, chip.options)
        except jax.errors.JaxRuntimeError as error:
            found.append({"topology": TOPOLOGY.value, "mesh": asdict(each.mesh), "fits": False, "refused": refusal(error)})
            print(f"{name_of(each.mesh):<12} does not fit: {refusal(error)}", flush=True)
        else:
            found.append(as_json(report, chip))
            texts.append(report.text)
            print(row(report, chip) if len(meshes) > 1 else summary(report, chip), flush=True)
    return found if len(meshes) > 1 else found[0], texts


def encoders(config: Config, chip: Chip, devices: Any) -> tuple[dict[str, Any], list[str]]:
    """Compiles each encoder for one device and prints what it takes; what there is for --json and --hlo."""
    require(not MESHES_FLAG.value, "--meshes: the encoders run on one device of each process; leave it out")
    single = MeshConfig()
    mesh, reports, refused = make_mesh(single, devices), {}, {}
    print(f"encode on one device of {TOPOLOGY.value}, for one pair")
    for name, program in programs.encode(config, mesh).items():
        try:
            reports[name] = compiled(program, single, mesh, chip, time.perf_counter())
            print(row(reports[name], chip, name), flush=True)
        except jax.errors.JaxRuntimeError as error:
            refused[name] = refusal(error)
            print(f"{name:<12} does not fit: {refused[name]}", flush=True)
    found = together(reports, chip, refused)
    verdict = "fits" if found["fits"] else "does not fit"
    print(
        f"all in memory together: {found['hbm_gib_per_device']} GiB of {chip.memory}, {verdict}; "
        f"at best {found['roofline_seconds']:.2f} s a pair"
    )
    return found, [report.text for report in reports.values()]


def devices_of(topology: str, slices: int = 1) -> Any:
    """The devices of so many slices of a topology, as the compiler describes them."""
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        said = str(error).splitlines()[0][:120]
        remedy = "TPU's compiler is needed, pip install -e '.[tpu]', and a generation with the chips along each axis, as v5p:4x4x4"
        raise RequestError(f"--topology={topology}: {said}; {remedy}") from None


def mesh_of(text: str) -> MeshConfig:
    """The mesh that `16x4x1` names."""
    sizes = text.split("x")
    require(len(sizes) == 3 and all(size.isdigit() for size in sizes), f"--meshes={text}: expected data x heads x keys, as 16x4x1")
    data, heads, keys = map(int, sizes)
    return MeshConfig(data=data, heads=heads, keys=keys, slices=SLICES.value)


def name_of(mesh: MeshConfig) -> str:
    """The mesh as `--meshes` has it."""
    return f"{mesh.data}x{mesh.heads}x{mesh.keys}"


def chosen_mesh(config: Config, topology: str) -> MeshConfig:
    """The configuration's mesh, or the recommended one if that is a single device."""
    if config.mesh.devices > 1:
        return config.mesh
    return documented_mesh(topology, SLICES.value)


def compiled(
    program: Program, config: MeshConfig, mesh: Mesh, chip: Chip, started: float, options: Mapping[str, str] | None = None
) -> Report:
    """Lowers and compiles."""
    done = program.traced.lower().compile(dict(options or {}))
    seconds_taken, used, text = time.perf_counter() - started, done.memory_analysis(), done.as_text()
    # `temp_size_in_bytes` is left out: the compiler takes programs whose temporaries by it are above the limit it was given.
    memory = {"arguments": used.argument_size_in_bytes, "outputs": used.output_size_in_bytes - used.alias_size_in_bytes}
    memory["temporaries"] = used.peak_memory_in_bytes - sum(memory.values())
    memory["program"] = used.generated_code_size_in_bytes
    executed, sent, places = operations(text), collectives(text), [place_of(device) for device in mesh.devices.flat]
    found = roofline(chip, program.useful, executed, sent, places)
    gib = {name: size / GIB for name, size in memory.items()}
    return Report(config, gib, program, executed, sent, places, found, seconds_taken, text)


def summary(report: Report, chip: Chip) -> str:
    """For a person: whether it fits, what takes the memory, and what it waits for."""
    total, times = sum(report.memory.values()), report.roofline
    lines = [
        f"{PROGRAM.value} on {TOPOLOGY.value}, mesh {described(report.mesh)}, compiled in {report.compiled_in:.0f} s",
        f"memory    {total:.1f} of {chip.memory} GiB a device: " + ", ".join(f"{name} {size:.1f}" for name, size in report.memory.items()),
        f"FLOPs     {report.program.useful:.4g} useful, {executed_of(report):.4g} executed, {excess(report):.3f} times",
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
    found: dict[Any, Sent] = {}
    for each in report.sent:
        key = each.kind, len(each.group), each.dtype, each.overlaps
        before = found.get(key, Sent(*key, 0, 0.0, 0.0))
        size, time = each.count * each.bytes / 1e9, seconds(each, chip, report.places)
        found[key] = Sent(*key, before.count + each.count, before.gigabytes + size, before.seconds + time)
    return sorted(found.values(), key=lambda sent: -sent.seconds)


def collective_row(sent: Sent) -> str:
    """A line of the table of collectives."""
    overlaps = "yes" if sent.overlaps else "no"
    return f"{sent.kind:<20} {sent.group:>6} {sent.dtype:>5} {sent.count:>6} {sent.gigabytes:>8.2f} {sent.seconds:>8.3f}  {overlaps}"


def executed_of(report: Report) -> float:
    """Operations that all devices execute."""
    return sum(report.executed) * report.mesh.devices


def excess(report: Report) -> float:
    """How many times the useful operations are executed."""
    return executed_of(report) / report.program.useful


def row(report: Report, chip: Chip, name: str = "") -> str:
    """A line of a table of meshes, or of programs with a name."""
    shares = " / ".join(f"{share:.1%}" for share in report.roofline.mfu.values())
    total = sum(report.memory.values())
    return (
        f"{name or name_of(report.mesh):<12} {total:>6.1f} GiB of {chip.memory}  {excess(report):.3f} executed/useful"
        f"  MFU {shares}  compiled in {report.compiled_in:.0f} s"
    )


def refusal(error: Exception) -> str:
    """What the compiler says when a program does not fit; other errors are raised."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    start = text.find("Ran out of memory")
    return (text[start:] if start >= 0 else text).splitlines()[0][:200]


def as_json(report: Report, chip: Chip) -> dict[str, Any]:
    """Everything that was found."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for each in report.sent:
        kinds[each.kind]["count"] += each.count
        kinds[each.kind]["bytes"] += each.count * each.bytes
    total = sum(report.memory.values())
    return {
        "topology": TOPOLOGY.value,
        "slices": SLICES.value,
        "devices": report.mesh.devices,
        "mesh": asdict(report.mesh),
        "program": PROGRAM.value,
        "params": report.program.params,
        "hbm_gib_per_device": round(total, 2),
        "hbm_limit_gib": chip.memory,
        "fits": True,  # the compiler refuses what does not
        "memory_gib": {name: round(size, 2) for name, size in report.memory.items()},
        "model_flops": report.program.useful,
        "executed_flops": executed_of(report),
        "executed_attention_flops": report.executed.attention * report.mesh.devices,
        "collectives": kinds,
        "collectives_by_group": [each._asdict() for each in sent_by_kind(report, chip)],
        "roofline_seconds": report.roofline.compute + report.roofline.exposed,
        "mfu_bound": report.roofline.mfu,
        "compile_seconds": round(report.compiled_in, 1),
        "assumptions": assumptions(chip),
    }


def together(reports: Mapping[str, Report], chip: Chip, refused: Mapping[str, str]) -> dict[str, Any]:
    """Of programs of one device that run one after the other: the weights of all, and beside those the most that one of them needs."""
    parts = {name: as_json(report, chip) | {"times": report.program.times} for name, report in reports.items()}
    networks = {report.program.network: report.program for report in reports.values()}
    weights = sum(program.weights for program in networks.values()) / GIB
    beside = max((beside_weights(report) for report in reports.values()), default=0.0)
    useful, executed, taken = (
        sum(part["times"] * part[name] for part in parts.values()) for name in ("model_flops", "executed_flops", "roofline_seconds")
    )
    return {
        "topology": TOPOLOGY.value,
        "devices": 1,
        "program": PROGRAM.value,
        "params": sum(program.params for program in networks.values()),
        "hbm_gib_per_device": round(weights + beside, 2),
        "hbm_limit_gib": chip.memory,
        "fits": not refused and weights + beside <= chip.memory,
        "memory_gib": {"weights": round(weights, 2), "beside them": round(beside, 2)},
        "model_flops": useful,
        "executed_flops": executed,
        "collectives": {},
        "roofline_seconds": taken,
        "mfu_bound": {"as compiled": useful / (chip.peak * 1e12 * taken)} if parts else {},
        "compile_seconds": round(sum(report.compiled_in for report in reports.values()), 1),
        "assumptions": assumptions(chip),
        "programs": parts,
        "refused": dict(refused),
    }


def beside_weights(report: Report) -> float:
    """GiB that a program needs beside its network's weights."""
    return sum(size for name, size in report.memory.items() if name != "arguments") + report.program.inputs / GIB


def assumptions(chip: Chip) -> str:
    """What the seconds depend on."""
    network = f"{chip.link} GB/s an axis, {chip.between_slices} GB/s between slices"
    return f"{chip.peak} TFLOP/s, {network}; products at {PRODUCTS} of the peak, attention at {ATTENTION}"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tracing needs no accelerator, and one that is here would be taken
    command.run(main, FLAGS)
