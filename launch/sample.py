"""One video from a reference, a first frame, a prompt, or any of them together, written as an mp4.

    python -m launch.sample --config=stage1 --checkpoint=DIR --task=motion --reference=ref.mp4 --first_frame=image.png --out=out.mp4
    python -m launch.sample --config=wan --checkpoint=DIR --first_frame=image.png --prompt="..." --out=out.mp4

`--task` and `--reference` repeat for combined transfer. The parts are loaded, used and let go one after the other, so the largest of
them decides the memory, not their sum.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from configs.errors import require
from configs.run import Config, VideoConfig
from data_pipelines import clips, mllm_inputs
from launch import command
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import MLLMInputs
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.resize import bicubic_resize
from omnitransfer_jax.tokenizer import clean_prompt, tokenize

FLAGS = flags.FlagValues()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of launch.import_weights, workdir of launch.train, or `embedded`, the package's own; empty: random. Else train.init_from.",
    flag_values=FLAGS,
)
TASK = flags.DEFINE_multi_enum("task", [], tasks.NAMES, "What to take from the reference; repeats with --reference.", flag_values=FLAGS)
REFERENCE = flags.DEFINE_multi_string("reference", [], "Clip to transfer from; repeats with --task.", flag_values=FLAGS)
PROMPT = flags.DEFINE_string("prompt", "", "What the video shows.", flag_values=FLAGS)
FIRST_FRAME = flags.DEFINE_string("first_frame", None, "Image the video starts from (image-to-video networks).", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "out.mp4", "The mp4 to write.", flag_values=FLAGS)


class Request(NamedTuple):
    """What the user asked for, read and checked."""

    prompt: str
    first_frame: np.ndarray | None
    """uint8 "H W 3"."""
    references: tuple[tuple[int, np.ndarray], ...]
    """Task index and clip, uint8 "T H W 3"."""
    video: VideoConfig
    """The video's size; with a first frame, the frame's own shape at the configured area."""


def main(config: Config) -> None:
    request = read_request(config)
    if not weights(config):
        print("no --checkpoint: the weights are random, so the video will be noise; it shows that every part runs", flush=True)
    conditions = encode(config, request)
    latents = generate(config, request.video, conditions)
    with stage("video decoder"):
        video = jax.jit(WanVAE.decode)(load_models.load_vae(weights(config), config), latents)
        clips.write_clip(OUT.value, clips.to_bytes(video[0]), request.video.fps)
    size = request.video
    print(f"wrote {OUT.value}: {size.frames} frames, {size.width} x {size.height}, {size.fps} fps")


def weights(config: Config) -> str:
    """The folder that all parts are loaded from; empty for random ones."""
    return config.train.init_from if CHECKPOINT.value is None else CHECKPOINT.value


def read_request(config: Config) -> Request:
    """The flags, checked before any weights are touched."""
    require(OUT.value.endswith(".mp4"), f"--out={OUT.value}: an mp4 is written; end the name in .mp4")
    require(
        len(TASK.value) == len(REFERENCE.value),
        f"{len(TASK.value)} --task and {len(REFERENCE.value)} --reference: each reference needs its task, in the same order",
    )
    chosen = [tasks.task_index(name) for name in TASK.value]
    require(
        bool(chosen) or not config.alignment.enabled,
        "no --task: from stage 2 on the model is told of references; give --task and --reference, or --config=stage1 or wan",
    )
    first_frame = FIRST_FRAME.value
    require(
        bool(first_frame) or not chosen or any(tasks.TASKS[i].family == "appearance" for i in chosen),
        f"--task={','.join(TASK.value)}: a temporal transfer starts from a picture; give --first_frame=IMAGE",
    )
    require(
        not first_frame or config.dit.image_dim is not None,
        f"--first_frame={first_frame}: this network is text-to-video; leave it out or take an image-to-video configuration",
    )
    video, frame, size = config.video, None, config.data.reference
    if first_frame:
        frame = clips.read_image(first_frame)
        step = config.vae.space_stride * config.dit.patch[1]
        height, width = same_area(frame.shape[0] / frame.shape[1], video.height * video.width, step)
        video = replace(video, height=height, width=width)
    read = [clips.read_clip(path, frames=size.frames, fps=size.fps, height=size.height, width=size.width) for path in REFERENCE.value]
    return Request(clean_prompt(PROMPT.value), frame, tuple(zip(chosen, read, strict=True)), video)


def same_area(aspect: float, area: int, step: int) -> tuple[int, int]:
    """Height and width of at most `area` pixels with height / width near `aspect`, multiples of `step` (Wan2.1 image2video.py)."""
    return max(step, int((area * aspect) ** 0.5 // step * step)), max(step, int((area / aspect) ** 0.5 // step * step))


def encode(config: Config, request: Request) -> Conditions:
    """Everything the network reads beside the noise."""
    video, folder = request.video, weights(config)
    text = tell(config, request) if config.alignment.enabled else encode_prompts(config, request)
    image = frame = None
    if request.first_frame is not None:
        picture = jnp.asarray(clips.to_unit(request.first_frame))[None]
        with stage("image encoder"):
            image = jax.jit(omnitransfer.encode_image)(load_models.load_image_encoder(folder, config), picture)
        frame = bicubic_resize(picture, video.height, video.width)
    latents, references = None, []
    if config.dit.image_dim is not None:
        with stage("video encoder"):
            vae = load_models.load_vae(folder, config)
            encode_first = jax.jit(omnitransfer.encode_first_frame, static_argnames="shape")
            latents = encode_first(vae, frame, shape=(1, video.frames, video.height, video.width))
            encode_clip = jax.jit(lambda vae, clip: vae.encode(clip))
            for k, (task, clip) in enumerate(request.references):
                together = config.dit.offsets == "frames"  # all references are then in one place, whatever their family
                family = [together or tasks.TASKS[other].family for other, _ in request.references[: k + 1]]
                rank = family.count(family[k]) if config.sampler.stack_references else 1
                encoded = encode_clip(vae, jnp.asarray(clips.to_unit(clip))[None])
                target = video.patches(config.vae, config.dit.patch)
                references.append(omnitransfer.make_reference(encoded, jnp.array([task]), target, rank, config.dit.offsets))
    return Conditions(text[:1], text[1:], image, latents, tuple(references))


def encode_prompts(config: Config, request: Request) -> jax.Array:
    """The prompt and the negative prompt by UMT5, "2 S E"."""
    prompts, folder = [request.prompt, clean_prompt(config.sampler.negative_prompt)], weights(config)
    with stage("text encoder"):
        tokens, mask = tokenize(load_models.load_vocabulary(folder), prompts, config.dit.text_len)
        encoder = load_models.load_text_encoder(folder, config)
        return jax.jit(omnitransfer.encode_text)(encoder, jnp.asarray(tokens), jnp.asarray(mask))


def tell(config: Config, request: Request) -> jax.Array:
    """What the language model says of every reference, one behind another, and the zeros of the unconditional pass, "2 S E"."""
    folder, first = weights(config), request.first_frame
    with stage("vision tower"):
        frame = None if first is None else clips.to_unit(clips.fit(first, request.video.height, request.video.width))
        look = mllm_inputs.look(config, load_models.load_mllm(folder, config))
        features = [look(frame, clips.to_unit(clip)) for _, clip in request.references]
    with stage("language model"):
        vocabulary, alignment = load_models.load_mllm_vocabulary(folder), load_models.load_alignment(folder, config)
        say = jax.jit(lambda alignment, seen, task: alignment(seen, task))
        said = []
        for (task, _), seen in zip(request.references, features, strict=True):
            prompt = mllm_inputs.show(config, vocabulary, tasks.NAMES[task], request.prompt, frame is not None)
            batch = jax.tree.map(lambda x: jnp.asarray(x)[None], prompt | {"features": seen})
            said.append(say(alignment, MLLMInputs(**batch), jnp.array([task])))
    told = jnp.concatenate(said, axis=1)
    return jnp.concatenate([told, jnp.zeros_like(told)])


def generate(config: Config, video: VideoConfig, conditions: Conditions) -> jax.Array:
    """Latents from noise, with a progress bar."""
    noise = jax.random.normal(jax.random.key(config.seed), (1, *video.latent_shape(config.vae)))
    with stage("transformer"):
        dit = load_models.load_dit(weights(config), config)
    with tqdm(total=config.sampler.steps, desc="denoising", unit="step") as bar:

        def tick(step: int) -> None:
            bar.update()

        def denoise(dit, conditions, noise):
            return omnitransfer.denoise(dit, conditions, noise, config.sampler, tick, omnitransfer.embeds_text(config))

        latents = jax.jit(denoise)(dit, conditions, noise).block_until_ready()
        jax.effects_barrier()
    return latents


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Says what is being done and how long it took."""
    started = time.perf_counter()
    print(f"{name} ... ", end="", flush=True)
    yield
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    command.run(main, FLAGS)
