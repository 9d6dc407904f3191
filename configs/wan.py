"""Plain Wan2.1, the base model: a first frame and a prompt, or a prompt alone, to a video.

(none)      image-to-video 14B at 480p       t2v_14b   text-to-video 14B at 480p
i2v_720p    image-to-video 14B at 720p       t2v_1_3b  text-to-video 1.3B at 480p
tiny        every part at a size for two CPU cores; random weights unless a checkpoint is given

python -m launch.sample --config=wan --checkpoint=DIR --first_frame=IMAGE --prompt="..." --out=out.mp4
"""

from dataclasses import replace

from configs.base import (
    AlignmentConfig,
    CLIPVisionConfig,
    Config,
    DiTConfig,
    LoRAConfig,
    QwenConfig,
    QwenVisionConfig,
    SamplerConfig,
    UMT5Config,
    VAEConfig,
    VideoConfig,
    variant_of,
)

I2V_14B = DiTConfig()
T2V_14B = replace(I2V_14B, in_channels=16, image_dim=None)
T2V_1_3B = replace(T2V_14B, dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)

I2V_480P = Config()
VARIANTS = {
    "": I2V_480P,
    "i2v_720p": replace(I2V_480P, video=VideoConfig(height=720, width=1280), sampler=SamplerConfig(shift=5.0)),
    "t2v_14b": replace(I2V_480P, dit=T2V_14B, sampler=SamplerConfig(steps=50, shift=5.0)),
    "t2v_1_3b": replace(I2V_480P, dit=T2V_1_3B, sampler=SamplerConfig(steps=50, shift=8.0, guidance=6.0)),
    "tiny": Config(
        dit=DiTConfig(dim=48, ffn_dim=96, num_layers=2, num_heads=2, text_dim=32, text_len=32, image_dim=32, freq_dim=32, dtype="float32"),
        vae=VAEConfig(base_dim=8),
        text=UMT5Config(vocab_size=384, dim=32, head_dim=8, ffn_dim=48, num_layers=2, num_heads=4, dtype="float32"),
        image=CLIPVisionConfig(dim=32, ffn_dim=64, num_layers=3, num_heads=2, image_size=28, dtype="float32"),
        mllm=QwenConfig(
            vocab_size=384,
            dim=48,
            ffn_dim=64,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            rope_sections=(2, 3, 3),
            vision_start=261,
            image_token=263,
            video_token=264,
            dtype="float32",
            vision=QwenVisionConfig(dim=32, ffn_dim=48, num_layers=2, num_heads=2, full_attention=(1,)),
        ),
        lora=LoRAConfig(rank=4, alpha=4.0),
        alignment=AlignmentConfig(queries=8, frames=5, frame_pixels=2 * 28 * 28, prompt_tokens=96, connector_dim=48),
        video=VideoConfig(frames=17, height=64, width=96),
        sampler=SamplerConfig(steps=8),
    ),
}


def get_config(variant: str = "") -> Config:
    """The configuration named `wan[:variant]`."""
    return variant_of(VARIANTS, variant)
