"""One video from a reference, a first frame, a prompt, or any of them together, written as an mp4.

    python -m launch.sample --config=stage1 --checkpoint=DIR --task=motion --reference=ref.mp4 --first_frame=image.png --out=out.mp4
    python -m launch.sample --config=wan --checkpoint=DIR --first_frame=image.png --prompt="..." --out=out.mp4
    python -m launch.sample --config=motion_inversion --checkpoint=DIR --first_frame=image.png --out=out.mp4
    python -m launch.sample --config=follow_your_motion --checkpoint=DIR --prompt="..." --out=out.mp4
    python -m launch.sample --config=ditflow:t2v_1_3b --checkpoint=DIR --reference=ref.mp4 --prompt="..." --out=out.mp4

`--task` and `--reference` repeat for combined transfer. The networks are loaded, used and let go one after the other, so the memory
needed is that of the largest one, not of all.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs.ditflow import DiTFlow
from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.motion_inversion import MotionInversion
from configs.run import Config, VideoConfig, plain
from configs.wan_animate_2 import WanAnimate2
from data_pipelines import clips, motion_training
from data_pipelines.encoders import Encoders, place_references
from data_pipelines.motion_inversion import load_tokens
from launch import command
from launch.sampling import animation, guidance
from launch.sampling.stages import StepBar, stage
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders import outputs, run_folder, saved_guidance
from omnitransfer_jax.mesh import make_mesh, replicated, with_found_mesh
from omnitransfer_jax.methods import ditflow, motion_inversion
from omnitransfer_jax.methods.ditflow import Source
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.resize import bicubic_resize
from omnitransfer_jax.tokenizer import clean_prompt
from omnitransfer_jax.train import flops

FLAGS = flags.FlagValues()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of launch.import_weights, workdir of launch.train, or `embedded`, the package's own; empty: random. Else train.init_from.",
    flag_values=FLAGS,
)
TASK = flags.DEFINE_multi_enum("task", [], tasks.NAMES, "What to take from the reference; repeats with --reference.", flag_values=FLAGS)
REFERENCE = flags.DEFINE_multi_string(
    "reference", [], "Clip to transfer from; repeats with --task. With ditflow one, alone.", flag_values=FLAGS
)
PROMPT = flags.DEFINE_string("prompt", "", "What the video shows.", flag_values=FLAGS)
FIRST_FRAME = flags.DEFINE_string("first_frame", None, "Image the video starts from (image-to-video networks).", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "out.mp4", "The mp4 to write.", flag_values=FLAGS)

NETWORKS = {"dit": "high-noise expert", "dit_low_noise": "low-noise expert"}  # the names of the stages in which they are loaded


class Request(NamedTuple):
    """What the user asked for, read and checked."""

    prompt: str
    first_frame: np.ndarray | None
    """uint8 "H W 3"."""
    references: tuple[tuple[int, np.ndarray], ...]
    """Task index and clip, uint8 "T H W 3"."""
    video: VideoConfig
    """The video's size; with a first frame, the frame's own shape at the configured area."""
    motion: np.ndarray | None = None
    """DiTFlow's reference, uint8 "T H W 3" of the video's size."""
    saved: np.ndarray | None = None
    """What it optimised for another prompt (`--ditflow.inject`)."""


def main(config: Config) -> None:
    require(
        run_folder.is_run(weights(config)) or not (weights(config) and Path(weights(config), motion_training.SPATIAL).is_dir()),
        f"--checkpoint={weights(config)}: its temporal stage has not begun; go on with its launch.train",
    )
    reads_image = (bool(FIRST_FRAME.value) or isinstance(config, DiTFlow)) and config.dit.image_dim is not None
    networks = ("dit", "vae", *(["mllm"] if config.alignment.enabled else ["text"]), *(["image"] if reads_image else []))
    given = load_models.INIT_FROM if CHECKPOINT.value is None and config.train.init_from else "--checkpoint"
    of_networks = plain(config) if isinstance(config, MotionInversion) else config
    load_models.require_weights(weights(config), of_networks, networks, given)
    config = with_found_mesh(config)
    if isinstance(config, WanAnimate2):
        return animate(config)
    finish = None
    if isinstance(config, MotionInversion):
        finish = jax.jit(partial(motion_inversion.conditions, config, load_tokens(checkpoint(config), config)))
    request = read_request(config)
    if not checkpoint(config):
        print("no --checkpoint: the weights are random, so the video will be noise; this only shows that every part runs", flush=True)
    encoders = Encoders(of_networks, weights(config))
    for note in [*notes(encoders, request), *reference_notes(config, request)]:
        print(note, flush=True)
    latents = generate(encoders, request, encode(encoders, request), finish)
    with stage("video decoder", encoders):
        clips.write_clip(OUT.value, clips.to_bytes(encoders.decode(latents)[0]), request.video.fps)
    size = request.video
    print(f"wrote {OUT.value}: {size.frames} frames, {size.width} x {size.height}, {size.fps} fps")


def checkpoint(config: Config) -> str:
    """The folder given by --checkpoint, or that of the configuration."""
    return config.train.init_from if CHECKPOINT.value is None else CHECKPOINT.value


def animate(config: WanAnimate2) -> None:
    """A driving clip to a video of the person of a picture (launch/sampling/animation.py)."""
    require_out(config)
    require(not TASK.value, f"--task={','.join(TASK.value)}: Wan-Animate-2 has one task, the movement of a person; leave it out")
    request = animation.read_request(config, REFERENCE.value, FIRST_FRAME.value)
    print(animation.cost(config, request), flush=True)
    encoders = Encoders(config, weights(config))
    video = animation.animate(config, encoders, request, clean_prompt(PROMPT.value))
    clips.write_clip(OUT.value, video, config.video.fps, sound_of=REFERENCE.value[0])
    print(f"wrote {OUT.value}: {len(video)} frames, {video.shape[2]} x {video.shape[1]}, {config.video.fps} fps")


def require_out(config: Config) -> None:
    """A `RequestError` unless `--out` can be what is written."""
    require(OUT.value.lower().endswith(".mp4"), f"--out={OUT.value}: an mp4 is written; end the name in .mp4")
    outputs.require_file("--out", OUT.value, [*REFERENCE.value, FIRST_FRAME.value or "", weights(config)])


def weights(config: Config) -> str:
    """The folder that all networks are loaded from; empty for random weights."""
    return run_folder.base_of(checkpoint(config), MotionInversion) if isinstance(config, MotionInversion) else checkpoint(config)


def read_request(config: Config) -> Request:
    """The flags, checked before any weights are touched."""
    require_out(config)
    guided = isinstance(config, DiTFlow)
    if guided:
        guidance.require_one_motion(config, TASK.value, REFERENCE.value)
    require(
        guided or len(TASK.value) == len(REFERENCE.value),
        f"{len(TASK.value)} --task and {len(REFERENCE.value)} --reference: each reference needs its task, in the same order",
    )
    if isinstance(config, MotionInversion):
        require_for_tokens(config)
    require(
        not (REFERENCE.value and isinstance(config, FollowYourMotion)),
        f"--reference={','.join(REFERENCE.value)}: this network reads none, for the motion is in --checkpoint; leave --task and it out",
    )
    chosen = [tasks.task_index(name) for name in TASK.value]
    require(
        bool(chosen) or not config.alignment.enabled,
        "no --task: from stage 2 on the context is made from references; give --task and --reference, or --config=stage1 or wan",
    )
    apart = [name for name in TASK.value if tasks.TASKS[tasks.task_index(name)].family == "appearance"]
    require(
        config.dit.reach == "all" or not apart,
        f"--task={','.join(apart)}: with dit.reach=same_frame a reference must share times with the target, which is so in temporal tasks",
    )
    first_frame = FIRST_FRAME.value
    require(
        bool(first_frame) or not chosen or any(tasks.TASKS[i].family == "appearance" for i in chosen),
        f"--task={','.join(TASK.value)}: a temporal transfer starts from a picture; give --first_frame=IMAGE",
    )
    require(
        config.dit.image_to_video or not (first_frame or chosen),
        f"{f'--first_frame={first_frame}' if first_frame else '--reference'}: this network is text-to-video; leave it out or take an "
        "image-to-video configuration",
    )
    video, frame = config.video, None
    if first_frame:
        frame = clips.read_image(first_frame)
        step = config.vae.space_stride * config.dit.patch[1]
        height, width = same_area(frame.shape[0] / frame.shape[1], video.height * video.width, step)
        video = replace(video, height=height, width=width)
    size = video if guided else config.data.reference
    read = [clips.read_clip(path, frames=size.frames, fps=size.fps, height=size.height, width=size.width) for path in REFERENCE.value]
    prompt = clean_prompt(PROMPT.value)
    if isinstance(config, DiTFlow):
        saved = saved_guidance.read(config.ditflow.inject, config, video) if config.ditflow.inject else None
        return Request(prompt, frame, (), video, read[0] if read else None, saved)
    return Request(prompt, frame, tuple(zip(chosen, read, strict=True)), video)


def require_for_tokens(config: MotionInversion) -> None:
    """A `RequestError` for flags that tokens of a motion leave no use for, or without the picture that they move."""
    require(not TASK.value, f"--task={','.join(TASK.value)}: the run has learnt its reference; leave out --task and --reference")
    require(
        config.keeps_prompt or not PROMPT.value,
        f"--prompt={PROMPT.value!r}: the tokens stand in its place (inversion.branch={config.inversion.branch}); leave it out",
    )
    require(
        not config.dit.image_to_video or bool(FIRST_FRAME.value),
        "no --first_frame: the tokens move a picture; give --first_frame=IMAGE",
    )


def notes(encoders: Encoders, request: Request) -> list[str]:
    """What the video will lack of what was asked for, or of what the network was trained with."""
    config, found = encoders.config, []
    if config.dit.image_to_video and request.first_frame is None and not request.references:
        found.append("no --first_frame: this is an image-to-video network, grey frames take its place; Wan2.1's were not trained so")
    if config.alignment.enabled:
        for index, _ in request.references:
            found += encoders.cut_prompts({"--prompt": request.prompt}, tasks.NAMES[index])
        return found
    negative = {"--sampler.negative_prompt": config.sampler.negative_prompt} if config.sampler.has_negative else {}
    return found + encoders.cut_prompts({"--prompt": request.prompt} | negative)


def reference_notes(config: Config, request: Request) -> list[str]:
    """What each reference will cost."""
    target, size = (math.prod(video.patches(config.vae, config.dit.patch)) for video in (request.video, config.data.reference))
    _, rows, columns = config.data.reference.patches(config.vae, config.dit.patch)
    return [flops.reference_note(config.dit, config.sampler, target, size, rows * columns)] * len(request.references)


def same_area(aspect: float, area: int, step: int) -> tuple[int, int]:
    """Height and width of at most `area` pixels with height / width near `aspect`, multiples of `step` (Wan2.1 image2video.py)."""
    return max(step, int((area * aspect) ** 0.5 // step * step)), max(step, int((area / aspect) ** 0.5 // step * step))


def encode(encoders: Encoders, request: Request) -> tuple[Conditions, Source | None]:
    """Everything the network reads beside the noise, and what it reads of DiTFlow's reference."""
    config, video = encoders.config, request.video
    context, negative = encode_context(encoders, request)
    picture = None if request.first_frame is None else clips.to_unit(request.first_frame)[None]
    image, condition, references = None, None, ()
    if picture is not None and config.dit.image_dim is not None:
        with stage("image encoder", encoders):
            image = jnp.asarray(encoders.image(picture))
    if config.dit.image_to_video:
        with stage("video encoder", encoders):
            frame = None if picture is None else np.asarray(bicubic_resize(jnp.asarray(picture), video.height, video.width))
            condition = jnp.asarray(encoders.no_condition if frame is None else encoders.condition(frame))
            latents = [(np.array([task], np.int32), encoders.latents(clips.to_unit(clip)[None])) for task, clip in request.references]
            references = place_references(config, video, latents)
    source = None if request.motion is None else guidance.encode_source(encoders, request.motion, context[1:])
    return Conditions(context[:1], negative[:1], image, condition, references), source


def encode_context(encoders: Encoders, request: Request) -> tuple[jax.Array, jax.Array]:
    """The text context and the negative context: of the prompts, or with alignment of all references.

    With a DiTFlow reference the second row is of the empty prompt, which goes with it.
    """
    config, video, inputs = encoders.config, request.video, []
    if not config.alignment.enabled:
        with stage("text encoder", encoders):
            return encoders.contexts([request.prompt] if request.motion is None else [request.prompt, ""])
    with stage("vision tower", encoders):
        has_frame = np.array([request.first_frame is not None], np.float32)
        frames = np.zeros((1, video.height, video.width, 3), np.float32)
        if request.first_frame is not None:
            frames[0] = clips.to_unit(clips.fit(request.first_frame, video.height, video.width))
        for index, clip in request.references:
            task = np.array([index], np.int32)
            inputs.append((task, encoders.mllm_inputs(task, [request.prompt], frames, has_frame, clips.to_unit(clip)[None])))
    with stage("language model", encoders):
        return encoders.contexts([request.prompt], load_models.load_alignment(encoders.folder, config), inputs)


def generate(
    encoders: Encoders,
    request: Request,
    encoded: tuple[Conditions, Source | None],
    finish: Callable[[WanDiT, Conditions], Conditions] | None = None,
) -> jax.Array:
    """Latents from noise, with a progress bar; of two experts one is in memory at a time.

    `finish` completes the conditions with what the transformer embeds; there is one expert then.
    """
    config, (conditions, source) = encoders.config, encoded
    noise = jax.random.normal(jax.random.key(config.seed), (1, *request.video.latent_shape(config.vae)))
    mesh = make_mesh(config.mesh)
    with StepBar(config.sampler.steps) as bar:

        def load(part: str) -> WanDiT:
            jax.effects_barrier()  # the steps so far are shown
            bar.clear()
            with stage(NETWORKS[part] if config.sampler.boundary > 0 else "transformer", encoders):
                return load_models.load_dit(encoders.folder, config, mesh, part)

        if finish is not None:
            dit = load("dit")
            conditions, load = finish(dit, jax.device_put(conditions, replicated(mesh))), lambda part: dit
        if isinstance(config, DiTFlow):
            saved = None if request.saved is None else jnp.asarray(request.saved)[None]
            guided = ditflow.sample_on(mesh, config, bar.reach)(load("dit"), conditions, noise, source, saved)
            latents = guided.latents
        else:
            guided, latents = None, omnitransfer.denoise_on(mesh, config, bar.reach)(load, conditions, noise)
        jax.block_until_ready(latents)
        jax.effects_barrier()
    if isinstance(config, DiTFlow) and guided is not None:
        guidance.finish(config, request.video, guided)
    return latents


if __name__ == "__main__":
    command.run(main, FLAGS)
