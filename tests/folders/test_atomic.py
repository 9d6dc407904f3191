"""A file written at once: whole under its name or absent, whoever interrupts, and no rest beside it."""

import hashlib

import pytest

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
