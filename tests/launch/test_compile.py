"""launch.compile: refusals anywhere, and a small program where TPU's compiler is installed: pip install -e '.[tpu]'.

The encoders, of which the autoencoder alone compiles for half a minute, and two slices are

    python -m pytest -m slow -n 0 tests/launch/test_compile.py
"""

import importlib.util
import json

import pytest

from launch import command, compile

SMALL = ["--config=stage1:smoke", "--dit.dim=512", "--dit.num_heads=4", "--dit.num_layers=2", "--train.batch_size=4"]
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler, libtpu, is not installed")


def execute(*args):
    return command.execute(compile.main, compile.FLAGS, [*SMALL, *args])


@needs_compiler
@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_small_program(program, tmp_path, capsys):
    assert execute("--topology=v5p:2x2x1", f"--program={program}", f"--json={tmp_path / 'found.json'}") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"]
    assert (found["devices"], found["mesh"]["heads"]) == (4, 4)  # the recommended mesh
    assert 0 < found["hbm_gib_per_device"] < found["hbm_limit_gib"]
    assert found["executed_attention_flops"] > 0
    if program == "train":  # q, k, v and the answers, of two layers and two streams: forward, again, and the gradients' way back
        assert found["collectives"]["all-to-all"]["count"] == 3 * 4 * 2 * 2
    out = capsys.readouterr().out
    assert f"{program} on v5p:2x2x1, mesh data 1 x heads 4 x keys 1" in out
    assert "memory" in out
    assert "all-to-all" in out


@needs_compiler
@pytest.mark.slow
def test_the_encoders(tmp_path, capsys):
    stage3 = ["--config=stage3:smoke", "--topology=v5p:2x2x1", "--program=encode"]
    assert command.execute(compile.main, compile.FLAGS, [*stage3, f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["programs"]) == ["clips", "text", "image", "vision"]
    assert found["fits"]
    assert found["model_flops"] == sum(each["times"] * each["model_flops"] for each in found["programs"].values())
    for name in ("clips", "text"):  # the others are so small here that resizing pictures weighs more
        assert found["programs"][name]["executed_flops"] == pytest.approx(found["programs"][name]["model_flops"], rel=0.2)
    assert "all in memory together" in capsys.readouterr().out


@needs_compiler
@pytest.mark.slow
def test_two_slices(tmp_path, capsys):
    args = ["--topology=v5p:2x2x1", "--slices=2", "--dit.dtype=bfloat16", "--train.batch_size=8", f"--json={tmp_path / 'found.json'}"]
    assert execute(*args, "--mesh.slices=2", "--mesh.data=2", "--mesh.heads=2") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["devices"], found["slices"]) == (8, 2)
    assert "mesh slices 2 x data 2 x heads 2 x keys 1" in capsys.readouterr().out
    sent = found["collectives_by_group"]
    assert max(each["group"] for each in sent) == 4  # nothing is exchanged by more devices than a slice has
    assert {each["group"] for each in sent if each["dtype"] == "bf16"} == {2}  # weights and tokens


@needs_compiler
def test_several_meshes(tmp_path, capsys):
    assert execute("--topology=v5p:2x2x1", "--meshes=4x1x1 2x2x1", f"--json={tmp_path / 'found.json'}") == 0
    assert [each["mesh"]["data"] for each in json.loads((tmp_path / "found.json").read_text())] == [4, 2]
    assert len(capsys.readouterr().out.splitlines()) == 2


@needs_compiler
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--topology=v5p:2x2x1", "--meshes=2x1x1"], "4 devices, but the mesh has 2"),
        (["--topology=v5p:2x2x1", "--program=encode", "--meshes=4x1x1"], "--meshes: the encoders run on one device"),
        (["--topology=v5p:2x2x1", "--meshes=2x2"], "--meshes=2x2: expected data x heads x keys, as 16x4x1"),
        (["--topology=v5p:2x2x2"], "no mesh is recommended for it"),
        (["--topology=v5p:many"], "a generation with the chips along each axis"),
    ],
)
def test_meshes_that_are_none(args, words, capsys):
    assert execute(*args) == 2
    assert words in capsys.readouterr().err


def test_a_generation_that_is_none(capsys):
    assert execute("--topology=v9:2x2") == 2
    assert capsys.readouterr().err.strip() == "--topology=v9:2x2: the part before the colon is one of v5e, v5p, v6e"
