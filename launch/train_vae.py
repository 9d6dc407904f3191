"""Trains the autoencoder on the procedural world: --config=vae:tiny --workdir=DIR. Started again it goes on where it stopped.

    python -m launch.train_vae --config=vae:tiny --workdir=runs/vae

The workdir holds the configuration, metrics.jsonl, TensorBoard events and checkpoints, and at the end vae.safetensors and vae.json.
SIGTERM or Ctrl-C saves after the current step and ends.
"""

from pathlib import Path

from absl import flags

from configs.vae import VAETraining
from launch import command
from world import vae_training

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True, flag_values=FLAGS)


def main(config: VAETraining) -> None:
    vae_training.train(config, Path(WORKDIR.value))


if __name__ == "__main__":
    command.run(main, FLAGS)
