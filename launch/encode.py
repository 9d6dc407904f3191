"""Clips into records: --config=NAME --manifest=FILE.jsonl --out=DIR. The weights of the encoders are those of train.init_from.

    python -m launch.encode --config=stage1 --manifest=clips.jsonl --out=records --train.init_from=checkpoints/wan_i2v

Started again, it goes on where it stopped: finished shards are kept, unless one of their clips has changed. With --check everything is read
and nothing is encoded: what can be used, what will be left out, and why. Several processes can share the work: process i of n encodes every
n-th shard, from the i-th on. JAX gives i and n, or --shard_index and --shard_count where JAX does not connect the processes. The last
process to finish writes the dataset's metadata. A pair that cannot be used is left out, and reported on the console and in
DIR/rejected.jsonl.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from configs.buckets import bucket_configs
from configs.errors import RequestError, require
from configs.run import Config, encoder_names
from data_pipelines import buckets, check, records, sources
from data_pipelines.encoders import Encoders, weights_of
from data_pipelines.manifest import Row, read_manifest, require_inside
from data_pipelines.pairs import Pixels, encode_together, prefetch, read_pixels
from launch import command
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import read_json, sha256, write_whole

FLAGS = flags.FlagValues()
MANIFEST = flags.DEFINE_string("manifest", None, "the pairs, one JSON object a line (docs/data.md)", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of the records; not needed with --check", flag_values=FLAGS)
RECORDS_PER_SHARD = flags.DEFINE_integer(
    "records_per_shard", 64, "pairs in a shard; a killed run repeats at most so many", lower_bound=1, flag_values=FLAGS
)
SHARD_INDEX = flags.DEFINE_integer(
    "shard_index", None, "this process among those that share the work; JAX's own if absent", flag_values=FLAGS
)
SHARD_COUNT = flags.DEFINE_integer("shard_count", None, "number of processes that share the work; JAX's own if absent", flag_values=FLAGS)

CHECK = flags.DEFINE_bool("check", False, "read all clips, say what is wrong with them, and stop", flag_values=FLAGS)
ALLOW_OUTSIDE = flags.DEFINE_bool("allow_outside", False, "clips may lie outside the manifest's folder", flag_values=FLAGS)

REJECTED_FILE = "rejected.jsonl"


def main(config: Config) -> None:
    manifest = Path(MANIFEST.value)
    rows = read_manifest(manifest)
    if not ALLOW_OUTSIDE.value:
        require_inside(rows, manifest.parent)
    if CHECK.value:
        check.check(rows, config)
        return
    require(bool(OUT.value), "--out (folder of the records): not given, and this command needs it")
    folder = Path(OUT.value or "")
    outputs.require_folder("--out", str(folder), [MANIFEST.value, config.train.init_from], holds="records", owns=["."])
    records.require_place(folder)
    index, count = process(SHARD_INDEX.value, SHARD_COUNT.value)
    load_models.require_weights(config.train.init_from, config, encoder_names(config))
    weights = weights_of(config)
    source = {"manifest": sha256(manifest), "weights": weights, "records_per_shard": RECORDS_PER_SHARD.value}
    assign = partial(buckets.assign, rows, config)
    bucket_of = buckets.write(folder, config, source, assign) if config.data.buckets else assign()
    works = [
        Work(each, folder / name, [row for row in rows if bucket_of[row.id] == name])
        for name, each in bucket_configs(config).items()
        if name in bucket_of.values()
    ]
    missing = {work.folder: work.begin(source, index, count) for work in works}
    if any(missing.values()) or not all((work.folder / records.EMPTY_TEXT_FILE).exists() for work in works):
        if weights == records.RANDOM:
            print("no weights in train.init_from: the encoders are random, so these records only show that every part runs")
        encoders = Encoders(config, config.train.init_from, jax.local_devices())
        encoders.load()
        (text,), (rows_of_text,) = encoders.text([""])
        with tqdm(total=sum(len(work.shards[i]) for work in works for i in missing[work.folder]), unit="pair", disable=None) as bar:
            for work in works:
                records.write_empty_text(work.folder, text[:rows_of_text])
                sized = encoders.of_size(work.config) if config.data.buckets else encoders
                for i in missing[work.folder]:
                    encode_shard(work.shards[i], work.paths[i], work.config, sized, bar)
    finish(folder, works, config)


@dataclass
class Work:
    """The records of one size: all of them, or those of a bucket."""

    config: Config
    folder: Path
    rows: list[Row]

    @property
    def shards(self) -> list[list[Row]]:
        return [self.rows[i : i + RECORDS_PER_SHARD.value] for i in range(0, len(self.rows), RECORDS_PER_SHARD.value)]

    @property
    def paths(self) -> list[Path]:
        return [records.shard_path(self.folder, i, len(self.shards)) for i in range(len(self.shards))]

    def begin(self, source: Mapping[str, Any], index: int, count: int) -> list[int]:
        """The shards that process `index` of `count` is to make: those that are absent, or whose clips have changed."""
        records.begin(self.folder, self.config, source)
        shards, paths = self.shards, self.paths
        return [i for i in range(index, len(shards), count) if not is_done(paths[i]) or is_stale(shards[i], paths[i])]


def process(index: int | None, count: int | None) -> tuple[int, int]:
    """Which process this is, and of how many: as --shard_index and --shard_count say, else as JAX knows."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    require(0 <= index < count, f"--shard_index={index} --shard_count={count}: the index counts from 0 and stays below the count")
    return index, count


def encode_shard(rows: Sequence[Row], path: Path, config: Config, encoders: Encoders, bar: tqdm) -> None:
    """Writes one shard, and beside it how many pairs of each task it keeps, which it refuses, and what its clips are known by."""
    started, kept, rejected, ids, files = time.monotonic(), Counter(), [], [], {}
    tally_path(path).unlink(missing_ok=True)  # what is made anew is not done meanwhile
    with records.shard_writer(path, records.schema(config)) as write:
        for group in groups(prefetch(partial(read, config=config), rows, config.data.threads), encoders.together):
            files |= {row.id: described for row, (described, _) in group}
            sound = [(row, pixels) for row, (_, pixels) in group if not isinstance(pixels, RequestError)]
            found = dict(zip([row.id for row, _ in sound], encode_together(sound, encoders) if sound else [], strict=True))
            for row, (_, pixels) in group:
                record = pixels if isinstance(pixels, RequestError) else found[row.id]
                if isinstance(record, RequestError):
                    rejected.append({"id": row.id, "task": row.task, "shard": path.name, **path_and_reason(record, row)})
                    print_line(f"refused {row.id}: {record}")
                    continue
                write(record)
                kept[row.task] += 1
                ids.append(row.id)
                for note in cut_prompts(row, encoders):
                    print_line(f"{row.id}: {note}")
            bar.update(len(group))
            bar.set_postfix(refused=len(rejected))
    write_whole(tally_path(path), json.dumps({"kept": kept, "rejected": rejected, "ids": ids, "files": files}))
    print_line(f"{path.name}: {kept.total()} kept, {len(rejected)} refused, {time.monotonic() - started:.1f} s")


Found = tuple[dict[str, Any], Pixels | RequestError]
"""What the clips of a row are known by, and their pixels, or why there are none."""


def groups(rows: Iterable[tuple[Row, Future[Found]]], size: int) -> Iterator[list[tuple[Row, Found]]]:
    """So many rows at a time, each read."""
    rows = iter(rows)
    while group := [(row, future.result()) for row, future in islice(rows, size)]:
        yield group


def read(row: Row, config: Config) -> Found:
    described = sources.describe(row)
    try:
        sources.require_stated(row, described)
        return described, read_pixels(row, config)
    except RequestError as error:
        return described, error


def is_stale(rows: Sequence[Row], path: Path) -> bool:
    """Whether a clip of a finished shard is another one by now; shards of earlier versions do not say what they were made of."""
    files = read_json(tally_path(path), "remove it, and its shard is made again", "kept").get("files")
    changed = [row.id for row in rows if files is not None and not sources.is_unchanged(row, files.get(row.id, {}))]
    if changed:
        print_line(f"{path.name}: made again, for the clips of {', '.join(changed[:3])} have changed")
    return bool(changed)


def cut_prompts(row: Row, encoders: Encoders) -> list[str]:
    """Sentences that say by which encoder the end of the row's prompt is not read."""
    tasks_of = (None, row.task) if encoders.config.alignment.enabled else (None,)
    return [note for task in tasks_of for note in encoders.cut_prompts({"prompt": row.prompt}, task)]


def path_and_reason(error: RequestError, row: Row) -> dict[str, str]:
    """The two parts of a message that begins with one of the row's paths."""
    paths = [row.reference.path, row.target.path, *([row.first_frame] if row.first_frame else [])]
    path = next(str(path) for path in paths if str(error).startswith(f"{path}: "))
    return {"path": path, "reason": str(error).removeprefix(f"{path}: ")}


def print_line(line: str) -> None:
    """Prints a line above the progress bar, without delay."""
    tqdm.write(line)
    sys.stdout.flush()


def tally_path(shard: Path) -> Path:
    """The file that says how many pairs of a shard were kept and which were refused."""
    return shard.parent / "tallies" / f"{shard.name}.json"


def is_done(path: Path) -> bool:
    """Whether a shard is complete."""
    return path.exists() and tally_path(path).exists()


def finish(folder: Path, works: Sequence[Work], config: Config) -> None:
    """Prints how many pairs were kept and refused, and writes the metadata of each data set whose shards are complete."""
    tallies = {
        work.folder: [read_json(tally_path(path), "remove it, and its shard is made again", "kept") for path in work.paths if is_done(path)]
        for work in works
    }
    rejected = [entry for each in tallies.values() for tally in each for entry in tally["rejected"]]
    write_whole(folder / REJECTED_FILE, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
    kept = sum((Counter(tally["kept"]) for each in tallies.values() for tally in each), Counter())
    refused = Counter(entry["task"] for entry in rejected)
    print(f"{'task':8} {'kept':>8} {'refused':>8}")
    for name in (*tasks.NAMES, "all"):
        counts = (kept.total(), refused.total()) if name == "all" else (kept[name], refused[name])
        print(f"{name:8} {counts[0]:8} {counts[1]:8}")
    for work in works if config.data.buckets else ():
        print(f"{work.folder.name}: {sum(sum(tally['kept'].values()) for tally in tallies[work.folder])} kept of {len(work.rows)}")
    there, needed = sum(map(len, tallies.values())), sum(len(work.paths) for work in works)
    if there < needed:
        print(f"{there} of {needed} shards are there; the dataset is made when the other processes have written theirs")
        return
    require(kept.total() > 0, f"{folder}: nothing is kept, all {refused.total()} pairs are refused; {folder / REJECTED_FILE} says why")
    for work in works:
        finish_one(work, tallies[work.folder])
    print(f"Next: python -m launch.train --config={FLAGS['config'].value} --workdir=DIR --data.path={folder}{buckets.flag(config)}")


def finish_one(work: Work, tallies: Sequence[Mapping[str, Any]]) -> None:
    """Writes the metadata of one data set; a bucket that keeps nothing is marked as such."""
    lengths = [sum(tally["kept"].values()) for tally in tallies]
    if not sum(lengths):
        write_whole(work.folder / buckets.NONE_KEPT, "")
        return
    (work.folder / buckets.NONE_KEPT).unlink(missing_ok=True)
    known = all("ids" in tally for tally in tallies)  # earlier versions wrote none
    records.finish(work.folder, work.config, lengths, [name for tally in tallies if known for name in tally["ids"]])


if __name__ == "__main__":
    command.run(main, FLAGS)
