"""Writes what a cluster needs to run a training: --config=NAME --target=xpk|jobset|skypilot|slurm|tpu-vm --out=DIR.

    python -m launch.recipe --config=stage3 --target=jobset --topology=v5p:4x4x4 --workdir=/shared/stage3 --out=recipe \
        --data.path=/shared/records --train.init_from=/shared/stage2
    python -m launch.recipe --config=stage1 --target=slurm --nodes=2 --processes=4 --workdir=/shared/stage1 --out=recipe --mesh.data=8

Nothing is started: DIR/README.md has the one command (docs/clusters.md). All targets have the same environment: the mesh of the topology,
one cache of compiled programs, time to save before they are killed, and a restart that goes on.
"""

import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from absl import flags
from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.chips import chip_of, documented_mesh
from configs.errors import require
from configs.run import Config
from launch import command
from launch.sweeping.plan import Shapes
from launch.sweeping.proposals import arguments_of
from launch.train import ONE_CLIP
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.train import loop

FLAGS = flags.FlagValues()
FILES = {
    "xpk": ("run.sh", "create.sh"),
    "jobset": ("jobset.yaml",),
    "skypilot": ("task.yaml",),
    "slurm": ("train.sbatch",),
    "tpu-vm": ("run.sh", "create.sh"),
}
START = {
    "xpk": "bash {}/create.sh",
    "jobset": "kubectl apply -f {}/jobset.yaml",
    "skypilot": "sky jobs launch {}/task.yaml",
    "slurm": "sbatch {}/train.sbatch",
    "tpu-vm": "PROJECT_FOLDER=$PWD bash {}/create.sh",
}
TARGET = flags.DEFINE_enum("target", None, list(FILES), "what starts the training", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of the files", required=True, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "", "of the training, on storage that all hosts share", flag_values=FLAGS)
TOPOLOGY = flags.DEFINE_string("topology", "", "of TPU targets, as v5p:4x4x4", flag_values=FLAGS)
NODES = flags.DEFINE_integer("nodes", 1, "of slurm", lower_bound=1, flag_values=FLAGS)
PROCESSES = flags.DEFINE_integer("processes", 1, "of slurm, on each node; one for each GPU", lower_bound=1, flag_values=FLAGS)
GPUS = flags.DEFINE_integer("gpus", 0, "of slurm, on each node", lower_bound=0, flag_values=FLAGS)
IMAGE = flags.DEFINE_string("image", "IMAGE", "container image with this project (xpk, jobset)", flag_values=FLAGS)
CLAIM = flags.DEFINE_string("claim", "CLAIM", "persistent volume claim of the folder that holds the workdir (jobset)", flag_values=FLAGS)
CLUSTER = flags.DEFINE_string("cluster", "CLUSTER", "name of the cluster (xpk)", flag_values=FLAGS)
ZONE = flags.DEFINE_string("zone", "ZONE", "of the cloud (xpk, tpu-vm)", flag_values=FLAGS)
RATE = flags.DEFINE_float("save_rate", 0.5, "GB/s at which a host writes to the workdir", 0.001, flag_values=FLAGS)

CHIPS_A_HOST = 4  # of a slice of several hosts; v5e and v6e have one host for up to 8 chips
ONE_HOST = {"v5e": 8, "v6e": 8, "v5p": 4}
ACCELERATOR = {
    "v5p": ("tpu-v5p-slice", "v5p-{cores}"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod-{chips}"),
    "v6e": ("tpu-v6e-slice", "v6e-{chips}"),
}
RUNTIME = {"v5p": "v2-alpha-tpuv5", "v5e": "v2-alpha-tpuv5-lite", "v6e": "v2-alpha-tpuv6e"}
SETTLE = 60  # seconds beside the save: the step that runs, and the file system
ROOM = 2  # saves may be this much slower than --save_rate
RESTARTS = 100


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The TPUs of a topology."""

    name: str
    """As v5p-128, the cloud's name of it."""
    kind: str
    """As tpu-v5p-slice, Kubernetes' name of it."""
    grid: str
    """As 4x4x4."""
    chips: int
    hosts: int
    runtime: str

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


def main(config: Config) -> None:
    require(not isinstance(config, ONE_CLIP), f"--config={FLAGS['config'].value}: learns from one clip, on one machine")
    require(bool(WORKDIR.value), "--workdir: not given; name the folder of the run on storage that all hosts share")
    require(WORKDIR.value.startswith("/"), f"--workdir={WORKDIR.value}: expected an absolute path; mount a bucket, as with gcsfuse")
    outputs.require_new_folder("--out", OUT.value)
    target, tpus = str(TARGET.value), None
    if target == "slurm":
        hosts, devices = NODES.value * PROCESSES.value, NODES.value * (GPUS.value or PROCESSES.value)
    else:
        tpus = slice_of(TOPOLOGY.value)
        config, hosts, devices = with_mesh(config, TOPOLOGY.value, tpus), tpus.hosts, tpus.chips
    require(
        config.mesh.devices == devices,
        f"--mesh: {config.mesh.devices} devices, but there are {devices}; give --mesh.data and --mesh.heads with that product",
    )
    config.validate()
    values = settings(cast(Config, loop.with_absolute_paths(config)), hosts)
    loader = PackageLoader("launch.recipes", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True)
    values |= {"tpus": tpus, "target": target, "start": START[target].format(OUT.value), "files": FILES[target]}
    for name in (*FILES[target], "README.md"):
        source = "README.md.j2" if name == "README.md" else f"{target.replace('-', '_')}_{name}.j2"
        write_whole(Path(OUT.value) / name, environment.get_template(source).render(values))
    print(f"Next, after reading {OUT.value}/README.md: {START[target].format(OUT.value)}")


def slice_of(topology: str) -> Slice:
    """The slice that a topology names."""
    require(bool(topology), "--topology: not given, and this target needs it, as v5p:4x4x4")
    generation, _, grid = topology.partition(":")
    chip_of(topology)
    require(re.fullmatch(r"\d+x\d+(x\d+)?", grid) is not None, f"--topology={topology}: expected the chips along each axis, as v5p:4x4x4")
    chips = math.prod(map(int, grid.split("x")))
    hosts = 1 if chips <= ONE_HOST[generation] else chips // CHIPS_A_HOST
    kind, name = ACCELERATOR[generation]
    name = name.format(chips=chips, cores=2 * chips)
    return Slice(name=name, kind=kind, grid=grid, chips=chips, hosts=hosts, runtime=RUNTIME[generation])


def with_mesh(config: Config, topology: str, tpus: Slice) -> Config:
    """The configuration on all chips of a topology: its own mesh, or the recommended one if that is one device."""
    if config.mesh.devices > 1 or tpus.chips == 1:
        return config
    return replace(config, mesh=documented_mesh(topology))


def settings(config: Config, hosts: int) -> dict[str, object]:
    """What all templates are filled with."""
    name, workdir = str(FLAGS["config"].value), WORKDIR.value.rstrip("/")
    saved = Shapes()(config).checkpoint_gib / (config.checkpoint.keep + 1) * 2**30 / 1e9
    writers = NODES.value if TARGET.value == "slurm" else hosts
    seconds = saved / writers / RATE.value
    arguments = [f"--config={name}", *arguments_of(config, name), f"--workdir={workdir}", *(["--distributed"] if hosts > 1 else [])]
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "train": " ".join(["python", "-m", "launch.train", *map(shlex.quote, arguments)]),
        "workdir": shlex.quote(workdir),
        "parent": str(Path(workdir).parent),
        "claim": CLAIM.value,
        "programs": shlex.quote(f"{workdir}-programs"),
        "steps": config.train.steps,
        "saved": f"{saved:.3g}",
        "rate": f"{RATE.value:g}",
        "seconds": f"{seconds:.0f}",
        "grace": math.ceil((ROOM * seconds + SETTLE) / 30) * 30,
        "hosts": hosts,
        "writers": writers,
        "nodes": NODES.value,
        "processes": PROCESSES.value,
        "gpus": GPUS.value,
        "image": IMAGE.value,
        "cluster": CLUSTER.value,
        "zone": ZONE.value,
        "restarts": RESTARTS,
    }


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # it counts, and computes nothing
    command.run(main, FLAGS)
