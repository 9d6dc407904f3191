"""Records without clips: numbers drawn at random in the sizes of stage1:smoke."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import stage1
from configs.run import Config
from data_pipelines import records
from omnitransfer_jax.batch import sample_spec

SMOKE = stage1.get_config("smoke")


def random_record(number: int, config: Config = SMOKE) -> dict:
    """Example `number`: task `number % 5`, a prompt of 1 to 4 rows."""
    rng = np.random.default_rng(number)
    sample = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), sample_spec(config))
    sample = sample._replace(task=np.int32(number % 5), has_image=np.float32(number % 5 > 1))
    return records.to_record(f"n{number}", sample, 1 + number % 4)


@pytest.fixture
def write_records(tmp_path):
    """A function that writes a dataset of shards with so many records each, and returns the configuration that reads it."""

    def write(*lengths: int, name: str = "records") -> Config:
        folder, number = tmp_path / name, 0
        records.begin(folder, SMOKE, {"world": "random"})
        records.write_empty_text(folder, np.ones((1, SMOKE.text.dim), np.float32))
        for shard, length in enumerate(lengths):
            with records.shard_writer(records.shard_path(folder, shard, len(lengths)), records.schema(SMOKE)) as append:
                for _ in range(length):
                    append(random_record(number))
                    number += 1
        records.finish(folder, SMOKE, lengths)
        return replace(SMOKE, data=replace(SMOKE.data, path=str(folder)))

    return write
