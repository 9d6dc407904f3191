"""Batches of a training whose samples fit in memory, such as those of one clip; batches.py reads records from disk."""

import hashlib
from typing import Any

import grain
import jax
import numpy as np

from configs.errors import require


def batches(samples: Any, size: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator[Any]:
    """Endless batches of `size` of the `samples`, a tree of arrays whose first axis counts them: this process's part of each.

    Every epoch has its own order, drawn from `seed`; a batch may begin in one epoch and end in the next. Processes read consecutive
    samples of a batch, in their order. The iterator's state is the number of batches it gave.
    """
    require(size % process_count == 0, f"train.batch_size={size}: a multiple of the {process_count} processes that share it")
    order = grain.MapDataset.range(len(jax.tree.leaves(samples)[0])).seed(seed % 2**32).shuffle().repeat()
    parts = order.map(lambda i: jax.tree.map(lambda x: x[i], samples)).batch(size // process_count, drop_remainder=True)
    return iter(parts[process_index::process_count].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def digest(samples: Any) -> str:
    """A digest of the samples' values, types and shapes, by which a run that goes on knows them."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in map(np.asarray, jax.tree.leaves(samples)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()
