"""The ablation: intervals agree with other computations of them, rows have equal conditions, a job runs once, a page keeps its prose."""

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from benchmarks import ablation
from benchmarks.ablation import Column
from configs import kinds, stage1, stage3
from configs.errors import RequestError
from launch import command
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.train.log import METRICS_FILE
from world.pair_records import example


@pytest.fixture(autouse=True)
def defaults():
    ablation.FLAGS.unparse_flags()
    ablation.FLAGS(["", "--steps=20", "--scored=3"])


def set_flags(*given):
    ablation.FLAGS(["", *given])


# Intervals


def test_interval_of_two_pairs_is_what_all_draws_give():
    """Both pairs the first, one of each, both the second: 1/4, 1/2, 1/4, so that 2.5% and 97.5% are the outer ones."""
    assert ablation.estimate(np.array([[[0.0, 4.0]]])) == (2.0, 0.0, 4.0)


def test_interval_has_the_difference_between_seeds():
    """Two seeds that differ, each with equal pairs: a draw may take one seed twice, however many pairs there are."""
    values = np.repeat([[0.0], [1.0]], 500, axis=1)[None]
    assert ablation.estimate(values) == pytest.approx((0.5, 0.0, 1.0))


def test_interval_draws_the_same_pairs_for_all_seeds():
    """Pairs whose scores are the same in all seeds: the interval is that of one seed, 1.96 standard errors."""
    pairs = np.random.default_rng(1).normal(size=400)
    _, low, high = ablation.estimate(np.repeat(pairs[None, None], 4, axis=1))
    assert (high - low) / 2 == pytest.approx(1.96 * pairs.std() / 400**0.5, rel=0.05)


def test_interval_draws_the_pairs_of_each_task_apart():
    """Each task has pairs of its own: the mean over four tasks is half as uncertain as one task."""
    values = np.random.default_rng(2).normal(size=(4, 1, 400))
    _, low, high = ablation.estimate(values)
    expected = 1.96 * np.sqrt((values.var(-1) / 400).sum()) / 4
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)


# Rows


def test_a_row_differs_from_the_row_before_in_one_thing():
    """None, joint, bias, decoupled: from one to the next a single thing changes, and alignment ends as stage 3 does."""
    configs = {row: ablation.stage_config(row, ablation.ROWS[row].stages[-1], 0, 20, Path("out")) for row in ablation.ROWS}
    found = {row: (c.train.references, c.dit.references, c.dit.offsets, c.alignment.enabled) for row, c in configs.items()}
    assert found == {
        "none": (False, "split", "task", False),
        "joint": (True, "bidirectional", "frames", False),
        "bias": (True, "bidirectional", "task", False),
        "decoupled": (True, "split", "task", False),
        "alignment": (True, "split", "task", True),
    }
    same = {(c.train.batch_size, c.seed, c.data, c.sampler, c.optimizer, c.train.ema, c.train.weighting) for c in configs.values()}
    assert len(same) == 1
    assert configs["alignment"].train.trainable == stage3.get_config("tiny").train.trainable


def test_every_row_may_start_from_the_base():
    base = stage1.get_config("tiny").dit
    for row in ablation.ROWS:
        config = ablation.stage_config(row, "stage1", 0, 20, Path("out"))
        config.validate()
        assert config.train.init_from == model_folder.EMBEDDED
        assert list(kinds.differences(base, config.dit, ("model",))) == []


@pytest.mark.parametrize("steps", [4, 20, 300])
def test_alignment_takes_as_many_steps_as_the_others(steps):
    counts = ablation.divided(steps, "alignment")
    assert sum(counts) == steps == ablation.divided(steps, "none")[0]
    assert min(counts) > 0


def test_wrong_shares_are_refused():
    with pytest.raises(RequestError, match="--steps=2: 1 \\+ 1 \\+ 0 steps"):
        ablation.divided(2, "alignment")
    for shares in ("0.5,0.5", "0.5,0.4,0.4", "1.5,-1,0.5", "a,b,c"):
        set_flags(f"--shares={shares}")
        with pytest.raises(RequestError, match=f"--shares={shares}: 3 positive numbers"):
            ablation.divided(20, "alignment")


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a function that only takes its batches, which are numbers here; the batches of each run, by its workdir."""
    read = {}

    def train(objective, config, workdir, mesh, data):
        read[f"{workdir.parent.name}/{workdir.name}"] = [next(data) for _ in range(config.train.steps)]
        (workdir / "checkpoints" / str(read.get("stopped", config.train.steps))).mkdir(parents=True)
        lines = [{"step": n, "seconds": 9.0 if n == 1 else n} for n in (1, 2, 3, 4)]
        (workdir / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(ablation, "batches", lambda config, seed: itertools.count(1000 * seed))
    monkeypatch.setattr(ablation, "empty_text", lambda config: None)
    monkeypatch.setattr(ablation.omnitransfer, "objective", lambda config, empty_text: None)
    monkeypatch.setattr(ablation.loop, "train", train)
    monkeypatch.setattr(ablation.run_folder, "latest", lambda workdir: max((workdir / "checkpoints").iterdir()))
    return read


def test_all_rows_read_the_same_batches(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(ablation, "score", lambda *_: ({}, 0.5))
    for row in ("joint", "alignment"):
        job = ablation.run_job(tmp_path, row, 2)
        assert job["seconds a step"] == 3  # the median without the first line, 9
    alignment = [trained[f"alignment-2/{stage}"] for stage in ("stage1", "stage2", "stage3")]
    assert [len(part) for part in alignment] == [12, 3, 5]
    assert [*itertools.chain(*alignment)] == trained["joint-2/stage1"] == list(range(2000, 2020))


def test_all_rows_have_the_same_prompts_and_the_first_seed_has_controls(monkeypatch):
    seen = []

    def measure(made, networks, pairs, controls):
        seen.append(({task: [pair.prompt for pair in of_task] for task, of_task in pairs.items()}, controls))
        return SimpleNamespace(scores={"id": {"transfer": {"retrieval": np.ones(3)}}})

    monkeypatch.setattr(ablation, "Encoders", lambda config, folder: config)
    monkeypatch.setattr(ablation, "Transfer", lambda config, encoder: seen.append(encoder.train.references))
    monkeypatch.setattr(ablation.transfer, "load", lambda config, folder: None)
    monkeypatch.setattr(ablation.transfer, "measure", measure)
    monkeypatch.setattr(ablation, "seconds_a_clip", lambda *_: 0.5)
    for row, seed in (("none", 0), ("decoupled", 0), ("decoupled", 1)):
        found, _ = ablation.score(ablation.stage_config(row, "stage1", seed, 20, Path("out")), "", seed)
        assert json.loads(json.dumps(found)) == {"id": {"transfer": {"retrieval": [1.0, 1.0, 1.0]}}}
    reads, (none, decoupled, later) = seen[::2], seen[1::2]
    assert reads == [True] * 3
    config = stage3.get_config("tiny")
    prompts = {task: [example(config, 1, i, "held_out", task).prompt for i in range(3)] for task in tasks.NAMES}
    assert none[0] == decoupled[0] == later[0] == prompts
    assert [none[1], decoupled[1], later[1]] == [("transfer",), ("transfer", "swapped", "none"), ("transfer",)]


def test_a_run_that_was_stopped_ends_the_process(tmp_path, trained, monkeypatch):
    trained["stopped"] = 7
    monkeypatch.setattr(ablation, "score", lambda *_: pytest.fail("scored half a training"))
    with pytest.raises(SystemExit, match="the same command resumes"):
        ablation.work(tmp_path, [("none", 0)])
    assert not ablation.job_path(tmp_path, "none", 0).exists()


# Jobs


def test_a_job_is_done_once_by_one_process(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(ablation, "run_job", lambda out, *job: done.append(job) or {"row": job[0], "seed": job[1]})
    jobs = [("none", 0), ("joint", 0), ("bias", 0)]
    with ablation.claimed(ablation.job_path(tmp_path, "joint", 0).with_suffix(".lock")) as held:
        assert held
        ablation.work(tmp_path, jobs)
    assert done == [("none", 0), ("bias", 0)]
    ablation.work(tmp_path, jobs)
    assert done == [("none", 0), ("bias", 0), ("joint", 0)]
    assert set(ablation.read_jobs(tmp_path)) == set(jobs)


def test_a_dead_process_holds_no_job(tmp_path):
    path = tmp_path / "job.lock"
    program = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with ablation.claimed(path) as held:
            assert not held
        process.kill()
        process.wait()
        with ablation.claimed(path) as held:
            assert held


def test_a_folder_keeps_its_settings(tmp_path):
    asked = ablation.settings()
    ablation.require_settings(tmp_path, asked)
    ablation.require_settings(tmp_path, asked)
    with pytest.raises(RequestError, match="steps=20 there, 30 now"):
        ablation.require_settings(tmp_path, asked | {"steps": 30})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rows=none,jiont", "--rows=jiont: no such rows; there are none, joint"),
        ("--core=4096", "--core=4096: this process may use"),
        ("--core=x", "x"),
        ("--report", "no ablation"),
    ],
)
def test_wrong_requests_are_errors_of_one_line(tmp_path, capsys, flag, message):
    assert command.execute(ablation.main, ablation.FLAGS, [f"--out={tmp_path}", flag]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Results


def made_up(seeds=2, pairs=6):
    """Jobs in which row r, seed s, pair n has a known PSNR, and all other scores are drawn."""
    jobs, random = {}, np.random.default_rng(0)
    own = {"motion": ["path"], "camera": ["camera"], "id": ["colour", "texture"], "style": ["colour", "texture"], "effect": []}
    for r, row in enumerate(ablation.ROWS):
        for seed in range(seeds):
            scores = {}
            for task in tasks.NAMES:
                transfer = {name: random.integers(0, 2, pairs).astype(float).tolist() for name in ("retrieval", "leak", *own[task])}
                transfer["psnr"] = [10.0 * n + seed + r for n in range(pairs)]
                scores[task] = {"transfer": transfer}
                if seed == 0 and row != "none":
                    scores[task]["swapped"] = {name: [0.0] * pairs for name in transfer}
            jobs[row, seed] = {"row": row, "seed": seed, "seconds a step": 0.1, "seconds a clip": 0.02, "scores": scores}
    return jobs


def test_gain_is_pair_by_pair_over_the_seeds_that_both_rows_have():
    """Pairs differ by 10 dB and rows by 1 dB: only differences within a pair are certain."""
    jobs = made_up()
    gain = Column("", "psnr", tasks.NAMES, above_none=True)
    values = ablation.values_of(jobs, "bias", gain)
    assert values is not None
    assert ablation.estimate(values) == pytest.approx((2.0, 2.0, 2.0))
    del jobs["none", 1]
    values = ablation.values_of(jobs, "bias", gain)
    assert values is not None
    assert values.shape == (5, 1, 6)
    del jobs["none", 0]
    assert ablation.values_of(jobs, "bias", gain) is None


def test_tables_have_the_means_of_the_jobs():
    jobs = made_up()
    lines = {line.split(" | ")[0].strip("| "): line for line in reversed(ablation.tables(jobs).splitlines()) if line.startswith("| ")}
    cells = [cell.strip() for cell in lines["+ bias"].strip("|").split("|")]

    def mean(*of):
        return 100 * np.mean([jobs["bias", seed]["scores"][task]["transfer"]["retrieval"] for seed in (0, 1) for task in of])

    means = [int(cell.partition("%")[0]) for cell in cells[1:9]]
    assert means[:5] == [round(mean(task)) for task in tasks.NAMES]
    assert means[5:] == [round(mean("id", "style")), round(mean("motion", "camera", "effect")), 0]
    assert lines["+ bias, from joint"].endswith(" +1.0 dB (+1.0 to +1.0) |")


def test_report_keeps_the_prose(tmp_path, capsys):
    jobs = made_up()
    ablation.require_settings(tmp_path, ablation.settings())
    (tmp_path / "jobs").mkdir()
    for (row, seed), job in jobs.items():
        ablation.job_path(tmp_path, row, seed).write_text(json.dumps(job))
    docs = tmp_path / "docs"
    ablation.report(tmp_path, docs)
    page = docs / "ablation.md"
    first = page.read_text()
    for row in ablation.ROWS:
        assert re.search(rf"^{row} ", first, re.MULTILINE)
    page.write_text(first.replace("<!-- prose -->\n", "<!-- prose -->\nWhat it means.\n\nMuch.\n").replace("dB", "gone"))
    ablation.report(tmp_path, docs)
    second = page.read_text()
    assert "What it means.\n\nMuch." in second
    assert second.replace("What it means.\n\nMuch.\n", "") == first
    page.write_text(second.replace("<!-- prose -->", ""))
    with pytest.raises(RequestError, match="put them back"):
        ablation.report(tmp_path, docs)
    found = json.loads((tmp_path / "ablation.json").read_text())["rows"]["joint"]["scores"]["id"]
    assert found["transfer"]["psnr"]["mean"] == pytest.approx(26.5)
    assert (found["transfer"]["psnr"]["seeds"], found["swapped"]["psnr"]["seeds"]) == (2, 1)

    assert ET.fromstring((docs / "ablation.svg").read_text()).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_figure_has_every_mean_and_interval():
    jobs = made_up()
    panels = ablation.figure(jobs).axes
    for panel, task in zip(panels, tasks.NAMES, strict=True):
        (dots,) = (line for line in panel.lines if line.get_marker() == "o")
        (bars,) = (each.get_segments() for each in panel.collections if isinstance(each, LineCollection))
        for row, dot, bar in zip(ablation.ROWS, dots.get_xydata(), bars, strict=True):
            mean = np.mean([jobs[row, seed]["scores"][task]["transfer"]["retrieval"] for seed in (0, 1)])
            assert dot[0] == pytest.approx(mean)
            assert bar[0, 0] <= mean <= bar[1, 0]
            assert bar[0, 1] == bar[1, 1] == dot[1]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [row.name for row in ablation.ROWS.values()]
    assert panels[0].yaxis_inverted()
