"""The whole chain, prompt and first frame to pixels, against diffusers' WanImageToVideoPipeline on the original's time grid."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from configs import base, run
from data_pipelines import clips
from omnitransfer_jax import samplers
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import byte_tokenizer, clean_prompt, tokenize
from omnitransfer_jax.weights import clip_vision, umt5, wan_dit, wan_vae
from tests.compare import LOG
from tests.parity.bridge import port, randomise

PROMPTS = ["A  fox &amp; a hare  run", "blurry, still"]
FRAMES, HEIGHT, WIDTH = 9, 32, 48
SAMPLER = run.SamplerConfig(steps=4, shift=3.0, guidance=5.0)
DIT = base.DiTConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, text_dim=32, image_dim=32, freq_dim=32, dtype="float32")
VAE = base.VAEConfig(base_dim=8)
TEXT = base.UMT5Config(vocab_size=384, dim=32, head_dim=8, ffn_dim=48, num_layers=2, num_heads=4, dtype="float32")
IMAGE = base.CLIPVisionConfig(dim=32, ffn_dim=48, num_layers=3, num_heads=2, image_size=28, dtype="float32")


class OriginalGrid(UniPCMultistepScheduler):
    """diffusers starts the grid elsewhere; this is Wan2.1's."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)


class OriginalPreprocessing:
    """Wan2.1 clip.py: the whole image squashed by bicubic interpolation without antialiasing, then CLIP's statistics."""

    def __call__(self, images, return_tensors):
        x = torch.tensor(np.array(images)).permute(2, 0, 1)[None] / 127.5 - 1
        x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        return BatchFeature({"pixel_values": (x - mean[:, None, None]) / std[:, None, None]})


def build(cls, config_class, table):
    settings = {k: v for k, v in table.items() if not k.startswith("_") and k not in ("architectures", "model_type")}
    return randomise(cls(config_class(**settings)) if config_class else cls(**settings))


def test_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    noise = np.random.default_rng(1).standard_normal((1, 3, HEIGHT // 8, WIDTH // 8, 16), np.float32)
    theirs = {
        "transformer": build(WanTransformer3DModel, None, wan_dit.config_json(DIT)),
        "vae": build(AutoencoderKLWan, None, wan_vae.config_json(VAE)),
        "text_encoder": build(UMT5EncoderModel, UMT5Config, umt5.config_json(TEXT)),
        "image_encoder": build(CLIPVisionModel, CLIPVisionConfig, clip_vision.config_json(IMAGE)),
    }
    scheduler = OriginalGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SAMPLER.shift)
    pipeline = WanImageToVideoPipeline(tokenizer=byte_tokenizer(), scheduler=scheduler, image_processor=OriginalPreprocessing(), **theirs)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=Image.fromarray(pixels), prompt=PROMPTS[0], negative_prompt=PROMPTS[1], height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=SAMPLER.steps, guidance_scale=SAMPLER.guidance, latents=torch.tensor(noise).permute(0, 4, 1, 2, 3),
    ).frames  # fmt: skip

    dit = port(lambda rngs: WanDiT(DIT, rngs=rngs), theirs["transformer"], wan_dit.entries(DIT, "diffusers"))
    vae = port(lambda rngs: WanVAE(VAE, rngs=rngs), theirs["vae"], wan_vae.entries(VAE, "diffusers"))
    text = port(lambda rngs: UMT5Encoder(TEXT, rngs=rngs), theirs["text_encoder"], umt5.entries(TEXT, "diffusers"))
    clip_table = clip_vision.entries(IMAGE, "diffusers")
    image = port(lambda rngs: CLIPVision(IMAGE, rngs=rngs), theirs["image_encoder"], clip_table, "vision_model.")
    tokens, mask = tokenize(byte_tokenizer(), [clean_prompt(p) for p in PROMPTS], DIT.text_len)
    frame = jnp.asarray(clips.to_unit(pixels))[None]

    @jax.jit
    def video(dit, vae, text, image, noise):
        encoded = omnitransfer.encode_text(text, jnp.asarray(tokens), jnp.asarray(mask))
        first = omnitransfer.encode_first_frame(vae, frame, (1, FRAMES, HEIGHT, WIDTH))
        conditions = Conditions(encoded[:1], encoded[1:], omnitransfer.encode_image(image, frame), first)
        (expert,) = samplers.experts(SAMPLER)
        return vae.decode(omnitransfer.denoise(dit, conditions, samplers.start(noise), SAMPLER, expert).latents)

    out = (np.asarray(video(dit, vae, text, image, jnp.asarray(noise))) + 1) / 2
    difference = np.abs(out - expected).max()
    LOG.info("pixels %.1e", difference)
    assert difference <= 2e-3
    assert expected.std() > 0.05  # a picture, not a clamped plane
