"""Motion-Textual Inversion on one clip: it is encoded once, its tokens start from that, and are learnt. `encode` takes many clips.

WORKDIR/   the run; its checkpoints hold the tokens and not the transformer, which is read again from train.init_from
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from configs.errors import require
from configs.motion_inversion import MotionInversion
from configs.run import plain
from data_pipelines import in_memory
from data_pipelines.clips import fit, to_unit
from data_pipelines.encoders import Encoders
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.mesh import data_share
from omnitransfer_jax.methods.motion_inversion import Sample, Start, initial_tokens, objective, shapes
from omnitransfer_jax.methods.omnitransfer import keys
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import loop


def train(config: MotionInversion, workdir: Path, mesh: Mesh, clip: UInt8[np.ndarray, "T H W 3"], caption: str) -> None:
    """The tokens of a clip of `config.video` and its caption, up to `config.train.steps` or a signal."""
    networks = ("dit", "vae", "text", *(["image"] if config.dit.image_dim is not None else []))
    load_models.require_weights(config.train.init_from, plain(config), networks)
    digest = in_memory.digest((clip, np.frombuffer(caption.encode(), np.uint8)))
    if run_folder.is_run(str(workdir)):
        loop.checked_origin(objective(config), loop.with_absolute_paths(config), workdir.absolute(), digest, done=1)
    print("encoding the clip", flush=True)
    encoders = Encoders(plain(config), config.train.init_from)
    samples, starts = encode(encoders, config, clip[None], [caption])
    encoders.release()
    train_on(config, workdir, mesh, load_models.load_dit(config.train.init_from, plain(config), mesh), samples, starts, digest)


def train_on(
    config: MotionInversion, workdir: Path, mesh: Mesh, dit: WanDiT, samples: Sample, starts: Sequence[Start], digest: str
) -> dict[str, Array] | None:
    """The tokens of all clips of `samples`, one after the other, as `loop.train` returns them; `dit` lies on the mesh."""
    index, count = data_share(mesh)
    data = in_memory.batches(samples, config.train.batch_size, seed=config.seed, process_index=index, process_count=count)
    trained, base = objective(config, stacked(config, dit, starts), len(starts)), flat_params(dit, "dit.")
    return loop.train(trained, config, workdir, mesh, data, data_digest=digest, base=base)


def stacked(config: MotionInversion, dit: WanDiT, starts: Sequence[Start]) -> dict[str, Float[np.ndarray, "B sets N D"]]:
    """The initial tokens of each clip, drawn from the seed and the clip's number."""
    key = keys(config)[0]
    each = [initial_tokens(config, dit, jax.tree.map(jnp.asarray, start), jax.random.fold_in(key, i)) for i, start in enumerate(starts)]
    return jax.tree.map(lambda *rows: np.stack(rows), *each)


def encode(
    encoders: Encoders, config: MotionInversion, videos: UInt8[np.ndarray, "B T H W 3"], captions: Sequence[str]
) -> tuple[Sample, list[Start]]:
    """Clips of the size in `config.video`, with their captions: their samples, and the start of each.

    The first samples are the clips, numbered in their order; `inversion.augment` others of each follow.
    """
    text, rows = encoders.text(captions)
    copies, number = 1 + config.inversion.augment, np.arange(len(videos), dtype=np.int32)
    random = np.random.default_rng(config.seed)
    others = [augmented(clip, random) for _ in range(copies - 1) for clip in videos]
    pixels = to_unit(np.concatenate([videos, np.stack(others)]) if others else videos)
    read = text if config.keeps_prompt else np.repeat(encoders.text([""])[0], len(videos), 0)
    condition = encoders.condition(pixels[:, 0]) if config.dit.image_to_video else None
    image = encoders.image(pixels[:, 0]) if config.dit.image_dim is not None else None
    samples = Sample._make((np.tile(number, copies), encoders.latents(pixels), np.tile(read, (copies, 1, 1)), condition, image))
    frames = [None] * len(videos)
    if "image" in shapes(config):
        picked = pixels[: len(videos), middle_frames(config)]
        features = encoders.image(rearrange(picked, "B F H W C -> (B F) H W C"))
        frames = list(rearrange(features, "(B F) ... -> B F ...", B=len(videos)))
    return samples, [Start._make((text[i, : rows[i]], frames[i])) for i in range(len(videos))]


def load_tokens(folder: str, config: MotionInversion) -> dict[str, np.ndarray]:
    """The tokens of the one clip that a run of Motion-Textual Inversion learnt, "1 sets N D" by the branch that reads them."""
    run_folder.base_of(folder, MotionInversion)
    run_folder.require_same_function(folder, config)
    frames, learnt = (each.video.latent_shape(each.vae)[0] for each in (config, run_folder.read_config(folder, MotionInversion)))
    require(
        frames == learnt,
        f"video.frames={config.video.frames}: {frames} latent frames, and the run in {folder} has tokens for {learnt}; "
        f"give --video.frames={(learnt - 1) * config.vae.time_stride + 1}",
    )
    loaded = run_folder.load_params(folder, objective(config).params)
    return {path.removeprefix("tokens."): np.asarray(x) for path, x in loaded.items()}


def augmented(clip: UInt8[np.ndarray, "T H W 3"], random: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
    """The clip cropped to 80 to 100 % of its sides, with saturation, contrast and brightness 80 to 120 %, the same in all frames."""
    height, width = clip.shape[1:3]
    share, across, down = random.uniform(0.8, 1), random.uniform(), random.uniform()
    rows, columns = round(share * height), round(share * width)
    top, left = round(down * (height - rows)), round(across * (width - columns))
    cut = clip[:, top : top + rows, left : left + columns]
    x = np.stack([fit(frame, height, width) for frame in cut]).astype(np.float32)
    saturation, contrast, brightness = random.uniform(0.8, 1.2, 3)
    grey = x.mean(-1, keepdims=True)
    x = grey + saturation * (x - grey)
    x = brightness * (x.mean() + contrast * (x - x.mean()))
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def middle_frames(config: MotionInversion) -> list[int]:
    """The video frame in the middle of each latent frame; the first latent frame is the first frame alone."""
    stride = config.vae.time_stride
    return [max(0, stride * frame - stride // 2) for frame in range(config.video.latent_shape(config.vae)[0])]
