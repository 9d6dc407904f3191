"""Plain Wan2.1, the base model, and Wan2.2: a first frame and a prompt, or a prompt alone, to a video.

(none)       image-to-video 14B at 480p              t2v_14b      text-to-video 14B at 480p
i2v_720p     image-to-video 14B at 720p              t2v_1_3b     text-to-video 1.3B at 480p
i2v_2_2_14b  Wan2.2 image-to-video A14B at 720p      t2v_2_2_14b  Wan2.2 text-to-video A14B at 720p
tiny         every part at a size for two CPU cores, with the weights inside the package (omnitransfer_jax/embedded/)
smoke        every part smaller still, with random weights: for tests; smoke_2_2 is that of Wan2.2

Wan2.2 A14B has two transformers of the same sizes: the high-noise expert makes the first steps, the low-noise expert those below
`sampler.boundary`. Its image-to-video network has no image branch, so it needs no CLIP.

python -m launch.sample --config=wan --checkpoint=DIR --first_frame=IMAGE --prompt="..." --out=out.mp4
"""

from dataclasses import replace

from configs.base import AlignmentConfig, CLIPVisionConfig, DiTConfig, LoRAConfig, QwenConfig, QwenVisionConfig, UMT5Config, VAEConfig
from configs.run import Config, DataConfig, SamplerConfig, TransferTrainConfig, VideoConfig, variant_of

I2V_14B = DiTConfig()
T2V_14B = replace(I2V_14B, in_channels=16, image_dim=None)
T2V_1_3B = replace(T2V_14B, dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)
I2V_2_2_14B = replace(I2V_14B, image_dim=None)
HD = VideoConfig(height=720, width=1280)

# Latents are 5 x 16 x 16 x 3 and a token covers 8 x 8 pixels, so there are 80 tokens; 2 frames are 4 of the language model's tokens.
TINY_VIDEO = VideoConfig(frames=9, height=32, width=32, fps=8)
# Statistics of the embedded autoencoder's latents of its training clips; launch.embed compares them with its vae.json.
TINY_LATENTS_MEAN = (1.0567, -0.4252, -0.3051)
TINY_LATENTS_STD = (2.639, 2.399, 2.0905)
# Because the world's clips are smooth, their colours are visible even at high noise levels, so small times carry little information.
TINY_SHIFT = 8.0

I2V_480P = Config()
VARIANTS = {
    "": I2V_480P,
    "i2v_720p": replace(I2V_480P, video=HD, sampler=SamplerConfig(shift=5.0)),
    "t2v_14b": replace(I2V_480P, dit=T2V_14B, sampler=SamplerConfig(steps=50, shift=5.0)),
    "t2v_1_3b": replace(I2V_480P, dit=T2V_1_3B, sampler=SamplerConfig(steps=50, shift=8.0, guidance=6.0)),
    "i2v_2_2_14b": replace(  # Wan2.2 wan_i2v_A14B.py
        I2V_480P, dit=I2V_2_2_14B, video=HD, sampler=SamplerConfig(shift=5.0, boundary=0.9, guidance=3.5, low_noise_guidance=3.5)
    ),
    "t2v_2_2_14b": replace(  # Wan2.2 wan_t2v_A14B.py, whose sample_guide_scale is that at low noise, then that at high noise
        I2V_480P, dit=T2V_14B, video=HD, sampler=SamplerConfig(shift=12.0, boundary=0.875, guidance=4.0, low_noise_guidance=3.0)
    ),
    "tiny": Config(
        dit=DiTConfig(
            dim=160,
            ffn_dim=480,
            num_layers=4,
            num_heads=5,
            text_dim=64,
            text_len=32,
            image_dim=64,
            freq_dim=64,
            in_channels=10,
            out_channels=3,
            patch=(1, 4, 4),
            rope_base=20.0,
            rope_top=2.0,
            dtype="float32",
            remat="none",
        ),
        vae=VAEConfig(
            base_dim=16,
            z_dim=3,
            dim_mult=(1, 2),
            num_res_blocks=1,
            temporal_downsample=(True,),
            encode_frames=8,
            decode_frames=4,
            latents_mean=TINY_LATENTS_MEAN,
            latents_std=TINY_LATENTS_STD,
        ),
        text=UMT5Config(vocab_size=512, dim=64, head_dim=16, ffn_dim=128, num_layers=2, num_heads=4, dtype="float32"),
        image=CLIPVisionConfig(dim=64, ffn_dim=128, num_layers=3, num_heads=4, image_size=28, dtype="float32"),
        mllm=QwenConfig(
            vocab_size=512,
            dim=96,
            ffn_dim=192,
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            rope_sections=(4, 6, 6),
            vision_start=5,
            image_token=7,
            video_token=8,
            dtype="float32",
            vision=QwenVisionConfig(dim=64, ffn_dim=96, num_layers=2, num_heads=4, patch=8, window=32, full_attention=(1,)),
        ),
        lora=LoRAConfig(rank=8, alpha=8.0),
        alignment=AlignmentConfig(queries=40, frames=9, frame_pixels=32 * 32, prompt_tokens=64, connector_dim=128),
        video=TINY_VIDEO,
        sampler=SamplerConfig(solver="euler", steps=10, shift=TINY_SHIFT, guidance=1.0),
        data=DataConfig(reference=TINY_VIDEO, threads=1),
        train=TransferTrainConfig(init_from="embedded"),
    ),
    "smoke": Config(
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
VARIANTS["smoke_2_2"] = replace(
    VARIANTS["smoke"],
    dit=replace(VARIANTS["smoke"].dit, image_dim=None),
    sampler=SamplerConfig(steps=8, boundary=0.9, guidance=3.5, low_noise_guidance=3.0),
)


def get_config(variant: str = "") -> Config:
    """The configuration named `wan[:variant]`."""
    return variant_of(VARIANTS, variant)
