"""Follow-Your-Motion on one clip: frames and caption are encoded once, heads are told apart, the two stages run one after the other.

    WORKDIR/heads.json    which heads are temporal, and how many of each block
    WORKDIR/spatial/      the run of the first stage
    WORKDIR/              the run of the second one, which starts from it; launch.sample and launch.export read this one

Started again, it goes on in the stage in which it stopped, bit for bit. Checkpoints hold the adapters alone; the transformer is read again
from train.init_from.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from configs.errors import RequestError, require
from configs.follow_your_motion import FollowYourMotion
from configs.kinds import FIXED, differences, select
from data_pipelines import in_memory
from data_pipelines.clips import to_unit
from data_pipelines.encoders import Encoders, encode_first_frames
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import fingerprint, run_folder
from omnitransfer_jax.folders.atomic import read_json, write_whole
from omnitransfer_jax.mesh import specs, to_mesh
from omnitransfer_jax.methods.follow_your_motion import (
    Sample,
    Stage,
    head_scores,
    head_table,
    keys,
    objective,
    sparse_frames,
    stage,
    temporal_heads,
    with_heads,
)
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.objective import Params
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import init_state

HEADS_FILE, SPATIAL = "heads.json", "spatial"


class Samples(NamedTuple):
    """The samples of each use; the first axis counts them."""

    spatial: Sample
    """Every frame alone."""
    temporal: Sample
    """The sparse clip."""
    clip: Sample
    """The whole clip, under which heads are classified."""


def train(config: FollowYourMotion, workdir: Path, mesh: Mesh, clip: UInt8[np.ndarray, "T H W 3"], prompt: str) -> None:
    """Both stages on a clip of `config.video` and its caption; a signal ends the stage that runs after its step, and all."""
    origin = config.train.init_from
    require(
        not run_folder.is_run(origin),
        f"train.init_from={origin}: a run, and its adapters would be on imported weights; give a folder of those",
    )
    require(jax.process_count() == 1, f"{jax.process_count()} processes: one clip is trained on by one; leave out --distributed")
    digest = digest_of(config, clip, prompt)
    workdir, spatial = workdir.absolute(), (workdir / SPATIAL).absolute()
    first, second = stage(config, "spatial", origin), stage(config, "temporal", str(spatial) if config.motion.spatial_steps else origin)
    for folder, each in ((spatial, first), (workdir, second)):
        if run_folder.is_run(str(folder)):
            before = run_folder.read_config(folder, FollowYourMotion)
            for name, value, now in differences(before.motion, each.motion, FIXED, "motion."):  # by the name that the user gives
                raise RequestError(f"--{name}={now!r}: the run in {folder} was started with {value!r}; give that, or another --workdir")
            loop.checked_origin(objective(each), loop.with_absolute_paths(each), folder, digest, run_folder.steps_done(folder))
    encoders = Encoders(config, origin)
    for note in encoders.cut_prompts({"--prompt": prompt}):
        print(note, flush=True)
    samples = encode(config, encoders, clip, prompt)
    encoders.release()
    dit = load_models.load_dit(origin, config, mesh)
    temporal = classify(config, workdir, mesh, dit, samples.clip, digest)
    if config.motion.spatial_steps and not run_folder.is_run(str(workdir)):
        if run_folder.steps_done(spatial) < first.train.steps:
            run_stage(first, spatial, mesh, dit, samples.spatial, temporal, digest)
        if run_folder.steps_done(spatial) < first.train.steps:  # a signal stopped it
            return
    run_stage(second, workdir, mesh, dit, samples.temporal, temporal, digest)


def run_stage(
    config: FollowYourMotion, workdir: Path, mesh: Mesh, dit: WanDiT, samples: Sample, temporal: Bool[np.ndarray, "layers N"], digest: str
) -> None:
    """One stage up to its last step, or to a signal."""
    print(f"{config.motion.stage} stage", flush=True)
    data = in_memory.batches(samples, config.train.batch_size, seed=config.seed)
    loop.train(objective(config, temporal), config, workdir, mesh, data, data_digest=digest, base=flat_params(dit, "dit."))


class ManyClips:
    """Both stages on one clip after another, without workdirs; each stage is compiled once. The result is that of `train`, bit for bit."""

    def __init__(self, config: FollowYourMotion, mesh: Mesh):
        self.config, self.mesh, self.base = config, mesh, load_models.load_dit(config.train.init_from, config, mesh)
        self.encoders = Encoders(config, config.train.init_from)
        names: tuple[Stage, ...] = ("spatial", "temporal") if config.motion.spatial_steps else ("temporal",)
        self.stages = [stage(config, name, config.train.init_from) for name in names]
        self.steps = [self._compiled_step(each) for each in self.stages]
        self.adapters = jax.jit(objective(self.stages[-1]).init)()

    def __call__(self, clip: UInt8[np.ndarray, "T H W 3"], prompt: str) -> WanDiT:
        """The transformer with the adapters of a clip of `config.video` added to its kernels."""
        config, samples = self.config, encode(self.config, self.encoders, clip, prompt)
        scores = head_scores(config, self.base, jax.tree.map(jnp.asarray, samples.clip), keys(config)[2])
        params = with_heads(self.adapters, temporal_heads(scores, config.motion))
        for each, step in zip(self.stages, self.steps, strict=True):
            trained = objective(each)
            params |= self._run(each, step, {path: params[path] for path in trained.params}, getattr(samples, each.motion.stage))
        adapters = {path.removeprefix("dit."): x for path, x in params.items()}
        return with_params(self.base, lora.merge_lora(flat_params(self.base) | adapters, config.motion.lora.scale))

    def _compiled_step(self, config: FollowYourMotion) -> loop.Step:
        trained, optimizer = objective(config), make_optimizer(config.optimizer, config.train.steps)
        where = specs({**trained.params, **trained.base}, trained.sharding, config.mesh)
        return jax.jit(loop.make_step(trained, config, optimizer, self.mesh, where))

    def _run(self, config: FollowYourMotion, step: loop.Step, params: Params, samples: Sample) -> Params:
        """All parameters after a stage: averages, if it keeps them."""
        trained, data = objective(config), in_memory.batches(samples, config.train.batch_size, seed=config.seed)
        state = init_state(params, trained, config, make_optimizer(config.optimizer, config.train.steps))
        for _ in range(config.train.steps):
            state, _ = step(state, to_mesh(next(data), self.mesh), trained.root_key(), flat_params(self.base, "dit."))
        return params | (state.ema or state.trainable)


def encode(config: FollowYourMotion, encoders: Encoders, clip: UInt8[np.ndarray, "T H W 3"], prompt: str) -> Samples:
    """The samples of a clip of `config.video` and its caption."""
    text, video = encoders.text([prompt])[0], to_unit(clip)
    frames = [_sample(encoders, frame[None], text, given=False) for frame in tqdm(video, desc="encoding frames", unit="frame")]
    # The caption and, on an image-to-video network, the grey condition are the same for all frames, so they are kept once.
    same = [x if x is None else np.broadcast_to(x, (len(frames), *x.shape[1:])) for x in frames[0][1:]]
    spatial = Sample._make([np.concatenate([frame.latents for frame in frames]), *same])
    temporal, whole = (_sample(encoders, video[picked], text, given=True) for picked in (sparse_frames(config), slice(None)))
    return Samples(spatial, temporal, whole)


def _sample(encoders: Encoders, video: Float[np.ndarray, "T H W 3"], text: Float[np.ndarray, "1 S E"], given: bool) -> Sample:
    """The sample of some frames; on an image-to-video network the first is `given`, or the frames before the noise are all grey."""
    latents, condition, image = encoders.latents(video[None]), None, None
    if encoders.config.dit.image_to_video:
        first = video[:1] if given else None
        condition = np.asarray(
            encode_first_frames(encoders.vae, None if first is None else jnp.asarray(first), shape=(1, *video.shape[:3]))
        )
        image = encoders.image(first) if first is not None and encoders.config.dit.image_dim is not None else None
    return Sample._make([latents, text, condition, image])


def digest_of(config: FollowYourMotion, clip: UInt8[np.ndarray, "T H W 3"], prompt: str) -> str:
    """A digest of the clip, the caption, and the imported weights that read them; a run that goes on reads the transformer again."""
    found = in_memory.digest((clip, np.frombuffer(prompt.encode(), np.uint8)))
    imported = run_folder.imported_weights(config.train.init_from)
    parts = ("dit", "vae", "text", *(["image"] if config.dit.image_dim else []))
    return " ".join([found, *(fingerprint.of_part(imported, part) for part in (parts if imported else ()))])


def classify(config: FollowYourMotion, workdir: Path, mesh: Mesh, dit: WanDiT, clip: Sample, digest: str) -> Bool[np.ndarray, "layers N"]:
    """Which heads are temporal: those of heads.json, or found now, printed and written there."""
    made_of = {"data": digest, "config": json.loads(json.dumps(select(config, ["model", "training"])["motion"]))}
    file = workdir / HEADS_FILE
    if file.exists() and (kept := read_json(file, "remove it: it is made again"))["made_of"] == made_of:
        return np.array(kept["temporal"], bool)
    if mesh.size > 1:  # no fused kernel is divided over devices outside a shard_map
        config = replace(config, dit=replace(config.dit, attention="chunked"))
        dit = with_params(abstract(lambda rngs: WanDiT(config.dit, rngs=rngs)), flat_params(dit))
    scores = head_scores(config, dit, jax.tree.map(jnp.asarray, clip), keys(config)[2])
    temporal = temporal_heads(scores, config.motion)
    print(f"{HEADS_FILE}: heads by {config.motion.rule!r}\n{head_table(temporal)}", flush=True)
    write_whole(file, json.dumps(heads_json(temporal, scores._asdict(), made_of)) + "\n")
    return temporal


def heads_json(temporal: Bool[np.ndarray, "layers N"], scores: Mapping[str, Any], made_of: Mapping[str, Any]) -> dict[str, Any]:
    """The content of heads.json."""
    blocks = [{"block": layer, "spatial": int((~heads).sum()), "temporal": int(heads.sum())} for layer, heads in enumerate(temporal)]
    values = {name: np.asarray(each).round(6).tolist() for name, each in scores.items()}
    return {"blocks": blocks, "temporal": temporal.astype(int).tolist(), "scores": values, "made_of": dict(made_of)}
