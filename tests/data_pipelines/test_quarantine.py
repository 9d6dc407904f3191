"""Damaged records in a training: set aside by name, the same batches for any readers, the list in the checkpoint, and a limit.

Two processes that tell each other: python -m pytest -n 0 -m slow tests/data_pipelines/test_quarantine.py
"""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.errors import RequestError
from configs.run import CheckpointConfig
from data_pipelines import batches, records
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.quarantine import Damage, Quarantine
from omnitransfer_jax.train.step import TrainState
from tests.data_pipelines.conftest import random_record
from tests.data_pipelines.test_batches import equal, numbers, reading, take

GOOD, BAD = range(12), (4, 9)


@pytest.fixture
def damaged(write_records):
    """Twelve records in two shards, of which numbers 4 and 9 have a changed bit; and a function that mends them."""
    config = write_records(6, 6)
    folder = Path(config.data.path)
    records.finish(folder, config, (6, 6), [f"n{i}" for i in range(12)])
    kept = {path: path.read_bytes() for path in folder.glob("records-train*")}
    for number in BAD:
        path = Path(records.Records(folder, config).shard(number))
        content = bytearray(path.read_bytes())
        content[content.find(random_record(number)["target"].tobytes()[:64])] ^= 1
        path.write_bytes(bytes(content))
    return config, lambda: [path.write_bytes(content) for path, content in kept.items()]


def stream(config, count, **given):
    return [number for batch in take(batches.batches(config, seed=0, **given), count) for number in numbers(batch)]


def test_the_next_good_record_is_read_in_its_place(damaged):
    """In every epoch, it and nothing else; the names of a step are those of the records that are read."""
    config, mend = damaged
    aside = Quarantine(2)
    found = stream(reading(config), 9, quarantine=aside)
    names = batches.identify(reading(config), aside)
    assert [int(name[1:]) for step in range(1, 10) for name in names(step)] == found
    assert sorted(aside.places) == [(0, 4), (0, 9)]
    assert {damage.name for damage in aside.news()} == {"n4", "n9"}
    mend()
    assert found == [{4: 5, 9: 10}.get(number, number) for number in stream(reading(config), 9)]


def test_batches_are_the_same_for_any_processes_and_threads(damaged):
    config, _ = damaged
    whole = take(batches.batches(reading(config), seed=0), 9)
    for count, threads in ((2, 3), (4, 1)):
        shares = [
            take(batches.batches(reading(config, threads=threads), seed=0, process_index=i, process_count=count), 9) for i in range(count)
        ]
        for step, batch in enumerate(whole):
            assert equal(jax.tree.map(lambda *parts: np.concatenate(parts), *[share[step] for share in shares]), batch)


def test_a_run_that_goes_on_sets_aside_the_same_records_mended_or_not(damaged, tmp_path):
    """From every step: the list in the checkpoint is what was met up to it, and the batches are those of a run that never stopped."""
    config, mend = damaged
    config, zero, given, aside = reading(config, threads=3), np.zeros((), np.int32), [], Quarantine(2)
    data = batches.batches(config, seed=0, quarantine=aside)
    met = []
    for step in range(1, 7):
        given.append(next(data))
        met.append(list(aside.places))
        with run_folder.open_checkpoints(tmp_path / str(step), CheckpointConfig()) as checkpoints:
            run_folder.save(checkpoints, step, state := TrainState(zero, {"a": zero}, {}, {}, {}, zero), data, aside)
    assert met[0] != met[-1], "all are met at once: the test shows nothing"
    for is_mended in (False, True):
        for step in range(1, 7):
            restored = Quarantine(2)
            again = batches.batches(config, seed=0, quarantine=restored)
            with run_folder.open_checkpoints(tmp_path / str(step), CheckpointConfig()) as checkpoints:
                run_folder.restore(checkpoints, state, again, restored)
            assert restored.places == met[step - 1]
            if not is_mended or len(restored.places) == len(BAD):
                assert all(map(equal, take(again, 6 - step), given[step:]))
        mend()


def test_too_many_end_the_run_in_one_line(damaged):
    config, _ = damaged
    config = reading(config, quarantine=1)
    with pytest.raises(RequestError, match=r"record (4|9) .* cannot be read.*2 damaged records are more than data\.quarantine=1"):
        stream(config, 9)
    with pytest.raises(RequestError, match=r"record (4|9) .* cannot be read .*remove this shard, and run"):
        stream(replace(config, data=replace(config.data, quarantine=0)), 9)


def test_a_shard_that_cannot_be_opened_is_not_set_aside_record_by_record(damaged):
    config, _ = damaged
    path = Path(records.Records(Path(config.data.path), config).shard(0))
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(RequestError, match="cannot be read") as error:
        stream(reading(config), 9)
    assert not isinstance(error.value, records.DamagedRecordError)


def test_what_a_batch_met_that_is_not_used_is_forgotten():
    aside, used, unused = Quarantine(3), Damage((0, 1), "a", ""), Damage((0, 2), "b", "")
    aside.take([used])
    assert aside.news() == [used]
    aside.take([used, unused])
    aside.take_back()
    assert aside.places == [(0, 1)]
    aside.take([unused])
    assert aside.news() == [unused]
    with pytest.raises(RequestError, match=r"^set aside before .*; 2 damaged records are more than data\.quarantine=1$"):
        Quarantine(1).restore(aside.state)


TWO = """
import sys
import jax
from omnitransfer_jax.quarantine import Damage, Quarantine
index, port = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 2, index)
aside = Quarantine(2)
aside.take([Damage((0, 5), "a", "r"), *([Damage((1, 2), "b", "r")] if index else [])])
aside.share()
print(aside.places, len(aside.news()), flush=True)
aside.share()
print(aside.places, flush=True)
"""


@pytest.mark.slow
def test_processes_learn_what_the_others_have_set_aside():
    """Of one record both know, of the other the second alone; it told of both, the first of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [subprocess.Popen([sys.executable, "-c", TWO, str(i), str(port)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    first, second = ([line for line in job.communicate(timeout=300)[0].splitlines() if line.startswith("[(")] for job in jobs)
    assert first == ["[(0, 5), (1, 2)] 1", "[(0, 5), (1, 2)]"]
    assert second == ["[(0, 5), (1, 2)] 2", "[(0, 5), (1, 2)]"]
