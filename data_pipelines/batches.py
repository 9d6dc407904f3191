"""Records to batches: a Grain pipeline of numpy arrays, the same for any number of threads and processes."""

from pathlib import Path
from typing import Any

import grain
import numpy as np

from configs.errors import require
from configs.run import Config
from data_pipelines import records

ARRAYS = ("target", "condition", "reference", "image")


def batches(config: Config, *, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless batches of the records in `config.data.path`; this process's share of each, `1 / process_count` of the samples.

        task int32 "B"   has_image float32 "B"   text "B S E"   image "B I J"
        target "B F H w C"   condition "B F H w c"   reference "B f h w C"   all float32
        shown, with alignment.enabled: tokens int32 "B S", mask bool "B S", positions int32 "B 3 S", source int32 "B S", features "B V D"

    Every epoch has its own order, drawn from `seed` (none with `data.shuffle=False`), and batches run on across its end. A batch over all
    processes does not depend on how many they are: each takes a contiguous share, in the order of the processes. The iterator's
    state is the number of batches it gave, so it may be restored with any number of threads and processes.
    """
    size = config.train.batch_size
    require(size % process_count == 0, f"train.batch_size={size}: a multiple of the {process_count} processes that share it")
    examples = grain.MapDataset.source(records.Records(_folder(config), config)).seed(seed % 2**32)
    if config.data.shuffle:
        examples = examples.shuffle()
    shares = examples.repeat().map(lambda record: decode(record, config)).batch(size // process_count, drop_remainder=True)
    threads = config.data.threads
    return iter(shares[process_index::process_count].to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


def empty_text(config: Config) -> np.ndarray:
    """What the text of a sample is replaced by when its prompt is dropped: the encoding of the empty prompt, float32 "S E"."""
    return records.empty_text(_folder(config), config.dit.text_len)


def decode(record: dict[str, Any], config: Config) -> dict[str, Any]:
    """One sample of a batch from its record."""
    sample: dict[str, Any] = {name: records.from_bits(record[name]) for name in ARRAYS}
    sample["text"] = records.pad_rows(records.from_bits(record["text"]), config.dit.text_len)
    if config.alignment.enabled:
        shown = {name: record[f"shown_{name}"] for name in records.SHOWN}
        sample["mllm_inputs"] = shown | {"features": records.from_bits(shown["features"])}
    return sample | {"task": np.int32(record["task"]), "has_image": np.float32(record["has_image"])}


def _folder(config: Config) -> Path:
    require(bool(config.data.path), f"data.path is empty: give --data.path=DIR, a folder of {records.ENCODE}")
    return Path(config.data.path)
