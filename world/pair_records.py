"""Pairs of the procedural world as records: rendered and encoded a batch at a time, the same arrays as those of real clips."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from configs.run import Config
from data_pipelines.clips import to_unit
from data_pipelines.encoders import Encoders
from data_pipelines.pairs import Clips, encode_batch
from data_pipelines.records import to_record
from world import pixels, screens
from world.pairs import Example, Split, draw_pair


def example(config: Config, key: int, index: int, split: Split, task: str | None = None, two: bool = False) -> Example:
    """Pair `index` of the world; for a network that reads no reference, the prompt describes all of the target.

    With `two`, such a network sees both clips of the pair where the screen has room (world/screens.py)."""
    pair = draw_pair(key, index, split, task)
    if config.train.references:
        return pair
    return pair._replace(prompt=screens.prompt(pair, two and screens.has_room(pair, config.video)))


def render(config: Config, pairs: Sequence[Example], two: bool = False) -> Clips:
    """The clips of `pairs`; no accelerator takes part, so that one batch can be rendered while another is encoded."""
    targets = to_unit(np.stack([screens.render(pair, config.video, two and screens.has_room(pair, config.video)) for pair in pairs]))
    references = np.stack([pixels.render(pair.reference, config.data.reference) for pair in pairs]) if config.train.references else None
    has_first_frame = np.array([pair.is_temporal for pair in pairs], np.float32)
    return Clips(targets, None if references is None else to_unit(references), targets[:, 0], has_first_frame)


def encode(encoders: Encoders, pairs: Sequence[Example], videos: Clips) -> list[dict[str, Any]]:
    """The records (`records.schema`) of `pairs`, in any mix of tasks."""
    batch, rows = encode_batch(encoders, [pair.task for pair in pairs], [pair.prompt for pair in pairs], videos)
    return [to_record(pair.id, jax.tree.map(lambda x, i=i: x[i], batch), rows[i]) for i, pair in enumerate(pairs)]
