"""How the parts meet: what the diffusion transformer is told, and how its answers become a video.

    prompt -> UMT5 -> text                    \\
    first frame -> CLIP -> image               >  WanDiT, asked by the sampler at every step  ->  latents -> VAE -> video
    first frame, then grey -> VAE -> condition /
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from configs.base import SamplerConfig
from omnitransfer_jax import samplers
from omnitransfer_jax.models.clip_vision import CLIPVision, preprocess
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE


class Conditions(NamedTuple):
    """What the network reads beside the noise."""

    text: Float[Array, "B S E"]
    """Encoded prompt, zero rows beyond its end."""
    negative_text: Float[Array, "B S E"]
    """What the unconditional pass of guidance reads instead."""
    image: Float[Array, "B I J"] | None = None
    """CLIP features of the first frame (image-to-video)."""
    latents: Float[Array, "B F H W C"] | None = None
    """Mask and encoded first frame, the channels behind the noise (image-to-video)."""


def encode_text(encoder: UMT5Encoder, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S E"]:
    """The text context of the cross-attention."""
    return encoder(tokens, mask)


def encode_image(encoder: CLIPVision, image: Float[Array, "B H W 3"]) -> Float[Array, "B I J"]:
    """The image context of the cross-attention, from the first frame at its own size, in [-1, 1]."""
    return encoder(preprocess(image, encoder.config.image_size))


def encode_first_frame(vae: WanVAE, image: Float[Array, "B H W 3"] | None, shape: tuple[int, int, int, int]) -> Float[Array, "B F h w C"]:
    """Mask and condition latents of a video of `shape` (B, T, H, W): the frame followed by grey, encoded whole (Wan2.1 image2video.py).

    Without an image, as in text-to-video on an image-to-video network, all frames are grey and the mask is 0.
    """
    video = jnp.zeros((*shape, 3))
    if image is not None:
        video = video.at[:, 0].set(image)
    latents = vae.encode(video)
    mask = jnp.zeros((*latents.shape[:-1], vae.config.time_stride))  # a channel for each video frame of a latent frame
    if image is not None:
        mask = mask.at[:, 0].set(1.0)
    return jnp.concatenate([mask, latents], axis=-1)


def denoise(
    dit: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B F H W C"],
    sampler: SamplerConfig,
    on_step: Callable[[int], None] | None = None,
) -> Float[Array, "B F H W C"]:
    """Clean latents from `noise`; with guidance both passes run as one batch."""
    guided = sampler.guidance != 1

    def twice(x: Array) -> Array:
        return jnp.concatenate([x, x]) if guided else x

    text = jnp.concatenate([conditions.text, conditions.negative_text]) if guided else conditions.text
    image = None if conditions.image is None else twice(conditions.image)

    def velocity(x: Array, timestep: Array) -> Array:
        latents = x if conditions.latents is None else jnp.concatenate([x, conditions.latents], axis=-1)
        v = dit(twice(latents), twice(timestep), text, image)
        if not guided:
            return v
        v, negative = jnp.split(v, 2)
        return negative + sampler.guidance * (v - negative)

    return samplers.sample(velocity, noise, sampler, on_step)
