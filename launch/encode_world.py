"""Pairs of the procedural world into records: --config=NAME --pairs=N --out=DIR. The encoders are those of train.init_from.

    python -m launch.encode_world --config=stage3:tiny --pairs=4000 --out=out/records

The pairs are those of the training split, the tasks in turn; the same --key gives the same pairs everywhere (world/pairs.py).
Started again it goes on where it stopped: finished shards are kept. With --data.buckets the pairs are divided over the sizes: half of them
to the first one (world/screens.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from configs.buckets import bucket_configs
from configs.errors import require
from configs.run import Config, encoder_names
from data_pipelines import buckets, records
from data_pipelines.encoders import Encoders, weights_of
from data_pipelines.pairs import prefetch
from launch import command
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import outputs
from world import screens
from world.pair_records import encode, example, render
from world.pairs import Example

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "folder of the records", required=True, flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 4000, "how many", lower_bound=1, flag_values=FLAGS)
KEY = flags.DEFINE_integer("key", 0, "which world", flag_values=FLAGS)
TWO = flags.DEFINE_bool("two", False, "stage0: both clips of a pair where the screen has room, in columns or shots", flag_values=FLAGS)

BATCH = 40  # pairs that are encoded together
SHARD = 10 * BATCH


def main(config: Config) -> None:
    require(not (TWO.value and config.train.references), "--two: for --config=stage0, whose network reads no reference; leave it out")
    outputs.require_folder("--out", OUT.value, [config.train.init_from], holds="records", owns=["."])
    records.require_place(Path(OUT.value))
    write(config, Path(OUT.value), PAIRS.value, KEY.value, TWO.value)
    again = buckets.flag(config)
    print(f"Next: python -m launch.train --config={FLAGS['config'].value} --workdir=DIR --data.path={OUT.value}{again}")


class Work(NamedTuple):
    """The records of one size."""

    config: Config
    folder: Path
    examples: list[Example]

    @property
    def shards(self) -> list[list[Example]]:
        return [self.examples[i : i + SHARD] for i in range(0, len(self.examples), SHARD)]

    @property
    def paths(self) -> list[Path]:
        return [records.shard_path(self.folder, i, len(self.shards)) for i in range(len(self.shards))]

    @property
    def missing(self) -> list[int]:
        return [i for i, path in enumerate(self.paths) if not path.exists()]


def write(config: Config, folder: Path, pairs: int, key: int, two: bool = False) -> None:
    """Writes those records of `pairs` pairs of world `key` that are not in `folder` yet; `two`: world/screens.py."""
    load_models.require_weights(config.train.init_from, config, encoder_names(config))
    source = {"world": key, "pairs": pairs, "prompts": config.train.references, "weights": weights_of(config)}
    source |= {"two": True} if two else {}  # records of before have no such word
    works = works_of(config, folder, pairs, key, two, source)
    for work in works:
        records.begin(work.folder, work.config, source)
    if any(work.missing for work in works) or not all((work.folder / records.EMPTY_TEXT_FILE).exists() for work in works):
        encoders = Encoders(config, config.train.init_from)
        encoders.load()
        if two:
            require_words(encoders, screens.WORDS)
        (text,), (rows,) = encoders.text([""])
        left = sum(len(work.shards[i]) for work in works for i in work.missing)
        with tqdm(total=left, desc="encoding", unit="pair", disable=None) as bar:
            for work in works:
                records.write_empty_text(work.folder, text[:rows])
                sized = encoders.of_size(work.config) if config.data.buckets else encoders
                for i in work.missing:
                    encode_shard(work, i, sized, two, bar)
    for work in works:
        records.finish(work.folder, work.config, [len(shard) for shard in work.shards], [pair.id for pair in work.examples])


def require_words(encoders: Encoders, words: Sequence[str]) -> None:
    """A `RequestError` for words that would all be the same to the text encoder."""
    vocabulary = encoders.vocabulary
    unknown = [word for word in words if vocabulary.unk_token_id in vocabulary(word).input_ids]
    folder = encoders.folder
    require(not unknown, f"train.init_from={folder}: its vocabulary lacks {' and '.join(unknown)}; make the folder anew with launch.embed")


def works_of(config: Config, folder: Path, pairs: int, key: int, two: bool, source: dict[str, Any]) -> list[Work]:
    """The pairs of each size."""
    if not config.data.buckets:
        return [Work(config, folder, [example(config, key, index, "train", two=two) for index in range(pairs)])]
    configs, drawn = bucket_configs(config), [example(config, key, index, "train") for index in range(pairs)]
    names, sizes = list(configs), [each.video for each in configs.values()]
    bucket_of = buckets.write(folder, config, source, lambda: {pair.id: names[screens.choose(pair, sizes, two)] for pair in drawn})
    chosen = {name: [i for i, pair in enumerate(drawn) if bucket_of[pair.id] == name] for name in names}
    return [
        Work(configs[name], folder / name, [example(configs[name], key, i, "train", two=two) for i in indices])
        for name, indices in chosen.items()
        if indices
    ]


def encode_shard(work: Work, index: int, encoders: Encoders, two: bool, bar: tqdm) -> None:
    examples = work.shards[index]
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    with records.shard_writer(work.paths[index], records.schema(work.config)) as append:
        for batch, videos in prefetch(partial(render, work.config, two=two), batches, threads=1):
            for record in encode(encoders, batch, videos.result()):
                append(record)
            bar.update(len(batch))


if __name__ == "__main__":
    command.run(main, FLAGS)
