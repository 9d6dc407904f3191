"""launch.sample with DiTFlow, by its commands at the smallest size: on clips that the project makes, and on real ones if there are any."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from launch import command, sample, train
from tests.launch.test_sample import moving, picture, properties

SMOKE = ["--config=ditflow:smoke", "--sampler.guidance=1"]


def run(*args):
    return command.execute(sample.main, sample.FLAGS, [*SMOKE, *map(str, args)])


def test_a_video_its_losses_and_its_positions(tmp_path, capsys):
    """The same request makes the same bytes; what was optimised goes with another prompt, without the reference."""
    clip, image, saved = moving(tmp_path / "r.mp4", frames=12), picture(tmp_path / "a.png"), tmp_path / "new" / "p.safetensors"
    given = [f"--reference={clip}", f"--first_frame={image}", "--ditflow.variable=positions", f"--ditflow.save={saved}"]
    assert run(*given, f"--out={tmp_path / 'a.mp4'}") == 0
    assert properties(tmp_path / "a.mp4") == (9, 32, 48, 8)
    printed = capsys.readouterr().out
    losses = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in losses] == ["step 1", "step 2"]
    assert all("flow loss" in line and "before the last" in line for line in losses)
    assert f"wrote {saved}: positions of 2 guided steps" in printed
    with safe_open(saved, "np") as file:
        assert {name: file.get_tensor(name).shape for name in list(file.keys())} == {"positions": (2, 2, 2, 18, 12)}
    first = saved.read_bytes()
    assert run(*given, f"--out={tmp_path / 'b.mp4'}") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert saved.read_bytes() == first
    capsys.readouterr()

    other = [f"--first_frame={image}", "--prompt=a dog", "--ditflow.variable=positions", f"--ditflow.inject={saved}"]
    assert run(*other, "--ditflow.kv_injection=False", f"--out={tmp_path / 'c.mp4'}") == 0
    assert not any(line.startswith("step ") for line in capsys.readouterr().out.splitlines())
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()
    wrong_files(tmp_path, saved, other, capsys)


def wrong_files(folder, saved, request, capsys):
    """A file of another schedule, size or variable, a damaged one, and none are refused in one line."""
    (folder / "cut.safetensors").write_bytes(saved.read_bytes()[:500])
    save_file({"positions": np.zeros(2, np.float32)}, folder / "other.safetensors")
    wrong = {
        "--sampler.shift=5": f"--sampler.shift=5.0: {saved} was made with 3.0",
        "--video.frames=5": f"--video.frames=5: {saved} was made with 9",
        "--ditflow.share=0.75": "guided steps [0, 1, 2]",
        "--ditflow.variable=latents": "--ditflow.variable='latents'",
        f"--ditflow.inject={folder / 'cut.safetensors'}": "no whole file of --ditflow.save",
        f"--ditflow.inject={folder / 'other.safetensors'}": "not made by --ditflow.save",
        f"--ditflow.inject={folder / 'absent.safetensors'}": "no such file",
    }
    for change, words in wrong.items():
        assert run(*request, "--ditflow.kv_injection=False", change) == 2, change
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "0 --reference: DiTFlow takes the motion of one clip"),
        (["--reference={clip}", "--reference={clip}"], "2 --reference: DiTFlow takes the motion of one clip"),
        (["--reference={clip}", "--task=motion"], "--task=motion: DiTFlow takes the motion of its reference and nothing else"),
        (["--ditflow.inject=a.safetensors"], "give it, or --ditflow.kv_injection=False"),
        (["--ditflow.inject=a.safetensors", "--ditflow.kv_injection=False", "--reference={clip}"], "none is read; leave it out"),
        (["--ditflow.inject=a.safetensors", "--ditflow.save=b.safetensors"], "give one"),
        (["--reference={clip}", "--ditflow.save=b.pt"], "--ditflow.save=b.pt: end the name in .safetensors"),
        (["--reference={clip}", "--ditflow.block=2"], "ditflow.block=2: the network has blocks 0 to 1"),
        (["--reference={clip}", "--ditflow.share=0.1"], "ditflow.share=0.1: less than one of 4 steps"),
        (["--reference={clip}", "--mesh.heads=2"], "mesh.heads=2"),
        (["--reference={clip}", "--ditflow.guide=none", "--ditflow.kv_injection=False"], "guides nothing"),
        (["--reference={clip}", "--alignment.enabled=True"], "the method guides plain Wan"),
        (["--reference={clip}", "--video.frames=33"], "33 needed"),
    ],
)
def test_wrong_requests(tmp_path, capsys, args, words):
    clip = moving(tmp_path / "r.mp4", frames=12)
    assert run(*(arg.format(clip=clip) for arg in args)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_it_does_not_train(tmp_path, capsys):
    assert command.execute(train.main, train.FLAGS, ["--config=ditflow:smoke", f"--workdir={tmp_path}"]) == 2
    assert "it trains nothing; give it to launch.sample" in capsys.readouterr().err


def test_a_real_clip(shared, tmp_path):
    """Text-to-video."""
    network = ["--dit.image_dim=None", "--dit.in_channels=16"]
    clip = shared / "clips" / "davis" / "bmx-trees.mp4"
    assert run(f"--reference={clip}", *network, "--prompt=a leopard", f"--out={tmp_path / 'a.mp4'}") == 0
    assert properties(tmp_path / "a.mp4") == (9, 32, 48, 8)
