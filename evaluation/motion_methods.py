"""Methods of motion transfer and their baselines on one backbone: the same first frame, prompt, noise and sampler for all.

backbone     no reference                                   ditflow            latents optimised (omnitransfer_jax/methods/ditflow.py)
injection    the reference's keys and values in block 0     ditflow_positions  rotary positions optimised
smm, moft    DiTFlow with another loss                      follow_your_motion adapters learnt from the reference
noised       starts from the reference at strength .75      motion_inversion   tokens learnt from it
still        the first frame, in all frames                 omnitransfer       a trained run reads it
copied       the reference itself                           truth              the clip to be made, in the world

A method that reads the reference is also given it reversed in time, and another one: what it gains with those is not its motion.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from configs.ditflow import DiTFlow
from configs.follow_your_motion import FollowYourMotion
from configs.motion_inversion import MotionInversion
from configs.run import Config, plain
from data_pipelines import clips, in_memory, motion_training
from data_pipelines import motion_inversion as inversion_data
from data_pipelines.encoders import Encoders, place_references
from evaluation import transfer
from evaluation.metrics import appearance, motion_fidelity, tracks
from evaluation.motion_cases import Case, Clip
from omnitransfer_jax import load_models, samplers, tasks
from omnitransfer_jax.flow import interpolate, time_grid
from omnitransfer_jax.mesh import make_mesh, specs, to_mesh
from omnitransfer_jax.methods import ditflow, motion_inversion
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import init_state
from world.scores import scores

STRENGTH = 0.75  # of the noised reference: the share of the steps that is made
REFERENCES = ("own", "reversed", "other")
Make = Callable[[Case, Clip, Array], Float[Array, "B F H W C"]]
"""make(case, the reference that is given, noise "1 F H W C") -> latents."""


class Backbone:
    """The networks of a folder, and what they read of a case."""

    def __init__(self, config: DiTFlow, folder: str):
        self.config, self.folder, self.mesh = config, folder, make_mesh(config.mesh)
        self.encoders = Encoders(plain(config), folder)
        self.denoise = omnitransfer.denoise_on(self.mesh, plain(config))

    @cached_property
    def dit(self) -> WanDiT:
        return load_models.load_dit(self.folder, plain(self.config), self.mesh)

    def noise(self, index: int) -> Float[Array, "1 F H W C"]:
        """The noise of case `index`."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), index)
        return jax.random.normal(key, (1, *self.config.video.latent_shape(self.config.vae)))

    def conditions(self, case: Case) -> Conditions:
        """Prompt and first frame."""
        context, negative = self.encoders.contexts([case.prompt])
        return Conditions(context, negative, *self.first_frame(None if case.first_frame is None else case.first_frame()))

    def first_frame(self, picture: UInt8[np.ndarray, "H W 3"] | None) -> tuple[Array | None, Array | None]:
        """CLIP features, and mask and latents: what an image-to-video network reads of a picture."""
        if picture is None or not self.config.dit.image_to_video:
            return None, None
        frame = clips.to_unit(picture)[None]
        image = None if self.config.dit.image_dim is None else jnp.asarray(self.encoders.image(frame))
        return image, jnp.asarray(self.encoders.condition(frame))

    def latents(self, clip: Clip) -> Float[Array, "1 F H W C"]:
        """Those of a clip."""
        return jnp.asarray(self.encoders.latents(clips.to_unit(clip)[None]))

    def decode(self, latents: Float[Array, "1 F H W C"]) -> Clip:
        """The clip of latents."""
        return clips.to_bytes(self.encoders.decode(latents)[0])


class Configs(NamedTuple):
    """The numbers of the methods that learn, on the backbone's models, sampler and size."""

    follow_your_motion: FollowYourMotion
    motion_inversion: MotionInversion
    omnitransfer: tuple[Config, str] | None = None
    """The configuration and folder of a run; without one there is no such row."""
    features_block: int | None = None
    """The block behind which SMM and MOFT read features; DiTFlow's if None."""


def unguided(backbone: Backbone) -> Make:
    """Plain sampling."""
    return lambda case, clip, noise: backbone.denoise(lambda _: backbone.dit, backbone.conditions(case), noise)


def guided(backbone: Backbone, **changes: object) -> Make:
    """DiTFlow with these fields of its configuration."""
    config = replace(backbone.config, ditflow=replace(backbone.config.ditflow, **changes))
    config.validate()
    sample = ditflow.sample_on(backbone.mesh, config)

    def make(case: Case, clip: Clip, noise: Array) -> Array:
        empty = backbone.encoders.contexts([""])[0]
        source = ditflow.Source(backbone.latents(clip), empty, *backbone.first_frame(clip[0]))
        return sample(backbone.dit, backbone.conditions(case), noise, source, None).latents

    return make


def features(configs: Configs) -> dict[str, int]:
    """The change of DiTFlow's configuration for guides on features."""
    return {} if configs.features_block is None else {"block": configs.features_block}


def noised(backbone: Backbone) -> Make:
    """The last steps of plain sampling, from the reference with the noise of the first of them; Euler, which needs no step before."""
    sampler = backbone.config.sampler
    first = sampler.steps - int(sampler.steps * STRENGTH)
    time = float(time_grid(sampler.steps, sampler.shift)[first])
    expert = samplers.Expert("dit", range(first, sampler.steps), sampler.guidance)

    @jax.jit
    def denoise(dit: WanDiT, conditions: Conditions, latents: Array, noise: Array) -> Array:
        start = samplers.start(interpolate(latents, noise, jnp.full(1, time)))
        return omnitransfer.denoise(dit, conditions, start, sampler, expert).latents

    return lambda case, clip, noise: denoise(backbone.dit, backbone.conditions(case), backbone.latents(clip), noise)


def with_adapters(backbone: Backbone, config: FollowYourMotion) -> Make:
    """Follow-Your-Motion: both stages on the reference, then plain sampling."""
    learn = motion_training.ManyClips(config, backbone.mesh)

    def make(case: Case, clip: Clip, noise: Array) -> Array:
        dit = learn(clip, case.caption)
        return backbone.denoise(lambda _: dit, backbone.conditions(case), noise)

    return make


def with_tokens(backbone: Backbone, config: MotionInversion) -> Make:
    """Motion-Textual Inversion: the reference's tokens, then plain sampling with them. The training is compiled once."""
    trained, optimizer = motion_inversion.objective(config), make_optimizer(config.optimizer, config.train.steps)
    spec = specs({**trained.params, **trained.base}, trained.sharding, config.mesh)
    step = jax.jit(loop.make_step(trained, config, optimizer, backbone.mesh, spec))
    finish = jax.jit(lambda dit, tokens, encoded: motion_inversion.conditions(config, tokens, dit, encoded))

    def make(case: Case, clip: Clip, noise: Array) -> Array:
        samples, starts = inversion_data.encode(backbone.encoders, config, clip[None], [case.caption])
        start = inversion_data.stacked(config, backbone.dit, starts)
        state = init_state(motion_inversion.objective(config, start).init(), trained, config, optimizer)
        base = flat_params(backbone.dit, "dit.")
        data = in_memory.batches(samples, config.train.batch_size, seed=config.seed)
        for _ in range(config.train.steps):
            state, _ = step(state, to_mesh(next(data), backbone.mesh), trained.root_key(), base)
        tokens = {path.removeprefix("tokens."): x for path, x in (state.ema or state.trainable).items()}
        return backbone.denoise(lambda _: backbone.dit, finish(backbone.dit, tokens, backbone.conditions(case)), noise)

    return make


def with_run(backbone: Backbone, config: Config, folder: str) -> Make:
    """OmniTransfer: a trained run with the reference as one of task motion, sampled as the backbone is."""
    encoders, networks, denoise = Encoders(config, folder), transfer.load(config, folder), omnitransfer.denoise_on(backbone.mesh, config)
    task = np.array([tasks.task_index("motion")], np.int32)

    def make(case: Case, clip: Clip, noise: Array) -> Array:
        assert case.first_frame is not None
        frame, given, reference = clips.to_unit(case.first_frame())[None], np.ones(1, np.float32), clips.to_unit(clip)[None]
        inputs = []
        if networks.alignment is not None:
            inputs.append((task, encoders.mllm_inputs(task, [case.prompt], frame, given, reference)))
        references = place_references(config, config.video, [(task, encoders.latents(reference))])
        context, negative = encoders.contexts([case.prompt], networks.alignment, inputs)
        conditions = Conditions(context, negative, *backbone.first_frame(case.first_frame()), references)
        return denoise(lambda _: networks.dit, conditions, noise)

    return make


class Method(NamedTuple):
    """A row of the comparison."""

    title: str
    prepare: Callable[[Backbone, Configs], Make | None]
    """None where a row is made without a network (`without_network`)."""
    reads_reference: bool = True


METHODS = {
    "backbone": Method("backbone, not guided", lambda b, c: unguided(b), False),
    "still": Method("first frame, frozen", lambda b, c: None, False),
    "copied": Method("copy of the reference", lambda b, c: None, False),
    "truth": Method("true clip", lambda b, c: None, False),
    "noised": Method("noised reference, start at .75", lambda b, c: noised(b)),
    "injection": Method("injection", lambda b, c: guided(b, guide="none", kv_injection=True)),
    "smm": Method("SMM", lambda b, c: guided(b, guide="smm", **features(c))),
    "moft": Method("MOFT", lambda b, c: guided(b, guide="moft", **features(c))),
    "ditflow": Method("DiTFlow, latents", lambda b, c: guided(b, variable="latents")),
    "ditflow_positions": Method("DiTFlow, positions", lambda b, c: guided(b, variable="positions")),
    "follow_your_motion": Method("Follow-Your-Motion", lambda b, c: with_adapters(b, c.follow_your_motion)),
    "motion_inversion": Method("Motion-Textual Inversion", lambda b, c: with_tokens(b, c.motion_inversion)),
    "omnitransfer": Method("OmniTransfer", lambda b, c: with_run(b, *c.omnitransfer)),
}


def without_network(method: str, case: Case, first_frame: UInt8[np.ndarray, "H W 3"]) -> Clip:
    """The clip of `still`, `copied` or `truth`; `first_frame` is the case's own, or that of the backbone's clip."""
    if method == "truth":
        assert case.truth is not None
        return case.truth()
    reference = case.reference()
    return reference if method == "copied" else np.repeat(first_frame[None], len(reference), 0)


def given(case: Case, reference: str) -> Clip:
    """One of `REFERENCES` of a case."""
    return case.other() if reference == "other" else case.reference()[:: -1 if reference == "reversed" else 1]


def is_control(case: Case, reference: str) -> bool:
    """Whether this reference shows another motion than the case's own. A path out and back is the same backwards."""
    own = case.reference()
    return reference == "other" or (reference == "reversed" and np.abs(own[::-1].astype(int) - own).mean() > 1)  # grey level


def measure(case: Case, clip: Clip, config: Config) -> dict[str, float]:
    """All scores of a clip, against the case's own reference and, where it is known, the truth (world/scores.py)."""
    reference = case.reference()
    found = {
        motion_fidelity.NAME: motion_fidelity.motion_fidelity(tracks.track(clip), tracks.track(reference)),
        "leak (colours)": appearance.appearance_leak(clip, reference),
        "consistency (pixels)": appearance.temporal_consistency(clip),
    }
    if case.pair is None:
        return found
    known = scores(case.pair, clip, config.video)
    return {name: known[name] for name in ("path", "retrieval", "psnr", "leak")} | found
