"""An export explains itself and is refused unless it is whole; the command says what is wrong in one line.

python -m tests.omnitransfer_torch.test_exported OUT exports and kills itself at the second part.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import wan
from configs.errors import RequestError
from data_pipelines import clips
from launch import command, export

HERE = Path(__file__).parents[2]
SIZE = wan.VARIANTS["tiny"].video
CONFIG = ["--config=stage1:tiny", "--checkpoint=embedded"]


def run_export(out, *more):
    return command.execute(export.main, export.FLAGS, [*CONFIG, f"--out={out}", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of the package's own model, with a table of scores."""
    pytest.importorskip("omnitransfer_torch", reason="PyTorch is not installed")
    out, scores = tmp_path_factory.mktemp("export") / "tiny", tmp_path_factory.mktemp("scores") / "scores.json"
    scores.write_text(json.dumps({"style": {"transfer": {"retrieval": {"mean": 0.95, "interval": [0.9, 1.0], "pairs": 40}}}}))
    assert run_export(out, "--verify", f"--scores={scores}") == 0
    return out


def read(folder):
    from omnitransfer_torch import exported

    return exported.read(folder)


def test_the_folder_explains_itself(folder):
    card = (folder / "README.md").read_text()
    for words in ("license: apache-2.0", "| style | transfer | retrieval | 0.95 | 0.9 to 1 | 40 |", "OmniTransferPipeline", "stage1:tiny"):
        assert words in card
    assert all(f"| `{task}` |" in card for task in ("id", "style", "motion", "camera", "effect"))
    here = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    here.pop("omnitransfer.json")
    assert json.loads((folder / "omnitransfer.json").read_text())["files"] == here
    transfer = read(folder)
    assert (transfer.text_len, transfer.rope_top, transfer.video.frames) == (32, 2.0, SIZE.frames)
    assert [task.flag for task in transfer.tasks] == [-2, -3, -1, -1, -1]


def drop(folder):
    (folder / "vae" / "config.json").unlink()


def cut(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def leave_unfinished(folder):
    (folder / "omnitransfer.json").unlink()


def change(**fields):
    def edit(folder):
        path = folder / "omnitransfer.json"
        content = json.loads(path.read_text())
        content["transfer"]["references"] |= fields
        path.write_text(json.dumps(content))

    return edit


def garble(folder):
    (folder / "omnitransfer.json").write_text('{"format": 1, "files": {}, "transfer": 3}')


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "vae/config.json: absent, so the export is not whole"),
        (cut, "diffusion_pytorch_model.safetensors: 7,"),
        (leave_unfinished, "no omnitransfer.json, so it is no whole export"),
        (change(attention="bidirectional"), "references='bidirectional'"),
        (change(reach="same_frame"), "reach='same_frame'"),
        (change(offsets="beside"), "offsets='beside'"),
        (garble, "not what launch.export writes (TypeError"),
    ],
)
def test_what_is_not_whole_is_refused(folder, tmp_path, edit, message):
    shutil.copytree(folder, tmp_path / "copy")
    edit(tmp_path / "copy")
    with pytest.raises(RequestError) as error:
        read(tmp_path / "copy")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_killed_export_left_is_refused_and_finished_by_running_again(folder, tmp_path):
    unfinished = tmp_path / ".again.unfinished"
    shutil.copytree(folder / "transformer", unfinished / "transformer")
    with pytest.raises(RequestError, match=r"no omnitransfer.json"):
        read(unfinished)
    assert run_export(tmp_path / "again") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    read(tmp_path / "again")


@pytest.mark.slow
def test_killed_at_the_second_part(folder, tmp_path):
    out = tmp_path / "again"
    done = subprocess.run([sys.executable, "-m", __spec__.name, str(out)], cwd=HERE, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == [".again.unfinished"]
    for place in (out, tmp_path / ".again.unfinished"):
        with pytest.raises(RequestError, match=r"no omnitransfer.json"):
            read(place)
    assert run_export(out) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.fixture
def request_of(tmp_path, folder):
    """A clip and a picture, and the command with them."""
    pictures = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    clips.write_clip(tmp_path / "ref.mp4", pictures, SIZE.fps)
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    given = {"model": folder, "task": "motion", "reference": tmp_path / "ref.mp4", "first_frame": tmp_path / "a.png"}
    given |= {"out": tmp_path / "out.mp4", "prompt": "a red ball"}

    def run(**changed):
        from omnitransfer_torch.__main__ import main

        return main([f"--{name}={value}" for name, value in (given | changed).items() if value is not None])

    return run, tmp_path


def test_the_command(request_of, capsys):
    run, place = request_of
    assert run(steps=2, guidance=2.0, cache="int8") == 0
    assert "wrote" in capsys.readouterr().out
    assert clips.read_clip(place / "out.mp4", frames=9, fps=SIZE.fps, height=32, width=32).std() > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "mood"}, "task 'mood': not one of id, style, motion, camera, effect"),
        ({"task": None}, "0 task and 1 reference"),
        ({"first_frame": None}, "a temporal transfer starts from a picture"),
        ({"reference": "absent.mp4"}, "absent.mp4: no such file"),
        ({"out": "out.gif"}, "an mp4 is written"),
        ({"model": "absent"}, "absent: no omnitransfer.json"),
        ({"offload": "model"}, "there is no GPU here"),
    ],
)
def test_a_wrong_request_is_one_line(request_of, capsys, changed, message):
    run, place = request_of
    capsys.readouterr()
    assert run(**changed) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading" not in line and line.strip()]
    assert message in lines[-1]
    assert not (place / "out.mp4").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verify", "--layout=original"], "no transfer model for PyTorch"),
        (["--scores=absent.json"], "absent.json: no such file"),
    ],
)
def test_a_wrong_export_is_one_line(tmp_path, capfd, flags, message):
    assert run_export(tmp_path / "out", *flags) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_imports_jax():
    """In a process where jax, and what is built on it, cannot be imported."""
    pytest.importorskip("torch")
    blocked = "sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'tyro', 'absl', 'einops')))"
    code = f"import sys; {blocked}; import omnitransfer_torch.__main__, omnitransfer_torch.one_velocity"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    save, calls = export.convert.save, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)

    export.convert.save = killed
    run_export(sys.argv[1])
