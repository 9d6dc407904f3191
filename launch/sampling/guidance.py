"""What DiTFlow asks of the flags, reads of its reference, and tells when it is done."""

import jax
import jax.numpy as jnp
import numpy as np

from configs.ditflow import DiTFlow
from configs.errors import require
from configs.run import VideoConfig
from data_pipelines import clips
from data_pipelines.encoders import Encoders
from launch.sampling.stages import stage
from omnitransfer_jax.folders import saved_guidance
from omnitransfer_jax.methods import ditflow
from omnitransfer_jax.methods.ditflow import Guided, Source


def require_one_motion(config: DiTFlow, tasks: list[str], references: list[str]) -> None:
    """A `RequestError` unless there is one reference, or none where DiTFlow reads none."""
    inject, count = config.ditflow.inject, len(references)
    ditflow.guided_steps(config.sampler, config.ditflow)
    require(not tasks, f"--task={','.join(tasks)}: DiTFlow takes the motion of its reference and nothing else; leave --task out")
    if inject and not config.ditflow.kv_injection:
        require(not count, f"--reference={references}: with --ditflow.inject and no injection of keys none is read; leave it out")
        return
    why = f"--ditflow.inject={inject} with injection of the reference's keys: give it, or --ditflow.kv_injection=False"
    require(count == 1, f"{count} --reference: {why if inject else 'DiTFlow takes the motion of one clip; give --reference=CLIP once'}")


def encode_source(encoders: Encoders, clip: np.ndarray, empty_context: jax.Array) -> Source:
    """What the network reads of the reference, uint8 "T H W 3": with image-to-video, its own first frame."""
    motion, image, condition = clips.to_unit(clip)[None], None, None
    if encoders.config.dit.image_dim is not None:
        with stage("image encoder of the reference", encoders):
            image = jnp.asarray(encoders.image(motion[:, 0]))
    with stage("video encoder of the reference", encoders):
        if encoders.config.dit.image_to_video:
            condition = jnp.asarray(encoders.condition(motion[:, 0]))
        return Source(jnp.asarray(encoders.latents(motion)), empty_context, image, condition)


def finish(config: DiTFlow, video: VideoConfig, guided: Guided) -> None:
    """Prints the losses of the guided steps, and writes what was optimised if that is asked for."""
    losses = np.asarray(guided.losses[0])
    if losses.size and not config.ditflow.inject and config.ditflow.guide != "none":
        for step, first, last in zip(ditflow.guided_steps(config.sampler, config.ditflow), losses[:, 0], losses[:, -1], strict=True):
            print(f"step {step + 1}: {config.ditflow.guide} loss {first:.4f} before the first update, {last:.4f} before the last")
        if not losses.any():
            print("the reference does not move from patch to patch: nothing guided this video")
    if config.ditflow.save:
        saved_guidance.write(config.ditflow.save, config, video, np.asarray(guided.saved[0]))
        print(f"wrote {config.ditflow.save}: {config.ditflow.variable} of {len(losses)} guided steps")
