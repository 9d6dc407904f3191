"""Wan-Animate-2: a driving clip and a picture of a person to a video as long as the clip, with its sound.

picture, driving clip -> frames of one size      prompts -> UMT5      picture, first driving frame -> CLIP
clip after clip (omnitransfer_jax/methods/wan_animate_2.py): encode, denoise, decode; the next goes on from the last frames
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RequestError, require
from configs.run import VideoConfig
from configs.wan_animate_2 import WanAnimate2
from data_pipelines import clips
from data_pipelines.encoders import Encoders, decode_clips, encode_clips
from launch.sampling.stages import StepBar, stage
from omnitransfer_jax import load_models
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import wan_animate_2
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.train import flops

encode_condition = jax.jit(wan_animate_2.encode_condition, static_argnames="frames")


class Request(NamedTuple):
    """What the user asked for, read and checked."""

    picture: np.ndarray
    """The person, uint8 "H W 3", at its own size."""
    driving: wan_animate_2.Clips
    """The driving frames, uint8, in clips."""
    video: VideoConfig
    """A clip's size: the picture's shape at the configured area."""


class Known(NamedTuple):
    """What is the same for every clip."""

    text: jax.Array
    negative: jax.Array
    reference_text: jax.Array
    image: jax.Array
    reference_image: jax.Array


def read_request(config: WanAnimate2, references: list[str], first_frame: str | None) -> Request:
    """The picture and the driving clip, read before any weights are touched."""
    require(len(references) == 1, f"{len(references)} --reference: Wan-Animate-2 takes one, the driving clip")
    if first_frame is None:
        raise RequestError("no --first_frame: Wan-Animate-2 needs a picture of the person; give --first_frame=IMAGE")
    picture, size = clips.read_image(first_frame), config.video
    height, width = letterbox_size(picture.shape[:2], size.height * size.width, config.vae.space_stride * config.dit.patch[1])
    frames = clips.read_clip(references[0], frames=config.frames or None, fps=size.fps, height=height, width=width, letterbox=True)
    video = VideoConfig(frames=size.frames, height=height, width=width, fps=size.fps)
    return Request(picture, wan_animate_2.in_clips(frames, size.frames, config.overlap), video)


def letterbox_size(shape: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """Height and width near `area` pixels in the proportions of `shape`, multiples of `step` (diffusers' video processor)."""
    aspect = shape[0] / shape[1]
    return max(step, round((area * aspect) ** 0.5) // step * step), max(step, round((area / aspect) ** 0.5) // step * step)


def cost(config: WanAnimate2, request: Request) -> str:
    """What the references will cost, said before anything is loaded."""
    target = request.video.patches(config.vae, config.dit.patch)
    tokens = target[1] * target[2] * target[0]
    return flops.reference_note(config.dit, config.sampler, tokens + target[1] * target[2], tokens, target[1] * target[2])


def animate(config: WanAnimate2, encoders: Encoders, request: Request, prompt: str) -> np.ndarray:
    """The video, uint8 "T H W 3", at the picture's proportions."""
    known, video = encode(config, encoders, request, prompt), request.video
    with stage("transformer", encoders):
        mesh = make_mesh(config.mesh)
        dit = load_models.load_dit(encoders.folder, config, mesh)
    picture, before, made = jnp.asarray(framed(request))[None], None, []
    for k, driving in enumerate(request.driving):
        latents = encode_clips(encoders.vae, jnp.asarray(clips.to_unit(driving))[None])
        condition = encode_condition(encoders.vae, picture, before, frames=video.frames)
        flag = config.dit.reference_flag or 0.0
        reference = wan_animate_2.driving_reference(latents, known.reference_text, known.reference_image, config.dit.patch, flag)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), k), (*condition.shape[:-1], config.vae.z_dim))
        conditions = Conditions(known.text, known.negative, known.image, condition, (reference,))
        with StepBar(config.sampler.steps, f"clip {k + 1} of {len(request.driving)}") as bar:
            found = omnitransfer.denoise_on(mesh, config, bar.reach)(lambda part: dit, conditions, noise).block_until_ready()
            jax.effects_barrier()
        frames = decode_clips(encoders.vae, found[:, 1:])  # the first latent frame is the picture's
        before = frames[:, -config.overlap :]
        made.append(np.asarray(frames)[0, config.overlap if k else 0 :])
    whole = np.concatenate(made)[: request.driving.wanted]
    return clips.without_letterbox(clips.to_bytes(whole), request.picture.shape[:2])


def framed(request: Request) -> np.ndarray:
    """The picture in the size of a clip, in [-1, 1]."""
    return clips.to_unit(clips.fit(request.picture, request.video.height, request.video.width, letterbox=True))


def encode(config: WanAnimate2, encoders: Encoders, request: Request, prompt: str) -> Known:
    """Both prompts, and the CLIP features of the picture and of the first driving frame."""
    with stage("text encoder", encoders):
        (text, driving), negative = encoders.contexts([prompt, config.reference_prompt])
    with stage("image encoder", encoders):
        image = encoders.image(framed(request)[None])
        reference_image = encoders.image(clips.to_unit(request.driving.frames[:1]))
    return Known(text[None], negative[:1], driving[None], jnp.asarray(image), jnp.asarray(reference_image))
