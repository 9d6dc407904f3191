"""Stage 1: the diffusion transformer learns to attend to references in context (paper section 5.1).

Goal    Wan2.1 I2V 14B becomes a transfer model for all five tasks; text still comes from UMT5.
Trains  every parameter of the transformer; autoencoder, UMT5 and CLIP are frozen and run once, in launch.encode.
Cost    10,000 steps of 16 samples, 480p x 81 frames, reference of the same size: 12.25 PFLOP a sample and step (docs/references.md).
Result  not run at full size. `tiny` starts from the base model inside the package; `smoke` has random weights, for tests.

    python -m launch.train --config=stage1 --workdir=DIR --data.path=RECORDS --train.init_from=IMPORTED
"""

from dataclasses import replace

from configs import stage0, wan
from configs.run import CheckpointConfig, Config, DataConfig, OptimizerConfig, TransferTrainConfig, VideoConfig, variant_of

FULL = wan.get_config()
SMOKE_VIDEO = VideoConfig(frames=9, height=32, width=48, fps=8)

VARIANTS = {
    "": FULL,
    "tiny": replace(stage0.TINY, train=replace(stage0.TINY_TRAIN, steps=560)),
    "smoke": replace(
        wan.get_config("smoke"),
        video=SMOKE_VIDEO,
        data=DataConfig(reference=SMOKE_VIDEO, threads=1),
        train=TransferTrainConfig(steps=60, batch_size=4, ema=0.9),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        checkpoint=CheckpointConfig(every=30),
    ),
}


def get_config(variant: str = "") -> Config:
    """The configuration named `stage1[:variant]`."""
    return variant_of(VARIANTS, variant)
