"""A run is told what to do by files and signals, and says how it goes."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import grain
import jax
import numpy as np
import pytest

from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import control, log, loop, report
from tests.train.tiny_run import EMPTY_TEXT, TINY, batches, sample

LONG = replace(TINY, checkpoint=replace(TINY.checkpoint, every=100))


def run(config, workdir, at, **hooks):
    """A run in which `at` is called with the number of each step, after its batch was drawn."""
    numbers = iter(range(1, 100))

    class Data(grain.DatasetIterator):
        def __next__(self):
            at(next(numbers))
            return next(plain)

        def get_state(self):
            return plain.get_state()

        def set_state(self, state):
            plain.set_state(state)

    plain = batches(config)
    return loop.train(omnitransfer.objective(config, EMPTY_TEXT), config, workdir, make_mesh(config.mesh), Data(), **hooks)


def test_files_are_obeyed_within_a_step(tmp_path, capsys, monkeypatch):
    """SAVE at 2, SAMPLE at 3, PAUSE at 4 for a while, STOP at 6; started again it goes on to the end."""
    monkeypatch.setattr(control, "LOOKS", 0.05)
    sampled, paused = [], []

    def at(n):
        if n in (2, 3, 4, 6):
            (tmp_path / {2: "SAVE", 3: "SAMPLE", 4: "PAUSE", 6: "STOP"}[n]).touch()
        if n == 4:
            threading.Timer(0.5, lambda: (paused.append(time.monotonic()), (tmp_path / "PAUSE").unlink())).start()
        if n == 5:
            assert paused, "step 5 began in spite of PAUSE"
            assert run_folder.steps_done(tmp_path) == 4

    assert run(LONG, tmp_path, at, sample=lambda n, params: sampled.append((n, sorted(params)))) is None
    assert [n for n, _ in sampled] == [0, 3]
    assert all(paths == sorted(omnitransfer.objective(TINY).params) for _, paths in sampled)
    assert run_folder.steps_done(tmp_path) == 6
    assert not [name for name in control.FILES if (tmp_path / name).exists()]
    out = capsys.readouterr().out
    assert f"paused after step 4, which is saved; remove {tmp_path / 'PAUSE'} to go on" in out
    assert "stopped after step 6 of 8" in out
    assert run(LONG, tmp_path, lambda n: None) is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_data_saves_the_step_before(tmp_path, number):
    def at(n):
        if n == 4:
            os.kill(os.getpid(), number)
            time.sleep(60)

    started = time.monotonic()
    assert run(LONG, tmp_path, at) is None
    assert run_folder.steps_done(tmp_path) == 3
    assert time.monotonic() - started < 50
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    run(LONG, tmp_path, lambda n: None)
    run(LONG, tmp_path / "whole", lambda n: None)
    for name in ("loss", "grad_norm"):
        ours, theirs = (
            [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (tmp_path, tmp_path / "whole")
        )
        assert ours == theirs


def test_a_signal_during_evaluation_or_samples_ends_them(tmp_path):
    def wait(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    config = replace(LONG, train=replace(LONG.train, evaluate_every=3))
    assert run(config, tmp_path, lambda n: None, evaluate=wait) is None
    assert run_folder.steps_done(tmp_path) == 3
    assert run(LONG, tmp_path / "samples", lambda n: None, sample=wait) is None
    assert run_folder.steps_done(tmp_path / "samples") == 0


def test_an_update_that_is_left_out_is_logged_with_its_samples(tmp_path, capsys):
    def broken(i):
        return sample(i) | ({"target": np.full_like(sample(i)["target"], np.nan)} if i == 4 else {})

    data = batches(LONG, broken)
    loop.train(
        omnitransfer.objective(LONG, EMPTY_TEXT), LONG, tmp_path, make_mesh(LONG.mesh), data, identify=lambda step: [f"a{step}", "<b>"]
    )
    skipped = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if json.loads(line)["loss"] is None
    ]
    found = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert skipped
    assert [(each["step"], each["kind"], each["samples"]) for each in found] == [(n, "skipped", [f"a{n}", "<b>"]) for n in skipped]
    assert (
        f"step {skipped[0]}: its update is left out: loss or gradients are not finite; its samples: a{skipped[0]}, <b>"
        in capsys.readouterr().out
    )
    page = (tmp_path / report.REPORT_FILE).read_text()
    assert "&lt;b&gt;" in page
    assert "<b>," not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<polyline") >= 10


def test_the_losses_of_tasks_make_up_the_loss():
    losses, task, times = np.array([1.0, 2.0, 6.0], np.float32), np.array([0, 0, 3], np.int32), np.array([0.1, 1.0, 0.5], np.float32)
    found = {name: float(value.mean()) for name, value in jax.jit(omnitransfer.of_groups)(losses, task, times).items()}
    assert log.of_groups(found) == pytest.approx(
        {"loss/id": 1.5, "loss/camera": 6.0, "loss/t0.0-0.2": 1.0, "loss/t0.4-0.6": 6.0, "loss/t0.8-1.0": 2.0}
    )
