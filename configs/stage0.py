"""Stage 0: the base model inside the package is trained on the procedural world, without references.

Goal    a small transformer that makes clips of the procedural world from a first frame, a prompt or both; stage 1 starts from it.
Trains  every parameter of the transformer, from random weights; autoencoder and encoders are those of the folder in train.init_from.
Size    `tiny` alone. At full size stage 0 is Wan2.1 itself, imported: python -m launch.import_weights --source=DIR --out=DIR
Cost    0.30 s a step of 16 samples on two CPU cores, 9 frames of 32 x 32 pixels (docs/world.md); the larger sizes were not timed.

    python -m launch.embed --config=stage0:tiny --vae=VAE --out=ENCODERS
    python -m launch.encode_world --config=stage0:tiny --train.init_from=ENCODERS --pairs=8000 --two --out=RECORDS
    python -m launch.train --config=stage0:tiny --workdir=DIR --data.path=RECORDS --train.init_from=ENCODERS
    python -m launch.embed --config=stage0:tiny --base=DIR --out=omnitransfer_jax/embedded
"""

from dataclasses import replace

from configs import wan
from configs.errors import require
from configs.run import Config, OptimizerConfig, TransferTrainConfig

# The numbers that all tiny stages have.
TINY_OPTIMIZER = OptimizerConfig(
    kind="muon", learning_rate=1e-2, vector_learning_rate=1e-2, adapter_share=0.03, warmup_steps=50, weight_decay=0.0
)
TINY_TRAIN = TransferTrainConfig(init_from="embedded", ema=0.99, weighting="clean", shift=wan.TINY_SHIFT)

# One grid would be all the base knows; these have other lengths, shapes and widths, and room for two columns and for two shots.
TINY_SIZES = ("9x32x32", "9x32x64", "17x32x32", "9x32x48", "9x48x48", "5x32x32")
TINY_WITH = wan.get_config("tiny")
TINY = replace(
    TINY_WITH,
    data=replace(TINY_WITH.data, buckets=TINY_SIZES),
    train=replace(TINY_TRAIN, init_from="", steps=8_000, references=False),
    optimizer=replace(TINY_OPTIMIZER, schedule="wsd", decay_share=0.25),
)
VARIANTS = {"tiny": TINY}


def get_config(variant: str = "") -> Config:
    """The configuration named `stage0:tiny`."""
    require(
        variant in VARIANTS,
        f"variant {variant!r}: stage0 has `tiny` alone; at full size the base is Wan2.1, imported: "
        "python -m launch.import_weights --source=DIR --out=DIR",
    )
    return VARIANTS[variant]
