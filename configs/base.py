"""The configurations of models, one class for each file of `omnitransfer_jax/models`. The defaults are the sizes of published models.

configs/run.py holds what a run adds to them, and the other files hold the numbers of the runs. configs/kinds.py explains `KIND`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from configs.errors import require
from configs.kinds import DATA, METHOD, RUN, TRAINING, Kind
from configs.ranges import ANY, FROM_0, PATTERNS, require_ranges

MASK_CHANNELS = 4  # one for each video frame of a latent frame (Wan2.1 image2video.py)
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Wan2.1 diffusion transformer. Defaults: I2V 14B (Wan2.1-I2V-14B config.json); 480P and 720P are the same network."""

    KIND: ClassVar[Kind] = "model"

    dim: int = 5120
    """Width of the residual stream (D)."""
    ffn_dim: int = 13824
    """Hidden width of the feed-forward layers (M)."""
    num_layers: int = 40
    """Number of blocks."""
    num_heads: int = 40
    """Attention heads (N); `dim / num_heads` is the head width."""
    in_channels: int = 36
    """Channels of the input latent: 16 noisy, and for image-to-video 4 of mask and 16 of condition."""
    out_channels: int = 16
    """Channels of the predicted velocity."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns one token covers."""
    text_dim: int = 4096
    """Width of the text encoder's output."""
    text_len: int = field(default=512, metadata=DATA)
    """Rows of text context; shorter prompts are padded with zero rows, which take part in the attention as in the original."""
    image_dim: int | None = 1280
    """Width of the CLIP features, or None for a network without an image branch: text-to-video, and Wan2.2's image-to-video, which reads
    the first frame from its latents alone."""
    freq_dim: int = 256
    """Width of the sinusoidal time embedding."""
    eps: float = 1e-6
    """Epsilon of the block norms (the image embedder's own is 1e-5)."""
    rope_base: float = 10_000.0
    """Frequency i of an axis with w rotated dimensions is `rope_top * rope_base ** -(2i / w)` radians a position."""
    rope_top: float = 1.0
    """The highest of these frequencies. Tiny grids learn better with top 2 and base 20, which turn visibly within a few positions."""
    dtype: Dtype = field(default="bfloat16", metadata=TRAINING)
    """Type in which the projections compute; norms, modulation, rotation, softmax and the residual stream are always float32."""
    attention: Literal["auto", "chunked", "cudnn", "splash"] = field(default="auto", metadata=RUN)
    """Kernel of the self-attention: `auto` takes the fused kernel of the backend, or `chunked` if it has none."""
    references: Literal["split", "joint", "bidirectional"] = field(default="split", metadata={**METHOD, "same": {"joint": "split"}})
    """How a target attends to references that are not cached.

    `split`: two attention calls. `joint`: the same function in one call over all tokens, under a one-directional mask. `bidirectional`:
    another function, the paper's baseline: plain Wan over target and references as one sequence. References then attend to the target,
    have its time and attend to the context. They differ at every step, so sampling has no cache, whatever `sampler.reference_cache` is.
    """
    reach: Literal["all", "same_frame"] = field(default="all", metadata=METHOD)
    """What of a reference a token of the target reads: all, or the frame at its own time, which must share times with the target."""
    offsets: Literal["task", "frames", "beside"] = field(default="task", metadata=METHOD)
    """Positions of references: the offsets of their task (Eq. 2), all after the target in time (the paper's baseline), or all beside it,
    one frame later and one width to the right (Wan-Animate-2, whose target begins with a picture of the identity)."""
    reference_flag: float | None = field(default=None, metadata={**METHOD, **ANY})
    """Value of the references' mask channels; None: the flag of their task."""
    reference_time: float = field(default=0.0, metadata={**METHOD, **FROM_0})
    """Timestep at which references are modulated, 0 to 1000."""
    reference_context: bool = field(default=False, metadata=METHOD)
    """Whether references read a text and a first frame of their own in the cross-attention."""
    remat: Literal["none", "qkv", "attention", "full"] = field(default="attention", metadata=RUN)
    """What a block stores for the backward pass: everything; the self-attention's queries, keys, values and outputs; its outputs; its input
    alone."""

    @property
    def image_to_video(self) -> bool:
        """Whether the network reads a mask and the latents of a first frame behind the noisy latent."""
        return self.in_channels > self.out_channels

    def validate(self) -> None:
        require_ranges(self, "dit")
        require(self.dim % self.num_heads == 0, f"dit.dim={self.dim}: not a multiple of dit.num_heads={self.num_heads}")
        head = self.dim // self.num_heads
        require(head % 2 == 0 and head >= 6, f"dit.dim/dit.num_heads={head}: rotation needs an even head width of at least 6")
        require(self.rope_base >= 1, f"dit.rope_base={self.rope_base}: at least 1, the ratio of the highest frequency to the lowest")
        require(
            self.reach == "all" or self.references == "split",
            f"dit.reach={self.reach!r} with dit.references={self.references!r}: only split reads single frames; "
            "take --dit.references=split",
        )
        require(self.reference_time <= 1000, f"dit.reference_time={self.reference_time}: a timestep, 0 to 1000")
        require(self.freq_dim % 2 == 0, f"dit.freq_dim={self.freq_dim}: even, as it holds sines and cosines")
        require(
            self.in_channels >= self.out_channels,
            f"dit.in_channels={self.in_channels}: at least dit.out_channels={self.out_channels}, the noisy latent comes first",
        )


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Wan2.1 causal video autoencoder (diffusers AutoencoderKLWan defaults = the published weights)."""

    KIND: ClassVar[Kind] = "model"

    base_dim: int = 96
    """Channels at full resolution."""
    z_dim: int = 16
    """Latent channels."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channel multiplier of each resolution; every step down halves height and width."""
    num_res_blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which of the steps down also halve time."""
    encode_frames: int = field(default=4, metadata=RUN)
    """Frames that the encoder takes at a time after the first one; a multiple of the time stride. More are faster but need more memory."""
    decode_frames: int = field(default=1, metadata=RUN)
    """Latent frames that the decoder takes at a time."""
    latents_mean: tuple[float, ...] = field(
        metadata=ANY,
        default=(
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
    )  # fmt: skip
    """Mean of each latent channel over the original's training data (Wan2.1 vae.py)."""
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    """Standard deviation of each latent channel (Wan2.1 vae.py)."""
    dtype: Dtype = field(default="float32", metadata=TRAINING)
    """Type in which the convolutions compute; the original's pipelines run the autoencoder in float32."""

    @property
    def time_stride(self) -> int:
        """Video frames per latent frame."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_stride(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** len(self.temporal_downsample)

    def validate(self) -> None:
        require_ranges(self, "vae")
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"vae.temporal_downsample has {len(self.temporal_downsample)} steps: vae.dim_mult has {len(self.dim_mult)} "
            f"resolutions, so it needs {len(self.dim_mult) - 1}",
        )
        require(
            len(self.latents_mean) == len(self.latents_std) == self.z_dim,
            f"vae.latents_mean and vae.latents_std have {len(self.latents_mean)} and {len(self.latents_std)} values: "
            f"vae.z_dim={self.z_dim} needs as many",
        )
        require(
            self.encode_frames % self.time_stride == 0,
            f"vae.encode_frames={self.encode_frames}: a multiple of {self.time_stride}, the time stride",
        )


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """UMT5 encoder. Defaults: google/umt5-xxl config.json."""

    KIND: ClassVar[Kind] = "model"

    vocab_size: int = 256384
    """Rows of the token embedding."""
    dim: int = 4096
    """Width of the residual stream (D)."""
    head_dim: int = 64
    """Width of one attention head (K)."""
    ffn_dim: int = 10240
    """Hidden width of the gated feed-forward layers (M)."""
    num_layers: int = 24
    """Number of blocks."""
    num_heads: int = 64
    """Attention heads (N)."""
    relative_buckets: int = 32
    """Buckets of the relative position bias; every layer has its own table."""
    relative_max_distance: int = 128
    """Distance beyond which all positions share a bucket."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    dtype: Dtype = field(default="bfloat16", metadata=TRAINING)
    """Type in which the projections compute."""

    def validate(self) -> None:
        require_ranges(self, "text")
        require(self.relative_buckets % 4 == 0, f"text.relative_buckets={self.relative_buckets}: a multiple of 4")


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """CLIP image tower. Defaults: ViT-H/14, the visual half of open-clip-xlm-roberta-large-vit-huge-14."""

    KIND: ClassVar[Kind] = "model"

    dim: int = 1280
    """Width of the residual stream (D)."""
    ffn_dim: int = 5120
    """Hidden width of the MLPs (M)."""
    num_layers: int = 32
    """Number of layers. Wan reads the output of the last but one; the last is kept so that the weights can be exported."""
    num_heads: int = 16
    """Attention heads (N)."""
    image_size: int = 224
    """Height and width of the input, in pixels."""
    patch: int = 14
    """Height and width of one patch, in pixels."""
    eps: float = 1e-5
    """Epsilon of the norms."""
    dtype: Dtype = field(default="bfloat16", metadata=TRAINING)
    """Type in which the projections compute (the original runs this tower in half precision)."""

    def validate(self) -> None:
        require_ranges(self, "image")
        require(
            self.num_layers >= 2, f"image.num_layers={self.num_layers}: at least 2, because the features are the output of the last but one"
        )
        require(
            self.image_size % self.patch == 0,
            f"image.image_size={self.image_size}: not a multiple of image.patch={self.patch}",
        )
        require(self.dim % self.num_heads == 0, f"image.dim={self.dim}: not a multiple of image.num_heads={self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """Vision tower of Qwen2.5-VL; 3B and 7B differ in its output width alone (Qwen2.5-VL-3B-Instruct config.json)."""

    KIND: ClassVar[Kind] = "model"

    dim: int = 1280
    """Width of the residual stream (D)."""
    ffn_dim: int = 3420
    """Hidden width of the gated MLPs (M)."""
    num_layers: int = 32
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads (N)."""
    patch: int = 14
    """Height and width of one patch, in pixels."""
    temporal_patch: int = 2
    """Frames that one patch covers; an image is repeated to fill them."""
    merge: int = 2
    """Rows and columns of patches that become one token of the language model."""
    window: int = 112
    """Height and width of an attention window, in pixels."""
    full_attention: tuple[int, ...] = field(default=(7, 15, 23, 31), metadata=FROM_0)
    """Blocks that attend over a whole frame instead of a window."""
    tokens_per_second: int = 2
    """Temporal positions per second of video."""
    eps: float = 1e-6
    """Epsilon of the norms."""

    def validate(self) -> None:
        require_ranges(self, "mllm.vision")
        unit = self.patch * self.merge
        require(self.window % unit == 0, f"mllm.vision.window={self.window}: a multiple of patch * merge = {unit}")
        require(
            self.dim % self.num_heads == 0 and self.dim // self.num_heads % 4 == 0,
            f"mllm.vision.dim={self.dim}: {self.num_heads} heads of a width that is a multiple of 4",
        )
        require(
            all(0 <= i < self.num_layers for i in self.full_attention),
            f"mllm.vision.full_attention={self.full_attention}: blocks 0 to {self.num_layers - 1}",
        )


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """Qwen2.5-VL. Defaults: 3B (Qwen2.5-VL-3B-Instruct config.json)."""

    KIND: ClassVar[Kind] = "model"

    vocab_size: int = 151936
    """Rows of the token embedding."""
    dim: int = 2048
    """Width of the residual stream (D)."""
    ffn_dim: int = 11008
    """Hidden width of the gated MLPs (M)."""
    num_layers: int = 36
    """Number of blocks."""
    num_heads: int = 16
    """Query heads (N)."""
    num_kv_heads: int = 2
    """Key and value heads; several query heads share one."""
    rope_theta: float = 1e6
    """Base of the rotation."""
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    """Numbers of frequencies for time, height and width; their sum is half a head."""
    tied: bool = True
    """Whether the token embedding is also the output projection."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    image_token: int = field(default=151655, metadata=FROM_0)
    """Token that an image's features replace."""
    video_token: int = field(default=151656, metadata=FROM_0)
    """Token that a video's features replace."""
    vision_start: int = field(default=151652, metadata=FROM_0)
    """Token in front of an image or a video."""
    vision: QwenVisionConfig = field(default_factory=QwenVisionConfig)
    """The vision tower."""
    dtype: Dtype = field(default="bfloat16", metadata=TRAINING)
    """Type in which the projections compute."""

    def validate(self) -> None:
        require_ranges(self, "mllm")
        self.vision.validate()
        require(
            self.dim % self.num_heads == 0 and self.num_heads % self.num_kv_heads == 0,
            f"mllm.dim={self.dim}, mllm.num_heads={self.num_heads}, mllm.num_kv_heads={self.num_kv_heads}: each a multiple of the next",
        )
        require(
            2 * sum(self.rope_sections) == self.dim // self.num_heads,
            f"mllm.rope_sections={self.rope_sections}: their sum is half the head width, {self.dim // self.num_heads // 2}",
        )


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters."""

    KIND: ClassVar[Kind] = "model"

    rank: int = 64
    """Width of the bottleneck (R)."""
    alpha: float = 64.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = field(default=(r"layers\.attention\..*", r"layers\.mlp\..*"), metadata=PATTERNS)
    """Regular expressions of the paths of the projections that get an adapter."""

    @property
    def scale(self) -> float:
        """The factor on an adapter's output."""
        return self.alpha / self.rank

    def validate(self) -> None:
        require_ranges(self, "lora")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """The context that Qwen2.5-VL makes in the place of UMT5 (paper section 4.4; the numbers are InstructX's, the paper has none)."""

    KIND: ClassVar[Kind] = "model"

    enabled: bool = False
    """Whether Qwen2.5-VL makes the context, as in stages 2 and 3."""
    queries: int = 256
    """MetaQueries of each task (Q), and so rows of context."""
    frames: int = field(default=13, metadata=DATA)
    """Frames of the reference among the language model's inputs, evenly spaced."""
    frame_pixels: int = field(default=128 * 28 * 28, metadata=DATA)
    """Largest number of pixels of such a frame; 28 x 28 of them become one token."""
    prompt_tokens: int = field(default=256, metadata=DATA)
    """Tokens for template and prompt together; a longer prompt is cut."""
    connector_dim: int = 4096
    """Hidden width of the connector."""
    into: Literal["text_embedder", "blocks"] = "text_embedder"
    """What reads the connector's output: Wan's pretrained text projection, or the blocks themselves, whose width it then has."""

    def validate(self) -> None:
        require_ranges(self, "alignment")
