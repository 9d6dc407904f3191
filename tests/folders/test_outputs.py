"""Where an output may lie: it can be written there, and no input is written over. What was tried leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from configs import stage1
from configs.errors import RequestError
from omnitransfer_jax.folders import model_folder, outputs, run_folder

SMOKE = stage1.get_config("smoke")
EACH = pytest.mark.parametrize("check", [outputs.require_file, outputs.require_folder, outputs.require_new_folder])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_nothing").symlink_to("nowhere/x")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def everything(folder):
    return sorted(map(str, folder.rglob("*")))


@EACH
@pytest.mark.parametrize("path", ["new", "folder/new", "a/b/c", "new/../other", "file/../x", "é x", "gs://bucket/x"])
def test_a_place_that_can_be_written(here, check, path):
    before = everything(here)
    if path == "file/../x":  # a file has no parent
        with pytest.raises(RequestError, match="cannot be written"):
            check("--out", path)
    else:
        check("--out", path)
    assert everything(here) == before


@EACH
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", r"^--out='': empty; give "),
        ("file/x", r"/file is no folder\)"),
        ("file/x/y", r"/file is no folder\)"),
        ("to_nothing/x", r"/to_nothing is no folder\)"),
        ("/proc/x", "cannot be written"),
        ("/proc/x/y", "cannot be written"),
        ("/sys/x", "cannot be written"),
        ("n" * 300, "File name too long"),
        ("a/" * 2100 + "x", r"\.\.\.: cannot be written \(File name too long"),
        ("loop/x", "/loop is no folder"),
        ("/dev/null", "a folder, or no file; give|a file is there"),
    ],
)
def test_a_place_that_cannot(here, check, path, reason):
    before = everything(here)
    with pytest.raises(RequestError, match=reason) as error:
        check("--out", path)
    assert str(error.value).startswith("--out=")
    assert len(str(error.value)) < 600
    assert everything(here) == before


@EACH
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOSPC])
def test_what_the_system_refuses_is_one_line(here, check, code, monkeypatch):
    """As on a disk that is read-only, which the superuser of a test cannot make of a folder."""

    def refuse(self, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(self))

    for name in ("mkdir", "touch"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            with pytest.raises(RequestError, match=rf"^--out=new: cannot be written \({os.strerror(code)}\); give another place$"):
                check("--out", "new")
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("check", "path", "reason"),
    [
        (outputs.require_file, "folder", "a folder, or no file; give the name of a file in it"),
        (outputs.require_file, "f" * 220, "File name too long"),  # atomic.write_whole writes beside it under a longer name
        (outputs.require_folder, "file", "a file is there, or a link to nothing; give a folder"),
        (outputs.require_folder, "to_nothing", "a file is there, or a link to nothing; give a folder"),
        (outputs.require_new_folder, ".", "not empty; give a new folder, or empty this one"),
        (outputs.require_new_folder, "f" * 250, "File name too long"),  # atomic.new_folder too
    ],
)
def test_what_one_kind_of_output_cannot_be(here, check, path, reason):
    with pytest.raises(RequestError, match=reason):
        check("--out", path)


@pytest.mark.parametrize("name", ["file", "./file", "folder/../file", "links/file", "soft", "hard"])
def test_no_input_is_written_over_by_any_of_its_names(here, name, monkeypatch):
    (here / "links").symlink_to(".")
    (here / "soft").symlink_to("file")
    os.link("file", "hard")
    for read in ("file", str(here / "file"), "links/file", "soft", "hard"):
        with pytest.raises(RequestError, match=rf"^--out={name}: this command reads it; give another name$"):
            outputs.require_file("--out", name, ["", "embedded", "absent", read])
    outputs.require_file("--out", name, ["", "absent", "folder"])
    monkeypatch.setattr(Path, "samefile", lambda self, other: True)  # as where capitals do not count
    with pytest.raises(RequestError, match="this command reads it"):
        outputs.require_file("--out", "FILE", ["file"])


def test_no_folder_that_is_read_is_written_into(here):
    (here / "link").symlink_to("folder")
    for name in ("folder", "link", "folder/."):
        with pytest.raises(RequestError, match="this command reads it; give another name"):
            outputs.require_folder("--out", name, ["folder"])
    outputs.require_folder("--out", "folder/new", ["folder"])
    outputs.require_folder("--out", "folder", ["folder/x"])
    for owned, read in ((".", "folder/x"), (".", "link/x/y"), ("checkpoints", "folder/checkpoints/8")):
        with pytest.raises(RequestError, match=f"this command reads {read}, where it would write"):
            outputs.require_folder("--out", "folder", [read], owns=[owned])
    with pytest.raises(RequestError, match="where it would write"):  # atomic.new_folder removes it
        outputs.require_new_folder("--out", "new", [".new.unfinished"])


def test_a_folder_of_another_kind_is_left_alone(here):
    run_folder.write_config(here / "run", SMOKE)
    model_folder.write_model(here / "model", {"dit": SMOKE.dit})
    (here / "records").mkdir()
    (here / "records" / "records.json").write_text("{}")
    for name, what in {"run": "the workdir of a run", "model": "a folder of imported weights", "records": "a folder of records"}.items():
        outputs.require_folder("--out", name, holds=name)
        for holds in {"", "run", "model", "records"} - {name}:
            with pytest.raises(RequestError, match=f"--out={name}: {what}; give another folder"):
                outputs.require_folder("--out", name, holds=holds)
    for path, home in {"run/checkpoints": "run", "run/checkpoints/8/x": "run", "model/dit/x": "model", "model/tokenizer": "model"}.items():
        for check in (outputs.require_file, outputs.require_folder):
            with pytest.raises(RequestError, match=f"--out={path}: inside of .*/{home}, "):
                check("--out", path)
    outputs.require_file("--out", "run/sample.mp4", ["run"])
    outputs.require_new_folder("--out", "run/exported", ["run"])
