"""Wan2.2's two experts by the commands: sampling, stage 1 from either, and what is refused. Torch is not needed."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest

from configs import wan
from data_pipelines import clips, example
from launch import command, encode, export, sample, train
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.tokenizer import byte_tokenizer
from omnitransfer_jax.weights.parts import LOW_NOISE, PARTS
from tests.launch.test_sample import moving, picture

SMALL = ["--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1"]
VIDEO = ["--video.frames=5", "--video.height=32", "--video.width=48", "--data.reference.frames=5", "--data.reference.height=32",
         "--data.reference.width=48"]  # fmt: skip
WAN = ["--config=wan:smoke_2_2", *SMALL, *VIDEO, "--sampler.steps=4"]  # 1 step by the high-noise expert, 3 by the other
STAGE1 = ["--config=stage1:smoke", "--dit.image_dim=None", *SMALL, *VIDEO]
CONFIG = command.override(wan.get_config("smoke_2_2"), SMALL, sample.FLAGS)
EXPERTS = (PARTS[0], LOW_NOISE)
ENCODERS = [part for part in PARTS if part.name in ("vae", "text")]


def run(module, *args):
    return command.execute(module.main, module.FLAGS, args)


def make_model(folder, parts):
    """A model folder with random numbers of ordinary size in each part, the experts' not the same."""
    for seed, part in enumerate(parts):
        draw, shapes = np.random.default_rng(seed), part.shapes(getattr(CONFIG, part.name))
        leaves = [(path, 0.1 * draw.standard_normal(leaf.shape, np.float32)) for path, leaf in shapes.items()]
        model_folder.save_part(folder, part.name, leaves)
    model_folder.write_model(folder, {part.name: getattr(CONFIG, part.name) for part in parts})
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), [*EXPERTS, *ENCODERS])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return [f"--reference={moving(folder / 'r.mp4')}", "--task=style", f"--first_frame={picture(folder / 'a.png')}"]


def without(model, part, folder):
    """A copy of the model folder without one part."""
    shutil.copytree(model, folder)
    shutil.rmtree(folder / part)
    path = folder / model_folder.MODEL_FILE
    content = json.loads(path.read_text())
    del content["parts"][part]
    path.write_text(json.dumps(content))
    return folder


def only_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_both_experts_make_a_video(model, inputs, tmp_path, monkeypatch, capsys):
    """One is in memory at a time, and no image encoder is asked for."""
    loaded, alive, load = [], [], load_models.load_dit

    def watched(folder, config, mesh, part):
        gc.collect()
        assert not any(network() is not None for network in alive)
        network = load(folder, config, mesh, part)
        loaded.append(part)
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(load_models, "load_dit", watched)
    monkeypatch.setattr(load_models, "load_image_encoder", None)
    assert run(sample, *WAN, f"--checkpoint={model}", *inputs, f"--out={tmp_path / 'a.mp4'}") == 0
    assert loaded == ["dit", "dit_low_noise"]
    printed = capsys.readouterr()
    assert "high-noise expert ..." in printed.out
    assert "low-noise expert ..." in printed.out
    assert "4/4" in printed.err
    assert clips.read_clip(tmp_path / "a.mp4", frames=5, fps=16, height=32, width=48).std() > 0


@pytest.mark.parametrize(
    ("absent", "args", "words"),
    [
        (
            "dit_low_noise",
            [],
            "--sampler.boundary=0.9: {} has no low-noise expert; import it too, or give --sampler.boundary=0 --sampler.low",
        ),
        ("dit", [], "--sampler.boundary=0.9: {} has no high-noise expert; import it too"),
        (None, ["--sampler.boundary=0"], "--sampler.boundary=0: {} has two experts (Wan2.2), and one would run at all noise levels"),
        (None, ["--sampler.low_noise_guidance=0.5"], "sampler.low_noise_guidance=0.5: at least 1"),
        (None, ["--sampler.boundary=1"], "sampler.boundary=1.0: from 0 to below 1"),
    ],
)
@pytest.mark.parametrize("module", [sample, export], ids=["sample", "export"])
def test_experts_that_do_not_fit_the_boundary(model, tmp_path, capsys, module, absent, args, words):
    folder = without(model, absent, tmp_path / "model") if absent else model
    own = ["--sampler.low_noise_guidance=None"] if args == ["--sampler.boundary=0"] else []
    assert run(module, *WAN, *own, *args, f"--checkpoint={folder}", f"--out={tmp_path / 'out.mp4'}") == 2
    assert words.format(folder) in only_line(capsys)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("absent", "args", "words"),
    [
        (
            None,
            [],
            "holds the high_noise and the low_noise expert of Wan2.2, and a training has one network: give --train.expert=high_noise or",
        ),
        ("dit_low_noise", ["--train.expert=low_noise"], "train.expert=low_noise: train.init_from='{}' has no experts to choose from"),
        (
            "dit",
            ["--train.expert=high_noise"],
            "holds the low_noise expert of Wan2.2, and a training has one network: give --train.expert=low_noise",
        ),
        (None, ["--train.expert=middle"], "--train.expert=middle: expected"),
        (None, ["--train.expert=low_noise", "--train.init_from="], "train.expert=low_noise: train.init_from='' has no experts"),
    ],
)
def test_experts_that_a_training_cannot_start_from(model, tmp_path, capsys, absent, args, words):
    folder = without(model, absent, tmp_path / "model") if absent else model
    assert run(train, *STAGE1, f"--train.init_from={folder}", f"--workdir={tmp_path / 'run'}", *args) == 2
    assert words.format(folder) in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_stage_1_starts_from_the_low_noise_expert(model, inputs, tmp_path, capsys):
    """Records without CLIP features, a training step, and a run that is one network: not sampled with a boundary, and exported
    without the other expert."""
    manifest, records, workdir = example.write_example(tmp_path / "clips"), tmp_path / "records", tmp_path / "run"
    start = f"--train.init_from={model}"
    assert run(encode, *STAGE1, start, f"--manifest={manifest}", f"--out={records}") == 0
    steps = ["--train.steps=2", "--train.ema=0", "--optimizer.learning_rate=1e-6", f"--data.path={records}", f"--workdir={workdir}"]
    assert run(train, *STAGE1, start, "--train.expert=low_noise", *steps) == 0
    trained = {
        path: np.asarray(x)
        for path, x in run_folder.load_params(workdir, {f"dit.{p}": x for p, x in LOW_NOISE.shapes(CONFIG.dit).items()}).items()
    }
    low, high = (dict(model_folder.read_part(model, part.name)) for part in EXPERTS[::-1])
    moved = {path: np.abs(trained[f"dit.{path}"] - leaf).max() for path, leaf in low.items()}
    assert 0 < max(moved.values()) < 1e-4
    assert min(np.abs(high[path] - leaf).max() for path, leaf in low.items()) > 1e-2
    capsys.readouterr()

    out = f"--out={tmp_path / 'a.mp4'}"
    assert run(sample, *STAGE1, f"--checkpoint={workdir}", "--sampler.boundary=0.9", *inputs, out) == 2
    assert f"--sampler.boundary=0.9: {workdir} is a run, which has one network; give --sampler.boundary=0" in only_line(capsys)
    assert run(export, *STAGE1, f"--checkpoint={workdir}", f"--out={tmp_path / 'theirs'}") == 0
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["_class_name"] == "OmniTransferPipeline"  # a pipeline of one network
    assert not index.keys() & {"boundary_ratio", "transformer_2"}
    assert not (tmp_path / "theirs" / "transformer_2").exists()
