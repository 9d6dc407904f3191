"""Bits that flip in the files of a checkpoint: none is loaded, whole checkpoints are never taken for damaged."""

import random
import re
import shutil
from collections import defaultdict
from dataclasses import replace

import grain
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from configs import stage1
from configs.errors import RequestError
from configs.run import CheckpointConfig
from launch import command as launch_command
from launch import export, sample
from omnitransfer_jax.folders import checksums, model_folder, run_folder
from omnitransfer_jax.models.omnitransfer import Conditions
from tests.folders.test_run_folder import State
from tests.train.tiny_run import TINY

SMOKE = stage1.get_config("smoke")
PLACES, OTHER_PLACES = 40, 4  # in the files of values of each kind, and in other files
RNG = np.random.default_rng(0)
LEAVES = {
    "blocks.kernel": RNG.standard_normal((2, 60, 40)).astype(np.float32),
    "norm.scale": RNG.standard_normal(40).astype(ml_dtypes.bfloat16),
    "step": np.array([3], np.float32),
}


def state(step):
    return State(np.array(step), LEAVES, {"frozen": RNG.standard_normal(500)}, {"mu": RNG.standard_normal(300)}, LEAVES, np.array(0))


def data():
    return iter(grain.MapDataset.range(10).to_iter_dataset())


def save(workdir, *steps):
    with run_folder.open_checkpoints(workdir, CheckpointConfig(keep=9)) as checkpoints:
        for step in steps:
            run_folder.save(checkpoints, step, state(step), data())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run with checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("run")
    run_folder.write_config(workdir, TINY)
    save(workdir, 2, 4)
    return workdir


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose part `vae` is an Orbax checkpoint and whose part `text` is one file."""
    folder = tmp_path_factory.mktemp("model")
    model_folder.save_part(folder, "vae", LEAVES.items())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    checksums.write(folder / "tokenizer")
    return folder


def by_kind(folder):
    """The files of a folder by kind: names that are numbers or digests count as one."""
    kinds = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        parts = path.relative_to(folder).parts
        kinds["/".join((*parts[:-1], "VALUES") if "d" in parts[:-1] else parts)].append(path)
    return kinds


def flips(folder, of=""):
    """Damages `folder` at seeded places, in files of the kinds that contain `of`; yields each place while its bit is flipped."""
    draw = random.Random(0)
    for kind, files in by_kind(folder).items():
        if of not in kind:
            continue
        for _ in range(PLACES if "VALUES" in kind or kind.endswith("safetensors") else OTHER_PLACES):
            file = draw.choice(files)
            content = file.read_bytes()
            if not content:
                continue
            at, bit = draw.randrange(len(content)), draw.randrange(8)
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            yield f"{kind}: bit {bit} of byte {at}"
            file.write_bytes(content)


def test_a_run_does_not_go_on_from_flipped_bits(run):
    folder, count = run / "checkpoints" / "4", 0
    assert {kind.partition("/")[0] for kind in by_kind(folder)} >= {"trainable", "frozen", "ema", "progress", "data", checksums.OF_ONE}
    for place in flips(folder):
        newest, damaged = run_folder._newest_whole(run)
        assert (newest.name, len(damaged)) == ("2", 1), place
        count += 1
    assert count > 8 * PLACES
    assert run_folder.latest(run).name == "4"


def test_weights_are_not_read_from_flipped_bits(run, capsys):
    """What sampling and export read of a run."""
    folder = run / "checkpoints" / "4"
    for item in ("ema/", "frozen/", "_CHECKPOINT"):
        for place in flips(folder, item):
            assert run_folder.latest(run).name == "2", place
    assert "4" in {run_folder.latest(run).name for _ in flips(folder, "progress/ocdbt.process_0/d/")}  # moments are not read
    assert "checkpoint 2 is taken" in capsys.readouterr().out


def test_without_another_checkpoint_it_is_an_error(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "2")
    damaging = flips(workdir / "checkpoints" / "4", "ema/ocdbt.process_0/d/VALUES")
    next(damaging)  # and it stays damaged
    for use in (lambda: run_folder.latest(workdir), lambda: run_folder.open_checkpoints(workdir, CheckpointConfig())):
        with pytest.raises(RequestError, match=r"4: damaged, ema/.* differs from its checksum; no other checkpoint is whole"):
            use()


@pytest.mark.parametrize("command", [sample, export])
def test_no_command_uses_flipped_bits(run, tmp_path, capsys, monkeypatch, command):
    """The whole command, of a run whose only checkpoint is damaged; the encoders of sampling are left out."""
    workdir, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out.mp4"
    shutil.rmtree(workdir / "checkpoints" / "2")
    run_folder.write_config(workdir, SMOKE)
    monkeypatch.setattr(sample, "encode", lambda encoders, request: (Conditions(*jnp.zeros((2, 1, 1, 1))), None))
    damaging = flips(workdir / "checkpoints" / "4", "ema/ocdbt.process_0/d/")
    next(damaging)
    request = ["--prompt=a ball", f"--first_frame={picture(tmp_path)}"] if command is sample else []
    args = ["--config=stage1:smoke", f"--checkpoint={workdir}", f"--out={out}", *request]
    assert launch_command.execute(command.main, command.FLAGS, args) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"{workdir}/checkpoints/4: damaged, ema/.* differs from its checksum; no other .* whole: restore it from a copy, or remove it\n",
        error[error.index(str(workdir)) :],  # behind the progress bar of sampling
    )
    assert not out.exists()


def picture(folder):
    Image.new("RGB", (64, 48)).save(folder / "first.png")
    return folder / "first.png"


def test_no_part_is_read_from_flipped_bits(model):
    for place in flips(model / "vae"):
        with pytest.raises(RequestError, match=r"vae: damaged, .*; restore it from a copy, or remove vae and import again"):
            model_folder.load_part(model, "vae", LEAVES)
        with pytest.raises(RequestError, match="vae: damaged"):
            next(model_folder.read_part(model, "vae"))
        assert place
    for _ in flips(model / "tokenizer"):
        with pytest.raises(RequestError, match="tokenizer: damaged"):
            model_folder.require_whole(model, "tokenizer")
    assert all(np.array_equal(x, LEAVES[path]) for path, x in model_folder.load_part(model, "vae", LEAVES).items())


def test_no_file_of_the_package_is_read_from_flipped_bits(tmp_path):
    folder = tmp_path / "embedded"
    folder.mkdir()
    model_folder.save_file(folder, "vae", LEAVES)
    checksums.write(folder)
    for place in flips(folder):
        with pytest.raises(RequestError, match="embedded: damaged"):
            model_folder.load_part(folder, "vae", LEAVES)
        assert place
    model_folder.load_part(folder, "vae", LEAVES)
    for name in model_folder.read_model(model_folder.EMBEDDED_FOLDER):
        model_folder.require_whole(model_folder.EMBEDDED_FOLDER, name)
        assert checksums.known(model_folder.EMBEDDED_FOLDER, (f"{name}.safetensors",)), name


def test_what_was_written_is_whole(tmp_path):
    """No false alarm, of eleven saves in a row and of a copy."""
    save(tmp_path, *range(1, 12))
    folders = list((tmp_path / "checkpoints").iterdir())
    assert sum(checksums.mismatch(folder) == "" and len(checksums.known(folder)) > 10 for folder in folders) == 9 == len(folders)
    copied = shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    assert run_folder._newest_whole(copied)[0].name == "11"


def test_absent_checksums_are_told_once(run, model, tmp_path, capsys):
    workdir, folder = shutil.copytree(run, tmp_path / "run"), shutil.copytree(model, tmp_path / "model")
    for path in (*workdir.rglob("checksums.*"), *folder.rglob("checksums.*")):
        path.unlink()
    capsys.readouterr()
    for _ in range(2):
        assert run_folder.latest(workdir).name == "4"
        model_folder.load_part(folder, "vae", LEAVES)
    out = capsys.readouterr().out
    assert out.count("checkpoints/4: has no checksums, as an earlier version or a killed run leaves it") == 1
    assert out.count(f"{folder}: written by an earlier version, without checksums") == 1


def test_processes_share_the_files(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "file").write_text(str(i))
    checksums.write(tmp_path, 0, 3)
    checksums.write(tmp_path, 2, 3)
    assert checksums.known(tmp_path) == {}  # a process was killed
    checksums.write(tmp_path, 1, 3)
    assert sorted(checksums.known(tmp_path)) == [f"{i}/file" for i in range(7)]
    assert checksums.known(tmp_path, ("2", "5")).keys() == {"2/file", "5/file"}
    (tmp_path / "5" / "file").write_text("6")
    found = [checksums.mismatch(tmp_path, (), i, 2) for i in range(2)]
    assert sorted(found) == ["", "5/file differs from its checksum"]
    (tmp_path / "5" / "file").unlink()
    assert checksums.mismatch(tmp_path) == "5/file is absent"
    assert checksums.mismatch(tmp_path, ("1", "2")) == ""


def test_an_export_computes_each_checksum_once(run, monkeypatch):
    checksums._sha256.cache_clear()
    read = []
    monkeypatch.setattr(checksums.atomic, "sha256", lambda path, of=checksums.atomic.sha256: read.append(path) or of(path))
    for _ in range(3):
        run_folder.latest(run)
    assert len(read) == len(set(read)) > 5
    assert not [path for path in read if "/progress/" in path or "/trainable/" in path]


def test_of_a_run_without_averages_what_trains_is_compared(tmp_path):
    plain = replace(TINY, train=replace(TINY.train, ema=0.0))
    run_folder.write_config(tmp_path, plain)
    with run_folder.open_checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        run_folder.save(checkpoints, 1, state(1)._replace(ema={}), data())
    for _ in flips(tmp_path / "checkpoints" / "1", "trainable/ocdbt.process_0/d/"):
        with pytest.raises(RequestError, match=r"1: damaged, trainable/.* differs"):
            run_folder.latest(tmp_path)
