"""Pairs of the procedural world into records: --config=NAME --pairs=N --out=DIR. The encoders are those of train.init_from.

    python -m launch.encode_world --config=stage3:tiny --pairs=4000 --out=out/records

The pairs are those of the training split, the tasks in turn; the same --key gives the same pairs everywhere (world/pairs.py).
Started again it goes on where it stopped: finished shards are kept.
"""

from functools import partial
from pathlib import Path

from absl import flags
from tqdm import tqdm

from configs.run import Config, encoder_names
from data_pipelines import records
from data_pipelines.encoders import Encoders, weights_of
from data_pipelines.pairs import prefetch
from launch import command
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import outputs
from world.pair_records import encode, example, render

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "folder of the records", required=True, flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 4000, "how many", lower_bound=1, flag_values=FLAGS)
KEY = flags.DEFINE_integer("key", 0, "which world", flag_values=FLAGS)

BATCH = 40  # pairs that are encoded together
SHARD = 10 * BATCH


def main(config: Config) -> None:
    outputs.require_folder("--out", OUT.value, [config.train.init_from], holds="records", owns=["."])
    records.require_place(Path(OUT.value))
    write(config, Path(OUT.value), PAIRS.value, KEY.value)
    print(f"Next: python -m launch.train --config={FLAGS['config'].value} --workdir=DIR --data.path={OUT.value}")


def write(config: Config, folder: Path, pairs: int, key: int) -> None:
    """Writes those records of `pairs` pairs of world `key` that are not in `folder` yet."""
    load_models.require_weights(config.train.init_from, config, encoder_names(config))
    records.begin(folder, config, {"world": key, "pairs": pairs, "prompts": config.train.references, "weights": weights_of(config)})
    shards = [range(i, min(i + SHARD, pairs)) for i in range(0, pairs, SHARD)]
    paths = [records.shard_path(folder, i, len(shards)) for i in range(len(shards))]
    missing = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    if missing or not (folder / records.EMPTY_TEXT_FILE).exists():
        encoders = Encoders(config, config.train.init_from)
        encoders.load()
        (text,), (rows,) = encoders.text([""])
        records.write_empty_text(folder, text[:rows])
        with tqdm(total=sum(len(shard) for shard, _ in missing), desc="encoding", unit="pair", disable=None) as bar:
            for shard, path in missing:
                with records.shard_writer(path, records.schema(config)) as append:
                    examples = [example(config, key, index, "train") for index in shard]
                    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
                    for batch, videos in prefetch(partial(render, config), batches, threads=1):
                        for record in encode(encoders, batch, videos.result()):
                            append(record)
                        bar.update(len(batch))
    ids = [example(config, key, index, "train").id for index in range(pairs)]
    records.finish(folder, config, [len(shard) for shard in shards], ids)


if __name__ == "__main__":
    command.run(main, FLAGS)
