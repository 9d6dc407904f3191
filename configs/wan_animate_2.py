"""Wan-Animate-2 (arXiv 2608.06009): a person of a picture moves like the person of a driving clip. Its weights are public.

Goal    motion transfer with real weights today: the same construction as OmniTransfer, on the same transformer (docs/references.md)
Differs in the values of `ANIMATE_2`: references read frame by frame, at timestep 1, with mask 1 and a context of their own; and in the
        target's first latent frame, which is the picture of the person.

(none)      the base model, 40 steps with guidance        distilled  its distilled sibling, 10 steps without
smoke       every part small, with random weights: for tests

    python -m launch.sample --config=wan_animate_2 --checkpoint=DIR --reference=driving.mp4 --first_frame=person.png --out=out.mp4
"""
# ruff: noqa: RUF001

from dataclasses import dataclass, field, replace

from configs import wan
from configs.errors import require
from configs.kinds import RUN
from configs.ranges import FROM_0
from configs.run import Config, DataConfig, SamplerConfig, VideoConfig, variant_of

ANIMATE_2 = {  # fields of DiTConfig whose values make the function another one (diffusers' WanAnimate2Transformer3DModel)
    "reach": "same_frame",
    "offsets": "beside",
    "reference_flag": 1.0,
    "reference_time": 1.0,
    "reference_context": True,
}
# Wan's own negative prompt, which the release samples with (infer/wan_animate_2.yaml).
NEGATIVE_PROMPT = (  # its commas are Chinese
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class WanAnimate2(Config):
    """The model and how a driving clip becomes a video: clips of `video.frames`, one after another."""

    frames: int = field(default=0, metadata=RUN | FROM_0)
    """Frames of the whole video; 0: as many as the driving clip has at `video.fps`."""
    overlap: int = field(default=1, metadata=RUN)
    """Last frames of a clip from which the next one goes on."""
    reference_prompt: str = field(default="人物动作的参考视频", metadata=RUN)
    """What the driving clip is said to be: its own text context. (The release's default: a reference video of a person's movement.)"""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        require(
            self.overlap < self.video.frames and (self.overlap - 1) % self.vae.time_stride == 0,
            f"overlap={self.overlap}: {self.vae.time_stride}n+1 frames, fewer than video.frames={self.video.frames}",
        )


VIDEO = VideoConfig(frames=81, height=800, width=640, fps=24)
FULL = WanAnimate2(
    dit=replace(wan.I2V_14B, **ANIMATE_2),
    video=VIDEO,
    data=DataConfig(reference=VIDEO),
    sampler=SamplerConfig(solver="dpm++", steps=40, shift=5.0, guidance=3.0, skip_unconditional=(9,), negative_prompt=NEGATIVE_PROMPT),
)
SMOKE = wan.get_config("smoke")
SMOKE_VIDEO = VideoConfig(frames=9, height=48, width=32, fps=8)

VARIANTS = {
    "": FULL,
    "distilled": replace(FULL, sampler=replace(FULL.sampler, steps=10, guidance=1.0, skip_unconditional=())),
    "smoke": WanAnimate2(
        dit=replace(SMOKE.dit, **ANIMATE_2),
        vae=SMOKE.vae,
        text=SMOKE.text,
        image=SMOKE.image,
        mllm=SMOKE.mllm,
        lora=SMOKE.lora,
        alignment=SMOKE.alignment,
        video=SMOKE_VIDEO,
        data=DataConfig(reference=SMOKE_VIDEO, threads=1),
        sampler=SamplerConfig(solver="dpm++", steps=3, shift=5.0, guidance=3.0, skip_unconditional=(1,)),
    ),
}


def get_config(variant: str = "") -> WanAnimate2:
    """The configuration named `wan_animate_2[:variant]`."""
    return variant_of(VARIANTS, variant)
