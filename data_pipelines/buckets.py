"""Which declared size the clips of a pair are encoded in, and where the records of each size lie.

    DIR/buckets.json                   the bucket of every pair, written before the first is encoded
    DIR/81x480x832_81x480x832/...      the records of a bucket: a data set of its own (records.py)

A pair goes to a bucket for which both of its clips are long enough: to the one closest in shape to the target, then with the most frames,
then with the most pixels. If its clips are too short for all, it goes to the one with the fewest frames, which refuses it with the reason.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from configs.buckets import bucket_configs
from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import decoding
from data_pipelines.manifest import Clip, Row
from data_pipelines.pairs import prefetch
from omnitransfer_jax.folders.atomic import read_json, write_whole
from omnitransfer_jax.folders.inputs import BUCKETS_FILE

NONE_KEPT = "none_kept"  # in the folder of a bucket whose pairs were all refused


class Size(NamedTuple):
    """What is known of a clip before it is decoded."""

    aspect: float
    """Width over height, as displayed."""
    seconds: float


def assign(rows: Sequence[Row], config: Config) -> dict[str, str]:
    """By the id of each row the name of its bucket. Clips that cannot be read go to the first one, where they are refused."""
    configs, found = bucket_configs(config), {}
    if list(configs) == [""]:
        return {row.id: "" for row in rows}
    with tqdm(total=len(rows), unit="pair", desc="sizes", disable=None) as bar:
        for row, future in prefetch(partial(bucket_of, configs=configs), rows, config.data.threads):
            found[row.id] = future.result()
            bar.update()
    return found


def flag(config: Config) -> str:
    """The flag that names them again; empty without buckets."""
    return f" --data.buckets {' '.join(config.data.buckets)}" if config.data.buckets else ""


def bucket_of(row: Row, configs: Mapping[str, Config]) -> str:
    """The bucket of a row."""
    try:
        target, reference = measure(row.target), measure(row.reference)
    except RequestError:
        return next(iter(configs))
    return best(target, reference, configs)


def best(target: Size, reference: Size, configs: Mapping[str, Config]) -> str:
    """The bucket of clips of these sizes."""

    def lasts(video: Any, size: Size) -> bool:
        return (video.frames - 0.5) / video.fps <= size.seconds

    def off(each: Config) -> float:
        return round(abs(math.log(target.aspect * each.video.height / each.video.width)), 6)

    long_enough = {name: each for name, each in configs.items() if lasts(each.video, target) and lasts(each.data.reference, reference)}
    if not long_enough:
        return min(configs, key=lambda name: (configs[name].video.frames, configs[name].data.reference.frames, off(configs[name])))
    order = {name: (off(each), -each.video.frames, -each.video.height * each.video.width) for name, each in long_enough.items()}
    return min(order, key=lambda name: order[name])


def measure(clip: Clip) -> Size:
    """Shape and length of a clip, or of its stretch, by its first picture and what its container says."""
    with decoding.decoder() as decoder:
        height, width, seconds = decoder.measure(clip.path)
    until = seconds if clip.end is None else min(clip.end, seconds)
    return Size(width / height, max(0.0, until - clip.start))


def write(folder: Path, config: Config, source: Mapping[str, Any], assign: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The buckets of all rows, as an earlier process has written them, or assigned now. Those of another request are a `RequestError`."""
    made = {"buckets": list(bucket_configs(config)), "source": json.loads(json.dumps(source))}
    path = folder / BUCKETS_FILE
    if path.exists():
        before = read(folder)
        same = before["buckets"] == made["buckets"] and before["source"] == made["source"]
        require(same, f"{folder}: begun with other buckets, another manifest or other weights; give another folder, or remove this one")
        return before["rows"]
    found = assign()
    write_whole(path, json.dumps(made | {"rows": found}))
    return found


def read(folder: Path) -> dict[str, Any]:
    return read_json(folder / BUCKETS_FILE, "restore it from a copy, or make the records again", "source", "rows")


def folders(folder: Path, config: Config) -> dict[str, Path]:
    """By bucket the folder of its records, for a data set that has some; without buckets the folder itself.

    A data set of other buckets than those of the configuration is a `RequestError`."""
    wanted, path = list(config.data.buckets), folder / BUCKETS_FILE
    if not wanted:
        require(
            not path.exists(), f"{folder}: records of several sizes; name those to read with --data.buckets ({BUCKETS_FILE} lists them)"
        )
        return {"": folder}
    require(path.exists(), f"{folder}: records of one size; leave out --data.buckets, or encode them with it")
    made = read(folder)
    absent = [name for name in bucket_configs(config) if name not in made["buckets"]]
    there = ", ".join(name.replace("_", "/") for name in made["buckets"])
    require(not absent, f"data.buckets: {folder} has no {', '.join(absent).replace('_', '/')}; it has {there}")
    filled = set(made["rows"].values())
    return {name: folder / name for name in bucket_configs(config) if name in filled and not (folder / name / NONE_KEPT).exists()}
