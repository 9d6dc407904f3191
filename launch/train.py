"""Trains: --config=stage1|stage2|stage3 --workdir=DIR. Started again on the same workdir it goes on where it stopped.

    python -m launch.train --config=stage1 --workdir=runs/stage1 --data.path=records --train.init_from=checkpoints/wan_i2v
    python -m launch.train --config=stage1 --dry_run

The workdir holds the configuration, metrics.jsonl, TensorBoard events and checkpoints (docs/training.md). SIGTERM or Ctrl-C saves after
the current step and ends.
"""

from pathlib import Path

import jax
from absl import flags

from configs.errors import require
from configs.run import Config
from data_pipelines.batches import batches, empty_text
from launch import command
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.plan import describe

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=FLAGS)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that a cluster started (TPU pod, Slurm, ...): join the others.", flag_values=FLAGS
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print configuration, parameters, memory and FLOPs, and stop.", flag_values=FLAGS)


def main(config: Config) -> None:
    if DRY_RUN.value:
        print(describe(config))
        return
    loop.require_weights(config)
    require(bool(WORKDIR.value), "--workdir: not given, and a training needs it; name the folder of the run")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    mesh = make_mesh(config.mesh)
    index, count = loop.data_share(mesh)
    data = batches(config, seed=config.seed, process_index=index, process_count=count)
    loop.train(config, Path(WORKDIR.value), mesh, data, empty_text(config))


if __name__ == "__main__":
    command.run(main, FLAGS)
