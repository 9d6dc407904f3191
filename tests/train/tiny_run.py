"""The smallest run with every branch alive, and data for it without files; also a process, as which tests can stop it.

python -m tests.train.tiny_run WORKDIR [NAME=NUMBER ...]
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import grain
import jax
import numpy as np

from configs import stage1
from configs.base import DiTConfig
from configs.run import CheckpointConfig, Config, DataConfig, MeshConfig, TransferTrainConfig, VideoConfig
from omnitransfer_jax import tasks
from omnitransfer_jax.batch import Batch
from omnitransfer_jax.folders import processes
from omnitransfer_jax.mesh import data_share, make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import loop

TINY = stage1.get_config("smoke")
TINY = replace(
    TINY,
    dit=DiTConfig(
        dim=24, ffn_dim=32, num_layers=2, num_heads=2, text_dim=8, text_len=6, image_dim=8, freq_dim=16, dtype="float32"
    ),
    text=replace(TINY.text, dim=8),
    image=replace(TINY.image, dim=8, image_size=14),
    video=VideoConfig(frames=5, height=32, width=64),
    data=DataConfig(reference=VideoConfig(frames=5, height=32, width=32), text_drop=0.3),
    train=TransferTrainConfig(steps=8, batch_size=2, ema=0.9),
    checkpoint=CheckpointConfig(every=2),
)  # fmt: skip
EMPTY_TEXT = np.full((6, 8), 0.1, np.float32)


def sample(i: int) -> dict[str, np.ndarray]:
    """One sample; all tasks take turns."""

    def draw(*shape: int) -> np.ndarray:
        return np.random.default_rng(i).standard_normal(shape).astype(np.float32)

    task = i % len(tasks.TASKS)
    first = np.float32(tasks.TASKS[task].family == "temporal")
    condition = np.concatenate([np.zeros((2, 4, 8, 4), np.float32), draw(2, 4, 8, 16)], -1)
    condition[0, ..., :4] = first
    return {
        "task": np.int32(task),
        "target": draw(2, 4, 8, 16),
        "condition": condition,
        "reference": draw(2, 4, 4, 16),
        "text": draw(6, 8),
        "image": first * draw(2, 8),
        "has_image": first,
    }


def batch_of(*numbers: int, **fields: np.ndarray) -> Batch:
    """A batch of these samples, with `fields` instead of theirs."""
    stacked = {name: np.stack([sample(i)[name] for i in numbers]) for name in sample(0)}
    return Batch(**stacked | fields)


def batches(config: Config, make=sample, share: tuple[int, int] = (0, 1)) -> grain.DatasetIterator[Batch]:
    """Endless batches of 7 samples in shuffled order, or one process's part of them."""
    samples = grain.MapDataset.range(7).seed(config.seed).shuffle().map(make).repeat()
    index, count = share
    parts = samples.batch(config.train.batch_size // count, drop_remainder=True)[index::count].map(lambda batch: Batch(**batch))
    return iter(parts.to_iter_dataset(grain.ReadOptions(num_threads=1)))


def train(config: Config, workdir: Path, make=sample, digest: str = "") -> None:
    mesh = make_mesh(config.mesh)
    loop.train(
        omnitransfer.objective(config, EMPTY_TEXT), config, workdir, mesh, batches(config, make, data_share(mesh)), data_digest=digest
    )


if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    given = {name: int(value) for name, value in (option.split("=") for option in options)}
    if "port" in given:
        jax.distributed.initialize(f"localhost:{given['port']}", given["processes"], given["process"])

    def slowly(i: int) -> dict[str, np.ndarray]:
        time.sleep(given.get("milliseconds", 0) / 1000)
        return sample(i)

    if "code" in given:
        processes.code = lambda: str(given["code"])
    mesh = MeshConfig(**{axis: given.get(axis, 1) for axis in ("slices", "data", "heads", "keys")})
    numbers = {name: given.get(name, getattr(TINY.train, name)) for name in ("steps", "batch_size")}
    config = replace(TINY, train=replace(TINY.train, **numbers), mesh=mesh, seed=given.get("seed", 0))
    train(config, Path(folder), slowly, str(given.get("data_digest", "")))
