"""Buckets: declared sizes, which pairs go where, and batches of one size in one order for any number of threads and processes.

The whole way from clips to a training: python -m pytest -n 0 -m slow tests/data_pipelines/test_buckets.py
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs.buckets import bucket_configs
from configs.errors import RequestError
from data_pipelines import batches, buckets, clips, example, records
from data_pipelines.buckets import Size
from launch import command, encode, train
from tests.data_pipelines.conftest import SMOKE, random_record

WIDE, TALL, LONG = "9x32x48", "9x48x32/5x32x32", "17x32x48/17x32x48"
SMALL = ["--config=stage1:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1"]


def bucketed(config=SMOKE, names=(WIDE, TALL), **data):
    return replace(config, data=replace(config.data, **{"buckets": names, **data}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("9x32",), r"data.buckets='9x32': FRAMESxHEIGHTxWIDTH"),
        (("9x32x48/",), "FRAMESxHEIGHTxWIDTH"),
        (("10x32x48",), r"data.buckets: target of 10x32x48/9x32x48.frames=10: the causal autoencoder needs 4n\+1, the nearest is 9"),
        (("9x32x48/9x30x48",), r"reference of .*height=30: a multiple of 16"),
        (("9x32x48", "9x32x48/9x32x48"), "there twice"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(names, message):
    with pytest.raises(RequestError, match=message):
        bucketed(names=names).validate()


def test_what_a_bucket_is():
    found = bucket_configs(bucketed())
    assert list(found) == ["9x32x48_9x32x48", "9x48x32_5x32x32"]
    tall = found["9x48x32_5x32x32"]
    assert (tall.video.height, tall.video.width, tall.video.fps) == (48, 32, 8)
    assert (tall.data.reference.frames, tall.data.reference.height) == (5, 32)
    assert bucket_configs(SMOKE) == {"": SMOKE}


def test_a_pair_goes_where_it_fits():
    configs = bucket_configs(bucketed(names=(WIDE, TALL, LONG)))
    wide, tall, long = configs
    enough = Size(1.0, 60.0)
    assert buckets.best(Size(1.5, 1.2), enough, configs) == wide  # 9 frames at 8 fps last 1.1 s, 17 last 2.1 s
    assert buckets.best(Size(1.5, 3.0), enough, configs) == long
    assert buckets.best(Size(1.5, 3.0), Size(1.0, 1.1), configs) == wide, "the reference is too short for the long one"
    assert buckets.best(Size(0.6, 3.0), enough, configs) == tall
    assert buckets.best(Size(1.5, 0.1), Size(1.0, 0.1), configs) in (wide, tall), "the fewest frames, where it is refused"


@pytest.fixture
def written(tmp_path):
    """write(name, wide, tall): a data set with so many records of each size, and ids that tell them apart."""

    def write(name, *counts):
        folder, config, rows = tmp_path / name, bucketed(), {}
        for (bucket, each), count in zip(bucket_configs(config).items(), counts, strict=True):
            rows |= {f"{name}{bucket}{n}": bucket for n in range(count)}
            if not count:
                continue
            records.begin(folder / bucket, each, {"world": "random"})
            records.write_empty_text(folder / bucket, np.ones((1, SMOKE.text.dim), np.float32))
            with records.shard_writer(records.shard_path(folder / bucket, 0, 1), records.schema(each)) as append:
                for n in range(count):
                    append(random_record(n, each) | {"id": f"{name}{bucket}{n}"})
            records.finish(folder / bucket, each, [count], [f"{name}{bucket}{n}" for n in range(count)])
        (folder / "buckets.json").write_text(json.dumps({"buckets": list(bucket_configs(config)), "source": {}, "rows": rows}))
        return str(folder)

    return write


def take(config, count, **given):
    iterator = batches.batches(config, seed=3, **given)
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_batches_of_one_size_in_one_order(written):
    """For 1, 2 and 4 processes and 1 to 3 threads; restored at every step; every record as often as the weights say."""
    config = bucketed(path=written("a", 6, 3), more=(written("b", 2, 0),), weights=(3.0, 1.0), threads=1)
    config = replace(config, seed=3, train=replace(config.train, batch_size=4))
    whole = take(config, 24)
    shapes = [batch.target.shape[1:4] for batch in whole]
    assert set(shapes) == {(3, 4, 6), (3, 6, 4)}
    assert all(
        batch.reference.shape[1:4] == ((3, 4, 6) if shape == (3, 4, 6) else (2, 4, 4)) for batch, shape in zip(whole, shapes, strict=True)
    )
    assert shapes.count((3, 6, 4)) == 6, "a third of three quarters of the samples"
    for count in (2, 4):
        threaded = replace(config, data=replace(config.data, threads=3))
        shares = [take(threaded, 24, process_index=i, process_count=count) for i in range(count)]
        for step, batch in enumerate(whole):
            assert same(jax.tree.map(lambda *parts: np.concatenate(parts), *[share[step] for share in shares]), batch)
    iterator, states = batches.batches(config, seed=3), []
    for _ in range(8):
        states.append(iterator.get_state())
        next(iterator)
    for step, state in enumerate(states):
        again = batches.batches(config, seed=3)
        again.set_state(state)
        assert same(next(again), whole[step])


def test_the_samples_of_a_step_are_known_in_buckets_too(written):
    config = bucketed(path=written("a", 5, 3), threads=1)
    names, configs = batches.identify(config), bucket_configs(config)
    known = {f"a{name}{n}": records.from_bits(random_record(n, each)["target"]) for name, each in configs.items() for n in range(5)}
    iterator = batches.batches(config, seed=config.seed)
    for step in range(1, 7):
        for name, target in zip(names(step), next(iterator).target, strict=True):
            assert np.array_equal(known[name], target)


def test_records_of_other_sizes_are_refused(written, write_records):
    path = written("a", 2, 2)
    for config, message in (
        (bucketed(path=path, buckets=()), "records of several sizes; name those to read with --data.buckets"),
        (bucketed(write_records(2)), "records of one size; leave out --data.buckets"),
        (bucketed(path=path, names=(WIDE, LONG)), r"has no 17x32x48/17x32x48; it has 9x32x48/9x32x48, 9x48x32/5x32x32"),
    ):
        with pytest.raises(RequestError, match=message):
            batches.batches(config, seed=0)


@pytest.mark.slow  # a minute: four programs are compiled
def test_clips_of_two_shapes_are_encoded_checked_and_trained(tmp_path, capsys):
    """The whole way: --check, encode twice, dry run, a training that compiles each size once."""
    manifest = example.write_example(tmp_path / "clips")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:3]
    tall = clips.read_clip(tmp_path / "clips" / rows[0]["target"], frames=32, fps=16, height=96, width=64)
    clips.write_clip(tmp_path / "clips" / "tall.mp4", tall, 16)
    rows[0]["target"] = "tall.mp4"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1] | {"id": "gone", "target": "gone.mp4"}]))
    out, given = tmp_path / "records", ["--data.buckets", WIDE, TALL]

    def run(module, *args):
        code = command.execute(module.main, module.FLAGS, [*SMALL, *given, *args])
        return code, capsys.readouterr().out

    code, said = run(encode, f"--manifest={manifest}", "--check")
    assert code == 0
    assert "         9x32x48          9x32x48        3        2" in said
    assert "         9x48x32          5x32x32        1        1" in said
    assert "a training compiles 2 program(s)" in said
    code, said = run(encode, f"--manifest={manifest}", f"--out={out}")
    assert code == 0
    assert f"--data.path={out} --data.buckets {WIDE} {TALL}" in said
    written = {path: path.stat().st_mtime_ns for path in out.glob("*x*/records-*")}
    assert len(written) == 2
    assert run(encode, f"--manifest={manifest}", f"--out={out}")[0] == 0
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*x*/records-*")}, "finished shards are kept"
    code, said = run(train, "--dry_run")
    assert "2 programs are compiled before the first step" in said
    code, said = run(train, f"--data.path={out}", f"--workdir={tmp_path / 'run'}", "--train.steps=6", "--train.batch_size=2")
    assert code == 0
    assert said.count("compiled in") == 2
    assert said.index("step 1/6") > said.rindex("compiled in")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    work = [round(line["tokens_per_second"] * line["seconds"]) for line in lines]
    assert set(work) == {2 * (18 + 18), 2 * (18 + 8)}, "tokens of the size of each step"
