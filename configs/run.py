"""What a run adds to its models: video, sampler, data, training, optimizer, checkpoints, mesh; and `Config`, which holds them all."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from configs.base import AlignmentConfig, CLIPVisionConfig, DiTConfig, LoRAConfig, QwenConfig, UMT5Config, VAEConfig
from configs.errors import require
from configs.kinds import FIXED, RUN, Kind, select


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The video a run makes."""

    KIND: ClassVar[Kind] = "data"

    frames: int = 81
    """Frames; the causal autoencoder needs 4n+1."""
    height: int = 480
    """Pixels. With a first frame, `height * width` is the area and the frame decides the aspect ratio."""
    width: int = 832
    """Pixels."""
    fps: int = 16
    """Frames per second (Wan2.1's training rate)."""

    def latent_shape(self, vae: VAEConfig) -> tuple[int, int, int, int]:
        """Frames, rows, columns and channels of the video's latents."""
        return (self.frames - 1) // vae.time_stride + 1, self.height // vae.space_stride, self.width // vae.space_stride, vae.z_dim

    def patches(self, vae: VAEConfig, patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """The transformer's tokens of the video: time, rows, columns."""
        (frames, rows, columns, _), (t, h, w) = self.latent_shape(vae), patch
        return frames // t, rows // h, columns // w

    def validate(self, at: str, vae: VAEConfig, patch: tuple[int, int, int]) -> None:
        """`at` is the field's name in messages; the autoencoder and the patch decide which sizes exist."""
        stride = vae.time_stride
        require(
            self.frames >= 1 and (self.frames - 1) % stride == 0,
            f"{at}.frames={self.frames}: the causal autoencoder needs {stride}n+1, "
            f"the nearest is {max(0, round((self.frames - 1) / stride)) * stride + 1}",
        )
        for name, size, cover in (("height", self.height, patch[1]), ("width", self.width, patch[2])):
            step = vae.space_stride * cover
            require(
                size > 0 and size % step == 0,
                f"{at}.{name}={size}: a multiple of {step}, the pixels one token covers; "
                f"the nearest is {max(1, round(size / step)) * step}",
            )
        require(self.fps > 0, f"{at}.fps={self.fps}: more than 0")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes a video. Defaults: Wan2.1 image-to-video at 480p."""

    KIND: ClassVar[Kind] = "run"

    solver: Literal["unipc", "euler"] = "unipc"
    """UniPC (order 2, bh2) on integer timesteps, or Euler on exact ones, both on the original's grid."""
    steps: int = 40
    """Denoising steps."""
    shift: float = 3.0
    """Bends the time grid towards noise: 3 at 480p, 5 at 720p."""
    guidance: float = 5.0
    """Scale of classifier-free guidance; 1 runs no unconditional branch."""
    negative_prompt: str = ""
    """The prompt of the unconditional branch."""
    reference_cache: Literal["full", "float8", "int8", "none"] = "full"
    """The cache of the references' keys and values: in the type of the computation, in one byte a number, or `none`.

    Without a cache they are computed at every step, as always with `dit.references=bidirectional`, where they depend on the step.
    """
    stack_references: bool = False
    """Several references of one family: if false, all are at the offset of Eq. 2; if true, the k-th is at k times the offset."""

    def validate(self) -> None:
        require(self.steps >= 1, f"sampler.steps={self.steps}: at least 1")
        require(self.shift > 0, f"sampler.shift={self.shift}: more than 0")
        require(self.guidance >= 1, f"sampler.guidance={self.guidance}: at least 1 (1 is no guidance)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records a run trains on, and how clips become records."""

    KIND: ClassVar[Kind] = "training"

    path: str = ""
    """Folder of records that launch.encode wrote."""
    reference: VideoConfig = field(default_factory=VideoConfig)
    """Size of the reference videos, which may differ from the target's."""
    text_drop: float = 0.1
    """Share of the samples whose prompt is replaced by the empty one, so that the unconditional branch learns."""
    shuffle: bool = True
    """Whether every epoch has a random order."""
    threads: int = field(default=4, metadata=RUN)
    """Reader threads."""

    def validate(self) -> None:
        require(0 <= self.text_drop < 1, f"data.text_drop={self.text_drop}: a share from 0 to below 1")
        require(self.threads >= 1, f"data.threads={self.threads}: at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a training runs, where it starts, and what it trains and reports."""

    KIND: ClassVar[Kind] = "training"

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 16
    """Samples per step over all devices (paper section 5.1)."""
    init_from: str = ""
    """Where the initial weights come from: a folder of launch.import_weights, or the workdir of another run."""
    trainable: tuple[str, ...] = (".*",)
    """Regular expressions of the parameters that train, as `part/path`; all others are frozen."""
    ema: float = 0.0
    """Decay of the running average of the weights, which sampling uses if there is one; 0 keeps no average.

    The decay of update n = 1, 2, ... is min(ema, (1 + n) / (10 + n)), so that the initial weights soon lose their share.
    """
    log_every: int = field(default=1, metadata=RUN)
    """Steps between lines of metrics.jsonl and of the console."""
    evaluate_every: int = field(default=0, metadata=RUN)
    """Steps between evaluations on held-out data, for trainings that have one; with 0 there is one at the end alone."""

    def validate(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: at least 1")
        require(0 <= self.ema < 1, f"train.ema={self.ema}: from 0 to below 1")
        require(
            self.evaluate_every >= 0 and self.evaluate_every % self.log_every == 0,
            f"train.evaluate_every={self.evaluate_every}: 0, or a multiple of train.log_every={self.log_every}",
        )


@dataclass(frozen=True, kw_only=True)
class TransferTrainConfig(TrainConfig):
    """A training of the transformer on pairs of clips: stages 0 to 3."""

    steps: int = field(default=10_000, metadata=RUN)
    """Optimizer steps (paper section 5.1, stage 1); a run may go on with more, unless its rate falls to 0 at the last one."""
    trainable: tuple[str, ...] = ("dit/.*",)
    """Regular expressions of the parameters that train, as `part/path`; all others are frozen."""
    shift: float = 3.0
    """Bends the drawn times towards noise, as in sampling."""
    weighting: Literal["velocity", "clean"] = "velocity"
    """Weight of the squared velocity error at time t: 1, or min(1, 2t)^2, for the error of the clean estimate over max(t, 0.5)^2."""
    references: bool = True
    """Whether targets attend to their references; if not, the network trains as Wan does, without any."""

    def validate(self) -> None:
        super().validate()
        require(self.shift > 0, f"train.shift={self.shift}: more than 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon; the rate rises linearly to its highest value, then stays there or falls."""

    KIND: ClassVar[Kind] = "training"

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon on matrices and AdamW with Nesterov momentum on the rest (optax.contrib.muon)."""
    learning_rate: float = 1e-5
    """Rate after the warm-up (paper section 5.1)."""
    vector_learning_rate: float = 2e-3
    """With Muon, the rate after the warm-up of all but matrices: biases, norms, modulations, queries."""
    adapter_share: float = 1.0
    """Factor on these rates for the language model's adapters and the queries."""
    warmup_steps: int = 100
    """Steps of the linear rise to the highest rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up the rate stays, or falls to 0 at the last step along half a cosine."""
    b1: float = 0.9
    """Decay of the first moment of AdamW; Muon's momentum on matrices is 0.95."""
    b2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; with 0 they are not clipped."""
    accumulate: int = 1
    """Number of parts of a batch that are computed one after the other; their gradients are averaged."""

    def validate(self) -> None:
        for name in ("learning_rate", "vector_learning_rate"):
            require(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)}: more than 0")
        require(self.adapter_share >= 0, f"optimizer.adapter_share={self.adapter_share}: at least 0")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: at least 0")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)}: from 0 to below 1")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: at least 0")
        require(self.clip_norm >= 0, f"optimizer.clip_norm={self.clip_norm}: more than 0, or 0 for no clipping")
        require(self.accumulate >= 1, f"optimizer.accumulate={self.accumulate}: at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run writes checkpoints."""

    KIND: ClassVar[Kind] = "run"

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the latest checkpoints are kept."""

    def validate(self) -> None:
        require(self.every >= 1, f"checkpoint.every={self.every}: at least 1")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: at least 1")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices divide the work; the product of the fields is the number of devices used."""

    KIND: ClassVar[Kind] = "run"

    data: int = 1
    """Devices that divide the batch; the parameters and the optimizer's state are sharded over them too."""
    context: int = 1
    """Devices that divide the tokens of each sample, target and reference in equal parts."""

    def validate(self) -> None:
        for name in ("data", "context"):
            require(getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)}: at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the configurations of all trainings have."""

    KIND: ClassVar[Kind] = "training"
    training: ClassVar[str]
    """Name of the training, which its workdir keeps."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """How long the training runs, where it starts, and what it trains."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights are updated."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When a training writes checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices divide the work."""
    seed: int = 0
    """The one root of every random number."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work; called before anything expensive starts."""
        for part in (self.train, self.optimizer, self.checkpoint, self.mesh):
            part.validate()
        parts = self.optimizer.accumulate * self.mesh.data
        require(
            self.train.batch_size % parts == 0,
            f"train.batch_size={self.train.batch_size}: a multiple of optimizer.accumulate * mesh.data = {parts}",
        )
        require(
            self.optimizer.schedule == "constant" or self.optimizer.warmup_steps < self.train.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps}: below train.steps={self.train.steps}, so that the rate can fall",
        )


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The whole model, and everything that commands do with it."""

    training: ClassVar[str] = "transfer"

    dit: DiTConfig = field(default_factory=DiTConfig)
    """The diffusion transformer."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    """The video autoencoder."""
    text: UMT5Config = field(default_factory=UMT5Config)
    """The text encoder."""
    image: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    """The image encoder, which a text-to-video network does not use."""
    mllm: QwenConfig = field(default_factory=QwenConfig)
    """The multimodal language model, which stages 2 and 3 use."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """The language model's adapters."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """How the language model makes the transformer's context."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """The video to make."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How noise becomes a video."""
    data: DataConfig = field(default_factory=DataConfig)
    """The records that a training reads."""
    train: TransferTrainConfig = field(default_factory=TransferTrainConfig)
    """How long the training runs, where it starts, and what it trains."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work; called before anything expensive starts."""
        super().validate()
        models = (self.dit, self.vae, self.text, self.image, self.mllm, self.lora, self.alignment)
        for part in (*models, self.sampler, self.data):
            part.validate()
        vae, dit = self.vae, self.dit
        for video, at in ((self.video, "video"), (self.data.reference, "data.reference")):
            video.validate(at, vae, dit.patch)
        require(
            dit.out_channels == vae.z_dim,
            f"dit.out_channels={dit.out_channels}: the autoencoder has vae.z_dim={vae.z_dim} latent channels",
        )
        require(dit.text_dim == self.text.dim, f"dit.text_dim={dit.text_dim}: the text encoder's width is text.dim={self.text.dim}")
        require(
            dit.image_dim in (None, self.image.dim),
            f"dit.image_dim={dit.image_dim}: the image encoder's width is image.dim={self.image.dim}",
        )


def variant_of(variants: dict[str, Config], name: str) -> Config:
    """`variants[name]`, or a `RequestError` that lists what there is."""
    require(name in variants, f"variant {name!r}: not one of {', '.join(sorted(filter(None, variants)))}, or none for the full size")
    return variants[name]


def record_fields(config: Config) -> dict[str, Any]:
    """What decides what a record holds: the data fields, and those fields of the encoders that change what they compute."""
    encoders = ("vae", "text", "image", *(["mllm"] if config.alignment.enabled else []))
    found = select(config, ["data"]) | {name: select(getattr(config, name), FIXED) for name in encoders}
    return {name: part for name, part in found.items() if name != "alignment" or config.alignment.enabled}
