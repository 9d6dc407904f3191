"""launch.recipe: every target has a golden file, and YAML is what Kubernetes' and SkyPilot's own schemas take.

The golden files are written anew by OMNITRANSFER_WRITE_GOLDEN=1 python -m pytest -n 0 tests/launch/test_recipe.py; read their difference.
"""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import command, recipe

GOLDEN = Path(__file__).parents[1] / "fixtures" / "recipes"
INPUTS = ("--data.path=/shared/records", "--train.init_from=/shared/stage2")
POD = ("--config=stage3", "--topology=v5p:4x4x4", "--workdir=/shared/stage3", *INPUTS)
SLURM = ("--config=stage1:smoke", "--nodes=2", "--processes=4", "--gpus=4", "--mesh.data=4", "--mesh.heads=2", "--workdir=/shared/run")
TARGETS = {target: SLURM if target == "slurm" else POD for target in recipe.FILES}


def execute(*args):
    return command.execute(recipe.main, recipe.FLAGS, args)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for target, flags in TARGETS.items():
            assert execute(*flags, f"--target={target}", f"--out={target}") == 0
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_of_a_target(target, written):
    names = sorted(path.name for path in (written / target).iterdir())
    assert names == sorted([*recipe.FILES[target], "README.md"])
    for name in names:
        text, golden = (written / target / name).read_text(), GOLDEN / target / name
        if "OMNITRANSFER_WRITE_GOLDEN" in os.environ:
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text)
        assert text == golden.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_what_every_target_has(target, written):
    """The training with its mesh and every process, one cache of programs, and time for two saves."""
    text = "\n".join(path.read_text() for path in (written / target).iterdir())
    assert "--mesh.data=" in text
    assert "--distributed" in text
    assert "JAX_COMPILATION_CACHE_DIR" in text
    for path in (written / target).iterdir():
        if path.suffix in (".sh", ".sbatch"):
            assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_a_jobset_is_what_kubernetes_takes(written):
    """Its jobs have the fields of Kubernetes' own schema of a job (of the package kubernetes-validate), and one grace period."""
    validate = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load((written / "jobset" / "jobset.yaml").read_text())
    for each in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": each["name"]}, **each["template"]}
        validate.validate(job, "1.31", strict=True)
        job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
        with pytest.raises(validate.ValidationError):
            validate.validate(job, "1.31", strict=True)


def test_a_skypilot_task_is_what_skypilot_takes(written):
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(written / "skypilot" / "task.yaml"))
    assert "launch.train" in task.run
    content = yaml.safe_load((written / "skypilot" / "task.yaml").read_text())
    with pytest.raises(ValueError, match="resorces"):
        sky.Task.from_yaml_config({**content, "resorces": {}})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=stage3", "--target=xpk", "--workdir=/w"], "--topology: not given"),
        (["--config=stage3", "--target=xpk", "--workdir=/w", "--topology=v5p:4"], "expected the chips along each axis"),
        (["--config=stage3", "--target=xpk", "--workdir=/w", "--topology=v5p:4x4x2"], "no mesh is recommended for it"),
        (["--config=stage3", "--target=xpk", "--workdir=/w", "--topology=v5p:4x4x4", "--mesh.data=4"], "4 devices, but there are 64"),
        (["--config=stage1:smoke", "--target=slurm", "--workdir=/w", "--processes=2"], "1 devices, but there are 2"),
        (["--config=stage1:smoke", "--target=slurm", "--workdir=gs://b/w"], "mount a bucket"),
        (["--config=stage1:smoke", "--target=slurm"], "--workdir: not given"),
    ],
)
def test_a_wrong_request_writes_nothing(flags, message, tmp_path, capsys):
    assert execute(*flags, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
