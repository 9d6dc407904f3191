"""Folders that an earlier version wrote still load: a model folder, a run of stage 1 and one of stage 3, and the records they read.

tests/fixtures/before_layout/README.md has the commands. The digests are of what the earlier version loaded from its own folders.
"""

import hashlib
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import clips
from data_pipelines.batches import batches
from launch import command, sample, train
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import make_mesh, to_mesh

ARCHIVE = Path(__file__).parent / "fixtures" / "before_layout" / "folders.tar.xz"
WRITTEN_AT = "/srv/before_layout"  # the paths in config.json begin so
SMALL = [
    "--dit.dim=12",
    "--dit.ffn_dim=16",
    "--dit.num_layers=2",
    "--dit.num_heads=1",
    "--dit.text_dim=8",
    "--dit.text_len=6",
    "--dit.image_dim=8",
    "--dit.freq_dim=8",
    "--vae.base_dim=4",
    "--vae.dim_mult",
    "1",
    "1",
    "1",
    "1",
    "--vae.num_res_blocks=1",
    "--text.dim=8",
    "--text.head_dim=4",
    "--text.num_heads=2",
    "--text.ffn_dim=16",
    "--text.num_layers=1",
    "--image.dim=8",
    "--image.ffn_dim=16",
    "--image.num_heads=2",
    "--image.image_size=14",
    "--mllm.num_layers=1",
    "--mllm.dim=16",
    "--mllm.ffn_dim=16",
    "--mllm.num_heads=1",
    "--mllm.vision.dim=16",
    "--mllm.vision.ffn_dim=16",
    "--alignment.connector_dim=16",
]
STAGES = pytest.mark.parametrize("stage", ["stage1", "stage3"])


@pytest.fixture
def old(tmp_path):
    """The folders, as if they had been written where they are now."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "before_layout"
    for file in (*folder.glob("*/config.json"), *folder.glob("records_*/records.json")):
        file.write_text(file.read_text().replace(WRITTEN_AT, str(folder)))
    return folder


def digests(folder):
    return json.loads((folder / "digests.json").read_text())


def sha256(leaves):
    total = hashlib.sha256()
    for path, leaf in sorted((path, np.asarray(leaf)) for path, leaf in leaves.items()):
        total.update(f"{path} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return total.hexdigest()


def flat(tree, path=""):
    """The leaves of nested dictionaries by their dotted paths, tuples as lists."""
    if not isinstance(tree, dict):
        return {path: list(tree) if isinstance(tree, tuple) else tree}
    return {name: leaf for key, branch in tree.items() for name, leaf in flat(branch, f"{path}.{key}").items()}


def run(module, stage, *args):
    assert command.execute(module.main, module.FLAGS, [f"--config={stage}:smoke", *map(str, args), *SMALL]) == 0


def test_a_model_folder(old):
    folder = old / "model"
    found = {name: sha256(dict(model_folder.read_part(folder, name))) for name in model_folder.read_model(folder)}
    assert found == digests(old)["model"]


@STAGES
def test_the_configuration_and_parameters_of_a_run(old, stage):
    workdir = old / stage
    config = run_folder.read_config(workdir)
    read, written = flat(asdict(config)), flat(json.loads((workdir / "config.json").read_text()))
    written[".mesh.keys"] = written.pop(".mesh.context")  # its name today
    assert {name: read[name] for name in written} == written
    assert sha256(run_folder.load_params(workdir, train.objective(config).params)) == digests(old)["run"][stage]


@STAGES
def test_records(old, stage):
    config = run_folder.read_config(old / stage)
    batch = to_mesh(next(batches(config, seed=0)), make_mesh(config.mesh))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    assert {name: sha256({"": x}) for name, x in arrays.items()} == digests(old)["records"][stage]


@STAGES
def test_a_run_goes_on(old, stage):
    workdir, config = old / stage, run_folder.read_config(old / stage)
    places = [f"--workdir={workdir}", f"--data.path={config.data.path}", f"--train.init_from={config.train.init_from}"]
    run(train, stage, *places, "--train.steps=3", "--checkpoint.keep=1")
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(digests(old)["loss"][stage], rel=1e-4)  # the third step is the new version's


@STAGES
def test_a_run_is_sampled_from(old, stage, monkeypatch):
    monkeypatch.setattr(clips, "H264", {"crf": "16"})  # as it was: the pixels are compared, not the codec
    request = ["--task=style", f"--reference={old / 'clips' / 'style_reference.mp4'}", "--prompt=a ball sinks", "--sampler.steps=2"]
    run(sample, stage, f"--checkpoint={old / stage}", f"--out={old / 'now.mp4'}", *request)
    before, now = (clips.read_clip(path, frames=9, fps=8, height=32, width=48) for path in (old / f"{stage}.mp4", old / "now.mp4"))
    assert np.abs(before.astype(int) - now).mean() < 1  # of 255
