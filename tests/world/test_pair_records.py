"""Pairs of the world, encoded many at a time, give the records that launch.encode makes of the same pixels, and training reads them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage0, stage3
from configs.buckets import bucket_configs
from configs.errors import RequestError
from data_pipelines import batches, pairs, records
from data_pipelines.clips import to_unit
from data_pipelines.encoders import Encoders
from data_pipelines.manifest import Clip, Row
from data_pipelines.pairs import encode_batch
from launch import encode_world
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder
from world import pixels, scenes, screens
from world.pair_records import encode, example, render
from world.pairs import draw_pair

TINY = stage3.get_config("tiny")
PAIRS = [example(TINY, 3, index, "train") for index in range(5)]  # one of each task


@pytest.fixture(scope="module")
def encoders():
    return Encoders(TINY, model_folder.EMBEDDED)


@pytest.fixture(scope="module")
def made(encoders):
    """The batch of `PAIRS`."""
    batch, _ = encode_batch(encoders, [pair.task for pair in PAIRS], [pair.prompt for pair in PAIRS], render(TINY, PAIRS))
    return batch


@pytest.fixture
def write(encoders, monkeypatch):
    """`encode_world.write` with the encoders that are loaded already, in shards and batches of five pairs."""
    monkeypatch.setattr(encode_world, "Encoders", lambda config, folder: encoders)
    monkeypatch.setattr(encode_world, "BATCH", 5)
    monkeypatch.setattr(encode_world, "SHARD", 5)
    return lambda folder, pairs=15, key=3: encode_world.write(TINY, folder, pairs, key)


def test_a_batch_is_the_records_of_its_rows(encoders, monkeypatch):
    """Records before they are rounded, against those of launch.encode; an appearance and a temporal pair."""
    monkeypatch.setattr(records, "to_bits", np.asarray)
    found = encode(encoders, PAIRS, render(TINY, PAIRS))
    for pair, record in list(zip(PAIRS, found, strict=True))[1:3]:
        reference, target = pixels.render(pair.reference, TINY.data.reference), pixels.render(pair.target, TINY.video)
        nowhere = Clip(Path())
        row = Row(pair.id, pair.task, nowhere, nowhere, pair.prompt)
        expected = pairs.encode(row, pairs.Pixels(reference, target, target[0] if row.is_temporal else None), encoders)
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                assert record[name].shape == value.shape, name
                np.testing.assert_allclose(record[name], value, rtol=1e-5, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)
            else:
                np.testing.assert_array_equal(record[name], value, err_msg=name)


def test_appearance_pairs_have_no_first_frame(made):
    temporal = np.array([tasks.TASKS[tasks.task_index(pair.task)].family == "temporal" for pair in PAIRS])
    assert (made.has_image == temporal).all()
    assert not made.image[~temporal].any()
    assert (made.condition[..., :4] == (temporal[:, None, None, None, None] & (np.arange(5) == 0)[:, None, None, None])).all()
    assert (made.condition[0] == made.condition[1]).all()
    for array in (made.image, made.condition, made.target, made.reference):
        assert not np.array_equal(array[2], array[3])


def test_training_reads_what_was_encoded(write, encoders, made, tmp_path):
    write(tmp_path, pairs=5)
    config = replace(TINY, data=replace(TINY.data, path=str(tmp_path), shuffle=False), train=replace(TINY.train, batch_size=5))
    with pytest.raises(RequestError, match=r"records made with weights of image and mllm and .*, but train.init_from='' has none; give"):
        batches.batches(replace(config, train=replace(config.train, init_from="")), seed=0)
    batch = next(batches.batches(config, seed=0))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32) if x.dtype == np.float32 else x, made)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    dataset = records.Records(tmp_path, config)
    assert [dataset[i]["id"].decode() for i in range(len(dataset))] == [pair.id for pair in PAIRS]
    (text,), (rows,) = encoders.text([""])
    assert (batches.empty_text(config)[:rows] == text[:rows].astype(jnp.bfloat16).astype(np.float32)).all()
    assert not batches.empty_text(config)[rows:].any()


def test_without_references_the_prompt_describes_the_target(encoders, monkeypatch):
    config = stage0.get_config("tiny")
    for index in range(5):
        pair, plain = example(config, 3, index, "train"), PAIRS[index]
        assert pair == plain._replace(prompt=scenes.caption(plain.target))
        assert plain == draw_pair(3, index, "train")
        assert pair.prompt != plain.prompt
    monkeypatch.setattr(encoders, "config", config)
    for record in encode(encoders, PAIRS, render(config, PAIRS)):
        assert not record["reference"].any()
        assert not any(name.startswith("shown_") for name in record)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(write, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    calls = []

    def counted(encoders, batch, videos):
        calls.append(batch[0].id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(encoders, batch, videos)

    monkeypatch.setattr(encode_world, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped")
    with pytest.raises(RequestError, match="unfinished records"):
        records.Records(tmp_path / "stopped", TINY)
    for _ in range(2):
        write(tmp_path / "stopped")
    assert [name.rsplit("-", 1)[1] for name in calls] == ["0", "5", "5", "10"]  # the first shard is made once, the second again
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_sizes_of_stage_0(encoders, monkeypatch, tmp_path):
    """Training reads batches of every size; a columns' record is that of the two clips side by side; what is there is kept."""
    config = stage0.get_config("tiny")
    config = replace(config, data=replace(config.data, buckets=("9x32x32", "9x32x64"), path=str(tmp_path)))
    config = replace(config, train=replace(config.train, init_from=model_folder.EMBEDDED, batch_size=2))
    monkeypatch.setattr(encoders, "config", config)
    monkeypatch.setattr(encode_world, "Encoders", lambda config, folder: encoders)
    monkeypatch.setattr(screens, "WORDS", ("above", "nowhere"))
    with pytest.raises(RequestError, match=r"its vocabulary lacks nowhere; make the folder anew with launch\.embed"):
        encode_world.write(config, tmp_path, 20, 3, two=True)
    monkeypatch.setattr(screens, "WORDS", ("above",))
    encode_world.write(config, tmp_path, 20, 3, two=True)
    kept = contents(tmp_path)
    monkeypatch.setattr(encode_world, "encode", lambda *_: pytest.fail("made again"))
    encode_world.write(config, tmp_path, 20, 3, two=True)
    assert contents(tmp_path) == kept
    with pytest.raises(RequestError, match="begun with other buckets"):
        encode_world.write(config, tmp_path, 20, 3)
    drawn = batches.batches(config, seed=0)
    shapes = {next(drawn).target.shape for _ in range(20)}
    assert shapes == {(2, *each.video.latent_shape(config.vae)) for each in bucket_configs(config).values()}
    wide = replace(bucket_configs(config)["9x32x64_9x32x32"], data=replace(config.data, buckets=()))
    dataset = records.Records(tmp_path / "9x32x64_9x32x32", wide)
    pair = next(pair for pair in map(partial(draw_pair, 3, split="train"), range(20)) if pair.id == dataset[0]["id"].decode())
    sides = np.concatenate([pixels.render(scene, config.video) for scene in (pair.target, pair.reference)], axis=2)
    expected = encoders.of_size(wide).vae.encode(jnp.asarray(to_unit(sides)[None]))[0]
    np.testing.assert_array_equal(dataset[0]["target"], np.asarray(expected.astype(jnp.bfloat16)).view(np.uint16))


def test_other_pairs_in_the_same_folder_are_refused(write, tmp_path):
    write(tmp_path, pairs=5)
    kept = contents(tmp_path)
    for change, message in (
        ({"key": 4}, r"source\.world=3 there, 4 now"),
        ({"pairs": 10}, r"source\.pairs=5 there, 10 now"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            write(tmp_path, **({"pairs": 5} | change))
        assert len(str(error.value).splitlines()) == 1
    assert contents(tmp_path) == kept
