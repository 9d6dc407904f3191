"""A small model with every branch alive in three forms: our folder, an export of it for PyTorch, and what ours makes of a request."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from configs import stage1, stage3
from configs.run import CheckpointConfig, Config, DataConfig, SamplerConfig, VideoConfig
from data_pipelines.encoders import Encoders
from launch import command, export, import_weights, sample
from launch.sample import Request
from omnitransfer_jax import load_models, samplers, tasks
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.omnitransfer import Conditions, OmniTransfer, embeds_text, velocity_of
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.tokenizer import byte_tokenizer
from omnitransfer_jax.train.step import TrainState
from omnitransfer_jax.weights.parts import MLLM, MLLM_TOKENIZER, PARTS
from tests.parity.bridge import randomise

torch.set_num_threads(1)  # of so small tensors; two threads would wait for each other

VIDEO, REFERENCE = VideoConfig(frames=5, height=32, width=48, fps=8), VideoConfig(frames=5, height=48, width=32, fps=8)
SMALL = {"--vae.base_dim": 4, "--vae.num_res_blocks": 1, "--sampler.steps": 3}
SIZES = {
    f"--{at}.{name}": getattr(video, name)
    for at, video in (("video", VIDEO), ("data.reference", REFERENCE))
    for name in ("frames", "height", "width")
}
FIELDS = [f"{name}={value}" for name, value in (SMALL | SIZES).items()]
CLASSES: dict[str, Any] = {
    "dit": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text": transformers.UMT5EncoderModel,
    "image": transformers.CLIPVisionModel,
    "mllm": transformers.Qwen2_5_VLForConditionalGeneration,
}
CONFIGS: dict[str, Any] = {
    "text": transformers.UMT5Config, "image": transformers.CLIPVisionConfig, "mllm": transformers.Qwen2_5_VLConfig
}  # fmt: skip


def small(stage: Any) -> Config:
    """The smoke size of a stage with `FIELDS`."""
    config = stage.get_config("smoke")
    return replace(
        config,
        vae=replace(config.vae, base_dim=4, num_res_blocks=1),
        video=VIDEO,
        data=DataConfig(reference=REFERENCE, threads=1),
        sampler=SamplerConfig(steps=3),
    )


STAGE1, STAGE3 = small(stage1), small(stage3)


def import_random(folder: Path, config: Config, mllm: bool = False) -> Path:
    """Our folder with random weights of PyTorch's classes."""
    for part in (*PARTS, *([MLLM] if mllm else [])):
        settings = {k: v for k, v in part.table.config_json(getattr(config, part.name)).items() if not k.startswith("_")}
        made = CONFIGS[part.name].from_dict(settings) if part.name in CONFIGS else None
        model = randomise(CLASSES[part.name](made) if made is not None else CLASSES[part.name](**settings))
        place = folder / "mllm_source" if part is MLLM else folder / "source" / part.diffusers[0]
        model.save_pretrained(place)
    byte_tokenizer().save_pretrained(folder / "source" / "tokenizer")
    for source in ("source", *(["mllm_source"] if mllm else [])):
        if source == "mllm_source":
            byte_tokenizer().save_pretrained(folder / source)
        args = [f"--source={folder / source}", f"--out={folder / 'ours'}"]
        assert command.execute(import_weights.main, import_weights.FLAGS, args) == 0
    assert not mllm or (folder / "ours" / MLLM_TOKENIZER).is_dir()
    return folder / "ours"


def write_run(folder: Path, config: Config, origin: Path, learnt: bool = True) -> Path:
    """A run of stage 3 with one checkpoint: the imported weights, and random queries, connector and adapters, or fresh adapters."""
    run_folder.write_config(folder, replace(config, train=replace(config.train, init_from=str(origin))))
    draw, params = np.random.default_rng(11), {}
    imported = {f"dit.{path}": x for path, x in model_folder.read_part(origin, "dit")}
    imported |= {f"alignment.mllm.{path}": x for path, x in model_folder.read_part(origin, "mllm")}
    for path, leaf in flat_params(abstract(lambda rngs: OmniTransfer(config, rngs=rngs))).items():
        spread = (
            0.0
            if path.endswith(".up") and not learnt
            else 1.0
            if path.endswith("queries")
            else leaf.shape[-2] ** -0.5
            if leaf.ndim > 1
            else 0.2
        )
        drawn = spread * draw.standard_normal(leaf.shape).astype(np.float32)
        params[path] = jnp.asarray(imported.get(path, drawn))
    zero = jnp.zeros((), jnp.int32)
    with run_folder.open_checkpoints(folder, CheckpointConfig()) as checkpoints:
        data = iter(grain.MapDataset.range(3).to_iter_dataset())
        run_folder.save(checkpoints, 8, TrainState(zero + 8, params, {}, {}, {}, zero), data)
    return folder


def exported(checkpoint: Path, out: Path, name: str, *more: str) -> Path:
    """The folder for PyTorch."""
    flags = [f"--config={name}", *FIELDS, f"--checkpoint={checkpoint}", f"--out={out}", *more]
    assert command.execute(export.main, export.FLAGS, flags) == 0
    return out


class Wish(NamedTuple):
    """A request in words that both sides read."""

    tasks: tuple[str, ...]
    references: tuple[np.ndarray, ...]
    first_frame: np.ndarray | None
    prompt: str
    sampler: SamplerConfig


class Made(NamedTuple):
    """What came of it, in our layout."""

    latents: np.ndarray
    """After every step "S B F H W C"."""
    frames: np.ndarray
    """"B T H W 3" in [0, 1]."""


@partial(jax.jit, static_argnames=("sampler", "embed_text"))
def trajectory(dit: WanDiT, conditions: Conditions, noise: jax.Array, sampler: SamplerConfig, embed_text: bool) -> jax.Array:
    """The latents after every step."""
    velocity = velocity_of(dit, conditions, dit.grid(noise), sampler, sampler.guidance, embed_text)
    return samplers.sample(velocity, noise, sampler, trajectory=True)[1:]


class Ours:
    """What our side makes, its networks loaded once."""

    def __init__(self, config: Config, folder: Path | str):
        self.config, self.folder = config, str(folder)
        self.encoders = Encoders(config, self.folder)
        setattr(self.encoders, "release", lambda: None)  # noqa: B010 - they are small, and are needed again
        self.dit = load_models.load_dit(self.folder, config, make_mesh(config.mesh))

    def __call__(self, wish: Wish, noise: np.ndarray | None = None) -> Made:
        config = replace(self.config, sampler=wish.sampler)
        video = config.video
        if wish.first_frame is not None:
            height, width, _ = wish.first_frame.shape
            height, width = sample.same_area(height / width, video.height * video.width, 16)
            video = replace(video, height=height, width=width)
        references = tuple((tasks.task_index(name), clip) for name, clip in zip(wish.tasks, wish.references, strict=True))
        self.encoders.config = config
        conditions, _ = sample.encode(self.encoders, Request(wish.prompt, wish.first_frame, references, video))
        noise = noise_of(config, video) if noise is None else noise
        sampler = replace(wish.sampler, stack_references=False)  # it is in the conditions by now; one program serves both
        latents = trajectory(self.dit, conditions, jnp.asarray(noise), sampler, embeds_text(config))
        return Made(np.asarray(latents), self.encoders.decode(latents[-1]).clip(-1, 1) / 2 + 0.5)


def noise_of(config: Config, video: VideoConfig) -> np.ndarray:
    """The noise that both start from."""
    return np.random.default_rng(5).standard_normal((1, *video.latent_shape(config.vae))).astype(np.float32)


def theirs(pipe: Any, wish: Wish, noise: np.ndarray, cache: str = "full") -> Made:
    """What PyTorch makes."""
    steps = []

    def keep(_, i, t, tensors):
        steps.append(tensors["latents"].permute(0, 2, 3, 4, 1).numpy().copy())
        return {}

    pipe.transfer = replace(pipe.transfer, references=replace(pipe.transfer.references, stack=wish.sampler.stack_references))
    frames = pipe(
        list(wish.tasks), list(wish.references), wish.first_frame, wish.prompt, wish.sampler.negative_prompt or None,
        wish.sampler.steps, wish.sampler.guidance, latents=torch.tensor(noise).permute(0, 4, 1, 2, 3), reference_cache=cache,
        callback_on_step_end=keep,
    ).frames  # fmt: skip
    return Made(np.stack(steps), frames)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A picture of random colours, smooth enough to survive scaling."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def clip(seed: int, size: VideoConfig = REFERENCE) -> np.ndarray:
    """A clip of random pictures."""
    return np.stack([picture(seed * 100 + i, size.height, size.width) for i in range(size.frames)])
