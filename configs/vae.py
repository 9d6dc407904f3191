"""The tiny autoencoder of the procedural world: Wan's, with fewer channels, and one downsampling step instead of three.

Goal    latents of 5 x 16 x 16 x 3 numbers for a 9 x 32 x 32 clip, from which its six factors can be read.
Trains  everything, from random weights, on clips that are generated during the training.

    python -m launch.train --config=vae:tiny --workdir=DIR
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from configs import wan
from configs.base import VAEConfig
from configs.errors import require
from configs.kinds import RUN
from configs.ranges import FROM_0, SHARE
from configs.run import OptimizerConfig, RunConfig, TrainConfig, VideoConfig


@dataclass(frozen=True, kw_only=True)
class VAETraining(RunConfig):
    """How an autoencoder is trained on the procedural world."""

    training: ClassVar[str] = "vae"

    vae: VAEConfig = field(default_factory=VAEConfig)
    """The autoencoder; the statistics of its latents are not known before the end, so the means are 0 and the deviations 1."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """The clips."""
    crop: int = 16
    """Height and width of the crops in a step: pixels of one clip resemble each other, so more and smaller crops teach more."""
    whole_share: float = field(default=0.1, metadata=SHARE)
    """Share of the steps, at the end, whose clips are not cropped."""
    grey_share: float = field(default=0.125, metadata=SHARE)
    """Share of the clips that are grey from their second frame on, like the condition clip of a given first frame."""
    kl_weight: float = field(default=1e-5, metadata=FROM_0)
    """Weight of the divergence from a standard normal, averaged over the latents, beside the mean squared error in [-1, 1]."""
    statistics_clips: int = field(default=512, metadata=RUN)
    """Training clips from which the latents' mean and deviation are computed."""
    evaluate_clips: int = field(default=256, metadata=RUN)
    """Held-out clips of the last evaluation; earlier ones use an eighth of them."""
    threads: int = field(default=2, metadata=RUN)
    """Threads that generate clips."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.vae.validate()
        self.video.validate("video", self.vae, (1, 1, 1))
        size = self.train.batch_size
        require(size % 2 == 0, f"train.batch_size={size}: a multiple of 2, because clips come in pairs")
        for name, unit in (("evaluate_clips", 8 * size), ("statistics_clips", size)):
            count = getattr(self, name)
            require(count % unit == 0, f"{name}={count}: a multiple of {unit}")
        stride = self.vae.space_stride
        require(
            self.crop <= min(self.video.height, self.video.width) and self.crop % stride == 0,
            f"crop={self.crop}: a multiple of {stride}, no larger than a clip",
        )
        require(
            set(self.vae.latents_mean) == {0.0} and set(self.vae.latents_std) == {1.0},
            "vae.latents_mean and vae.latents_std: the training computes them; give 0 and 1",
        )


# With Muon, the autoencoder and the language model of the world learn several times as fast as with Adam alone.
WORLD_OPTIMIZER = OptimizerConfig(
    kind="muon", learning_rate=2e-2, vector_learning_rate=5e-3, warmup_steps=20, schedule="cosine", weight_decay=0.0, clip_norm=0.0
)
MODEL = wan.get_config("tiny")
TINY = VAETraining(
    vae=replace(MODEL.vae, latents_mean=(0.0,) * MODEL.vae.z_dim, latents_std=(1.0,) * MODEL.vae.z_dim),
    video=MODEL.video,
    train=TrainConfig(steps=1_200, batch_size=8, evaluate_every=300, log_every=50),
    optimizer=WORLD_OPTIMIZER,
)
VARIANTS = {"tiny": TINY}


def get_config(variant: str = "") -> VAETraining:
    """The configuration named `vae:tiny`."""
    require(variant in VARIANTS, f"variant {variant!r}: the only one is tiny")
    return VARIANTS[variant]
