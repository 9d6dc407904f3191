"""Follow-Your-Motion (arXiv 2506.05207): adapters on the attention heads that look through time learn the motion of one clip.

Goal    the motion of a reference clip with another content, from a prompt (text-to-video), or from a first frame and a prompt.
Trains  two adapters on the self-attention's queries, keys and values: `lora_spatial` on the spatial heads, on single frames of the clip;
        then `lora_temporal` on the temporal heads, on frames sampled sparsely from it. The transformer is frozen.
Result  a LoRA: launch.sample adds it to the transformer, launch.export writes it for ComfyUI and diffusers (docs/methods.md).

(none), t2v_1_3b   text-to-video 1.3B, which the authors recommend     tiny    the base inside the package
t2v_14b            text-to-video 14B                                   smoke   random weights, for tests
i2v_14b            image-to-video 14B: our variant, not the paper's

    python -m launch.train --config=follow_your_motion --reference=ref.mp4 --prompt="its caption" --train.init_from=DIR --workdir=W
    python -m launch.sample --config=follow_your_motion --checkpoint=W --prompt="..." --out=out.mp4
    python -m launch.export --config=follow_your_motion --checkpoint=W --layout=comfyui --out=LORA
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from configs import stage0, stage1, wan
from configs.base import LoRAConfig
from configs.errors import require
from configs.kinds import Kind
from configs.ranges import BELOW_1, FROM_0, require_ranges
from configs.run import CheckpointConfig, Config, OptimizerConfig, TransferTrainConfig, variant_of

QKV = (r"blocks\.self_attention\.(query|key|value)",)


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """The numbers of the method. Sources: "paper" with notes on it, "released" for the authors' scripts, "ours" for what neither has."""

    KIND: ClassVar[Kind] = "training"

    stage: Literal["spatial", "temporal"] = "temporal"
    """What the run in this folder trains. launch.train sets it: `spatial` in WORKDIR/spatial, then `temporal` in WORKDIR itself."""
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=16, alpha=16.0, targets=QKV))
    """Each of the two adapters (released; the paper's rank is 128)."""

    rule: Literal["paper", "released", "ranked"] = "paper"
    """When a head is temporal, from its attention map on the noised clip and two masks of bands: near places of the token order (spatial),
    and near places of the order that has time fastest (temporal). The masks are those of the released code in all rules, for the paper
    gives no width.

    `paper`: cosine with the spatial mask < `paper_alpha` times that with the temporal one. `released`: the weight in the temporal band is
    at least `released_factor` times that in the spatial one. `ranked`: the half of each block's heads with the largest quotient of the two
    (a re-implementation has 6 of 12).

    A block whose heads are all of one kind keeps them so: the other kind's adapter has no head there and changes nothing. It is marked
    in the table that is printed and kept in heads.json. No temporal head, or no spatial one, in all blocks is an error."""
    paper_alpha: float = 1.25
    """Factor of the paper's rule (paper)."""
    released_factor: float = 1.3
    """Factor of the released rule (released)."""
    band_tokens: int = 128
    """Tokens of a step of the bands; a band is as wide as a latent frame, in whole steps (released)."""
    head_time: float = field(default=0.9998, metadata=BELOW_1)
    """Noise level at which heads are classified (released: step 1 of the scheduler's 1,000, at its shift of 5)."""
    head_draws: int = 4
    """Noises over which a head's scores are averaged (ours; released: 1)."""

    sparse_frames: int = 17
    """Frames of the second stage, evenly spaced from the first to the last of `video.frames` (paper: 17 of 81; released: all)."""
    stretch: Literal["latent", "paper", "none"] = "latent"
    """Factor on the temporal positions of sparse frames. `latent`: (L - 1) / (l - 1) for L latent frames of the clip and l of the sparse
    one, so that both ends keep their positions (ours). `paper`: `video.frames / sparse_frames`. `none`: 1 (released)."""
    motion_loss: Literal["signed", "absolute"] = "signed"
    """1 - cosine of differences between adjacent latent frames, of the predicted velocity and the true one. `signed`: over the channels
    (ours, nearest to the paper's formula). `absolute`: of absolute differences, over time (released)."""
    motion_weight: float = field(default=1.0, metadata=FROM_0)
    """Factor on the motion loss (released)."""

    spatial_steps: int = field(default=1500, metadata=FROM_0)
    """Steps of the first stage; with 0 it is left out (released; paper: about 3,000). `train.steps` are those of the second."""
    spatial_learning_rate: float = 1e-4
    """Rate of the first stage (released). `optimizer.learning_rate` is that of the second."""
    spatial_weight_decay: float = field(default=0.1, metadata=FROM_0)
    """Weight decay of the first stage (released). `optimizer.weight_decay` is that of the second."""

    def validate(self) -> None:
        require_ranges(self, "motion")
        self.lora.validate()


@dataclass(frozen=True, kw_only=True)
class FollowYourMotion(Config):
    """A model, and how motion is learnt. On an image-to-video network (ours, the paper has text-to-video alone) the first stage sees grey
    frames and mask 0, for the first frame would be the answer; the second one sees the clip's first frame; sampling another one."""

    training: ClassVar[str] = "follow_your_motion"

    motion: MotionConfig = field(default_factory=MotionConfig)
    """The method."""

    @property
    def time_scale(self) -> float:
        """The factor on the temporal positions of this stage's frames."""
        if self.motion.stage == "spatial" or self.motion.stretch == "none":
            return 1.0
        frames, sparse = self.video.frames, self.motion.sparse_frames
        return frames / sparse if self.motion.stretch == "paper" else (frames - 1) / (sparse - 1)

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.motion.validate()
        require(not self.alignment.enabled, "alignment.enabled=True: Follow-Your-Motion reads UMT5; give --alignment.enabled=False")
        require(not self.train.references, "train.references=True: Follow-Your-Motion reads no reference; give --train.references=False")
        sparse, stride = self.motion.sparse_frames, self.vae.time_stride
        require(
            stride < sparse <= self.video.frames and (sparse - 1) % stride == 0,
            f"motion.sparse_frames={sparse}: {stride}n+1, from {stride + 1} to video.frames={self.video.frames}",
        )
        _, rows, columns = self.video.patches(self.vae, self.dit.patch)
        require(
            self.motion.band_tokens <= rows * columns,
            f"motion.band_tokens={self.motion.band_tokens}: at most {rows * columns}, the tokens of a latent frame",
        )


def on(base: Config) -> FollowYourMotion:
    """The method with the released numbers on this model."""
    values: dict[str, Any] = vars(base) | {
        "train": TransferTrainConfig(steps=1500, batch_size=1, shift=5.0, weighting="bell", references=False),
        "optimizer": OptimizerConfig(learning_rate=1e-4, weight_decay=0.5, warmup_steps=0),
    }
    return FollowYourMotion(**values)


T2V_1_3B = on(wan.get_config("t2v_1_3b"))
SMOKE = on(stage1.get_config("smoke"))
VARIANTS: dict[str, FollowYourMotion] = {
    "": T2V_1_3B,
    "t2v_1_3b": T2V_1_3B,
    "t2v_14b": on(wan.get_config("t2v_14b")),
    "i2v_14b": on(wan.get_config()),
    "tiny": replace(
        on(wan.get_config("tiny")),
        motion=MotionConfig(
            lora=LoRAConfig(rank=8, alpha=8.0, targets=QKV), rule="ranked", band_tokens=1, sparse_frames=9, spatial_steps=50,
            spatial_learning_rate=1e-3, spatial_weight_decay=0.0,
        ),
        train=replace(stage0.TINY_TRAIN, steps=200, batch_size=4, ema=0.0, references=False),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, warmup_steps=10),
    ),
    "smoke": replace(
        SMOKE,
        dit=replace(SMOKE.dit, image_dim=None, in_channels=16),
        motion=MotionConfig(
            lora=LoRAConfig(rank=4, alpha=4.0, targets=QKV), rule="ranked", band_tokens=2, head_draws=2, sparse_frames=5, spatial_steps=6,
        ),
        train=replace(SMOKE.train, steps=6),
        checkpoint=CheckpointConfig(every=3),
    ),
}  # fmt: skip


def get_config(variant: str = "") -> FollowYourMotion:
    """The configuration named `follow_your_motion[:variant]`."""
    return variant_of(VARIANTS, variant)
