"""launch.sweep: spaces, the plan, trials that are killed, diverge and go on, halving, and the page.

The trials are tests/launch/stand_in_training.py, which takes milliseconds.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from configs import stage1
from configs.errors import RequestError
from launch import command, sweep
from launch.sweeping import findings, page, plan, proposals, runner, slurm, space, trials
from omnitransfer_jax.train import flops

RATES = "[fields]\noptimizer.learning_rate = {log = [1e-3, 1e-1]}\ntrain.shift = {range = [1.0, 8.0], points = 2}\n"
SMOKE = ("--config=stage1:smoke",)


def space_of(text, tmp_path, config=None):
    path = tmp_path / "space.toml"
    path.write_text(text)
    return space.read(str(path), config or stage1.get_config("smoke"))


def execute(*args):
    return command.execute(sweep.main, sweep.FLAGS, args)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Sweeps of the stand-in training: started(*flags) -> exit code."""
    monkeypatch.setattr(runner, "TRAINING", "tests.launch.stand_in_training")
    monkeypatch.setattr(runner, "LOOK", 0.01)
    monkeypatch.setattr(runner, "WAIT", 0.01)
    monkeypatch.setattr(sweep, "data_digest", lambda config: "")

    def started(*flags, text=RATES, out=tmp_path / "out"):
        (tmp_path / "space.toml").write_text(text)
        return execute(*SMOKE, f"--space={tmp_path / 'space.toml'}", f"--out={out}", *flags)

    return started


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fields]\noptimizer.learning_rat = [1e-3]", "--optimizer.learning_rat: no such flag or configuration field, did you mean"),
        ("[fields]\noptimizer.learning_rate = []", "optimizer.learning_rate = []: empty"),
        ("[fields]\noptimizer.learning_rate = {log = [0.1, 0.1]}", "log = [0.1, 0.1]: an empty range"),
        ("[fields]\noptimizer.learning_rate = {range = [0.2, 0.1]}", "an empty range; expected LOW below HIGH"),
        ("[fields]\noptimizer.warmup_steps = {log = [0, 8]}", "a logarithmic scale begins above 0"),
        ("[fields]\noptimizer.warmup_steps = {range = [0.5, 8]}", "--optimizer.warmup_steps=0.5: expected int"),
        ("[fields]\ntrain.weighting = {range = [0, 8]}", "--train.weighting=0: expected one of velocity, clean, bell"),
        ("[fields]\ntrain.weighting = 'clean'", "expected a list of values"),
        ("[fields]\ntrain.batch_size = [4, 0]", "train.batch_size=0: train.batch_size=0: at least 1"),
        ("[fields]\ndata.text_drop = [0.1, 1.5]", "data.text_drop=1.5: from 0 to below 1"),
        ("[field]\na = [1]", "[field]: no such part; there are [fields]"),
        ("[fields", "not TOML"),
        ("", "no field; write one under [fields]"),
        ("[choices.size]\na = {dit.dim = 48}\nb = {dit.num_layers = 2}", "choices.size.b: expected the fields of the others, dit.dim"),
        ("[fields]\ndit.dim = [48]\n[choices.size]\na = {dit.dim = 48}", "dit.dim: given twice"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_one_line_before_anything_starts(text, message, stand_in, tmp_path, capsys):
    assert stand_in("--search=grid", text=text) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("--space=")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials=0"], "--trials: not given"),
        (["--search=grid"], "optimizer.learning_rate: a grid has to know how many points it takes of this range"),
        (["--trials=3", "--halving=1"], "--halving=1: one of one goes on"),
        (["--trials=3", "--first_rung=100"], "--first_rung=100: at most train.steps=60"),
        (["--trials=3", "--device=v9"], "--device=v9: expected one of v5e, v5p, v6e, A100"),
        (["--trials=3", "--budget_device_hours=1"], "the device-hours are not known; give --device"),
        (["--trials=3", "--device=1e-9", "--budget_device_hours=1"], "the plan is "),
        (["--trials=3", "--checkpoint.keep=100000000"], "checkpoints of all trials need "),
        (["--trials=3", "--train.init_from=nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_wrong_request_starts_nothing(flags, message, stand_in, tmp_path, capsys):
    assert stand_in(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "trials").exists()


def test_points_of_a_space(tmp_path):
    """Random ones are in range and the same however many are taken; a grid has all combinations; choices set several fields."""
    text = RATES + "optimizer.warmup_steps = {range = [2, 9]}\n[choices.size]\n"
    text += "small = {dit.dim = 48, dit.num_heads = 4}\nlarge = {dit.dim = 96, dit.num_heads = 8}\n"
    found = space_of(text, tmp_path)
    drawn = found.different(seed=3, count=40)
    assert found.different(seed=3, count=7) == drawn[:7]
    assert found.different(seed=4, count=7) != drawn[:7]
    rates = np.log10([point["optimizer.learning_rate"] for point in drawn])
    assert rates.min() >= -3
    assert rates.max() <= -1
    assert 10 < (rates < -2).sum() < 30  # evenly on the logarithmic scale
    assert {point["optimizer.warmup_steps"] for point in drawn} <= set(range(2, 10))
    assert Counter(point["size"] for point in drawn).keys() == {"small", "large"}
    config = found.at(drawn[0] | {"size": "large"})
    assert (config.dit.dim, config.dit.num_heads) == (96, 8)
    grid = space_of(RATES.replace("1e-1]", "1e-1], points = 3") + "seed = [1, 2]", tmp_path).grid()
    assert len(grid) == 3 * 2 * 2
    assert [point["optimizer.learning_rate"] for point in grid[::4]] == [1e-3, 1e-2, 1e-1]


def test_the_plan_is_counted(tmp_path):
    """Steps of a halved sweep, operations of the method's own count, hours from them, and the checkpoints' bytes."""
    found = space_of(RATES, tmp_path)
    config = found.config
    sweep_ = made(tmp_path, found, count=8, rungs=(15, 30, 60), halving=2)
    costs = plan.plan(sweep_, [(str(point), found.at(point)) for point in found.different(0, 8)], device="v5e", efficiency=0.5)
    assert costs.steps == 8 * 15 + 4 * 15 + 2 * 30
    assert costs.flops == costs.steps * flops.train_step(config)
    assert costs.device_hours == pytest.approx(costs.flops / (197e12 * 0.5) / 3600)
    assert len(costs.shapes) == 1
    assert "of 15.75 GiB" in costs.fits[0]
    trained = sum(leaf.size for leaf in plan.objective(config).params.values())
    assert costs.storage_gib == pytest.approx(8 * 3 * trained * 4 * 4 / 2**30, rel=1e-3)  # weights, two moments, average; two are kept
    sizes = space_of("[choices.size]\na = {dit.num_layers = 1}\nb = {dit.num_layers = 3}", tmp_path)
    costs = plan.plan(made(tmp_path, sizes, 2, (60,), 0), [(str(point), sizes.at(point)) for point in sizes.grid()])
    assert len(costs.shapes) == 2
    assert costs.device_hours is None
    assert costs.flops == sum(60 * flops.train_step(sizes.at(point)) for point in sizes.grid())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"fits": False, "refused": "Ran out of memory"}, "it does not fit: Ran out of memory"),
        ({"fits": True, "hbm_gib_per_device": 3.5, "hbm_limit_gib": 15.75, "mesh": {"data": 1, "heads": 4}}, "3.5 of 15.75 GiB a device"),
    ],
)
def test_the_plan_may_be_compiled(found, expected, stand_in, monkeypatch, capsys):
    """What launch.compile finds is in the plan, with the mesh it is of; what it refuses starts nothing. The compiler itself is not here."""

    def compiled(command, **options):
        flag = next(arg for arg in command if arg.startswith("--json="))
        Path(flag.removeprefix("--json=")).write_text(json.dumps(found))
        assert {"launch.compile", "--topology=v5e:2x2", "--config=stage1:smoke"} <= set(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(plan.subprocess, "run", compiled)
    assert stand_in("--trials=2", "--compile=v5e:2x2", "--dry_run") == (0 if found["fits"] else 2)
    said = capsys.readouterr()
    assert expected in said.out + said.err
    assert not found["fits"] or "with --mesh.heads=4" in said.out


def made(tmp_path, found, count, rungs, halving, **others):
    return trials.Sweep(
        config="stage1:smoke", base=(), space=proposals.definition(found), search="random", trials=count, seed=0, rungs=rungs,
        halving=halving, objective=trials.Objective(**others), folder=tmp_path / "sweep", home=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "count", "halving", "first", "every", "expected"),
    [
        (60, 8, 0, 0, 1, (60,)),
        (60, 8, 2, 0, 1, (8, 16, 32, 60)),
        (1000, 9, 3, 0, 1, (112, 336, 1000)),
        (1000, 9, 3, 100, 25, (100, 300, 900, 1000)),
        (60, 8, 2, 7, 10, (10, 20, 30, 60)),
        (60, 1, 2, 0, 1, (60,)),
    ],
)
def test_rungs(steps, count, halving, first, every, expected):
    assert trials.rungs(steps, count, halving, first, every) == expected


def test_the_objective_is_a_mean_of_the_last_steps():
    lines = [{"step": n, "loss": float(n), "loss/t0.0-0.2": 1.0, "loss/t0.2-0.4": float(n)} for n in range(1, 41)]
    assert trials.Objective().value(lines, 20) == 19.5  # steps 19 and 20
    assert trials.Objective(window=0).value(lines, 20) == 20
    assert trials.Objective(metric="loss_by_time", window=0).value(lines, 20) == 10.5
    assert trials.Objective().value([*lines, {"step": 41, "loss": None}], 41) is None
    with pytest.raises(RequestError, match=r"--objective=accuracy: metrics\.jsonl has loss, loss/t0\.0-0\.2"):
        trials.Objective(metric="accuracy").value(lines, 20)
    assert trials.Objective(goal="max").best_first({1: 0.5, 2: 0.7}) == [2, 1]


def test_killed_diverged_and_halved_trials(stand_in, tmp_path, capsys):
    """A killed trial goes on and its log is an unkilled one's; a diverged one is reported; the better half goes on; nothing is repeated."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    text = "[fields]\noptimizer.learning_rate = [0.1, 0.2, 0.3, 0.9]"
    flags = ("--search=grid", "--halving=2", "--first_rung=15", "--train.steps=60")
    assert stand_in(*flags, text=text, out=whole) == 0
    (out / "trials" / "0001").mkdir(parents=True)
    (out / "trials" / "0001" / "KILL").write_text("20")
    assert stand_in(*flags, text=text) == 0
    printed = capsys.readouterr().out
    states = [trials.Trial(out / "trials" / f"000{n}").state for n in range(4)]
    assert [state.status for state in states] == ["finished", "stopped", "stopped", "diverged"]
    assert states[1].restarts == 1
    assert "not finite 10 times in a row" in states[3].reason
    assert states[1].reason == f"loss {states[1].values['30']:.4g} at step 30: place 2 of 2, 1 went on"
    assert states[2].values.keys() == {"15"}
    assert "python -m launch.train --config=stage1:smoke --optimizer.learning_rate=0.1 --workdir=NEW" in printed
    for n in (0, 1):
        logs = [(folder / "trials" / f"000{n}" / "run" / "metrics.jsonl").read_text() for folder in (whole, out)]
        until = min(len(log.splitlines()) for log in logs)
        assert until >= (60, 30)[n]
        assert logs[0].splitlines()[:until] == logs[1].splitlines()[:until]
        assert trials.Trial(whole / "trials" / f"000{n}").state.values == states[n].values
    before = {path: path.read_text() for path in out.rglob("log.txt")}
    assert stand_in(*flags, text=text) == 0
    assert {path: path.read_text() for path in out.rglob("log.txt")} == before, "no process was started"
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert (rows[0]["trial"], rows[0]["status"]) == ("0", "finished")
    assert float(rows[0]["loss"]) == states[0].values["60"]
    assert stand_in(*flags[:1], "--halving=4", text=text) == 2
    assert "was begun with rungs" in capsys.readouterr().err


def test_a_trial_that_always_dies_is_not_started_for_ever(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("DIES_FROM", "20")
    assert stand_in("--trials=1") == 0
    state = trials.Trial(tmp_path / "out" / "trials" / "0000").state
    assert state.status == "failed"
    assert f"ended {runner.PATIENCE} times by SIGKILL without a new step" in state.reason
    assert state.restarts == runner.PATIENCE  # the first start made 20 steps


def test_a_trial_that_cannot_start_fails_alone(stand_in, tmp_path, monkeypatch):
    """The others run."""
    monkeypatch.setattr(runner, "TRAINING", "tests.launch.no_such_training")
    assert stand_in("--trials=2") == 0
    states = [trials.Trial(tmp_path / "out" / "trials" / f"000{n}").state for n in range(2)]
    assert [state.status for state in states] == ["failed", "failed"]
    assert "No module named tests.launch.no_such_training" in states[0].reason


def test_a_file_stops_one_trial(stand_in, tmp_path):
    (tmp_path / "out" / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "out" / "trials" / "0000" / "STOP").touch()
    assert stand_in("--trials=2", "--train.steps=300") == 0
    states = [trials.Trial(tmp_path / "out" / "trials" / f"000{n}").state for n in range(2)]
    assert [state.status for state in states] == ["stopped", "finished"]


def test_a_file_stops_the_sweep(stand_in, tmp_path, monkeypatch):
    """Its trial saves and ends; the same command goes on."""
    monkeypatch.setenv("STEP_SECONDS", "0.05")
    log = tmp_path / "out" / "trials" / "0000" / "run" / "metrics.jsonl"

    def stop():
        while not log.exists():
            time.sleep(0.01)
        (tmp_path / "out" / "STOP").touch()

    threading.Thread(target=stop, daemon=True).start()
    assert stand_in("--trials=2") == 130
    assert 0 < len(log.read_text().splitlines()) < 60
    assert trials.Trial(log.parents[1]).state.status == "waiting"
    monkeypatch.setenv("STEP_SECONDS", "0")
    assert stand_in("--trials=2") == 0
    assert trials.Trial(log.parents[1]).state.status == "finished"


def test_two_that_bring_one_trial_start_it_once(stand_in, tmp_path):
    """As jobs of a sweep that was killed, and those of the same sweep again."""
    assert stand_in("--trials=1", "--train.steps=5", "--optimizer.warmup_steps=1") == 0
    found = trials.Sweep.read(tmp_path / "out")
    trial = found.trial(0)
    shutil.rmtree(trial.workdir)
    (trial.folder / "state.json").unlink()
    (trial.folder / "log.txt").unlink()
    threads = [threading.Thread(target=runner.advance, args=(found, 0, 5)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trial.state.status == "finished"
    assert (trial.folder / "log.txt").read_text().count("started") == 1


@pytest.fixture
def queue(monkeypatch):
    """A queue of Slurm without Slurm: states by job, what was cancelled, and the trials that were submitted."""
    found = {"states": {}, "cancelled": [], "submitted": []}

    def submitted(sweep, numbers, until, options, at_once):
        found["submitted"] += numbers
        return {number: f"7_{number}" for number in numbers}

    monkeypatch.setattr(slurm, "LOOK", 0.01)
    monkeypatch.setattr(slurm, "_submitted", submitted)
    monkeypatch.setattr(slurm, "_queue", lambda: {job: (state, "None") for job, state in found["states"].items()})
    monkeypatch.setattr(slurm, "_state", lambda job: "OUT_OF_MEMORY")
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **options: found["cancelled"].append(command))
    return found


def begun(tmp_path, count):
    """A sweep whose trials have a point each and have not run."""
    found = space_of(RATES, tmp_path)
    sweep_ = made(tmp_path, found, count=count, rungs=(60,), halving=0)
    sweep_.write()
    for number, point in enumerate(found.different(0, count)):
        proposals.begin(sweep_, sweep_.trial(number), found, point)
    return sweep_


def test_the_queue_of_slurm_is_followed(queue, tmp_path, monkeypatch):
    """A job of a killed sweep is not submitted again; a job that is gone fails its trial, and the others go on."""
    sweep_, done = begun(tmp_path, 3), []
    (sweep_.folder / "slurm").mkdir()
    (sweep_.folder / "slurm" / "jobs.json").write_text('{"0": "5_0", "2": "5_2"}')
    queue["states"] |= {"5_0": "RUNNING", "7_1": "PENDING"}
    monkeypatch.setattr(slurm, "LATE", 0.05)

    def end(number):
        done.append(number)
        if number == 2:  # it was gone from the start; the others end now
            for other in (0, 1):
                sweep_.trial(other).set(trials.State(status="finished", until=60, values={"60": 1.0}))

    slurm.bring(sweep_, [0, 1, 2], 60, end, options={}, at_once=0)
    assert queue["submitted"] == [1, 2]
    assert sorted(done) == [0, 1, 2]
    assert sweep_.trial(2).state.status == "failed"
    assert "job 7_2 ended (OUT_OF_MEMORY)" in sweep_.trial(2).state.reason
    assert queue["cancelled"] == []


def test_jobs_that_wait_are_cancelled_with_the_sweep(queue, tmp_path):
    """One that runs is waited for: it saves."""
    sweep_ = begun(tmp_path, 2)
    queue["states"] |= {"7_0": "RUNNING", "7_1": "PENDING"}
    sweep_.stop_file.touch()
    threading.Timer(0.2, lambda: queue["states"].pop("7_0")).start()
    with pytest.raises(KeyboardInterrupt):
        slurm.bring(sweep_, [0, 1], 60, lambda number: None, options={}, at_once=0)
    assert queue["cancelled"][0] == ["scancel", "7_1"]
    assert "7_0" not in queue["states"]


def test_more_trials_of_the_same_sweep(stand_in, tmp_path):
    assert stand_in("--trials=2") == 0
    first = (tmp_path / "out" / "trials" / "0001" / "trial.json").read_text()
    assert stand_in("--trials=3") == 0
    assert (tmp_path / "out" / "trials" / "0001" / "trial.json").read_text() == first
    assert trials.Trial(tmp_path / "out" / "trials" / "0002").state.status == "finished"


SWEEP = """
import sys
from launch import command, sweep
from launch.sweeping import runner
runner.TRAINING, runner.LOOK, runner.WAIT, sweep.data_digest = "tests.launch.stand_in_training", 0.01, 0.01, lambda config: ""
command.run(sweep.main, sweep.FLAGS)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_stopped_goes_on(number, tmp_path):
    """Its trial ends with it; the same command repeats no finished trial."""
    (tmp_path / "space.toml").write_text("[fields]\noptimizer.learning_rate = [0.1, 0.2, 0.3]")
    args = [sys.executable, "-c", SWEEP, *SMOKE, f"--space={tmp_path / 'space.toml'}", "--search=grid", f"--out={tmp_path / 'out'}"]
    env = os.environ | {"STEP_SECONDS": "0.03"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(args, env=env, cwd=root, stdout=subprocess.DEVNULL)
    logs = [tmp_path / "out" / "trials" / f"000{n}" / "run" / "metrics.jsonl" for n in range(3)]
    while not logs[1].exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGTERM else -number)
    time.sleep(0.5)
    done = [len(log.read_text().splitlines()) if log.exists() else 0 for log in logs]
    assert done[0] == 60
    assert done[1] < 60
    finished = tmp_path / "out" / "trials" / "0000" / "log.txt"
    said = finished.read_text()
    assert subprocess.run(args, cwd=root, stdout=subprocess.DEVNULL).returncode == 0
    assert [len(log.read_text().splitlines()) for log in logs] == [60, 60, 60]
    assert finished.read_text() == said, "no process was started"


def test_tpe_proposes_from_what_is_known(stand_in, tmp_path):
    """Of 24 trials the later ones lie nearer to the best rate, the smallest."""
    pytest.importorskip("optuna")
    assert stand_in("--search=tpe", "--trials=24", "--train.steps=2", "--optimizer.warmup_steps=1") == 0
    rates = [trials.Trial(tmp_path / "out" / "trials" / f"{n:04d}").point["optimizer.learning_rate"] for n in range(24)]
    assert len(set(rates)) > 20
    assert np.median(rates[14:]) < 0.5 * np.median(rates[:10])


def test_importance_is_of_the_field_that_matters():
    rng = np.random.default_rng(0)
    points = [{"rate": float(rng.random()), "kind": str(rng.choice(["a", "b"])), "other": float(rng.random())} for _ in range(60)]
    found = findings.importance(points, [(point["rate"] - 0.5) ** 2 + 0.001 * rng.random() for point in points])
    assert next(iter(found)) == "rate"
    assert found["rate"] > 0.6
    assert max(found["kind"], found["other"]) < 0.15
    assert findings.importance(points[:3], [1, 2, 3]) == {}


def test_a_power_law_is_found_with_its_interval():
    rng = np.random.default_rng(1)
    cost = np.repeat(np.geomspace(1e15, 1e18, 6), 2)
    exact = 40 * cost**-0.07
    law = findings.power_law(cost, exact * np.tile([1.0, 1.5], 6))  # the better one of each size counts
    assert law is not None
    assert (law.exponent, law.factor) == (pytest.approx(0.07), pytest.approx(40))
    inside = 0
    for _ in range(200):
        law = findings.power_law(cost[::2], exact[::2] * np.exp(0.05 * rng.standard_normal(6)))
        assert law is not None
        inside += law.low <= 0.07 <= law.high
    assert 180 <= inside <= 199
    assert findings.power_law([1e3, 1e4], [1, 2]) is None


def test_two_hundred_trials_are_read_in_seconds(tmp_path):
    """Into a page that loads nothing and escapes what it shows."""
    found = space_of(RATES + "[choices.size]\na = {dit.num_layers = 1}\nb = {dit.num_layers = 2}\nc = {dit.num_layers = 3}", tmp_path)
    made_ = made(tmp_path, found, count=200, rungs=(2000,), halving=0)
    made_.write()
    rng = np.random.default_rng(0)
    for number, point in enumerate(found.different(0, 200)):
        trial = made_.trial(number)
        proposals.begin(made_, trial, found, point)
        losses = 1 + point["optimizer.learning_rate"] + rng.random(2000) / 10
        trial.workdir.mkdir()
        line = {"grad_norm": 1.0, "learning_rate": 1e-4, "seconds": 0.5, "data_wait": 0.01, "loss/id": 0.5}
        lines = [json.dumps({"step": n, "loss": loss} | line) for n, loss in enumerate(losses, start=1)]
        (trial.workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        trial.set(trials.State(status="finished", until=2000, values={"2000": float(losses[-200:].mean())}))
    made_.trial(0).end("failed", "exit code 1: <script>alert(1)</script>")
    started = time.perf_counter()
    page.write(made_, "the plan")
    seconds = time.perf_counter() - started
    print(f"200 trials in {seconds:.1f} s")
    assert seconds < 20
    text = (made_.folder / "sweep.html").read_text()
    assert len(text) < 15e6
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    links = Links()
    links.feed(text)
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert "its 95% interval is" in text
    assert text.count('<th scope="row">') == 201
    assert len(list(csv.DictReader((made_.folder / "sweep.csv").read_text().splitlines()))) == 200


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
