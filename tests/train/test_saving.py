"""A disk that refuses: training goes on, saves again, and waits if it must; what is kept is what can be verified."""

import json
from dataclasses import replace

import pytest
from etils import epath

from omnitransfer_jax.folders import checkpoints, checksums, run_folder
from omnitransfer_jax.train import log, saving
from tests.train.tiny_run import TINY, train

FULL = OSError(28, "No space left on device", "a file")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run on a disk that is well."""
    workdir = tmp_path_factory.mktemp("whole")
    train(TINY, workdir)
    return workdir


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(saving, "RETRIES", (0.0, 0.05))
    monkeypatch.setattr(saving, "PAUSE", 0.05)


def refuse(monkeypatch, module, name, calls):
    """Calls of these numbers, from 1 on, find the disk full."""
    plain, count = getattr(module, name), [0]

    def patched(*args, **named):
        count[0] += 1
        if count[0] in calls:
            raise FULL
        return plain(*args, **named)

    monkeypatch.setattr(module, name, patched)
    return count


def losses(workdir):
    return [(line["step"], line["loss"]) for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.usefixtures("impatient")
def test_a_save_that_is_refused_is_tried_again(whole, tmp_path, monkeypatch, capsys):
    """The second one is refused, here its checksums; the checkpoint before stays until there is another."""
    refuse(monkeypatch, checksums, "write", {2})
    train(TINY, tmp_path)
    out = capsys.readouterr().out
    assert "not saved, a file: No space left on device; training goes on, the last checkpoint is that of step 2; free some space" in out
    assert "saved again" in out
    assert losses(tmp_path) == losses(whole)
    assert run_folder.steps_done(tmp_path) == 8


@pytest.mark.usefixtures("impatient")
def test_a_run_waits_at_its_end_until_it_can_be_saved(whole, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, checksums, "write", set(range(2, 9)))
    train(TINY, tmp_path)
    assert "training waits until it can be saved: free some space; then it goes on by itself" in capsys.readouterr().out
    assert run_folder.steps_done(tmp_path) == 8
    assert losses(tmp_path) == losses(whole)


@pytest.mark.usefixtures("impatient")
def test_lines_of_the_log_wait_for_the_disk(whole, tmp_path, monkeypatch):
    """Also one of which a part was written; no checkpoint is ahead of the log."""
    plain, count = log.os.write, [0]

    def write(file, content):
        count[0] += 1
        if count[0] in (3, 4, 5):
            plain(file, content[: len(content) // 2])
            raise FULL
        return plain(file, content)

    class System:
        def __getattr__(self, name):
            return write if name == "write" else getattr(log_os, name)

    log_os = log.os
    monkeypatch.setattr(log, "os", System())
    train(TINY, tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_another_error_of_a_save_is_raised(tmp_path, monkeypatch):
    def broken(*args):
        raise KeyError("a bug")

    monkeypatch.setattr(checksums, "write", broken)
    with pytest.raises(KeyError, match="a bug"):
        train(TINY, tmp_path)


def test_the_last_checkpoint_that_can_be_verified_is_never_removed(tmp_path, monkeypatch):
    """With `checkpoint.keep=1`, whenever a process dies: after every step of the thread that saves there is a verified one."""
    seen = []
    plain = checksums.write

    def write(folder, *args):
        seen.append([step for step in steps(tmp_path) if checksums.known(tmp_path / "checkpoints" / str(step))])
        plain(folder, *args)

    monkeypatch.setattr(checksums, "write", write)
    train(replace(TINY, checkpoint=replace(TINY.checkpoint, keep=1)), tmp_path)
    assert seen == [[], [2], [4], [6]]
    assert steps(tmp_path) == [8]


def test_what_a_refused_save_has_left_is_removed_at_the_end(tmp_path):
    with checkpoints.Checkpoints(epath.Path(tmp_path), keep=2):
        (tmp_path / "4.orbax-checkpoint-tmp" / "trainable").mkdir(parents=True)
    assert not list(tmp_path.iterdir())
