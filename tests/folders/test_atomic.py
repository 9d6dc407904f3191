"""A file written at once: whole under its name or absent, whoever interrupts, and no rest beside it."""

import hashlib
from pathlib import Path

import pytest

from configs.errors import RequestError
from omnitransfer_jax.folders import atomic


def test_a_file_is_written_with_its_folders_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    atomic.write_whole(path, "one")
    atomic.write_whole(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write_whole(path, b"earlier")

    def interrupt(number):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_whole(path, b"new")
    assert path.read_bytes() == b"earlier"
    assert not [found for found in tmp_path.iterdir() if found != path and not found.name.startswith(".")]


def test_the_digest_is_that_of_the_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert atomic.sha256(path) == hashlib.sha256(b"content").hexdigest()


def test_a_new_folder_appears_whole_and_can_be_written_again_after_an_interruption(tmp_path):
    target = tmp_path / "a" / "folder"

    def fail(error):
        with atomic.new_folder(target) as folder:
            (folder / "part").write_text("half")
            raise error

    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error):
            fail(error)
        assert not list(target.parent.iterdir())
    (target.parent / ".folder.unfinished" / "part").mkdir(parents=True)  # a process was killed
    target.mkdir()
    with atomic.new_folder(target) as folder:
        assert not list(folder.iterdir())
        (folder / "file").write_text("whole")
        assert not list(target.iterdir())
    assert [path.relative_to(target.parent) for path in sorted(target.parent.rglob("*"))] == [Path("folder"), Path("folder/file")]
    with pytest.raises(RequestError, match="folder: not empty"), atomic.new_folder(target):
        pass
    assert (target / "file").read_text() == "whole"
