"""Several processes of one run: each axis of the mesh across the border between two, and processes that are not of one mind.

The quick tests start two processes once (and test_loop.py has `data` across their border, with a signal). Every axis, trained, saved and
restored by two processes, and every kind of disagreement between real ones, are

    python -m pytest -o faulthandler_timeout=0 -m slow -n 0 tests/train/test_processes.py
"""

import json
import socket
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from configs.errors import RequestError
from configs.kinds import flat
from omnitransfer_jax.folders import processes
from tests.train.test_loop import left_by, lines, saved_steps, start_process
from tests.train.tiny_run import TINY, train


def run_two(workdir, *options, one=(), other=()):
    """Exit codes, outputs and errors of two processes of one device each, with some options of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [
        start_process(workdir, f"port={port}", "processes=2", f"process={i}", *options, *own, devices=1)
        for i, own in enumerate((one, other))
    ]
    found = [process.communicate() for process in both]
    return [(process.returncode, *texts) for process, texts in zip(both, found, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run of 8 steps by one device."""
    workdir = tmp_path_factory.mktemp("whole")
    train(TINY, workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["slices", "data", "heads", "keys"])
def test_each_axis_across_the_border(axis, whole, tmp_path):
    """Two processes train and save, two others restore and go on; loss, batches and weights are those of one device."""
    for steps in (4, 8):
        for code, _, errors in run_two(tmp_path, f"{axis}=2", f"steps={steps}"):
            assert code == 0, errors
        assert saved_steps(tmp_path)[-1] == str(steps)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    last = tmp_path / "checkpoints" / "8"
    assert {path.name for path in last.glob("checksums.*")} == {"checksums.0-of-2.json", "checksums.1-of-2.json"}
    ours, theirs = left_by(tmp_path), left_by(whole)
    np.testing.assert_array_equal(ours["next"], theirs["next"])
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)  # a mesh changes rounding, and steps carry it on
    for name in theirs:
        if name.startswith(".trainable"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)


def assert_refused(found, message):
    """Both processes end as wrong requests do, and say why; nothing hangs."""
    for code, _, errors in found:
        assert code != 0
        assert message in errors.splitlines()[-1], errors


def test_processes_of_another_configuration_are_refused(tmp_path):
    found = run_two(tmp_path, "data=2", other=["seed=5"])
    assert_refused(found, "RequestError: --seed: '5' in process 1, '0' in process 0; start all processes with the same command")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [("code=7", "code: '7' in process 1"), ("data_digest=7", "digest of the data: '7' in process 1, '' in process 0")],
)
def test_processes_of_other_code_or_data_are_refused(option, message, tmp_path):
    assert_refused(run_two(tmp_path, "data=2", other=[option]), message)


@pytest.fixture
def of_three(monkeypatch):
    """require_same as process 0 of three calls it, where the others have what is given."""

    def call(mine, *others):
        def gathered(text, room):
            assert len(text.encode()) <= room
            return [text, *(json.dumps({name: str(value) for name, value in each.items()}) for each in others)]

        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(processes, "gathered", gathered)
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.stack([x, x, x]))
        processes.require_same(mine)

    return call


def test_what_differs_is_named(of_three):
    fields = {f"--{name}": value for name, value in flat(asdict(TINY)).items()}
    other = {f"--{name}": value for name, value in flat(asdict(replace(TINY, seed=3, train=replace(TINY.train, batch_size=4)))).items()}
    code = {"code": processes.code()}
    of_three(fields, fields | code, fields | code)
    with pytest.raises(RequestError, match=r"^--train\.batch_size: '4' in process 2, '2' in process 0, and 1 more differ; start all"):
        of_three(fields, fields | code, other | code)
    with pytest.raises(RequestError, match=r"^code: 'another' in process 1, '[0-9a-f]{12}, jax .*' in process 0; start all"):
        of_three(fields, fields | {"code": "another"}, fields | code)
    with pytest.raises(RequestError, match=r"^digest: 'b' in process 1, 'a' in process 0"):
        of_three({"digest": "a"}, {"digest": "b"} | code, {"digest": "a"} | code)
