"""Batches: the same for any number of processes and threads, each epoch a new order, and restored where they stood."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines import batches, records
from launch import command, train
from omnitransfer_jax.batch import Batch, batch_spec
from omnitransfer_jax.mesh import make_mesh, to_mesh
from tests.data_pipelines.conftest import SMOKE, random_record


def reading(config, *, batch_size=4, threads=1, **data):
    return replace(config, train=replace(config.train, batch_size=batch_size), data=replace(config.data, threads=threads, **data))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def numbers(batch):
    """Which example each sample is; its target identifies it."""
    known = [records.from_bits(random_record(n)["target"]) for n in range(12)]
    return [next(n for n, target in enumerate(known) if (target == sample).all()) for sample in batch.target]


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_what_a_batch_holds(write_records):
    config = reading(write_records(2, 3), shuffle=False)
    batch = next(batches.batches(config, seed=0))
    assert jax.tree.map(lambda x: (x.dtype.name, x.shape), batch) == Batch(
        task=("int32", (4,)),
        has_image=("float32", (4,)),
        target=("bfloat16", (4, 3, 4, 6, 16)),
        condition=("bfloat16", (4, 3, 4, 6, 20)),
        reference=("bfloat16", (4, 3, 4, 6, 16)),
        text=("bfloat16", (4, 32, 32)),
        image=("bfloat16", (4, 5, 32)),
    )
    arrived = to_mesh(batch, make_mesh(config.mesh))
    assert jax.tree.map(lambda x: (x.dtype, x.shape), arrived) == jax.tree.map(lambda x: (x.dtype, x.shape), batch_spec(config))
    assert jax.tree.all(jax.tree.map(np.array_equal, arrived, batch))
    assert batch.task.tolist() == [0, 1, 2, 3]
    assert batch.has_image.tolist() == [0, 0, 1, 1]
    for number in range(4):
        record = random_record(number)
        for name in ("target", "condition", "reference", "image"):
            assert (getattr(batch, name)[number] == records.from_bits(record[name])).all()
        rows = len(record["text"])
        assert (batch.text[number, :rows] == records.from_bits(record["text"])).all()
        assert not batch.text[number, rows:].any()
    assert batches.empty_text(config).shape == (32, 32)


@pytest.mark.parametrize("lengths", [(3, 0, 4), (1, 2)])
def test_global_batches_do_not_depend_on_the_number_of_processes(write_records, lengths):
    """Over several epochs; the second dataset is smaller than a batch."""
    config = reading(write_records(*lengths))
    alone = take(batches.batches(config, seed=3), 6)
    for count in (2, 4):
        shares = [take(batches.batches(config, seed=3, process_index=i, process_count=count), 6) for i in range(count)]
        for step, whole in enumerate(alone):
            joined = jax.tree.map(lambda *parts: np.concatenate(parts), *[share[step] for share in shares])
            assert equal(joined, whole), (count, step)


def test_neither_threads_nor_time_change_the_batches(write_records):
    config = write_records(3, 4)
    first = take(batches.batches(reading(config, threads=1), seed=5), 8)
    for threads in (1, 2, 5):
        assert all(map(equal, first, take(batches.batches(reading(config, threads=threads), seed=5), 8)))
    assert not all(map(equal, first, take(batches.batches(reading(config), seed=6), 8)))


def test_every_epoch_has_every_example_in_an_order_of_its_own(write_records):
    config = write_records(5, 7)
    stream = [number for batch in take(batches.batches(reading(config), seed=0), 9) for number in numbers(batch)]
    epochs = [stream[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(12))]}) == 4
    unshuffled = take(batches.batches(reading(config, shuffle=False), seed=0), 6)
    assert [number for batch in unshuffled for number in numbers(batch)] == [*range(12), *range(12)]


def test_a_restored_iterator_goes_on_with_the_next_batch(write_records):
    """From every state of two and a half epochs; into other numbers of threads and processes too."""
    config = reading(write_records(3, 4), threads=2)
    iterator, states, given = batches.batches(config, seed=1), [], []
    for _ in range(5):
        states.append(iterator.get_state())
        given.append(next(iterator))
    for step, state in enumerate(states):
        again = batches.batches(reading(config, threads=1), seed=1)
        next(again)
        again.set_state(state)
        assert all(map(equal, take(again, 5 - step), given[step:]))
        half = batches.batches(config, seed=1, process_index=1, process_count=2)
        half.set_state(state)
        assert equal(next(half), jax.tree.map(lambda x: x[2:], given[step]))


def test_a_wrong_request(write_records):
    with pytest.raises(RequestError, match=r"data\.path is empty: give --data\.path=DIR"):
        batches.batches(SMOKE, seed=0)
    with pytest.raises(RequestError, match=r"train\.batch_size=4: a multiple of the 3 processes"):
        batches.batches(reading(write_records(1)), seed=0, process_count=3)


def test_a_training_is_given_the_digest_of_its_records(write_records, tmp_path, monkeypatch):
    """launch.train: the same for moved records, another for other records at the old path."""
    found = []
    monkeypatch.setattr(train.loop, "train", lambda *args, data_digest, **others: found.append(data_digest))

    def run(path):
        args = ["--config=stage1:smoke", f"--workdir={tmp_path / 'run'}", f"--data.path={path}"]
        assert command.execute(train.main, train.FLAGS, args) == 0

    run(old := write_records(2).data.path)
    Path(old).rename(tmp_path / "moved")
    run(tmp_path / "moved")
    run(write_records(3).data.path)
    assert found[0] == found[1] != found[2]


def test_data_sets_are_mixed_by_weight(write_records, tmp_path):
    """The same for any number of threads and processes, from any state; every sample of the smaller one comes as often as the others."""
    first, second = write_records(5, 7, name="first"), write_records(2, 1, name="second")
    config = reading(first, more=(second.data.path,), weights=(3.0, 1.0))
    ids = batches.identify(config)
    config.validate()
    whole = take(batches.batches(config, seed=0), 12)
    for index in range(2):
        shares = take(batches.batches(reading(first, threads=3, **mixed(config)), seed=0, process_index=index, process_count=2), 12)
        assert all(
            equal(share, jax.tree.map(lambda x, i=index: x[2 * i : 2 * i + 2], batch)) for share, batch in zip(shares, whole, strict=True)
        )
    again = batches.batches(config, seed=0)
    state = [next(again), again.get_state()][1]
    other = batches.batches(config, seed=0)
    other.set_state(state)
    assert equal(next(other), whole[1])
    with pytest.raises(RequestError, match=r"data\.weights=\(1\.0,\): 1 for 2 folders"):
        reading(first, more=(second.data.path,), weights=(1.0,)).validate()
    assert ids(1) == []  # these records say no ids
    assert batches.data_digest(config) != batches.data_digest(first)


def mixed(config):
    return {"more": config.data.more, "weights": config.data.weights}


def test_the_samples_of_a_step_are_known(write_records):
    """Of each of the first steps the ids that stand in its records, of one data set and of two."""
    first, second = write_records(3, 2, name="first"), write_records(4, name="second")
    for folder, count in ((first.data.path, 5), (second.data.path, 4)):
        config = replace(SMOKE, data=replace(SMOKE.data, path=folder))
        records.finish(Path(folder), config, (3, 2) if count == 5 else (4,), [f"n{i}" for i in range(count)])
    for config in (reading(first), reading(first, more=(second.data.path,), weights=(1.0, 1.0))):
        names = batches.identify(config)
        for step, batch in enumerate(take(batches.batches(config, seed=config.seed), 6), start=1):
            assert [int(name[1:]) for name in names(step)] == numbers(batch)
