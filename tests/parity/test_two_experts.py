"""Wan2.2's two experts against diffusers' pipelines with `transformer_2`: the latents after every step, on the original's time grid."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

from configs import base, run
from data_pipelines import clips
from omnitransfer_jax import samplers
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.weights import wan_dit, wan_vae
from tests.compare import LOG, relative_l2
from tests.parity.bridge import port, randomise

FRAMES, HEIGHT, WIDTH = 9, 32, 48
I2V = base.DiTConfig(
    dim=48, ffn_dim=64, num_layers=2, num_heads=2, text_dim=32, text_len=16, image_dim=None, freq_dim=32, dtype="float32", remat="none"
)
VAE = base.VAEConfig(base_dim=8)
CONFIGS = {  # the published boundaries, at which each expert here makes steps: 3 and 3, 4 and 2
    "i2v": (I2V, run.SamplerConfig(steps=6, shift=5.0, boundary=0.9, guidance=3.5, low_noise_guidance=2.0)),
    "t2v": (replace(I2V, in_channels=16), run.SamplerConfig(steps=6, shift=8.0, boundary=0.875, guidance=4.0, low_noise_guidance=3.0)),
}
TOLERANCE = 1e-4


class OriginalGrid(UniPCMultistepScheduler):
    """diffusers starts the grid elsewhere; this is that of Wan2.1 and Wan2.2 (fm_solvers_unipc.py)."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1], device=device)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


NOISE, TEXTS = draw(1, 1, 3, HEIGHT // 8, WIDTH // 8, 16), draw(2, 2, 16, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def experts_of(config):
    settings = {k: v for k, v in wan_dit.config_json(config).items() if not k.startswith("_")}
    return {part: randomise(WanTransformer3DModel(**settings), seed) for seed, part in enumerate(("dit", "dit_low_noise"))}


def their_latents(theirs, vae, sampler):
    """The latents after each step, channels last."""
    found, image = [], theirs["dit"].config.in_channels == 36
    pipeline = (WanImageToVideoPipeline if image else WanPipeline)(
        tokenizer=None, text_encoder=None, vae=vae, transformer=theirs["dit"], transformer_2=theirs["dit_low_noise"],
        scheduler=OriginalGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sampler.shift),
        boundary_ratio=sampler.boundary,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def keep(pipeline, step, timestep, kept):
        found.append(kept["latents"].permute(0, 2, 3, 4, 1).numpy())
        return kept

    pipeline(
        **({"image": Image.fromarray(PIXELS)} if image else {}), prompt_embeds=torch.tensor(TEXTS[:1]),
        negative_prompt_embeds=torch.tensor(TEXTS[1:]), height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance, guidance_scale_2=sampler.low_noise_guidance, latents=torch.tensor(NOISE).permute(0, 4, 1, 2, 3),
        output_type="latent", callback_on_step_end=keep,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_after_every_step(name):
    config, sampler = CONFIGS[name]
    theirs = experts_of(config)
    vae = randomise(AutoencoderKLWan(**{k: v for k, v in wan_vae.config_json(VAE).items() if not k.startswith("_")}))
    expected = their_latents(theirs, vae, sampler)
    ours = {part: port(lambda rngs: WanDiT(config, rngs=rngs), theirs[part], wan_dit.entries(config, "diffusers")) for part in theirs}
    first = None
    if config.image_to_video:
        encoder, frame = port(lambda rngs: WanVAE(VAE, rngs=rngs), vae, wan_vae.entries(VAE, "diffusers")), clips.to_unit(PIXELS)[None]
        first = jax.jit(lambda vae: omnitransfer.encode_first_frame(vae, jnp.asarray(frame), (1, FRAMES, HEIGHT, WIDTH)))(encoder)
    conditions = Conditions(jnp.asarray(TEXTS[:1]), jnp.asarray(TEXTS[1:]), None, first)

    path = jax.jit(partial(trajectory, sampler, first))(ours)
    errors = [relative_l2(a, b) for a, b in zip(path[1:], expected, strict=True)]
    LOG.info("%s: %.1e at most", name, max(errors))
    assert max(errors) <= TOLERANCE
    assert relative_l2(sample_of_parts(config, sampler, ours, conditions), expected[-1]) <= TOLERANCE


def trajectory(sampler, first, ours):
    """The latents before and after every step, by `samplers.sample` and guidance as Wan2.2 has it."""

    def velocity(part, guidance):
        def guided(x, timestep):
            latents = x if first is None else jnp.concatenate([x, first], -1)
            v, negative = jax.lax.map(lambda text: ours[part](latents, timestep, text), jnp.asarray(TEXTS)[:, None])
            return negative + guidance * (v - negative)

        return guided

    low = velocity("dit_low_noise", sampler.low_noise_guidance)
    return samplers.sample(velocity("dit", sampler.guidance), jnp.asarray(NOISE), sampler, low_noise=low, trajectory=True)


def sample_of_parts(config, sampler, ours, conditions):
    """As launch.sample does it: an expert is loaded when its steps come, and the one before is gone by then."""
    asked = []

    def load(part):
        live = sum(x.nbytes for x in jax.live_arrays())
        asked.append((part, live))
        return jax.tree.map(jnp.copy, ours[part])

    whole = run.Config(dit=config, sampler=sampler, vae=VAE)
    latents = omnitransfer.denoise_on(make_mesh(whole.mesh), whole)(load, conditions, jnp.asarray(NOISE))
    assert [part for part, _ in asked] == ["dit", "dit_low_noise"]
    size = sum(x.nbytes for x in flat_params(ours["dit"]).values())
    assert asked[1][1] - asked[0][1] < size / 2
    return latents
