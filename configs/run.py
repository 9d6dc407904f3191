"""What a run adds to its models: video, sampler, data, training, optimizer, checkpoints, mesh; and `Config`, which holds them all."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from configs.base import MASK_CHANNELS, AlignmentConfig, CLIPVisionConfig, DiTConfig, LoRAConfig, QwenConfig, UMT5Config, VAEConfig
from configs.buckets import require_buckets
from configs.errors import require
from configs.kinds import FIXED, RUN, Kind, select
from configs.ranges import BELOW_1, FROM_0, FROM_1, PATTERNS, SEED, SHARE, require_ranges

AnyConfig = TypeVar("AnyConfig", bound="Config")
ReferenceCache = Literal["full", "activations", "float8", "int8", "none"]


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
        require_ranges(self, at)
        stride = vae.time_stride
        require(
            (self.frames - 1) % stride == 0,
            f"{at}.frames={self.frames}: the causal autoencoder needs {stride}n+1, "
            f"the nearest is {round((self.frames - 1) / stride) * stride + 1}",
        )
        for name, size, cover in (("height", self.height, patch[1]), ("width", self.width, patch[2])):
            step = vae.space_stride * cover
            require(
                size % step == 0,
                f"{at}.{name}={size}: a multiple of {step}, the pixels one token covers; "
                f"the nearest is {max(1, round(size / step)) * step}",
            )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How noise becomes a video. Defaults: Wan2.1 image-to-video at 480p."""

    KIND: ClassVar[Kind] = "run"

    solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    """UniPC (order 2, bh2) or DPM-Solver++ (order 2) on integer timesteps, or Euler on exact ones, all on the original's grid."""
    steps: int = 40
    """Denoising steps."""
    shift: float = 3.0
    """Bends the time grid towards noise: 3 at 480p, 5 at 720p."""
    guidance: float = field(default=5.0, metadata=FROM_1)
    """Scale of classifier-free guidance; 1 runs no unconditional branch."""
    boundary: float = field(default=0.0, metadata=BELOW_1)
    """With the two experts of Wan2.2: the noise level, from 0 to 1, from which up the high-noise expert runs; 0 for one network."""
    low_noise_guidance: float | None = field(default=None, metadata=FROM_1)
    """The scale of guidance below `boundary`; None for `guidance`."""
    negative_prompt: str = ""
    """The prompt of the unconditional branch."""
    reference_cache: ReferenceCache = "full"
    """What is kept of references: keys and values (`full`), the `activations` they are projected from, half the size and as exact, or
    keys and values in one byte a number.

    With `none` they are computed at every step, as always with `dit.references=bidirectional`, where they depend on the step.
    """
    skip_unconditional: tuple[int, ...] = field(default=(), metadata=FROM_0)
    """Blocks, counted from 0, that the unconditional pass of guidance leaves out (Wan-Animate-2: block 9)."""
    stack_references: bool = False
    """Several references of one family: if false, all are at the offset of Eq. 2; if true, the k-th is at k times the offset."""

    @property
    def has_negative(self) -> bool:
        """Whether any step runs the unconditional branch."""
        return max(self.guidance, self.low_noise_guidance or 1) > 1

    def validate(self) -> None:
        require_ranges(self, "sampler")
        require(
            self.boundary > 0 or self.low_noise_guidance is None,
            f"sampler.low_noise_guidance={self.low_noise_guidance}: that of a second expert; give --sampler.boundary too, or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records a run trains on, and how clips become records."""

    KIND: ClassVar[Kind] = "training"

    path: str = ""
    """Folder of records that launch.encode wrote."""
    more: tuple[str, ...] = ()
    """Further folders of records, mixed with those of `path`: a folder of each task mixes the tasks by weight."""
    weights: tuple[float, ...] = ()
    """How often samples of `path` and of each of `more` are drawn; if empty, as often as there are records in them."""
    reference: VideoConfig = field(default_factory=VideoConfig)
    """Size of the reference videos, which may differ from the target's."""
    buckets: tuple[str, ...] = ()
    """Sizes that records have, frames x height x width, of references behind a slash (configs/buckets.py); none for `video` alone."""
    text_drop: float = field(default=0.1, metadata=BELOW_1)
    """Share of the samples whose prompt is replaced by the empty one, so that the unconditional branch learns."""
    shuffle: bool = True
    """Whether every epoch has a random order."""
    threads: int = field(default=4, metadata=RUN)
    """Reader threads."""
    quarantine: int = field(default=10, metadata=RUN | FROM_0)
    """Damaged records that a training sets aside, reading others in their places; one more ends it."""

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders of records."""
        return (self.path, *self.more)

    def validate(self) -> None:
        require_ranges(self, "data")
        require(
            len(self.weights) in (0, len(self.folders)),
            f"data.weights={self.weights}: {len(self.weights)} for {len(self.folders)} folders of records; give one for each of "
            "data.path and data.more",
        )


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
    trainable: tuple[str, ...] = field(default=(".*",), metadata=PATTERNS)
    """Regular expressions of the parameters that train, as `part/path`; all others are frozen."""
    ema: float = field(default=0.0, metadata=BELOW_1)
    """Decay of the running average of the weights, which sampling uses if there is one; 0 keeps no average.

    The decay of update n = 1, 2, ... is min(ema, (1 + n) / (10 + n)), so that the initial weights soon lose their share.
    """
    log_every: int = field(default=1, metadata=RUN)
    """Steps between lines of metrics.jsonl and of the console."""
    hang_seconds: int = field(default=1800, metadata=RUN | FROM_0)
    """Seconds without progress after which a run says where it stands and ends; 0 for never. Evaluation and sampling take time too."""
    evaluate_every: int = field(default=0, metadata=RUN | FROM_0)
    """Steps between evaluations on held-out data, for trainings that have one; with 0 there is one at the end alone."""
    sample_every: int = field(default=500, metadata=RUN | FROM_0)
    """Steps between samples, for a training with `sample_prompts`; with 0 there are some before the first step and after the last alone."""
    profile: str = field(default="", metadata=RUN)
    """FIRST:LAST, the steps to profile, for TensorBoard's profiler; empty for none."""
    wandb: str = field(default="", metadata=RUN)
    """The project of Weights & Biases that gets the lines of the log too; empty for none."""

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        if not self.profile:
            return None
        first, _, last = self.profile.partition(":")
        is_window = first.isdecimal() and last.isdecimal() and len(self.profile) < 24 and 1 <= int(first) <= int(last)
        require(is_window, f"train.profile={self.profile!r}: FIRST:LAST, the steps to profile, such as 20:24")
        return int(first), int(last)

    def validate(self) -> None:
        require_ranges(self, "train")
        _ = self.profile_window
        require(
            self.evaluate_every % self.log_every == 0,
            f"train.evaluate_every={self.evaluate_every}: 0, or a multiple of train.log_every={self.log_every}",
        )


@dataclass(frozen=True, kw_only=True)
class TransferTrainConfig(TrainConfig):
    """A training of the transformer on pairs of clips: stages 0 to 3."""

    steps: int = field(default=10_000, metadata=RUN)
    """Optimizer steps (paper section 5.1, stage 1); a run may go on with more, unless its rate falls to 0 at the last one."""
    trainable: tuple[str, ...] = field(default=("dit/.*",), metadata=PATTERNS)
    """Regular expressions of the parameters that train, as `part/path`; all others are frozen."""
    shift: float = 3.0
    """Bends the drawn times towards noise, as in sampling."""
    weighting: Literal["velocity", "clean", "bell"] = "velocity"
    """Weight of the loss at time t. `velocity`: 1. `clean`: min(1, 2t)^2, for the error of the clean estimate over max(t, 0.5)^2.
    `bell`: largest at t = 0.5, 0 at t = 1 (DiffSynth-Studio's training weight, which Follow-Your-Motion has)."""
    references: bool = True
    """Whether targets attend to their references; if not, the network trains as Wan does, without any."""
    expert: Literal["high_noise", "low_noise"] | None = None
    """Which of the two experts in `init_from` (Wan2.2) the training starts from; None where there is one network."""
    sample_prompts: str = field(default="", metadata=RUN)
    """File of JSON lines: what is sampled every `sample_every` steps (docs/training.md); empty for no samples."""
    evaluate_suite: str = field(default="", metadata=RUN)
    """Suite of launch.evaluate, a file or `world:N`, that is sampled and measured every `evaluate_every` steps; empty for none."""


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
    adapter_share: float = field(default=1.0, metadata=FROM_0)
    """Factor on these rates for the language model's adapters and the queries."""
    warmup_steps: int = field(default=100, metadata=FROM_0)
    """Steps of the linear rise to the highest rate."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up the rate stays, falls to 0 at the last step along half a cosine, or (warm-up, stable, decay) stays until the last
    `decay_share` of the steps and falls to 0 in them, along a line."""
    decay_share: float = field(default=0.2, metadata=SHARE)
    """With `wsd`, the share of the steps in which the rate falls."""
    b1: float = field(default=0.9, metadata=BELOW_1)
    """Decay of the first moment of AdamW; Muon's momentum on matrices is 0.95."""
    b2: float = field(default=0.999, metadata=BELOW_1)
    """Decay of the second moment."""
    weight_decay: float = field(default=0.01, metadata=FROM_0)
    """Decoupled weight decay of matrices; vectors have none."""
    clip_norm: float = field(default=1.0, metadata=FROM_0)
    """Largest global norm of the gradients; with 0 they are not clipped."""
    accumulate: int = 1
    """Number of parts of a batch that are computed one after the other; their gradients are averaged."""

    def validate(self) -> None:
        require_ranges(self, "optimizer")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run writes checkpoints."""

    KIND: ClassVar[Kind] = "run"

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the latest checkpoints are kept."""

    def validate(self) -> None:
        require_ranges(self, "checkpoint")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices divide the work; the product of the fields is the number of devices used.

    Parameters and the optimizer's state are spread over all devices of a slice."""

    KIND: ClassVar[Kind] = "run"

    data: int = 1
    """Devices that divide the batch."""
    heads: int = 1
    """Devices that divide the tokens of each sample, target and reference in equal parts, and exchange them for heads in self-attention."""
    keys: int = 1
    """Devices that divide the tokens too, and gather all keys and values in self-attention."""
    slices: int = 1
    """Groups of data * heads * keys devices with a slow network between them, which divide the batch; each has all parameters."""
    auto: bool = False
    """Whether launch.train, launch.sample and launch.evaluate take the mesh that is documented for the devices they find (docs/pods.md)."""

    @property
    def devices(self) -> int:
        """The devices in use."""
        return self.slices * self.data * self.heads * self.keys

    def validate(self) -> None:
        require_ranges(self, "mesh")
        given = " and ".join(
            f"mesh.{name}={getattr(self, name)}" for name in ("slices", "data", "heads", "keys") if getattr(self, name) > 1
        )
        require(not (self.auto and given), f"mesh.auto=True chooses the mesh, and {given} was given; leave one of them out")


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
    seed: int = field(default=0, metadata=SEED)
    """The one root of every random number."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work; called before anything expensive starts."""
        require_ranges(self, "")
        for part in (self.train, self.optimizer, self.checkpoint, self.mesh):
            part.validate()
        parts = self.optimizer.accumulate * self.mesh.slices * self.mesh.data
        require(
            self.train.batch_size % parts == 0,
            f"train.batch_size={self.train.batch_size}: a multiple of optimizer.accumulate * mesh.slices * mesh.data = {parts}",
        )
        require(
            self.optimizer.schedule == "constant" or self.optimizer.warmup_steps < self.train.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps}: below train.steps={self.train.steps}, so that the rate can fall",
        )
        stable = self.train.steps * (1 - self.optimizer.decay_share)
        require(
            self.optimizer.schedule != "wsd" or self.optimizer.warmup_steps <= stable,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps}: at most {stable:g}, for with optimizer.decay_share="
            f"{self.optimizer.decay_share} the rate falls from there on",
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
    """The image encoder, which only a network with `dit.image_dim` uses."""
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

    @property
    def dit_low_noise(self) -> DiTConfig:
        """Wan2.2's low-noise expert, as large as the high-noise one."""
        return self.dit

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work; called before anything expensive starts."""
        super().validate()
        models = (self.dit, self.vae, self.text, self.image, self.mllm, self.lora, self.alignment)
        for part in (*models, self.sampler, self.data):
            part.validate()
        vae, dit = self.vae, self.dit
        for video, at in ((self.video, "video"), (self.data.reference, "data.reference")):
            video.validate(at, vae, dit.patch)
        require_buckets(self)
        require(
            dit.out_channels == vae.z_dim,
            f"dit.out_channels={dit.out_channels}: the autoencoder has vae.z_dim={vae.z_dim} latent channels",
        )
        require(
            dit.num_heads % self.mesh.heads == 0,
            f"mesh.heads={self.mesh.heads}: a divisor of dit.num_heads={dit.num_heads}, because all take equal shares; divide the tokens "
            "further with --mesh.keys",
        )
        channels = dit.out_channels + MASK_CHANNELS + vae.z_dim
        require(
            dit.in_channels in (dit.out_channels, channels),
            f"dit.in_channels={dit.in_channels}: {dit.out_channels}, the noisy latent's channels, or for image-to-video {channels}: "
            f"{MASK_CHANNELS} more of the mask and vae.z_dim={vae.z_dim} of the first frame",
        )
        require(
            dit.image_dim is None or dit.image_to_video,
            f"dit.image_dim={dit.image_dim}: text-to-video, dit.in_channels={dit.in_channels}, reads no image; give --dit.image_dim=None",
        )
        require(
            all(block < dit.num_layers for block in self.sampler.skip_unconditional),
            f"sampler.skip_unconditional={self.sampler.skip_unconditional}: blocks are 0 to {dit.num_layers - 1} (dit.num_layers)",
        )
        require(dit.text_dim == self.text.dim, f"dit.text_dim={dit.text_dim}: the text encoder's width is text.dim={self.text.dim}")
        require(
            dit.image_dim in (None, self.image.dim),
            f"dit.image_dim={dit.image_dim}: the image encoder's width is image.dim={self.image.dim}",
        )


def plain(config: Config) -> Config:
    """The configuration without what a subclass adds: that of the networks which a method works on."""
    return Config(**{field.name: getattr(config, field.name) for field in fields(Config)})


def variant_of(variants: Mapping[str, AnyConfig], name: str) -> AnyConfig:
    """`variants[name]`, or a `RequestError` that lists what there is."""
    require(name in variants, f"variant {name!r}: not one of {', '.join(sorted(filter(None, variants)))}, or none for the full size")
    return variants[name]


def record_fields(config: Config) -> dict[str, Any]:
    """What decides what a record holds: the data fields, and those fields of the encoders that change what they compute."""
    found = select(config, ["data"]) | {name: select(getattr(config, name), FIXED) for name in encoder_names(config)}
    return {name: part for name, part in found.items() if name != "alignment" or config.alignment.enabled}


def encoder_names(config: Config) -> tuple[str, ...]:
    """The networks whose outputs a record holds."""
    image, mllm = config.dit.image_dim is not None, config.alignment.enabled
    return ("vae", "text", *(["image"] if image else []), *(["mllm"] if mllm else []))
