"""A real Slurm: launch.recipe's job of two processes and launch.sweep's array are pre-empted, queued again, and end as others do.

Minutes on two cores, in a Slurm of one node: make test-slurm. It works on any other cluster too, in a shared --basetemp.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import stage1
from launch.sweeping import trials
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.methods.omnitransfer import objective
from omnitransfer_jax.train.log import read_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE = 30 * 60.0
MEASURED = ("seconds", "data_wait", "tokens_per_second", "mfu", "compile_seconds")  # of the machine, not of the training
STEPS = ("--train.steps=240", "--checkpoint.every=60", "--checkpoint.keep=1")


def command(*args, check=True):
    return subprocess.run(args, cwd=ROOT, check=check, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Pairs of the world; skips where there is no Slurm."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm answers: make test-slurm")
    folder = tmp_path_factory.mktemp("world") / "records"
    command(sys.executable, "-m", "launch.encode_world", "--config=stage1:smoke", "--pairs=40", f"--out={folder}")
    return folder


def queue():
    """State of each of my jobs that has not ended."""
    lines = command("squeue", "--me", "--array", "--noheader", "--format=%i %T", check=False).splitlines()
    return dict(line.split() for line in lines)


def waited(condition, process=None):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, queue()
        assert process is None or process.poll() is None, "the sweep ended before"
        time.sleep(0.05)
    return found


def lines(workdir):
    """What a training logged, without what was measured."""
    path = workdir / "metrics.jsonl"
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in read_lines(workdir)] if path.exists() else []


def assert_same(workdir, other):
    assert lines(workdir) == lines(other)
    ours, theirs = (run_folder.load_params(folder, objective(stage1.get_config("smoke")).params) for folder in (workdir, other))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def submitted(tmp_path, records, name):
    """The number of the job of a recipe, and the workdir of its training."""
    workdir, recipe = tmp_path / name, tmp_path / f"recipe_{name}"
    flags = ["--config=stage1:smoke", "--target=slurm", "--processes=2", "--mesh.data=2", f"--workdir={workdir}", f"--out={recipe}"]
    command(sys.executable, "-m", "launch.recipe", *flags, f"--data.path={records}", *STEPS)
    said = command("sbatch", "--parsable", f"--output={recipe}/log.txt", f"{recipe}/train.sbatch")
    return said.strip(), workdir, recipe / "log.txt"


def test_a_recipe_is_pre_empted_and_goes_on(records, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # the recipe says `python`
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    job, whole, _ = submitted(tmp_path, records, "whole")
    waited(lambda: job not in queue())
    assert len(lines(whole)) == 240
    job, workdir, log = submitted(tmp_path, records, "stopped")
    waited(lambda: len(lines(workdir)) >= 20)
    command("scancel", "--signal=TERM", job)
    waited(lambda: "start 0: exit code 0, from step 0 to" in log.read_text())
    reached = len(lines(workdir))
    assert 20 <= reached < 240
    waited(lambda: job not in queue())
    text = log.read_text()
    print(text)
    assert f"going on after step {reached}" in text
    assert f"start 1: exit code 0, from step {reached} to 240 of 240" in text
    assert_same(workdir, whole)


def test_a_sweep_is_pre_empted_killed_and_goes_on(records, tmp_path):
    """Two trials of four go on; one job is pre-empted; the sweep is killed, its jobs run on, and the same command finds them."""
    pytest.importorskip("submitit")
    env, out = os.environ | {"JAX_PLATFORMS": "cpu"}, tmp_path / "sweep"
    (tmp_path / "space.toml").write_text("[fields]\noptimizer.learning_rate = [1e-3, 1e-2, 1e30]")
    args = [sys.executable, "-m", "launch.sweep", "--config=stage1:smoke", f"--space={tmp_path / 'space.toml'}", "--search=grid"]
    args += ["--engine=slurm", "--halving=2", "--first_rung=120", f"--data.path={records}", *STEPS, f"--out={out}"]
    process = subprocess.Popen(args, cwd=ROOT, env=env)
    workdirs = [out / "trials" / f"000{n}" / "run" for n in range(3)]
    waited(lambda: len(lines(workdirs[0])) >= 20, process)
    jobs = json.loads((out / "slurm" / "jobs.json").read_text())
    command("scancel", "--signal=TERM", jobs["0"])
    waited(lambda: trials.Trial(out / "trials" / "0000").state.restarts == 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    still = set(queue())
    assert jobs["0"] in still
    assert subprocess.run(args, cwd=ROOT, env=env).returncode == 0
    states = [trials.Trial(out / "trials" / f"000{n}").state for n in range(3)]
    print([(state.status, state.values, state.restarts) for state in states])
    assert states[2].status == "diverged"
    assert states[0].status == states[1].status == "finished"
    assert states[0].restarts == 1
    whole = tmp_path / "whole"
    arguments = trials.Trial(out / "trials" / "0000").args
    subprocess.run([sys.executable, "-m", "launch.train", *arguments, f"--workdir={whole}"], cwd=ROOT, env=env, check=True)
    assert_same(workdirs[0], whole)
