"""launch.sweep --engine=ray: real trainings that are killed and diverge, a sweep that is killed, and a cluster that loses a node.

Minutes on two cores: python -m pytest -n 0 -s -o faulthandler_timeout=0 -m "slow or not slow" tests/launch/test_sweep_ray.py
"""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import command, sweep
from launch.sweeping import ray as engine
from launch.sweeping import runner, trials
from omnitransfer_jax.train.log import read_lines

ROOT = Path(__file__).parents[2]
MINUTES = 60.0
MEASURED = ("seconds", "data_wait", "tokens_per_second", "mfu", "compile_seconds")  # of the machine, not of the training
LOCAL = ("--config=stage1:smoke", "--trials=2", "--engine=ray")


def execute(*args):
    return command.execute(sweep.main, sweep.FLAGS, args)


@pytest.fixture
def space(tmp_path, monkeypatch):
    """The flags of a space of four rates, of the stand-in training."""
    (tmp_path / "space.toml").write_text("[fields]\noptimizer.learning_rate = [0.1, 0.2, 0.3, 0.9]")
    monkeypatch.setattr(sweep, "data_digest", lambda config: "")
    return ("--config=stage1:smoke", f"--space={tmp_path / 'space.toml'}", "--search=grid", f"--out={tmp_path / 'out'}", "--engine=ray")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resources=GPU",), "--resources=GPU: expected NAME=VALUE"),
        (("--resources=GPU=many",), "--resources=GPU=many: expected a number above 0"),
        (("--engine=local", "--resources=GPU=1"), "--engine=local runs one trial with all there is"),
        (("--engine=slurm", "--address=head:6379"), "--address=head:6379: of a Ray cluster"),
    ],
)
def test_a_wrong_request_is_one_line(flags, message, space, tmp_path, capsys):
    pytest.importorskip("ray")
    assert execute(*space, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_absent_library_is_one_line(name, library, space, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert execute(*space, f"--engine={name}") == 2
    error = capsys.readouterr().err
    assert f"it is not installed: pip install {library}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def waited(condition, process=None):
    """What `condition` returns once it is true; the process has to run until then."""
    end = time.monotonic() + 30 * MINUTES
    while not (found := condition()):
        assert time.monotonic() < end
        assert process is None or process.poll() is None, "the sweep ended before"
        time.sleep(0.02)
    return found


# --- a cluster of two nodes -------------------------------------------------------------------------------------------------------------


def of_the_stand_in():
    """In each worker of Ray before its first task: trials are the stand-in training."""
    runner.TRAINING, runner.LOOK, runner.WAIT = "tests.launch.stand_in_training", 0.05, 0.05


@pytest.fixture
def cluster(monkeypatch):
    """Ray's own cluster of two simulated nodes, to which this process is connected; the second one can be removed."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": engine.STORE})
    second = found.add_node(num_cpus=2, object_store_memory=engine.STORE)
    environment = {"PYTHONPATH": str(ROOT), "STEP_SECONDS": "0.2"}
    ray.init(found.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": of_the_stand_in, "env_vars": environment})
    try:
        yield found, second
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.mark.slow
def test_a_sweep_on_a_cluster_is_asked_to_stop(cluster, space, tmp_path):
    """Trials that run save and end, one that waits for a place is not started, and the same command goes on."""
    logs = [tmp_path / "out" / "trials" / f"{n:04d}" / "run" / "metrics.jsonl" for n in range(4)]

    def stop():
        waited(lambda: sum(log.exists() for log in logs) == 2)
        (tmp_path / "out" / "STOP").touch()

    threading.Thread(target=stop, daemon=True).start()
    assert execute(*space, "--resources=CPU=2") == 130
    assert [log.exists() for log in logs].count(True) == 2
    assert all(len(log.read_text().splitlines()) < 60 for log in logs if log.exists())
    assert execute(*space) == 0
    states = [trials.Trial(log.parents[1]).state.status for log in logs]
    assert states == ["finished"] * 3 + ["diverged"]


def node_of(pid):
    """The raylet that a process of a trial descends from; a trial's session is its own, its parents are not."""
    while pid > 1:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        if status["Name"].startswith("raylet"):
            return pid
        pid = int(status["PPid"])
    return None


def trainings(folder):
    """Processes by the number of the trial of a sweep whose training they are."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        at = [word.decode() for word in words if word.startswith(f"--workdir={folder}/trials/".encode())]
        if at:
            found[int(Path(at[0]).parent.name)] = int(path.parent.name)
    return found


@pytest.mark.slow
def test_a_cluster_that_loses_a_node(cluster, space, tmp_path, capsys):
    """Trials run on both nodes; those of the removed one go on at the other, and the sweep ends as an undisturbed one."""
    found, second = cluster
    nodes, lost = {}, set()

    def watch():
        logs = [tmp_path / "out" / "trials" / f"{n:04d}" / "run" / "metrics.jsonl" for n in range(4)]
        while len(set(nodes.values())) < 2 or not all(logs[number].exists() for number in nodes):
            for number, pid in trainings(tmp_path / "out").items():
                try:
                    nodes.setdefault(number, node_of(pid))
                except OSError:
                    continue
            time.sleep(0.1)
        raylet = second.all_processes["raylet"][0].process.pid
        lost.update(number for number, node in nodes.items() if node == raylet)
        found.remove_node(second)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert execute(*space) == 0
    thread.join(timeout=1)
    assert "2 nodes, 4 trials at once, each CPU=1" in capsys.readouterr().out
    assert len(set(nodes.values())) == 2, "trials ran on one node"
    assert lost
    states = [trials.Trial(tmp_path / "out" / "trials" / f"000{n}").state for n in range(4)]
    assert [state.status for state in states] == ["finished"] * 3 + ["diverged"]
    assert all(states[number].restarts >= 1 for number in lost - {3})
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        lines = read_lines(tmp_path / "out" / "trials" / f"000{number}" / "run")
        assert [line["step"] for line in lines] == list(range(1, 61))
        assert states[number].values == {"60": pytest.approx(rate + sum(1 / n for n in range(55, 61)) / 6)}


# --- real trainings ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """Eight trainings in the world, halved: one killed, two that diverge, then the sweep killed; the same command ends it."""
    pytest.importorskip("ray")
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    records, out = tmp_path / "records", tmp_path / "sweep"
    started = [sys.executable, "-m"]
    encode = [*started, "launch.encode_world", "--config=stage1:smoke", "--pairs=40", f"--out={records}"]
    subprocess.run(encode, cwd=ROOT, env=env, check=True)
    (tmp_path / "space.toml").write_text("[fields]\noptimizer.learning_rate = [1e-3, 3e-3, 1e-2, 1e30]\ntrain.shift = [1.0, 4.0]")
    args = [*started, "launch.sweep", "--config=stage1:smoke", f"--space={tmp_path / 'space.toml'}", "--search=grid"]
    args += ["--engine=ray", "--resources=CPU=1", "--halving=2", "--first_rung=120", "--objective=loss_by_time", f"--data.path={records}"]
    args += ["--train.steps=240", "--checkpoint.every=20", "--checkpoint.keep=1", f"--out={out}"]
    process = subprocess.Popen(args, cwd=ROOT, env=env)
    log = out / "trials" / "0001" / "run" / "metrics.jsonl"
    waited(lambda: log.exists() and log.read_text().count("\n") >= 50, process)
    os.kill(waited(lambda: trainings(out).get(1), process), signal.SIGKILL)
    states = lambda: {n: trials.Trial(out / "trials" / f"000{n}").state for n in range(8)}  # noqa: E731
    waited(lambda: sum(state.status == "reached" for state in states().values()) >= 3, process)
    process.kill()
    process.wait()
    waited(lambda: not trainings(out))
    before = {n: (out / "trials" / f"000{n}" / "log.txt").read_text() for n, state in states().items() if state.status == "reached"}
    assert states()[1].restarts == 1
    assert subprocess.run(args, cwd=ROOT, env=env).returncode == 0
    after = states()
    print({n: (state.status, state.values) for n, state in after.items()})
    assert [after[n].status for n in (6, 7)] == ["diverged", "diverged"]
    assert "not finite" in after[6].reason
    assert sum(state.status == "finished" for state in after.values()) == 4
    for number, text in before.items():  # one more process at most, for the second rung
        more = (out / "trials" / f"000{number}" / "log.txt").read_text().removeprefix(text)
        assert more.count("compiled in") == (1 if after[number].status == "finished" else 0)
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["stopped"] * 2 + ["diverged"] * 2
    whole, arguments = tmp_path / "whole", trials.Trial(out / "trials" / "0001").args
    subprocess.run([*started, "launch.train", *arguments, f"--workdir={whole}"], cwd=ROOT, env=env, check=True)
    killed, unkilled = (
        [{name: value for name, value in line.items() if name not in MEASURED} for line in read_lines(folder)]
        for folder in (log.parent, whole)
    )
    assert len(killed) >= 120
    assert killed == unkilled[: len(killed)]
    assert trials.Objective(metric="loss_by_time").value(read_lines(whole), 120) == after[1].values["120"]
