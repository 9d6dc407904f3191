"""Motion-Textual Inversion (arXiv 2408.00458, "Reenact Anything"): the motion of one clip as tokens in the place of the prompt.

Goal    the motion of a reference clip, started from another picture (image-to-video), or in the words of another prompt (text-to-video).
Trains  (latent frames + 1) x tokens rows of the cross-attention's context; the transformer is frozen.
Cost    14B, 21 frames at 480p: 0.5 million parameters, one 80 GB GPU, 1,000 steps of about 1 PFLOP (docs/methods.md).
Result  not run at full size. `tiny` starts from the base model inside the package; `smoke` has random weights, for tests.

(none), i2v_14b   image-to-video 14B, the method as published, on Wan     t2v_14b, t2v_1_3b   text-to-video: our variant
tiny              the base inside the package                             smoke               random weights, for tests

    python -m launch.train --config=motion_inversion --reference=ref.mp4 --train.init_from=DIR --workdir=W
    python -m launch.sample --config=motion_inversion --checkpoint=W --first_frame=image.png --out=out.mp4
    python -m launch.export --config=motion_inversion --checkpoint=W --out=TOKENS
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from configs import stage1, wan
from configs.errors import require
from configs.kinds import METHOD, TRAINING, Kind
from configs.ranges import ANY, FROM_0, require_ranges
from configs.run import CheckpointConfig, Config, OptimizerConfig, TransferTrainConfig, variant_of

TRAINABLE = ("tokens/.*",)


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """The numbers of the method. Sources: "paper" with notes on it, "unofficial" for a re-implementation, "ours" for what neither has."""

    KIND: ClassVar[Kind] = "model"

    tokens: int = 5
    """Rows of each set (N): every latent frame has a set of its own, and all frames share one more (paper)."""
    branch: Literal["text", "image", "both"] = "text"
    """Which branch of the cross-attention reads the tokens. `text` (ours): they stand in the place of the prompt, and the CLIP features of
    the first frame stay, so appearance comes from the picture. `image`: in the place of the CLIP features, as in the paper, whose SVD has
    no other branch. A text-to-video network has `text` alone, and keeps its prompt beside the tokens."""
    space: Literal["blocks", "encoder"] = "blocks"
    """Where the tokens live. `blocks` (ours): behind Wan's projection of the encoder's output, as wide as the blocks. `encoder`: in front
    of it, as wide as the encoder's output, as in textual inversion."""
    sink: bool = field(default=True, metadata=METHOD)
    """Whether the encoded empty prompt, with its padding, is read beside tokens that stand in the place of the prompt (ours). Wan gives
    padding much of its attention; without it a few tokens share all of that."""

    times: Literal["logit_normal", "uniform"] = field(default="logit_normal", metadata=TRAINING)
    """How noise levels are drawn. `logit_normal`: sigmoid of a normal variable, which is the EDM noise of log-normal sigma (unofficial).
    `uniform`: uniform, then bent by `train.shift`, as the other trainings draw (ours)."""
    time_mean: float = field(default=2.8, metadata={**TRAINING, **ANY})
    """Mean of that normal variable; 2.8 is a median level of 0.94 (unofficial; SVD's own is 0.7)."""
    time_std: float = field(default=1.6, metadata=TRAINING)
    """Its deviation (unofficial)."""
    augment: int = field(default=0, metadata={**TRAINING, **FROM_0})
    """Further copies of the clip to learn from, each cropped to a part and with other colours, first frame included, so that tokens keep
    less of its look (the paper augments too; how is not known)."""
    init_noise: float = field(default=0.1, metadata={**TRAINING, **FROM_0})
    """Noise on the initial tokens, in deviations of them, so that the rows of a set differ (unofficial)."""

    def validate(self) -> None:
        require_ranges(self, "inversion")


@dataclass(frozen=True, kw_only=True)
class MotionInversion(Config):
    """A model, and how the tokens of a clip's motion are learnt."""

    training: ClassVar[str] = "motion_inversion"

    inversion: InversionConfig = field(default_factory=InversionConfig)
    """The method."""

    @property
    def keeps_prompt(self) -> bool:
        """Whether the transformer reads the prompt, beside the tokens or in another branch than theirs."""
        return not self.dit.image_to_video or self.inversion.branch == "image"

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.inversion.validate()
        inversion = self.inversion
        require(not self.alignment.enabled, "alignment.enabled=True: motion inversion reads UMT5; give --alignment.enabled=False")
        require(not self.train.references, "train.references=True: motion inversion reads no reference; give --train.references=False")
        require(
            self.sampler.boundary == 0,
            f"sampler.boundary={self.sampler.boundary:g}: tokens are learnt for one network; give --sampler.boundary=0",
        )
        require(
            self.train.trainable == TRAINABLE,
            f"train.trainable={' '.join(self.train.trainable)}: motion inversion trains {TRAINABLE[0]} alone; leave it out",
        )
        require(
            self.dit.image_dim is not None or inversion.branch == "text",
            f"inversion.branch={inversion.branch}: this network has no image branch; give --inversion.branch=text",
        )
        require(
            2 * inversion.tokens <= self.dit.text_len,
            f"inversion.tokens={inversion.tokens}: at most {self.dit.text_len // 2}, for a frame reads two sets in the place of "
            f"dit.text_len={self.dit.text_len} rows",
        )
        patches = (self.image.image_size // self.image.patch) ** 2
        require(
            inversion.branch == "text" or inversion.tokens <= patches + 1,
            f"inversion.tokens={inversion.tokens}: at most {patches + 1}, the CLIP tokens of a frame, from which they start",
        )
        frames, devices = self.video.patches(self.vae, self.dit.patch)[0], self.mesh.heads * self.mesh.keys
        require(
            frames % devices == 0,
            f"mesh.heads * mesh.keys = {devices}: a divisor of the {frames} latent frames, for a device reads the tokens of whole frames",
        )


def on(base: Config) -> MotionInversion:
    """The method with its default numbers on this model."""
    values: dict[str, Any] = vars(base) | {
        "train": TransferTrainConfig(steps=1000, batch_size=1, trainable=TRAINABLE, references=False),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0),  # unofficial, but for the weight decay
    }
    return MotionInversion(**values)


def short(base: Config) -> Config:
    """With videos of 21 frames: 14B then trains on one 80 GB GPU. The paper's have 14."""
    return replace(base, video=replace(base.video, frames=21))


I2V_14B = on(short(wan.get_config()))
SMOKE = on(stage1.get_config("smoke"))
TINY = on(wan.get_config("tiny"))
VARIANTS = {
    "": I2V_14B,
    "i2v_14b": I2V_14B,
    "t2v_14b": on(short(wan.get_config("t2v_14b"))),
    "t2v_1_3b": on(short(wan.get_config("t2v_1_3b"))),
    "tiny": replace(
        TINY,
        train=replace(TINY.train, steps=300, init_from="embedded"),
        optimizer=replace(TINY.optimizer, learning_rate=1e-2),
    ),
    "smoke": replace(
        SMOKE,
        inversion=InversionConfig(tokens=2),
        train=replace(SMOKE.train, steps=6, batch_size=2),
        checkpoint=CheckpointConfig(every=3),
        sampler=replace(SMOKE.sampler, steps=2),
    ),
}


def get_config(variant: str = "") -> MotionInversion:
    """The configuration named `motion_inversion[:variant]`."""
    return variant_of(VARIANTS, variant)
