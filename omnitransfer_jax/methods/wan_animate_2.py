"""Wan-Animate-2's sampling (arXiv 2608.06009): a long video as clips that go on from each other's last frames.

    driving clip -> clips of equal length that overlap; the last one is filled up with the end played backwards
    of each:  driving frames -> VAE -> reference;   [ picture | last frames made so far, then grey ] -> VAE -> condition
              noise of one latent frame more -> denoise -> without the first latent frame, the picture's -> VAE -> frames

The VAE is causal, so each clip is encoded by itself. Everything here follows diffusers' modular pipeline of the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from configs.base import MASK_CHANNELS
from omnitransfer_jax.models.omnitransfer import make_reference
from omnitransfer_jax.models.wan_dit import Reference
from omnitransfer_jax.models.wan_vae import WanVAE


@dataclass(frozen=True)
class Clips:
    """The driving frames in the form of clips."""

    frames: np.ndarray
    """ "T H W 3", as many as all clips together need."""
    length: int
    overlap: int
    wanted: int
    """Frames of the result."""

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.length - self.overlap
        for start in range(0, len(self.frames) - self.overlap, step):
            yield self.frames[start : start + self.length]

    def __len__(self) -> int:
        return (len(self.frames) - self.overlap) // (self.length - self.overlap)


def in_clips(frames: np.ndarray, length: int, overlap: int) -> Clips:
    """`frames` "T H W 3" as clips of `length` frames, of which each begins with the last `overlap` frames of the one before.

    What is missing of the last clip is the end played backwards, as often as it takes.
    """
    wanted, step = len(frames), length - overlap
    missing = -(wanted - overlap) % step if wanted > overlap else length - wanted
    back_and_forth = np.concatenate([np.arange(wanted)[::-1], np.arange(wanted)])
    return Clips(frames[np.concatenate([np.arange(wanted), np.resize(back_and_forth, missing)])], length, overlap, wanted)


def encode_condition(
    vae: WanVAE, picture: Float[Array, "B H W 3"], before: Float[Array, "B t H W 3"] | None, frames: int
) -> Float[Array, "B F h w C"]:
    """Mask and condition latents of a clip of `frames` frames: the picture by itself, then the last frames `before` it and grey."""
    video = jnp.zeros((len(picture), frames, *picture.shape[1:]))
    if before is not None:
        video = video.at[:, : before.shape[1]].set(before)
    parts = []
    for latents, known in ((vae.encode(picture[:, None]), 1), (vae.encode(video), 0 if before is None else before.shape[1])):
        mask = jnp.arange(latents.shape[1]) < (known + MASK_CHANNELS - 1) // MASK_CHANNELS
        mask = jnp.broadcast_to(mask[None, :, None, None, None], (*latents.shape[:-1], MASK_CHANNELS)).astype(latents.dtype)
        parts.append(jnp.concatenate([mask, latents], -1))
    return jnp.concatenate(parts, axis=1)


def driving_reference(
    latents: Float[Array, "B F h w C"], text: Float[Array, "B S E"], image: Float[Array, "B I J"], patch: tuple[int, int, int], flag: float
) -> Reference:
    """The driving clip as the network reads it: encoded frames, its own prompt and the CLIP features of its first frame."""
    batch, frames, rows, columns, _ = latents.shape
    target = (frames + 1) // patch[0], rows // patch[1], columns // patch[2]
    made = make_reference(latents, jnp.zeros(batch, jnp.int32), target, by="beside", flag=flag)
    return made._replace(text=text, image=image)
