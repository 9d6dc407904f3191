"""stage1:lora by its commands: records -> training, stopped and continued -> a video, both files, and a video from a file.

About a minute and a half: python -m pytest -n 0 -m slow tests/launch/test_lora_road.py
"""

import json

import pytest
from PIL import Image

from data_pipelines import clips, example
from launch import command, encode, export, sample, train

pytestmark = pytest.mark.slow
SMALL = ["--config=stage1:lora_smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1"]


def run(module, *args):
    return command.execute(module.main, module.FLAGS, [*SMALL, *args])


def test_the_road(tmp_path, capsys):
    example.write_example(tmp_path / "clips")
    assert run(encode, f"--manifest={tmp_path / 'clips' / 'manifest.jsonl'}", f"--out={tmp_path / 'records'}") == 0
    assert run(train, "--dry_run", "--base=int8") == 0
    assert "trainable" in capsys.readouterr().out
    training = [f"--data.path={tmp_path / 'records'}", f"--workdir={tmp_path / 'run'}"]
    assert run(train, *training, "--train.steps=3") == 0
    assert run(train, *training) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    Image.fromarray(clips.read_clip(tmp_path / "clips" / "motion_target.mp4", frames=1, fps=8, height=32, width=48)[0]).save(
        tmp_path / "a.png"
    )
    request = ["--task=motion", f"--reference={tmp_path / 'clips' / 'motion_reference.mp4'}", f"--first_frame={tmp_path / 'a.png'}"]
    request += ["--sampler.steps=2"]
    assert run(sample, *request, f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'run.mp4'}") == 0
    for layout in ("comfyui", "diffusers"):
        assert run(export, f"--checkpoint={tmp_path / 'run'}", f"--layout={layout}", f"--out={tmp_path / layout}") == 0
    file = tmp_path / "comfyui" / "loras" / "stage1_lora_smoke.safetensors"
    given = ["--checkpoint=", f"--adapter_from={file}", f"--out={tmp_path / 'file.mp4'}"]  # on the random weights that the run had
    assert run(sample, *request, *given) == 0
    assert (tmp_path / "run.mp4").read_bytes() == (tmp_path / "file.mp4").read_bytes()
    assert "reference branch" in (tmp_path / "comfyui" / "README.md").read_text()
    capsys.readouterr()
    assert run(export, f"--checkpoint={tmp_path / 'run'}", "--layout=original", f"--out={tmp_path / 'x'}") == 2
    assert "a LoRA has none of that" in capsys.readouterr().err
    assert run(train, *training, "--base=int8") == 2
    assert "--base='int8': the run in" in capsys.readouterr().err
