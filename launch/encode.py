"""Clips into records: --config=NAME --manifest=FILE.jsonl --out=DIR. The weights of the encoders are those of train.init_from.

    python -m launch.encode --config=stage1 --manifest=clips.jsonl --out=records --train.init_from=checkpoints/wan_i2v

Started again, it goes on where it stopped: finished shards are kept. Many processes share the work, each with every n-th shard; they are
told apart by JAX, or by --shard_index and --shard_count where they know nothing of each other. The last of them to finish makes the
dataset. A pair that cannot be used is reported, here and in DIR/rejected.jsonl, and left out.
"""

import hashlib
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
from absl import flags
from tqdm import tqdm

from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import records
from data_pipelines.encoders import Encoders, Pixels, encode, load_encoders, read_pixels
from data_pipelines.manifest import Row, read_manifest
from launch import command
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.folders.run_folder import imported_weights

FLAGS = flags.FlagValues()
MANIFEST = flags.DEFINE_string("manifest", None, "the pairs, one JSON object a line (docs/data.md)", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of the records", required=True, flag_values=FLAGS)
RECORDS_PER_SHARD = flags.DEFINE_integer(
    "records_per_shard", 64, "pairs in a shard, which is what a killed run repeats at most", lower_bound=1, flag_values=FLAGS
)
SHARD_INDEX = flags.DEFINE_integer(
    "shard_index", None, "this process among those that share the work; JAX's own if absent", flag_values=FLAGS
)
SHARD_COUNT = flags.DEFINE_integer("shard_count", None, "number of processes that share the work; JAX's own if absent", flag_values=FLAGS)

REJECTED_FILE = "rejected.jsonl"
RANDOM = "random"
Item = TypeVar("Item")
Result = TypeVar("Result")


def main(config: Config) -> None:
    folder, manifest = Path(OUT.value), Path(MANIFEST.value)
    rows = read_manifest(manifest)
    index, count = process()
    weights = weights_of(config)
    source = {"manifest": sha256(manifest), "weights": weights, "records_per_shard": RECORDS_PER_SHARD.value}
    records.begin(folder, config, source)
    shards = [rows[i : i + RECORDS_PER_SHARD.value] for i in range(0, len(rows), RECORDS_PER_SHARD.value)]
    paths = [records.shard_path(folder, i, len(shards)) for i in range(len(shards))]
    missing = [i for i in range(index, len(shards), count) if not is_done(paths[i])]
    if missing or not (folder / records.EMPTY_TEXT_FILE).exists():
        if weights == RANDOM:
            print("no weights in train.init_from: the encoders are random, so these records show that every part runs and no more")
        encoders = load_encoders(config, config.train.init_from)
        records.write_empty_text(folder, encoders.text(""))
        with tqdm(total=sum(len(shards[i]) for i in missing), unit="pair", disable=None) as bar:
            for i in missing:
                encode_shard(shards[i], paths[i], config, encoders, bar)
    settle(folder, paths, config)


def process() -> tuple[int, int]:
    """Which process this is, and of how many."""
    index = jax.process_index() if SHARD_INDEX.value is None else SHARD_INDEX.value
    count = jax.process_count() if SHARD_COUNT.value is None else SHARD_COUNT.value
    require(0 <= index < count, f"--shard_index={index} --shard_count={count}: the index counts from 0 and stays below the count")
    return index, count


def weights_of(config: Config) -> str | dict[str, str]:
    """What the encoders are, in the words the records keep."""
    folder = imported_weights(config.train.init_from)
    if not folder:
        return RANDOM
    model_folder.require_model(folder, config)
    return {"path": str(Path(folder).resolve()), model_folder.MODEL_FILE: sha256(Path(folder) / model_folder.MODEL_FILE)}


def encode_shard(rows: Sequence[Row], path: Path, config: Config, encoders: Encoders, bar: tqdm) -> None:
    """Writes one shard, and beside it how many pairs of each task it keeps and which it refuses."""
    started, kept, rejected = time.monotonic(), Counter(), []

    def read(row: Row) -> Pixels:
        return read_pixels(row, config)

    with records.shard_writer(path, records.schema(config)) as write:
        for row, pixels in ahead(read, rows, config.data.threads):
            try:
                write(encode(row, pixels.result(), encoders, config))
                kept[row.task] += 1
            except RequestError as error:
                rejected.append({"id": row.id, "task": row.task, "shard": path.name, **told(error, row)})
                say(f"refused {row.id}: {error}")
            bar.update()
            bar.set_postfix(refused=len(rejected))
        records.write_whole(tally_path(path), json.dumps({"kept": kept, "rejected": rejected}).encode())
    say(f"{path.name}: {kept.total()} kept, {len(rejected)} refused, {time.monotonic() - started:.1f} s")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item with the future of `function` of it, in order; threads are at work on the next ones."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def told(error: RequestError, row: Row) -> dict[str, str]:
    """A message that begins with a path of the row, as the path and the rest."""
    paths = [row.reference.path, row.target.path, *([row.first_frame] if row.first_frame else [])]
    path = next(str(path) for path in paths if str(error).startswith(f"{path}: "))
    return {"path": path, "reason": str(error).removeprefix(f"{path}: ")}


def say(line: str) -> None:
    """A line on the console, above the progress bar, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def tally_path(shard: Path) -> Path:
    """Where it stands what became of the pairs of a shard."""
    return shard.parent / "tallies" / f"{shard.name}.json"


def is_done(path: Path) -> bool:
    """Whether a shard is complete."""
    return path.exists() and tally_path(path).exists()


def settle(folder: Path, paths: Sequence[Path], config: Config) -> None:
    """Makes the dataset if all shards are there, and says what was kept and what was not."""
    tallies = [json.loads(tally_path(path).read_text()) for path in paths if is_done(path)]
    rejected = [entry for tally in tallies for entry in tally["rejected"]]
    records.write_whole(folder / REJECTED_FILE, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
    kept = sum((Counter(tally["kept"]) for tally in tallies), Counter())
    refused = Counter(entry["task"] for entry in rejected)
    print(f"{'task':8} {'kept':>8} {'refused':>8}")
    for name in (*tasks.NAMES, "all"):
        counts = (kept.total(), refused.total()) if name == "all" else (kept[name], refused[name])
        print(f"{name:8} {counts[0]:8} {counts[1]:8}")
    if len(tallies) < len(paths):
        print(f"{len(tallies)} of {len(paths)} shards are there; the dataset is made when the other processes have written theirs")
        return
    require(kept.total() > 0, f"{folder}: nothing is kept, all {refused.total()} pairs are refused; {folder / REJECTED_FILE} says why")
    records.finish(folder, config, [sum(tally["kept"].values()) for tally in tallies])
    print(f"Next: python -m launch.train --config={FLAGS['config'].value} --workdir=DIR --data.path={folder}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    command.run(main, FLAGS)
