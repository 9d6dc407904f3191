"""DiTFlow (arXiv 2412.07776): a clip's motion, read from attention, guides the sampling of a new video. Nothing trains.

Goal    the motion of `--reference` with the content of a prompt, or of a prompt and a first frame; docs/methods.md.
Cost    each guided step adds `updates` forward and backward passes through the blocks up to `block`.
Result  not run at full size. `tiny` is the package's own base, its numbers from a sweep in the procedural world; `smoke` is for tests.

    python -m launch.sample --config=ditflow:t2v_1_3b --checkpoint=DIR --reference=ref.mp4 --prompt="..." --out=out.mp4
    python -m launch.sample --config=ditflow:i2v_14b --checkpoint=DIR --reference=ref.mp4 --first_frame=IMAGE --prompt="..." --out=out.mp4

The same configuration runs the paper's baselines: `--ditflow.guide=smm`, `moft`, or `none` for injection alone.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from configs import wan
from configs.base import VAEConfig
from configs.errors import require
from configs.kinds import Kind
from configs.ranges import FROM_0, SHARE, require_ranges
from configs.run import Config, SamplerConfig, VideoConfig, variant_of

NEGATIVE_PROMPT = "bad quality, distortions, unrealistic, distorted image, watermark, signature"  # the released code's


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """The numbers of the method. Where no source is named, paper and released code agree; both are for CogVideoX."""

    KIND: ClassVar[Kind] = "run"

    guide: Literal["flow", "smm", "moft", "none"] = "flow"
    """What is compared with the reference: attention motion flow (DiTFlow), its baselines SMM and MOFT, or nothing: injection alone."""
    variable: Literal["latents", "positions"] = "latents"
    """What is optimised: the noisy latents, or the rotations of all queries and keys (the paper's z_t and rho_t)."""
    block: int = field(default=20, metadata=FROM_0)
    """The block that is read, counted from 0 (paper: 20 of 42 and 15 of 30 blocks)."""
    temperature: float = 2.0
    """Factor on the attention logits of the sample's flow. Wan's normalised queries have other logits, so it wants a sweep there."""
    updates: int = field(default=5, metadata=FROM_0)
    """Updates in each guided step, by an Adam that starts anew."""
    rate: float = 0.002
    """Learning rate in the first guided step."""
    last_rate: float = 0.001
    """Learning rate towards which it falls linearly; the step behind the last guided one would have it."""
    window: Literal["level", "steps"] = "level"
    """Whether noise levels or the index decides which steps are guided. The paper's: `steps`. Ours: `level`, because with Wan's shifted
    grids the first fifth of the steps all have levels above 0.9, and Wan's motion settles later than CogVideoX's."""
    lowest: float = field(default=0.9, metadata=SHARE)
    """With `level`: guided while the level is at least this; 0.9 is 25 %, 36 % and 47 % of the steps at shifts 3, 5 and 8 (ours)."""
    highest: float = field(default=1.0, metadata=SHARE)
    """With `level`: and at most this."""
    share: float = field(default=0.2, metadata=SHARE)
    """With `steps`: the first share of the steps is guided, rounded down."""
    kv_injection: bool = True
    """Whether block 0 reads the keys and values of the noised reference in the guided steps. They carry layout too, so try both."""
    channels: float = field(default=0.04, metadata=SHARE)
    """With `moft`: the share of the channels that is compared (released code)."""
    save: str = ""
    """File for the optimised latents or positions of every guided step, `.safetensors`."""
    inject: str = ""
    """Such a file, whose values are taken instead of optimising any: another prompt gets the motion at the cost of plain sampling."""

    def validate(self, blocks: int) -> None:
        """`blocks` is the number of blocks of the transformer."""
        require_ranges(self, "ditflow")
        require(self.block < blocks, f"ditflow.block={self.block}: the network has blocks 0 to {blocks - 1}")
        require(
            self.lowest <= self.highest, f"ditflow.lowest={self.lowest}: above ditflow.highest={self.highest}; give the lower level first"
        )
        require(
            self.guide != "none" or self.kv_injection or bool(self.inject),
            "ditflow.guide=none with ditflow.kv_injection=False guides nothing; take --config=wan for the plain backbone",
        )
        require(not (self.save and self.inject), "--ditflow.save and --ditflow.inject: give one; what is injected is not optimised anew")
        for name, path in (("save", self.save), ("inject", self.inject)):
            require(not path or path.endswith(".safetensors"), f"--ditflow.{name}={path}: end the name in .safetensors")


@dataclass(frozen=True, kw_only=True)
class DiTFlow(Config):
    """The whole model, and the guidance."""

    ditflow: GuidanceConfig = field(default_factory=GuidanceConfig)
    """How the reference guides the sampling."""

    def validate(self) -> None:
        super().validate()
        self.ditflow.validate(self.dit.num_layers)
        require(
            self.sampler.boundary == 0,
            f"sampler.boundary={self.sampler.boundary}: DiTFlow guides one network, not Wan2.2's two experts; give 0",
        )
        require(not self.alignment.enabled, "alignment.enabled=True: the method guides plain Wan; take --config=stage2 for the alignment")
        require(
            self.mesh.heads * self.mesh.keys == 1,
            f"mesh.heads={self.mesh.heads}, mesh.keys={self.mesh.keys}: the flow compares all tokens on one device; give 1 for both",
        )


def _guided(base: Config, guidance: float, ditflow: GuidanceConfig) -> DiTFlow:
    """Sampling of `base` as the method wants it. Euler, because UniPC's history is of latents that the guidance has moved since."""
    sampler = replace(base.sampler, solver="euler", guidance=guidance, negative_prompt=NEGATIVE_PROMPT)
    return DiTFlow(**vars(replace(base, sampler=sampler)), ditflow=ditflow)


# Chosen by a sweep over pairs 100 to 139 of the procedural world (docs/methods.md), by the gain in path error. Injected keys only changed
# the layout.
TINY_GUIDANCE = GuidanceConfig(block=3, temperature=5.0, rate=0.08, last_rate=0.04, lowest=0.8, kv_injection=False)
SMOKE = replace(
    wan.get_config("smoke"),
    vae=VAEConfig(base_dim=4, num_res_blocks=1),
    video=VideoConfig(frames=9, height=32, width=48, fps=8),
    sampler=SamplerConfig(steps=4),
)
VARIANTS = {
    "t2v_1_3b": _guided(wan.get_config("t2v_1_3b"), 6.0, GuidanceConfig(block=15)),
    "t2v_14b": _guided(wan.get_config("t2v_14b"), 5.0, GuidanceConfig()),
    "i2v_14b": _guided(wan.get_config(), 5.0, GuidanceConfig()),
    "tiny": _guided(wan.get_config("tiny"), 1.0, TINY_GUIDANCE),
    "smoke": _guided(SMOKE, 5.0, GuidanceConfig(block=1, updates=2, rate=0.02, window="steps", share=0.5)),
}
VARIANTS[""] = VARIANTS["t2v_14b"]


def get_config(variant: str = "") -> DiTFlow:
    """The configuration named `ditflow[:variant]`."""
    found = variant_of(VARIANTS, variant)
    assert isinstance(found, DiTFlow)
    return found
