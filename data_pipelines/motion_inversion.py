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

from configs.motion_inversion import MotionInversion
from configs.run import plain
from data_pipelines import in_memory
from data_pipelines.clips import to_unit
from data_pipelines.encoders import Encoders
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import fingerprint, run_folder
from omnitransfer_jax.mesh import data_share
from omnitransfer_jax.methods.motion_inversion import Sample, Start, initial_tokens, objective, shapes
from omnitransfer_jax.methods.omnitransfer import keys
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train import loop


def train(config: MotionInversion, workdir: Path, mesh: Mesh, clip: UInt8[np.ndarray, "T H W 3"], caption: str) -> None:
    """The tokens of a clip of `config.video` and its caption, up to `config.train.steps` or a signal."""
    digest = digest_of(config, clip, caption)
    if run_folder.is_run(str(workdir)):
        loop.require_same_run(workdir.absolute(), loop.with_absolute_paths(config), digest)
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
    base = {f"dit.{path}": x for path, x in flat_params(dit).items()}
    return loop.train(
        objective(config, stacked(config, dit, starts), len(starts)), config, workdir, mesh, data, data_digest=digest, base=base
    )


def stacked(config: MotionInversion, dit: WanDiT, starts: Sequence[Start]) -> dict[str, Float[np.ndarray, "B sets N D"]]:
    """The initial tokens of each clip, drawn from the seed and the clip's number."""
    key = keys(config)[0]
    each = [initial_tokens(config, dit, jax.tree.map(jnp.asarray, start), jax.random.fold_in(key, i)) for i, start in enumerate(starts)]
    return jax.tree.map(lambda *rows: np.stack(rows), *each)


def digest_of(config: MotionInversion, clip: UInt8[np.ndarray, "T H W 3"], caption: str) -> str:
    """A digest of the clip, its caption, and the transformer that a run reads again when it goes on."""
    found = in_memory.digest((clip, np.frombuffer(caption.encode(), np.uint8)))
    imported = run_folder.imported_weights(config.train.init_from)
    return f"{found} {fingerprint.of_part(imported, 'dit')}" if imported else found


def encode(
    encoders: Encoders, config: MotionInversion, videos: UInt8[np.ndarray, "B T H W 3"], captions: Sequence[str]
) -> tuple[Sample, list[Start]]:
    """Clips of the size in `config.video`, with their captions: the samples, numbered in this order, and the start of each."""
    pixels, is_i2v = to_unit(videos), config.dit.image_dim is not None
    text, rows = encoders.text(captions)
    read = text if config.keeps_prompt else np.repeat(encoders.text([""])[0], len(videos), 0)
    condition, image = (encoders.condition(pixels[:, 0]), encoders.image(pixels[:, 0])) if is_i2v else (None, None)
    samples = Sample(np.arange(len(videos), dtype=np.int32), encoders.latents(pixels), read, condition, image)
    frames = [None] * len(videos)
    if "image" in shapes(config):
        picked = pixels[:, middle_frames(config)]
        features = encoders.image(rearrange(picked, "B F H W C -> (B F) H W C"))
        frames = list(rearrange(features, "(B F) I J -> B F I J", B=len(videos)))
    return samples, [Start(text[i, : rows[i]], frames[i]) for i in range(len(videos))]


def middle_frames(config: MotionInversion) -> list[int]:
    """The video frame in the middle of each latent frame; the first latent frame is the first frame alone."""
    stride = config.vae.time_stride
    return [max(0, stride * frame - stride // 2) for frame in range(config.video.latent_shape(config.vae)[0])]
