"""The commands of Motion-Textual Inversion: one clip into tokens, tokens into a video or a folder; and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import load_file

from configs.motion_inversion import MotionInversion
from data_pipelines import clips, example
from data_pipelines import motion_inversion as data
from launch import command, export, sample, train
from omnitransfer_jax.folders import run_folder

SMOKE = ["--config=motion_inversion:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--video.frames=5", "--video.fps=8"]


def run(module, *args):
    return command.execute(module.main, module.FLAGS, [*SMOKE, *args])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    example.write_example(folder)
    return folder / "motion_reference.mp4", folder / "effect_first_frame.png"


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The workdir of a training that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run(train, f"--reference={made[0]}", f"--workdir={workdir}") == 0
    return workdir


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tokens(workdir):
    return data.load_tokens(str(workdir), run_folder.read_config(workdir, MotionInversion))["text"]


def moves(workdir, image, out):
    """Whether the command makes a video of the size and number of frames that was asked for, which is no still."""
    assert run(sample, f"--checkpoint={workdir}", f"--first_frame={image}", f"--out={out}") == 0
    rows, columns, _ = clips.read_image(image).shape
    height, width = sample.same_area(rows / columns, 32 * 48, 16)
    return clips.read_clip(out, frames=5, fps=8, height=height, width=width).std() > 0


def test_interrupted_equals_uninterrupted(whole, made, tmp_path):
    args = f"--reference={made[0]}", f"--workdir={tmp_path}"
    assert run(train, *args, "--train.steps=2") == 0
    assert run(train, *args) == 0
    assert losses(tmp_path) == losses(whole)
    assert len(losses(whole)) == 6
    assert np.array_equal(tokens(tmp_path), tokens(whole))


def test_a_checkpoint_holds_the_tokens_alone(whole):
    checkpoint = run_folder.latest(whole)
    assert set(ocp.metadata(checkpoint, checkpointable_name="trainable").metadata) == {"tokens.text"}
    assert not (checkpoint / "frozen").exists()
    assert sum(path.stat().st_size for path in Path(checkpoint).rglob("*") if path.is_file()) < 200_000


def test_a_video_of_another_picture(whole, made, tmp_path):
    assert moves(whole, made[1], tmp_path / "out.mp4")


def test_tokens_that_have_not_moved_are_the_initial_ones(made, tmp_path, monkeypatch):
    """After a step whose rate rounds to nothing; so the sample is that of the initial tokens."""
    started = []
    initial = data.initial_tokens
    monkeypatch.setattr(data, "initial_tokens", lambda *args: started.append(initial(*args)) or started[0])
    still = ["--train.steps=1", "--optimizer.learning_rate=1e-30"]
    assert run(train, f"--reference={made[0]}", f"--workdir={tmp_path}", "--prompt=a ball rolls", *still) == 0
    assert np.array_equal(tokens(tmp_path)[0], started[0]["text"])


def test_an_export_can_be_read(whole, tmp_path):
    assert run(export, f"--checkpoint={whole}", f"--out={tmp_path / 'tokens'}") == 0
    found = load_file(tmp_path / "tokens" / "tokens.safetensors")
    assert found.keys() == {"text"}
    assert np.array_equal(found["text"], tokens(whole)[0])
    config = json.loads((tmp_path / "tokens" / "config.json").read_text())
    assert config["inversion"]["tokens"] == found["text"].shape[1] == 2
    assert config["video"] == {"frames": 5, "latent_frames": 2, "fps": 8}
    readme = (tmp_path / "tokens" / "README.md").read_text()
    assert "| `text` | 3 x 2 x 48 |" in readme
    assert not re.search(r"[{}]", readme)


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        (train, ["--workdir={new}"], "--reference: not given"),
        (train, ["--workdir={new}", "--reference={clip}", "--video.frames=33"], "33 needed"),
        (train, ["--workdir={run}", "--reference={clip}", "--prompt=a ball"], "give those, or another --workdir"),
        (train, ["--workdir={run}", "--reference={clip}", "--inversion.tokens=3"], "was started with 2"),
        (train, ["--workdir={new}", "--reference={clip}", "--train.trainable", ".*"], "trains tokens/.* alone"),
        (train, ["--workdir={new}", "--reference={clip}", "--inversion.tokens=17"], "at most 16"),
        (train, ["--workdir={new}", "--reference={clip}", "--mesh.keys=3"], "mesh.heads * mesh.keys = 3: a divisor of the 2 latent frames"),
        (sample, ["--checkpoint={run}"], "no --first_frame: the tokens move a picture"),
        (sample, ["--checkpoint={run}", "--first_frame={image}", "--prompt=a"], "--prompt='a': the tokens stand in its place"),
        (
            sample,
            ["--checkpoint={run}", "--first_frame={image}", "--task=motion", "--reference={clip}"],
            "the run has learnt its reference",
        ),
        (sample, ["--checkpoint={run}", "--first_frame={image}", "--video.frames=9"], "has tokens for 2; give --video.frames=5"),
        (sample, ["--checkpoint={run}", "--first_frame={image}", "--inversion.sink=False"], "--inversion.sink=False"),
        (sample, ["--checkpoint=embedded", "--first_frame={image}"], "'embedded': no run, and the tokens of a motion are in one"),
        (export, ["--checkpoint=embedded", "--out={new}"], "no run, and the tokens of a motion are in one"),
    ],
)
def test_wrong_requests(whole, made, tmp_path, capsys, module, args, words):
    names = {"new": tmp_path / "new", "clip": made[0], "image": made[1], "run": whole}
    assert run(module, *(arg.format(**names) for arg in args), *([f"--out={tmp_path / 'a.mp4'}"] if module is sample else [])) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_run_of_tokens_is_no_transformer(whole, made, tmp_path, capsys):
    args = ["--config=stage1:smoke", f"--checkpoint={whole}", f"--first_frame={made[1]}", f"--out={tmp_path / 'a.mp4'}"]
    assert command.execute(sample.main, sample.FLAGS, args) == 2
    assert "a run of the tokens of a motion's training; give one of the transformer's" in capsys.readouterr().err


@pytest.mark.slow  # the same way as on what the project makes: pytest -n 0 -m slow -k real
def test_a_real_clip(shared, tmp_path):
    clip, image = shared / "clips" / "davis" / "bmx-trees.mp4", tmp_path / "first.png"
    Image.fromarray(clips.read_clip(shared / "clips" / "davis" / "lucia.mp4", frames=1, fps=8, height=64, width=96)[0]).save(image)
    assert run(train, f"--reference={clip}", f"--workdir={tmp_path / 'run'}", "--train.steps=2") == 0
    assert moves(tmp_path / "run", image, tmp_path / "out.mp4")
