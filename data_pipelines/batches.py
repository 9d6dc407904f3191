"""Records to batches: a Grain pipeline of NumPy arrays, the same for any number of threads and processes.

Several data sets are mixed sample by sample. A run keeps one number, of the batches it has read: the rest follows from the seed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from configs.errors import require
from configs.run import Config
from data_pipelines import records
from data_pipelines.encoders import weights_of
from omnitransfer_jax import tasks
from omnitransfer_jax.batch import Batch
from omnitransfer_jax.folders import fingerprint, model_folder, run_folder


def batches(config: Config, *, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Batch]:
    """Endless batches of the records in `config.data.folders`: this process's part of each, `1 / process_count` of the samples.

    Every epoch has its own order, drawn from `seed` (the order of the records with `data.shuffle=False`); a batch may begin in one epoch
    and end in the next. The batch over all processes does not depend on how many there are: each process reads consecutive samples, in
    the order of the processes. The iterator's state is the number of batches it gave, so it can be restored with any number of threads
    and processes. Records that other encoders made than those of train.init_from are a `RequestError`.
    """
    size = config.train.batch_size
    require(size % process_count == 0, f"train.batch_size={size}: a multiple of the {process_count} processes that share it")
    require_same_weights(config)
    examples = ordered([records.Records(folder, config) for folder in _folders(config)], config, seed)

    def sample(record: Any) -> Batch:
        found = records.from_record(record, config)
        task = tasks.TASKS[int(found.task)]
        require(
            config.dit.reach == "all" or task.family == "temporal",
            f"{config.data.path}: a pair of task {task.name}; with dit.reach=same_frame references must share times with their targets, "
            "which is so in temporal tasks: encode those alone, or take --dit.reach=all",
        )
        return found

    samples = examples.map(sample)
    parts = samples.batch(size // process_count, drop_remainder=True)
    threads = config.data.threads
    return iter(parts[process_index::process_count].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


def ordered(sources: Sequence[Any], config: Config, seed: int) -> grain.MapDataset[Any]:
    """What `sources` hold in the endless order of a training: each in orders of its own, mixed by `data.weights` in fixed proportions."""

    def order(number: int) -> grain.MapDataset[Any]:
        examples = grain.MapDataset.source(sources[number]).seed((seed + number) % 2**32)
        return (examples.shuffle() if config.data.shuffle else examples).repeat()

    if len(sources) == 1:
        return order(0)
    weights = config.data.weights or tuple(map(len, sources))
    return grain.MapDataset.mix([order(number) for number in range(len(sources))], [weight / sum(weights) for weight in weights])


def identify(config: Config) -> Callable[[int], list[str]]:
    """names(step): the ids of the samples of the batch of step 1, 2, ..., of all processes; empty for records of an earlier version."""
    ids, size = [records.Records(folder, config).ids for folder in _folders(config)], config.train.batch_size
    order = ordered(ids, config, config.seed) if all(ids) else None

    def names(step: int) -> list[str]:
        return [] if order is None else [str(order[i]) for i in range((step - 1) * size, step * size)]

    return names


def require_same_weights(config: Config) -> None:
    """A `RequestError` if other encoders made the records than those of train.init_from, whose folder may be gone when a run goes on."""
    origin = run_folder.imported_weights(config.train.init_from)
    if not origin or model_folder.exists(origin):
        for folder in _folders(config):
            records.require_same_weights(folder, weights_of(config), config.train.init_from)


def empty_text(config: Config) -> np.ndarray:
    """The encoding of the empty prompt, float32 "S E", which replaces the text of a sample whose prompt is dropped."""
    first, *others = (records.empty_text(folder, config.dit.text_len) for folder in _folders(config))
    for folder, other in zip(config.data.more, others, strict=True):
        require(
            np.array_equal(first, other),
            f"{folder}: its empty prompt is encoded otherwise than that of {config.data.path}; encode both with the same weights",
        )
    return first


def data_digest(config: Config) -> str:
    """The digest of the records, by which a run that goes on knows them."""
    first, *others = (records.digest(folder, config) for folder in _folders(config))
    return fingerprint.of_pairs([(str(number), digest) for number, digest in enumerate([first, *others])]) if others else first


def _folders(config: Config) -> list[Path]:
    require(bool(config.data.path), f"data.path is empty: give --data.path=DIR, a folder of {records.ENCODE}")
    return [Path(folder) for folder in config.data.folders]
