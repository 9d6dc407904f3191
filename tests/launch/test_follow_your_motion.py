"""Follow-Your-Motion by its commands: from a clip and its caption to a video and a LoRA; interrupted, it goes on bit for bit.

python -m tests.launch.test_follow_your_motion STAGE STEP ARGUMENTS kills itself in front of that step of that stage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import load_file

from configs import follow_your_motion as configs
from data_pipelines import clips, example, in_memory, motion_training
from launch import command, export, sample, train
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import fingerprint, run_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models.flat_params import flat_params

HERE = Path(__file__).parents[2]
SMALL = ["--config=follow_your_motion:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1"]
TINY = ["--config=follow_your_motion:tiny", "--motion.spatial_steps=2", "--train.steps=3", "--checkpoint.every=1", "--motion.head_draws=1"]
CAPTION = "--prompt=a ball bounces"


class Interrupting(grain.DatasetIterator):
    """Batches that send this process a signal in front of a step."""

    def __init__(self, data, step, number, wait):
        super().__init__()
        self.data, self.left, self.number, self.wait = data, step - data.get_state()["next_index"], number, wait

    def __next__(self):
        self.left -= 1
        if not self.left:
            self.wait()
            os.kill(os.getpid(), self.number)
        return next(self.data)

    def get_state(self):
        return self.data.get_state()

    def set_state(self, state):
        self.data.set_state(state)
        self.left -= state["next_index"]


def interrupting(batches, stage, step, number, wait=lambda: None):
    """`in_memory.batches` for which step `step` of `stage` does not come without the signal `number`, when `wait` returns."""

    def make(samples, *args, **options):
        data = batches(samples, *args, **options)
        is_spatial = samples.latents.shape[1] == 1
        return Interrupting(data, step, number, wait) if is_spatial == (stage == "spatial") else data

    return make


def run(config, clip, workdir, *more):
    return command.execute(train.main, train.FLAGS, [*config, f"--reference={clip}", CAPTION, f"--workdir={workdir}", *more])


def lines(workdir, name="loss"):
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stored(workdir):
    """All parameters in the latest checkpoint of a run by name, and the losses."""
    folder, found = run_folder.latest(workdir), {}
    for part in ("trainable", "frozen"):
        leaves = ocp.metadata(folder, checkpointable_name=part).metadata
        like = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
        found |= {f"{part}/{path}": x for path, x in ocp.load(folder, like, checkpointable_name=part).items()}
    return found | {"loss": np.array(lines(workdir)), "grad_norm": np.array(lines(workdir, "grad_norm"))}


def assert_same(workdir, other):
    for folder in ("spatial", "."):
        ours, theirs = stored(workdir / folder), stored(other / folder)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    example.write_example(folder)
    return folder / "motion_reference.mp4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clip):
    """The workdir of a training that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run(SMALL, clip, workdir) == 0
    return workdir


def test_a_workdir_holds_what_is_promised(whole):
    assert len(lines(whole / "spatial")) == len(lines(whole)) == 6
    heads = json.loads((whole / "heads.json").read_text())
    assert heads["blocks"] == [{"block": 0, "spatial": 1, "temporal": 1}]
    found = stored(whole)
    assert all(".lora_" in name for name in found if "/" in name)
    for name in ("query", "key", "value"):
        path = f"dit.blocks.self_attention.{name}"
        assert (found[f"frozen/{path}.lora_temporal.head_mask"] == heads["temporal"]).all()
        assert np.abs(found[f"trainable/{path}.lora_temporal.up"]).max() > 0
        earlier = stored(whole / "spatial")
        for half in ("down", "up"):
            assert (found[f"frozen/{path}.lora_spatial.{half}"] == earlier[f"trainable/{path}.lora_spatial.{half}"]).all()


def sampled(config, workdir, out, *more):
    args = [*config, f"--checkpoint={workdir}", "--prompt=a cat jumps", f"--out={out}", "--sampler.steps=2", *more]
    assert command.execute(sample.main, sample.FLAGS, args) == 0
    return clips.read_clip(out, frames=9, fps=8, height=32, width=48 if config is SMALL else 32)


def test_a_video_and_a_lora(whole, tmp_path, capsys):
    assert sampled(SMALL, whole, tmp_path / "a.mp4").std() > 0
    args = [*SMALL, f"--checkpoint={whole}", "--layout=comfyui", f"--out={tmp_path / 'lora'}"]
    assert command.execute(export.main, export.FLAGS, args) == 0
    assert "wrote" in capsys.readouterr().out
    lora = load_file(tmp_path / "lora" / "loras" / "follow_your_motion_smoke.safetensors")
    assert {name.split(".", 2)[-1] for name in lora} == {f"0.self_attn.{x}.lora_{half}.weight" for x in "qkv" for half in "AB"}


def test_interrupted_in_both_stages_equals_uninterrupted(whole, clip, tmp_path, monkeypatch):
    """Checkpoints come every third step, so a killed stage goes on from step 3 and a stopped one from where it stopped."""

    def killed(stage, step):
        args = [*SMALL, f"--reference={clip}", CAPTION, f"--workdir={tmp_path}"]
        code = subprocess.run([sys.executable, "-m", __spec__.name, stage, str(step), *args], cwd=HERE, capture_output=True)
        assert code.returncode == -signal.SIGKILL, code.stderr.decode()

    def stopped(stage, step):
        with monkeypatch.context() as patch:
            patch.setattr(in_memory, "batches", interrupting(in_memory.batches, stage, step, signal.SIGTERM))
            assert run(SMALL, clip, tmp_path) == 0
        return run_folder.steps_done(tmp_path / "spatial"), run_folder.steps_done(tmp_path)

    killed("spatial", 5)
    assert run_folder.steps_done(tmp_path / "spatial") == 3
    assert stopped("spatial", 5) == (4, 0)  # it waited for the fifth batch
    assert not run_folder.is_run(str(tmp_path))
    killed("temporal", 6)
    assert run_folder.steps_done(tmp_path) == 3
    assert run(SMALL, clip, tmp_path) == 0
    assert_same(tmp_path, whole)


def test_on_imported_weights(clip, tmp_path, monkeypatch, capsys):
    """Checkpoints hold the adapters alone: the transformer is read again from where it was imported, here inside the package."""
    assert run(TINY, clip, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "batches", interrupting(in_memory.batches, "temporal", 2, signal.SIGTERM))
        assert run(TINY, clip, tmp_path / "run") == 0
    assert run_folder.steps_done(tmp_path / "run") == 1
    assert run(TINY, clip, tmp_path / "run") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    found = stored(tmp_path / "run")
    assert all(".lora_" in name for name in found if "/" in name)
    assert len(found) == 18 + 2

    config = configs.get_config("tiny")
    motion = replace(config.motion, spatial_steps=2, head_draws=1)
    config = replace(config, motion=motion, train=replace(config.train, steps=3))
    base, merged = (
        flat_params(load_models.load_dit(folder, config, make_mesh(config.mesh))) for folder in ("embedded", str(tmp_path / "run"))
    )
    many = motion_training.ManyClips(config, make_mesh(config.mesh))
    size = config.video
    pixels = clips.read_clip(clip, frames=size.frames, fps=size.fps, height=size.height, width=size.width)
    again = flat_params(many(pixels, CAPTION.removeprefix("--prompt=")))
    assert [path for path in merged if not np.array_equal(again[path], merged[path])] == []
    moved = {path for path in base if not np.array_equal(base[path], merged[path])}
    assert moved == {f"blocks.self_attention.{name}.kernel" for name in ("query", "key", "value")}
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a.png")
    assert sampled(TINY, tmp_path / "run", tmp_path / "a.mp4", f"--first_frame={tmp_path / 'a.png'}").std() > 0

    capsys.readouterr()
    monkeypatch.setattr(fingerprint, "of_part", lambda folder, name: "another")
    assert run(TINY, clip, tmp_path / "run", "--train.steps=4") == 2
    assert "was started with another clip, caption or model than --reference" in capsys.readouterr().err


def test_wrong_requests_are_one_line(whole, clip, tmp_path, capsys):
    def refused(module, *args):
        capsys.readouterr()
        assert command.execute(module.main, module.FLAGS, [*SMALL, *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--reference: not given" in refused(train, f"--workdir={tmp_path}")
    given = [f"--reference={clip}", f"--workdir={whole}"]
    assert "another clip, caption or model" in refused(train, *given, "--prompt=another caption")
    assert "--motion.spatial_learning_rate=1.0: the run in" in refused(train, *given, CAPTION, "--motion.spatial_learning_rate=1")
    other = [f"--reference={clip}", CAPTION, f"--workdir={tmp_path / 'other'}"]
    assert "a run, and its adapters would be" in refused(train, *other, f"--train.init_from={whole}")
    assert "this network reads none" in refused(sample, f"--checkpoint={whole}", "--task=motion", f"--reference={clip}")
    assert "has 4.0; give its --config" in refused(sample, f"--checkpoint={whole}", "--motion.lora.alpha=9")
    assert "a LoRA has none of that" in refused(export, f"--checkpoint={whole}", "--layout=original", f"--out={tmp_path / 'x'}")
    (tmp_path / "begun" / "spatial").mkdir(parents=True)
    assert "its temporal stage has not begun" in refused(sample, f"--checkpoint={tmp_path / 'begun'}", f"--out={tmp_path / 'a.mp4'}")


@pytest.mark.slow  # the same way as on what the project makes: pytest -n 0 -m slow -k real
def test_a_real_clip(shared, tmp_path):
    clip = shared / "clips" / "davis" / "bmx-trees.mp4"
    assert run([*SMALL, "--motion.spatial_steps=2", "--train.steps=2"], clip, tmp_path / "run") == 0
    assert sampled(SMALL, tmp_path / "run", tmp_path / "a.mp4").std() > 0


if __name__ == "__main__":
    stage, step, *arguments = sys.argv[1:]
    workdir = Path(arguments[-1].removeprefix("--workdir=")) / (stage if stage == "spatial" else "")

    def until_the_last_checkpoint_is_written():
        while run_folder.steps_done(workdir) < (int(step) - 1) // 3 * 3:
            time.sleep(0.01)

    batches = interrupting(in_memory.batches, stage, int(step), signal.SIGKILL, until_the_last_checkpoint_is_written)
    in_memory.batches = batches
    sys.exit(command.execute(train.main, train.FLAGS, arguments))
