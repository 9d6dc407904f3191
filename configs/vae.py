"""The tiny autoencoder of the procedural world: Wan's, with fewer channels, and one step down instead of three.

Goal    latents of a 9 x 32 x 32 clip in 5 x 16 x 16 x 3 numbers that show what its six factors are.
Trains  everything, from random weights, on clips that are drawn as they are needed.

    python -m launch.train_vae --config=vae:tiny --workdir=DIR
"""

from dataclasses import dataclass, field, replace

from configs import wan
from configs.base import CheckpointConfig, VAEConfig, VideoConfig, require


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """How an autoencoder is trained on the procedural world."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    """The autoencoder; its latents are not normalised before their statistics are known, so the means are 0 and the deviations 1."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """The clips."""
    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 8
    """Clips per step; even, for the world gives pairs."""
    crop: int = 16
    """Height and width of what a step sees of its clips: pixels of one clip resemble each other, so more and smaller parts teach more."""
    whole_share: float = 0.1
    """Share of the steps, the last ones, that see whole clips."""
    grey_share: float = 0.125
    """Share of the clips that are grey from their second frame on, as a clip is of which only the first frame is given."""
    learning_rate: float = 2e-2
    """Highest rate of Muon on kernels, after the warm-up; from there it falls to 0 along half a cosine."""
    vector_learning_rate: float = 5e-3
    """The same of Adam on biases and scales."""
    warmup_steps: int = 20
    """Steps up to the highest rate."""
    kl_weight: float = 1e-5
    """Weight of the divergence from a standard normal, averaged over the latents, beside the mean squared error in [-1, 1]."""
    evaluate_every: int = 300
    """Steps between reconstructions of held-out clips."""
    evaluate_clips: int = 256
    """Held-out clips at the end; an eighth of them before."""
    statistics_clips: int = 512
    """Training clips over which the latents' mean and deviation are taken."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl and of the console."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When it saves."""
    threads: int = 2
    """Threads that draw clips."""
    seed: int = 0
    """The one root of every random number."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        self.vae.validate()
        self.checkpoint.validate()
        self.video.validate("video", self.vae, (1, 1, 1))
        for name in ("steps", "evaluate_every", "log_every", "threads"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: at least 1")
        for name, unit in (("batch_size", 2), ("evaluate_clips", 8 * self.batch_size), ("statistics_clips", self.batch_size)):
            size = getattr(self, name)
            require(size >= unit and size % unit == 0, f"{name}={size}: a multiple of {unit}")
        require(
            self.evaluate_every % self.log_every == 0, f"evaluate_every={self.evaluate_every}: a multiple of log_every={self.log_every}"
        )
        stride = self.vae.space_stride
        require(
            0 < self.crop <= min(self.video.height, self.video.width) and self.crop % stride == 0,
            f"crop={self.crop}: a multiple of {stride}, no larger than a clip",
        )
        require(0 <= self.whole_share <= 1, f"whole_share={self.whole_share}: a share from 0 to 1")
        require(0 <= self.grey_share <= 1, f"grey_share={self.grey_share}: a share from 0 to 1")
        for name in ("learning_rate", "vector_learning_rate"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}: more than 0")
        require(0 <= self.warmup_steps < self.steps, f"warmup_steps={self.warmup_steps}: from 0 to below steps={self.steps}")
        require(self.kl_weight >= 0, f"kl_weight={self.kl_weight}: at least 0")
        require(
            set(self.vae.latents_mean) == {0.0} and set(self.vae.latents_std) == {1.0},
            "vae.latents_mean and vae.latents_std: the training finds them; 0 and 1 before",
        )


MODEL = wan.get_config("tiny")
TINY = VAETraining(
    vae=replace(MODEL.vae, latents_mean=(0.0,) * MODEL.vae.z_dim, latents_std=(1.0,) * MODEL.vae.z_dim),
    video=MODEL.video,
)


def get_config(variant: str = "") -> VAETraining:
    """The configuration named `vae:tiny`."""
    require(variant == "tiny", f"variant {variant!r}: the only one is tiny")
    return TINY
