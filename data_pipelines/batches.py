"""Records to batches: a Grain pipeline of NumPy arrays, the same for any number of threads and processes.

Several data sets are mixed sample by sample; a batch has samples of one bucket (configs/buckets.py). A run keeps one number, of the batches
it has read: the rest follows from the seed.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from configs.buckets import bucket_configs
from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import buckets, records
from data_pipelines.encoders import weights_of
from omnitransfer_jax import tasks
from omnitransfer_jax.batch import Batch, sample_spec
from omnitransfer_jax.folders import fingerprint, model_folder, run_folder
from omnitransfer_jax.folders.checksums import print_once
from omnitransfer_jax.quarantine import Damage, Quarantine

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 2**28  # bytes


def batches(
    config: Config, *, seed: int, process_index: int = 0, process_count: int = 1, quarantine: Quarantine | None = None
) -> grain.DatasetIterator[Batch]:
    """Endless batches of the records in `config.data.folders`: this process's part of each, `1 / process_count` of the samples.

    Every epoch has its own order, drawn from `seed` (the order of the records with `data.shuffle=False`); a batch may begin in one epoch
    and end in the next. The batch over all processes does not depend on how many there are: each process reads consecutive samples, in
    the order of the processes. The iterator's state is the number of batches it gave, so it can be restored with any number of threads
    and processes. Records that other encoders made than those of train.init_from are a `RequestError`.

    A record that fails its check is set aside in the `quarantine`, and the next good one of its data set is read in its place.
    """
    size = config.train.batch_size
    require(size % process_count == 0, f"train.batch_size={size}: a multiple of the {process_count} processes that share it")
    require_same_weights(config)
    keep_freed_memory()

    aside = quarantine if quarantine is not None else Quarantine(config.data.quarantine)

    def sample(read: Read, spec: Batch) -> tuple[Batch, list[Damage]]:
        found = records.from_record(read.record, spec)
        task = tasks.TASKS[int(found.task)]
        require(
            config.dit.reach == "all" or task.family == "temporal",
            f"{config.data.path}: a pair of task {task.name}; with dit.reach=same_frame references must share times with their targets, "
            "which is so in temporal tasks: encode those alone, or take --dit.reach=all",
        )
        return found, read.damaged

    def parts(part: Part) -> grain.MapDataset[Any]:
        sound = part._replace(sources=[Sound(source, part.first + k, aside) for k, source in enumerate(part.sources)])
        samples = ordered(sound, config, seed).map(partial(sample, spec=sample_spec(part.config)))
        return samples.batch(size // process_count, drop_remainder=True, batch_fn=stack)[process_index::process_count]

    def take(found: tuple[Batch, list[Damage]]) -> Batch:
        aside.take(found[1])  # in the order of the batches, whichever thread met them first
        return found[0]

    threads = config.data.threads
    whole = mixed([(part, parts(part)) for part in opened(config)])
    return iter(whole.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)).map(take))


def keep_freed_memory() -> None:
    """Lets the C library (glibc) keep memory that was freed: to map fresh pages for every record costs more than to read it."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, KEPT)


def stack(samples: Sequence[tuple[Batch, list[Damage]]]) -> tuple[Batch, list[Damage]]:
    """A batch of samples, and the damaged records that were met on the way."""
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *[sample for sample, _ in samples])
    return batch, [damage for _, damaged in samples for damage in damaged]


class Read(NamedTuple):
    """A record, and the damaged ones before it that it stands for."""

    record: Any
    damaged: list[Damage]


class Sound:
    """The records of data set `number` of a run; in the place of a damaged one, or of one in the quarantine, the next good one is read.

    `records` are by number; of names alone (`identify`) none is damaged.
    """

    def __init__(self, records: Any, number: int, quarantine: Quarantine):
        self.records, self.number, self.quarantine = records, number, quarantine

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Read:
        met: list[Damage] = []
        for place in range(index, index + len(self)):
            at = place % len(self)
            if (self.number, at) in self.quarantine:
                continue
            try:
                return Read(self.records[at], met)
            except records.DamagedRecordError as error:
                met.append(Damage((self.number, at), self.records.name(at), str(error)))
                if len(met) > self.quarantine.most:
                    raise
        raise RequestError(f"{self.records.folder}: every record of it is damaged; make them again: {records.ENCODE}")


class Part(NamedTuple):
    """The records of one bucket, of all data sets that have some."""

    number: int
    """Of the bucket."""
    config: Config
    """With the sizes of the bucket."""
    sources: list[Any]
    weights: list[float]
    """Share of each source in the samples of the training."""
    first: int
    """The number of the first source among those of all buckets."""


def opened(config: Config) -> list[Part]:
    """The records of a training, by bucket. What a data set is drawn by is divided over its buckets as its records are."""
    opened = [
        {name: records.Records(path, each) for name, each in bucket_configs(config).items() if (path := there.get(name)) is not None}
        for there in (buckets.folders(folder, config) for folder in _folders(config))
    ]
    weights = config.data.weights or tuple(sum(map(len, each.values())) for each in opened)
    parts = []
    for number, (name, each) in enumerate(bucket_configs(config).items()):
        pairs = [
            (of[name], weight * len(of[name]) / sum(map(len, of.values())))
            for of, weight in zip(opened, weights, strict=True)
            if name in of
        ]
        if pairs:
            sources, shares = [source for source, _ in pairs], [weight for _, weight in pairs]
            parts.append(Part(number, each, sources, shares, number * len(config.data.folders)))
    return parts


def ordered(part: Part, config: Config, seed: int) -> grain.MapDataset[Any]:
    """The samples of a bucket in the endless order of a training: each source in orders of its own, mixed in fixed proportions."""

    def order(number: int) -> grain.MapDataset[Any]:
        examples = grain.MapDataset.source(part.sources[number]).seed((seed + part.first + number) % 2**32)
        return (examples.shuffle() if config.data.shuffle else examples).repeat()

    if len(part.sources) == 1:
        return order(0)
    return grain.MapDataset.mix([order(number) for number in range(len(part.sources))], _shares(part.weights))


def mixed(parts: Sequence[tuple[Part, grain.MapDataset[Any]]]) -> grain.MapDataset[Any]:
    """Batches of all buckets, mixed so that every sample is drawn as often as its data set's weight says."""
    if len(parts) == 1:
        return parts[0][1]
    return grain.MapDataset.mix([batches for _, batches in parts], _shares([sum(part.weights) for part, _ in parts]))


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def identify(config: Config, quarantine: Quarantine | None = None) -> Callable[[int], list[str]]:
    """names(step): the ids of the samples of the batch of step 1, 2, ..., of all processes; empty for records of an earlier version.

    Of records in the `quarantine` they are those of the records that are read in their places."""
    parts, aside = opened(config), quarantine or Quarantine()
    if not all(source.ids for part in parts for source in part.sources):
        return lambda step: []

    def named(part: Part) -> grain.MapDataset[Any]:
        names = [Sound(source.ids, part.first + k, aside) for k, source in enumerate(part.sources)]
        return ordered(part._replace(sources=names), config, config.seed).batch(
            config.train.batch_size, drop_remainder=True, batch_fn=lambda reads: [str(read.record) for read in reads]
        )

    order: Any = mixed([(part, named(part)) for part in parts])
    return lambda step: order[step - 1]


def require_same_weights(config: Config) -> None:
    """A `RequestError` if other encoders made the records than those of train.init_from, whose folder may be gone when a run goes on."""
    origin = run_folder.imported_weights(config.train.init_from)
    if not origin or model_folder.exists(origin):
        for _, folder in _places(config):
            records.require_same_weights(folder, weights_of(config), config.train.init_from)


def empty_text(config: Config) -> np.ndarray:
    """The encoding of the empty prompt, float32 "S E", which replaces the text of a sample whose prompt is dropped."""
    (_, place), *others = _places(config)
    first = records.empty_text(place, config.dit.text_len)
    for _, folder in others:
        require(
            np.array_equal(first, records.empty_text(folder, config.dit.text_len)),
            f"{folder}: its empty prompt is encoded otherwise than that of {place}; encode both with the same weights",
        )
    return first


def data_digest(config: Config, going_on: bool = False) -> str:
    """The digest of the records, by which a run that goes on knows them.

    It is empty if the run is `going_on` and a record that the digest reads is damaged by now: their path tells, then."""
    try:
        first, *others = (records.digest(folder, each) for each, folder in _places(config))
    except records.DamagedRecordError as error:
        if not going_on:
            raise
        print_once(f"{error}; the run goes on if data.path is the same")
        return ""
    return fingerprint.of_pairs([(str(number), digest) for number, digest in enumerate([first, *others])]) if others else first


def _places(config: Config) -> list[tuple[Config, Path]]:
    """Every folder of records, each with the configuration of its sizes."""
    configs = bucket_configs(config)
    found = [(configs[name], path) for folder in _folders(config) for name, path in buckets.folders(folder, config).items()]
    require(bool(found), f"{config.data.path}: no records of the buckets {' '.join(config.data.buckets)}; name others")
    return found


def _folders(config: Config) -> list[Path]:
    require(bool(config.data.path), f"data.path is empty: give --data.path=DIR, a folder of {records.ENCODE}")
    return [Path(folder) for folder in config.data.folders]
