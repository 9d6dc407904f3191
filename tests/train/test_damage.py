"""A checkpoint that is damaged: a run goes on from the whole one before it and says so; no damage is overlooked."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath

from configs.errors import RequestError
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.folders.checksums import OF_ONE
from omnitransfer_jax.folders.whole import damage
from omnitransfer_jax.methods.omnitransfer import objective
from tests.train.test_loop import parts_of_a_run
from tests.train.tiny_run import TINY, batches, train

SHORT = replace(TINY, train=replace(TINY.train, steps=4, trainable=("dit/head.*",)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run with frozen parameters, of 4 steps with checkpoints after 2 and 4."""
    workdir = tmp_path_factory.mktemp("whole")
    train(SHORT, workdir)
    return workdir


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may damage, in a folder whose name a URL would have to escape."""
    return shutil.copytree(whole, tmp_path / "100 % of:it")


def state_of(workdir):
    """The latest state."""
    _, _, like = parts_of_a_run(SHORT)
    with run_folder.open_checkpoints(workdir, SHORT.checkpoint) as checkpoints:
        state = run_folder.restore(checkpoints, like, batches(SHORT))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def largest(folder):
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty_folder(run):
    (run / "checkpoints" / "99").mkdir()


def no_values(run):
    largest(run / "checkpoints" / "4" / "trainable").unlink()


def cut_moments(run):
    file = largest(run / "checkpoints" / "4" / "progress")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def another_format(run):
    (run / "checkpoints" / "4" / "frozen" / "manifest.ocdbt").write_bytes(b"not a manifest")


@pytest.mark.parametrize(
    ("hurt", "newest", "line"),
    [
        (empty_folder, 4, "checkpoints/99: damaged, _CHECKPOINT_METADATA is absent; it is 99.damaged1 now"),
        (no_values, 2, "checkpoints/4: damaged, trainable/"),
        (cut_moments, 2, "checkpoints/4: damaged, progress cannot be read; it is 4.damaged1 now"),
        (another_format, 2, "checkpoints/4: damaged, frozen cannot be read; it is 4.damaged1 now"),
    ],
)
def test_a_run_goes_on_from_the_whole_checkpoint_before(whole, run, capsys, hurt, newest, line):
    hurt(run)
    assert run_folder.latest(run).name == str(newest)
    capsys.readouterr()
    train(SHORT, run)
    printed = capsys.readouterr().out
    assert [text for text in printed.splitlines() if "damaged" in text and line in text]
    assert ("4 steps are done, 4 are asked for" if newest == 4 else "going on after step 2") in printed
    ours, theirs = state_of(run), state_of(whole)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def test_what_is_sampled_comes_from_a_whole_checkpoint(run, capsys):
    params = objective(SHORT).params
    no_values(run)
    expected = run_folder.load_params(run, params)
    shutil.rmtree(run / "checkpoints" / "4")
    found = run_folder.load_params(run, params)
    assert all(np.array_equal(x, expected[path]) for path, x in found.items())
    assert capsys.readouterr().out.count("checkpoint 2 is taken\n") == 1


@pytest.mark.parametrize("hurt", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")], ids=["absent", "empty"])
def test_no_damage_is_overlooked(whole, run, hurt):
    """Every file of a run of an earlier version, without checksums, one after the other. Without all that are not missed it is restored
    bit for bit."""
    folder, missed = run / "checkpoints" / "4", {}
    for file in (run / "checkpoints").glob(f"*/{OF_ONE}"):
        file.unlink()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        hurt(file)
        missed[file] = damage(epath.Path(folder))
        file.write_bytes(content)
    assert damage(epath.Path(folder)) == ""
    assert missed[folder / "ema" / "manifest.ocdbt"] == "ema cannot be read"
    assert missed[folder / "data" / "_METADATA"] in ("data/_METADATA is absent", "data cannot be read")
    assert missed[largest(folder / "frozen")]
    for file in (path for path, reason in missed.items() if not reason):
        hurt(file)
    ours, theirs = state_of(run), state_of(whole)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def test_without_a_whole_checkpoint_nothing_begins_anew(run):
    shutil.rmtree(run / "checkpoints" / "2")
    cut_moments(run)
    for use in (lambda: train(SHORT, run), lambda: run_folder.latest(run)):
        with pytest.raises(RequestError, match=r"4: damaged, progress cannot be read; no other checkpoint is whole: restore it"):
            use()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (Exception("array index\n" * 300), RequestError),
        (ValueError("DATA_LOSS"), RequestError),
        (KeyError("frozen"), RequestError),
        (MemoryError("array"), MemoryError),
    ],
)
def test_what_orbax_raises_at_other_bytes_is_one_short_line(run, monkeypatch, error, raised):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(run_folder.ocp, "load", load)
    with pytest.raises(raised) as found:
        run_folder.load_params(run, objective(SHORT).params)
    if raised is RequestError:
        assert f"{run}/checkpoints/4: cannot be read ({type(error).__name__}: " in str(found.value)
        assert "move it elsewhere, and the checkpoint before it is taken" in str(found.value)
        assert len(str(found.value)) < 500
