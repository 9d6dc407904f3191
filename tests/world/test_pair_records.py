"""Pairs of the world encoded many at a time are what the road of real clips makes of the same pixels, and are read as training reads."""

import copy
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage0, stage3
from configs.errors import RequestError
from data_pipelines import batches, encoders, records
from data_pipelines.manifest import Clip, Row
from launch import encode_world
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder
from world import pair_records, pixels, scenes
from world.pair_records import Encoder, example
from world.pairs import draw_pair

TINY = stage3.get_config("tiny")
PAIRS = [example(TINY, 3, index, "train") for index in range(5)]  # one of each task


@pytest.fixture(scope="module")
def encoder():
    return Encoder(TINY, model_folder.EMBEDDED)


@pytest.fixture(scope="module")
def made(encoder):
    """The arrays of `PAIRS`, the target's among them."""
    return encoder(PAIRS) | {"target": np.asarray(encoder.encode_video(encoder.draw(PAIRS).targets))}


@pytest.fixture
def write(encoder, monkeypatch):
    """`encode_world.write` with the encoder that is there already, in shards and batches of five pairs."""
    monkeypatch.setattr(encode_world, "Encoder", lambda config, folder: encoder)
    monkeypatch.setattr(encode_world, "BATCH", 5)
    monkeypatch.setattr(encode_world, "SHARD", 5)
    return lambda folder, pairs=15, key=3: encode_world.write(TINY, folder, pairs, key)


def test_it_is_the_road_of_real_clips(encoder, monkeypatch):
    """Records before they are rounded; an appearance and a temporal pair."""
    monkeypatch.setattr(encoders, "to_bits", np.asarray)
    monkeypatch.setattr(pair_records, "to_bits", np.asarray)
    frozen = encoders.load_encoders(TINY, model_folder.EMBEDDED)
    found = encoder.records(PAIRS)
    for pair, record in list(zip(PAIRS, found, strict=True))[1:3]:
        reference, target = pixels.render(pair.reference, TINY.data.reference), pixels.render(pair.target, TINY.video)
        nowhere = Clip(Path())
        row = Row(pair.id, pair.task, nowhere, nowhere, pair.prompt)
        expected = encoders.encode(row, encoders.Pixels(reference, target, target[0] if row.is_temporal else None), frozen, TINY)
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                assert record[name].shape == value.shape, name
                np.testing.assert_allclose(record[name], value, rtol=1e-5, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)
            else:
                np.testing.assert_array_equal(record[name], value, err_msg=name)


def test_what_a_pair_has_not_is_nothing(made):
    temporal = np.array([tasks.TASKS[tasks.task_index(pair.task)].family == "temporal" for pair in PAIRS])
    assert (made["has_image"] == temporal).all()
    assert not made["image"][~temporal].any()
    assert (made["condition"][..., :4] == (temporal[:, None, None, None, None] & (np.arange(5) == 0)[:, None, None, None])).all()
    assert (made["condition"][0] == made["condition"][1]).all()
    for name in ("image", "condition", "target", "reference"):
        assert not np.array_equal(made[name][2], made[name][3]), name


def test_training_reads_what_was_encoded(write, encoder, made, tmp_path):
    write(tmp_path, pairs=5)
    config = replace(TINY, data=replace(TINY.data, path=str(tmp_path), shuffle=False), train=replace(TINY.train, batch_size=5))
    batch = next(batches.batches(config, seed=0))
    names = {"target", "condition", "reference", "image", "text", "task", "has_image"}
    assert batch.keys() == names | {"mllm_inputs"}
    for name in names:
        expected = made[name].astype(jnp.bfloat16).astype(np.float32) if made[name].dtype == np.float32 else made[name]
        np.testing.assert_array_equal(batch[name], expected, err_msg=name)
    for name, array in made["mllm_inputs"].items():
        expected = array.astype(jnp.bfloat16).astype(np.float32) if name == "features" else array
        np.testing.assert_array_equal(batch["mllm_inputs"][name], expected, err_msg=name)
    dataset = records.Records(tmp_path, config)
    assert [dataset[i]["id"].decode() for i in range(len(dataset))] == [pair.id for pair in PAIRS]
    (text,), (rows,) = encoder.text([""])
    assert (batches.empty_text(config)[:rows] == text[:rows].astype(jnp.bfloat16).astype(np.float32)).all()
    assert not batches.empty_text(config)[rows:].any()


def test_a_network_without_references_is_told_everything(encoder):
    config = stage0.get_config("tiny")
    for index in range(5):
        pair, plain = example(config, 3, index, "train"), PAIRS[index]
        assert pair == plain._replace(prompt=scenes.caption(plain.target))
        assert plain == draw_pair(3, index, "train")
        assert pair.prompt != plain.prompt
    blind = copy.copy(encoder)
    blind.config = config
    found = blind([example(config, 3, index, "train") for index in range(5)])
    assert not found["reference"].any()
    assert "mllm_inputs" not in found


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(write, encoder, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    plain, seen = encoder.records, []

    def counted(pairs, drawn):
        seen.append(pairs[0].id)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(pairs, drawn)

    monkeypatch.setattr(encoder, "records", counted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped")
    with pytest.raises(RequestError, match="unfinished records"):
        records.Records(tmp_path / "stopped", TINY)
    for _ in range(2):
        write(tmp_path / "stopped")
    assert [name.rsplit("-", 1)[1] for name in seen] == ["0", "5", "5", "10"]  # the first shard is made once, the second again
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


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
