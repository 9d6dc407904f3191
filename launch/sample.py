"""One video from a prompt, a first frame, or both, written as an mp4.

    python -m launch.sample --config=wan --checkpoint=DIR --first_frame=IMAGE --prompt="..." --out=out.mp4

The parts are loaded, used and let go one after the other, so the largest of them decides the memory, not their sum.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from configs.base import Config, VideoConfig, require
from data_pipelines import clips
from launch import command
from omnitransfer_jax import checkpoint
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.params import abstract, flat_params, with_params
from omnitransfer_jax.resize import bicubic_resize
from omnitransfer_jax.tokenizer import byte_tokenizer, clean_prompt, load_tokenizer, tokenize

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder that launch.import_weights or launch.train wrote; without it, random weights.")
PROMPT = flags.DEFINE_string("prompt", "", "What the video shows.")
FIRST_FRAME = flags.DEFINE_string("first_frame", None, "Image the video starts from (image-to-video networks).")
OUT = flags.DEFINE_string("out", "out.mp4", "The mp4 to write.")

Model = TypeVar("Model", bound=nnx.Module)


class Request(NamedTuple):
    """What the user asked for, read and checked."""

    prompt: str
    first_frame: np.ndarray | None
    """uint8 "H W 3"."""
    video: VideoConfig
    """The video's size; with a first frame, the frame's own shape at the configured area."""


def main(config: Config) -> None:
    request = read_request(config)
    if CHECKPOINT.value is None:
        print("no --checkpoint: the weights are random, so the video will be noise; it shows that every part runs", flush=True)
    conditions = encode(config, request)
    latents = generate(config, request.video, conditions)
    with stage("video decoder"):
        video = jax.jit(WanVAE.decode)(load(config, "vae", lambda rngs: WanVAE(config.vae, rngs=rngs)), latents)
        clips.write_clip(OUT.value, clips.to_bytes(video[0]), request.video.fps)
    size = request.video
    print(f"wrote {OUT.value}: {size.frames} frames, {size.width} x {size.height}, {size.fps} fps")


def read_request(config: Config) -> Request:
    """The flags, checked before any weights are touched."""
    require(OUT.value.endswith(".mp4"), f"--out={OUT.value}: an mp4 is written; end the name in .mp4")
    if FIRST_FRAME.value is None:
        return Request(clean_prompt(PROMPT.value), None, config.video)
    require(
        config.dit.image_dim is not None,
        f"--first_frame={FIRST_FRAME.value}: this network is text-to-video; leave it out or take an image-to-video configuration",
    )
    frame = clips.read_image(FIRST_FRAME.value)
    step = config.vae.space_stride * config.dit.patch[1]
    height, width = same_area(frame.shape[0] / frame.shape[1], config.video.height * config.video.width, step)
    return Request(clean_prompt(PROMPT.value), frame, replace(config.video, height=height, width=width))


def same_area(aspect: float, area: int, step: int) -> tuple[int, int]:
    """Height and width of at most `area` pixels with height / width near `aspect`, multiples of `step` (Wan2.1 image2video.py)."""
    return max(step, int((area * aspect) ** 0.5 // step * step)), max(step, int((area / aspect) ** 0.5 // step * step))


def encode(config: Config, request: Request) -> Conditions:
    """Everything the network reads beside the noise."""
    video = request.video
    with stage("text encoder"):
        tokenizer = byte_tokenizer() if CHECKPOINT.value is None else load_tokenizer(CHECKPOINT.value)
        tokens, mask = tokenize(tokenizer, [request.prompt, clean_prompt(config.sampler.negative_prompt)], config.dit.text_len)
        encoder = load(config, "text", lambda rngs: UMT5Encoder(config.text, rngs=rngs))
        text = jax.jit(omnitransfer.encode_text)(encoder, jnp.asarray(tokens), jnp.asarray(mask))
        del encoder
    image = latents = None
    if request.first_frame is not None:
        frame = jnp.asarray(clips.to_unit(request.first_frame))[None]
        with stage("image encoder"):
            encoder = load(config, "image", lambda rngs: CLIPVision(config.image, rngs=rngs))
            image = jax.jit(omnitransfer.encode_image)(encoder, frame)
            del encoder
        frame = bicubic_resize(frame, video.height, video.width)
    else:
        frame = None
    if config.dit.image_dim is not None:
        with stage("video encoder"):
            vae = load(config, "vae", lambda rngs: WanVAE(config.vae, rngs=rngs))
            encode_video = jax.jit(omnitransfer.encode_first_frame, static_argnames="shape")
            latents = encode_video(vae, frame, shape=(1, video.frames, video.height, video.width))
    return Conditions(text[:1], text[1:], image, latents)


def generate(config: Config, video: VideoConfig, conditions: Conditions) -> jax.Array:
    """Latents from noise, with a progress bar."""
    stride = config.vae.space_stride
    shape = (1, (video.frames - 1) // config.vae.time_stride + 1, video.height // stride, video.width // stride, config.vae.z_dim)
    noise = jax.random.normal(jax.random.key(config.seed), shape)
    with stage("transformer"):
        dit = load(config, "dit", lambda rngs: WanDiT(config.dit, rngs=rngs), dtype=config.dit.dtype)
    with tqdm(total=config.sampler.steps, desc="denoising", unit="step") as bar:
        denoise = jax.jit(
            lambda dit, conditions, noise: omnitransfer.denoise(dit, conditions, noise, config.sampler, lambda _: bar.update())
        )
        latents = denoise(dit, conditions, noise).block_until_ready()
        jax.effects_barrier()
    return latents


def load(config: Config, part: str, make: Callable[[nnx.Rngs], Model], dtype: str | None = None) -> Model:
    """One part of the model, from the checkpoint or, without one, with random weights."""
    if CHECKPOINT.value is None:
        return jax.jit(lambda: make(nnx.Rngs(config.seed)))()
    model = abstract(make)
    return with_params(model, checkpoint.load_part(CHECKPOINT.value, part, flat_params(model), dtype=dtype))


@contextmanager
def stage(name: str) -> Iterator[Any]:
    """Says what is being done and how long it took."""
    started = time.perf_counter()
    print(f"{name} ... ", end="", flush=True)
    yield
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    command.run(main)
