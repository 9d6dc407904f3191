"""How fast a training can read: records against the same bytes read raw, and clips against PyAV alone.

    python -m benchmarks.loader [--records=200] [--rounds=5]

    raw        the shards' bytes, file by file
    pieces     the same bytes in pieces as large as a record
    shards     ArrayRecord alone: the bytes of each record, compared with their hash
    records    `data_pipelines.batches`, from the shards to batches, one thread
    pyav       the same clip decoded to the last frame that is needed, scaled to RGB to cover the size, and cut, by PyAV alone
    clips      `data_pipelines.clips.read_clip` in this process
    limited    the same in a process with limits (`data_pipelines.decoding`), as launch.encode does it

All alternate within one run, on one pinned core; files are in the page cache, so no disk is measured. Seconds are those of the processor,
of all threads and of the process with limits, so that other work on the machine counts less. Only ratios are meaningful.
"""

import os

CORE = max(os.sched_getaffinity(0))
if __name__ == "__main__":
    os.sched_setaffinity(0, {CORE})  # before any library counts the cores

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import jax
import numpy as np
from absl import flags

from configs import stage1
from configs.run import Config, VideoConfig
from data_pipelines import batches, clips, decoding, example, records
from launch import command
from omnitransfer_jax.batch import sample_spec

FLAGS = flags.FlagValues()
RECORDS = flags.DEFINE_integer("records", 120, "records that are written and read", lower_bound=8, flag_values=FLAGS)
ROUNDS = flags.DEFINE_integer("rounds", 5, "timed runs of each, after one that is not counted", lower_bound=1, flag_values=FLAGS)

VIDEO = VideoConfig(frames=81, height=240, width=416, fps=16)  # a quarter of the paper's size
SHARD = 20


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="loader_") as folder:
        config = write(Path(folder))
        clip = write_clip(Path(folder) / "clip.mp4")
        size = {"frames": VIDEO.frames, "fps": VIDEO.fps, "height": VIDEO.height, "width": VIDEO.width}
        shards = sorted((Path(folder) / "records").glob("records-*"))
        gigabytes = sum(path.stat().st_size for path in shards) / 1e9
        opened, decoder = records.Records(Path(folder) / "records", config), decoding.Decoder()
        seconds = timed({
            "raw": lambda: [path.read_bytes() for path in shards],
            "pieces": lambda: [in_pieces(path, round(gigabytes * 1e9 / RECORDS.value)) for path in shards],
            "shards": lambda: [len(opened.serialized(index)) for index in range(RECORDS.value)],
            "records": lambda: read(config),
            "pyav": lambda: alone(clip),
            "clips": lambda: clips.read_clip(clip, **size),
            "limited": lambda: decoder.clip(clip, **size),
        }, lambda: time.process_time() + decoder.cpu_seconds)  # fmt: skip
    size_of_one = gigabytes * 1000 / RECORDS.value
    print(f"{RECORDS.value} records of {size_of_one:.1f} MB; a clip of {VIDEO.frames} frames; medians of {ROUNDS.value}")
    for name in ("raw", "pieces", "shards", "records"):
        speed = f"{RECORDS.value / seconds[name]:9.1f} records/s {gigabytes / seconds[name]:7.2f} GB/s"
        print(f"{name:10} {speed}  {seconds['raw'] / seconds[name]:5.2f} of raw {seconds['pieces'] / seconds[name]:5.2f} of pieces")
    for name in ("pyav", "clips", "limited"):
        print(f"{name:10} {VIDEO.frames / seconds[name]:9.1f} frames/s  {'':12} {seconds['pyav'] / seconds[name]:5.2f} of PyAV")


def timed(forms: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(ROUNDS.value + 1):
        for name, form in forms.items():
            started = clock()
            form()
            if number:
                found[name].append(clock() - started)
    return {name: statistics.median(each) for name, each in found.items()}


def write(folder: Path) -> Config:
    """Records of random numbers, and the configuration that reads them."""
    smoke = stage1.get_config("smoke")
    config = replace(
        smoke,
        video=VIDEO,
        data=replace(smoke.data, reference=VIDEO, path=str(folder / "records"), threads=1),
        train=replace(smoke.train, batch_size=4),
    )
    records.begin(folder / "records", config, {"world": "random", "weights": records.RANDOM})
    records.write_empty_text(folder / "records", np.ones((1, config.text.dim), np.float32))
    counts = [min(SHARD, RECORDS.value - i) for i in range(0, RECORDS.value, SHARD)]
    numbers = iter(range(RECORDS.value))
    for shard, count in enumerate(counts):
        with records.shard_writer(records.shard_path(folder / "records", shard, len(counts)), records.schema(config)) as append:
            for _ in range(count):
                append(record(next(numbers), config))
    records.finish(folder / "records", config, counts, [f"n{i}" for i in range(RECORDS.value)])
    return config


def record(number: int, config: Config) -> dict:
    rng = np.random.default_rng(number)
    sample = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), sample_spec(config))
    return records.to_record(f"n{number}", sample._replace(task=np.int32(number % 5)), 4)


def in_pieces(path: Path, size: int) -> int:
    with path.open("rb", buffering=0) as file:
        return sum(len(piece) for piece in iter(lambda: file.read(size), b""))


def read(config: Config) -> int:
    """All records once, in the order of a training."""
    iterator: Iterator = batches.batches(config, seed=0)
    return sum(len(next(iterator).task) for _ in range(RECORDS.value // config.train.batch_size))


def write_clip(path: Path) -> Path:
    """A 720p clip at 16 frames a second."""
    scene = example.SCENES["camera"][0]
    small = np.stack([scene(i / VIDEO.frames) for i in range(VIDEO.frames + 4)])
    clips.write_clip(path, small.repeat(11, axis=1).repeat(13, axis=2)[:, :704, :1248], VIDEO.fps)
    return path


def alone(path: Path) -> np.ndarray:
    """The frames by PyAV, scaled by swscale to cover the same size and cut; without times, colours, orientation and checks."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        scale = max(VIDEO.height / stream.height, VIDEO.width / stream.width)
        height, width = round(stream.height * scale), round(stream.width * scale)
        top, left = (height - VIDEO.height) // 2, (width - VIDEO.width) // 2
        for frame in container.decode(stream):
            picture = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="BICUBIC")
            frames.append(picture[top : top + VIDEO.height, left : left + VIDEO.width])
            if len(frames) == VIDEO.frames:
                break
    return np.stack(frames)


if __name__ == "__main__":
    command.run(main, FLAGS)
