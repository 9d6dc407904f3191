"""Trains the tiny language model: --config=mllm:tiny --encoders=DIR --workdir=DIR. Started again it goes on where it stopped.

    python -m launch.train_mllm --config=mllm:tiny --encoders=out/encoders --workdir=runs/mllm

The weights it starts from and its words are those of --encoders, a folder of launch.embed. The workdir holds the configuration,
metrics.jsonl, TensorBoard events and checkpoints, and at the end mllm.safetensors and mllm.json. SIGTERM or Ctrl-C saves after the current
step and ends.
"""

from pathlib import Path

from absl import flags

from configs.mllm import MLLMTraining
from launch import command
from world import mllm_training

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True, flag_values=FLAGS)
ENCODERS = flags.DEFINE_string("encoders", None, "folder that launch.embed wrote", required=True, flag_values=FLAGS)


def main(config: MLLMTraining) -> None:
    mllm_training.train(config, ENCODERS.value, Path(WORKDIR.value))


if __name__ == "__main__":
    command.run(main, FLAGS)
