"""Samples of a training while it goes on: the same prompts and the same noise at every time, beside the samples of before the first step.

before the training   prompts, pictures, references -> frozen encoders, which are then let go -> what the transformer reads
at a step             parameters (averaged if there is an average) -> sampler on the mesh of the training -> clips -> grid.py
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from configs.run import Config, encoder_names
from configs.stage1 import TransferLoRA
from data_pipelines import clips
from data_pipelines.encoders import Encoders, place_references
from data_pipelines.prompts import MOST, Pictures, Prompt
from launch.sampling import grid
from omnitransfer_jax import load_models, samplers, tasks
from omnitransfer_jax.mesh import replicated
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import Alignment, MLLMInputs
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.omnitransfer import Conditions, OmniTransfer
from omnitransfer_jax.models.transfer_adapters import make_model
from omnitransfer_jax.train.objective import Params

SAMPLES = "samples"
COLUMNS = ("reference", "first frame", "before training")


class Encoded(NamedTuple):
    """What the networks read of one prompt, NumPy arrays whose first axis is 1."""

    task: np.ndarray
    text: np.ndarray
    """Not read with alignment."""
    image: np.ndarray | None
    condition: np.ndarray
    reference: np.ndarray | None
    inputs: MLLMInputs | None


class TrainingSamples:
    """sample(step, params) of a training (train/loop.py). What is asked for is encoded when it is made."""

    def __init__(
        self, config: Config, asked: list[tuple[Prompt, Pictures]], mesh: Mesh, workdir: Path, base: Params | None = None, shown: int = MOST
    ):
        """`base` are the weights that the training's adapters stand on; the first `shown` of `asked` are what a call makes, the others are
        made for an evaluation. Encoders without weights are a `RequestError`."""
        self.config = replace(config, sampler=replace(config.sampler, boundary=0.0, low_noise_guidance=None))  # one network trains
        self.asked, self.mesh, self.folder, self.base = asked, mesh, workdir / SAMPLES, base or {}
        self.shown = asked[:shown]
        load_models.require_weights(config.train.init_from, config, encoder_names(config))
        self.encoders = Encoders(config, config.train.init_from)
        self.negative = self.encoders.text([config.sampler.negative_prompt])[0]
        self.encoded = [encoded(self.encoders, *each) for each in asked]
        self.encoders.release(keep=("vae",))
        self.model = abstract(
            partial(make_model, config) if isinstance(config, TransferLoRA) else lambda rngs: OmniTransfer(config, rngs=rngs)
        )
        (self.expert,) = samplers.experts(self.config.sampler)
        function = partial(omnitransfer.denoise_part, self.config, None)
        self.run, places = omnitransfer.program_on(mesh, self.config, function, self.model.dit)
        shardings = {path: leaf.sharding for path, leaf in places.items()}
        self.cast = jax.jit(partial(dit_params, None if isinstance(config, TransferLoRA) else config.dit.dtype), out_shardings=shardings)
        self.align = jax.jit(partial(contexts, self.model.alignment), out_shardings=replicated(mesh)) if self.model.alignment else None

    def __call__(self, step: int, params: Params) -> bytes | None:
        """Samples with these parameters and writes the grid; its middle frame as a JPEG. Of several processes the first one writes."""
        started = time.perf_counter()
        made = self.clips(params, range(len(self.shown)))
        if jax.process_index():
            return None
        name = f"step_{step:06d}"
        for number, ((prompt, _), clip) in enumerate(zip(self.shown, made, strict=True), start=1):
            clips.write_clip(self.folder / name / f"{number}_{prompt.task}.mp4", clip, self.config.video.fps)
        path = self.folder / f"{name}.webp"
        picture = self.draw(path, step, made)
        print(f"step {step}: {len(made)} samples in {time.perf_counter() - started:.1f} s, {path}", flush=True)
        return picture

    def clips(self, params: Params, numbers: Sequence[int]) -> list[np.ndarray]:
        """The clips of some of what is asked for; of several processes the first one decodes, the others have none."""
        latents = self.sample(params, numbers)
        return [] if jax.process_index() else [clips.to_bytes(self.encoders.decode(jnp.asarray(each[None]))[0]) for each in latents]

    def sample(self, params: Params, numbers: Sequence[int] | None = None) -> list[np.ndarray]:
        """The latents of each prompt, or of these; as many at once as the devices divide a batch by."""
        numbers = range(len(self.asked)) if numbers is None else numbers
        dit, found = self.cast(params | self.base), {}
        kinds = {number: self.asked[number][1].first_frame is not None for number in numbers}
        for chunk in chunks(kinds, self.width):
            batch = jax.tree.map(lambda *x: np.concatenate(x), *(self.encoded[i] for i in padded(chunk, self.width)))
            noise = np.concatenate([self.noise(i) for i in padded(chunk, self.width)])
            trees = jax.device_put((self.conditions(batch, params), samplers.start(jnp.asarray(noise))), replicated(self.mesh))
            state = self.run(dit, trees, batched=True, static=(self.expert,)).latents
            whole = multihost_utils.process_allgather(state, tiled=True) if jax.process_count() > 1 else state
            found |= dict(zip(chunk, np.asarray(whole), strict=False))  # the rest is padding
        return [found[i] for i in numbers]

    @property
    def width(self) -> int:
        """Samples that the devices make at once."""
        return self.config.mesh.slices * self.config.mesh.data

    def noise(self, number: int) -> np.ndarray:
        """Always the same for prompt `number`: that of `launch.sample` with the seed `seed + number`; cases are counted from 0 again."""
        place = number if number < len(self.shown) else number - len(self.shown)
        key = jax.random.key((self.config.seed + place) % 2**32)
        return np.asarray(jax.random.normal(key, (1, *self.config.video.latent_shape(self.config.vae))))

    def conditions(self, batch: Encoded, params: Params) -> Conditions:
        """What the transformer reads of a batch; with alignment the language model as it is by now makes the context."""
        config, references = self.config, []
        if batch.reference is not None:
            references = [(batch.task, batch.reference)]
        if self.align is None:
            text, negative = jnp.asarray(batch.text), jnp.repeat(jnp.asarray(self.negative), len(batch.task), 0)
        else:
            inputs, task = jax.device_put((batch.inputs, batch.task), replicated(self.mesh))
            text = self.align({path: x for path, x in params.items() if path.startswith("alignment.")}, inputs, task)
            negative = jnp.zeros_like(text)
        image = None if batch.image is None else jnp.asarray(batch.image)
        return Conditions(text, negative, image, jnp.asarray(batch.condition), place_references(config, config.video, references))

    def draw(self, path: Path, step: int, made: list[np.ndarray]) -> bytes:
        """Writes the grid; before the first step its clips are kept for those of later steps."""
        video, seconds = self.config.video, grid.times(self.config.video.frames, self.config.video.fps)
        now = [grid.small(clip, video.fps, seconds) for clip in made]
        names = [self.digest(*each) for each in self.shown]
        if step == 0:
            grid.write_base(self.folder, dict(zip(names, now, strict=True)))
        before, rows = grid.read_base(self.folder), []
        for (prompt, (reference, frame)), name, clip in zip(self.shown, names, now, strict=True):
            given = None if reference is None else grid.small(reference, self.config.data.reference.fps, seconds)
            first = None if frame is None else grid.small(frame[None], video.fps, [0.0])
            rows.append(grid.Row(f"{prompt.task}  {prompt.prompt}", (given, first, before.get(name), clip)))
        return grid.write(path, (*COLUMNS, f"step {step}"), rows, seconds)

    def digest(self, prompt: Prompt, pictures: Pictures) -> str:
        """What the sample of a prompt depends on beside the weights and its place: by this it is known again."""
        config = self.config
        found = hashlib.sha256(repr((prompt.task, prompt.prompt, asdict(config.video), asdict(config.sampler), config.seed)).encode())
        for pixels in pictures:
            found.update(b"-" if pixels is None else np.ascontiguousarray(pixels).tobytes())
        return found.hexdigest()[:32]


def encoded(encoders: Encoders, prompt: Prompt, pictures: Pictures) -> Encoded:
    """What the networks read of one prompt."""
    config, task = encoders.config, np.array([tasks.task_index(prompt.task)], np.int32)
    has_frame, frames = np.array([pictures.first_frame is not None], np.float32), np.zeros((1, config.video.height, config.video.width, 3))
    if pictures.first_frame is not None:
        frames = clips.to_unit(pictures.first_frame)[None]
    reference = None if pictures.reference is None else clips.to_unit(pictures.reference)[None]
    inputs = None
    if config.alignment.enabled and reference is not None:
        inputs = encoders.mllm_inputs(task, [prompt.prompt], frames.astype(np.float32), has_frame, reference)
    image, condition = encoders.first_frames(frames.astype(np.float32), has_frame)
    latents = None if reference is None else encoders.latents(reference)
    text = encoders.text([prompt.prompt])[0]
    return Encoded(task, text, image if has_frame.any() else None, condition, latents, inputs)


def dit_params(dtype: str | None, params: Params) -> Params:
    """The transformer's parameters by their paths in it, as `launch.sample` has them: all in `dtype`, or with None as they are."""
    own = {path.removeprefix("dit."): x for path, x in params.items() if path.startswith("dit.")}
    return {path: x if dtype is None else x.astype(dtype) for path, x in own.items()}


def contexts(model: Alignment, params: Params, inputs: MLLMInputs, task: jax.Array) -> Any:
    """The alignment's context of a batch."""
    return with_params(model, {path.removeprefix("alignment."): x for path, x in params.items()})(inputs, task)


def chunks(kinds: Mapping[int, bool], width: int) -> list[list[int]]:
    """The numbers of the samples in groups of one kind and of at most `width`."""
    groups = [[i for i, kind in kinds.items() if kind is each] for each in (True, False)]
    return [group[i : i + width] for group in groups for i in range(0, len(group), width)]


def padded(chunk: list[int], width: int) -> list[int]:
    """`width` numbers: those of a group, and the last one again."""
    return [*chunk, *[chunk[-1]] * (width - len(chunk))]
