"""Trains: --config=stage1|stage2|stage3 --workdir=DIR. Started again on the same workdir it goes on where it stopped.

    python -m launch.train --config=stage1 --workdir=runs/stage1 --data.path=records --train.init_from=checkpoints/wan_i2v
    python -m launch.train --config=stage1 --dry_run

`vae:tiny` and `mllm:tiny` train the autoencoder and the language model of the procedural world (docs/world.md). The workdir holds the
configuration, metrics.jsonl, TensorBoard events and checkpoints (docs/training.md). SIGTERM or Ctrl-C saves after the current step and
ends.
"""

from pathlib import Path

import jax
from absl import flags

from configs.ditflow import DiTFlow
from configs.errors import require
from configs.mllm import MLLMTraining
from configs.run import Config
from configs.vae import VAETraining
from data_pipelines.batches import batches, data_digest, empty_text
from launch import command
from omnitransfer_jax import load_models
from omnitransfer_jax.mesh import data_share, make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.objective import Objective
from omnitransfer_jax.train.plan import describe
from world import mllm_training, vae_training

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=FLAGS)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that a cluster started (TPU pod, Slurm, ...): join the others.", flag_values=FLAGS
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print configuration, parameters, memory and FLOPs, and stop.", flag_values=FLAGS)


def main(config: Config | VAETraining | MLLMTraining) -> None:
    require(not isinstance(config, DiTFlow), "--config=ditflow: it trains nothing; give it to launch.sample, with --reference=CLIP")
    if DRY_RUN.value:
        print(describe(objective(config), config))
        return
    loop.require_weights(objective(config), config)
    require(bool(WORKDIR.value), "--workdir: not given, and a training needs it; name the folder of the run")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    mesh, workdir = make_mesh(config.mesh), Path(WORKDIR.value)
    match config:
        case VAETraining():
            vae_training.train(config, workdir, mesh)
        case MLLMTraining():
            mllm_training.train(config, workdir, mesh)
        case Config():
            index, count = data_share(mesh)
            data = batches(config, seed=config.seed, process_index=index, process_count=count)
            trained = omnitransfer.objective(config, empty_text(config))
            loop.train(trained, config, workdir, mesh, data, data_digest=data_digest(config))


def objective(config: Config | VAETraining | MLLMTraining) -> Objective:
    """What the configuration trains."""
    match config:
        case VAETraining():
            return vae_training.objective(config)
        case MLLMTraining():
            return mllm_training.objective(config, load_models.load_mllm_vocabulary(config.train.init_from))
        case Config():
            return omnitransfer.objective(config)


if __name__ == "__main__":
    command.run(main, FLAGS)
