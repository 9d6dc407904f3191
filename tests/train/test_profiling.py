"""A window of steps is profiled, and the run is otherwise the same; W&B gets the lines of the log."""

import json
import sys
from dataclasses import replace

import pytest

from configs.errors import RequestError
from configs.run import TrainConfig
from omnitransfer_jax.train.log import RunLog
from omnitransfer_jax.train.profiling import Profile


@pytest.fixture
def traced(monkeypatch):
    """What the profiler was told, in its order, instead of a profile."""
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop",)))
    return calls


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 9), ["start", 3, 4, 5, "stop"]),
        (range(4, 9), ["start", 4, 5, "stop"]),  # a run that goes on inside the window
        (range(6, 9), []),
        (range(1, 5), ["start", 3, 4, "stop"]),  # one that ends inside it
    ],
)
def test_the_window_is_traced(traced, tmp_path, steps, expected):
    with Profile(tmp_path, (3, 5)) as profile:
        for n in steps:
            with profile.step(n):
                traced.append((n,)) if profile.is_tracing else None
            profile.after(n, lambda n=n: traced.append(("done", n)))
    assert [call[0] for call in traced if call[0] != "done"] == expected
    assert [call for call in traced if call[0] == "done"] == ([("done", 5)] if 5 in expected else [])
    assert all(call[1] == str(tmp_path) for call in traced if call[0] == "start")


def test_a_profile_that_the_disk_refuses_ends_nothing(tmp_path, monkeypatch, capsys):
    def refuse():
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: None)
    monkeypatch.setattr("jax.profiler.stop_trace", refuse)
    with Profile(tmp_path, (1, 1)) as profile:
        with profile.step(1):
            pass
        profile.after(1, lambda: None)
        profile.step(2)
    assert capsys.readouterr().out == "no profile: No space left on device; training goes on\n"


@pytest.mark.parametrize("window", ["3", "3:", ":4", "0:4", "5:4", "a:b", "1:2:3", "-1:4"])
def test_a_wrong_window(window):
    with pytest.raises(RequestError, match=r"train\.profile='.*': FIRST:LAST, the steps to profile, such as 20:24"):
        TrainConfig(profile=window).validate()


class StandIn:
    """Of the package wandb: what it was given. `broken` is the number of the call that fails."""

    def __init__(self, broken=None):
        self.started, self.lines, self.finished, self.broken = [], [], 0, broken

    def init(self, **given):
        self.started.append(given)
        return self

    def define_metric(self, *args, **given):
        pass

    def log(self, line):
        if len(self.lines) == self.broken:
            raise OSError("no network")
        self.lines.append(line)

    def finish(self):
        self.finished += 1


def write_log(workdir, steps, first=0):
    config = replace(TrainConfig(), wandb="transfer", steps=9)
    with RunLog(workdir, config, first, of={"seed": 3}) as log:
        for step in steps:
            log.write(step, {"loss": 1.0 / step if step != 2 else float("nan"), "grad_norm": 1.0})


def test_wandb_gets_every_line(tmp_path, monkeypatch):
    """And a run that goes on is the same one there."""
    monkeypatch.setitem(sys.modules, "wandb", stand_in := StandIn())
    write_log(tmp_path, [1, 2, 3])
    write_log(tmp_path, [4], first=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert stand_in.lines == [{name: value for name, value in line.items() if value is not None} for line in lines]
    assert [line["step"] for line in stand_in.lines] == [1, 2, 3, 4]
    first, second = stand_in.started
    assert (first["id"], first["project"], first["config"], first["resume"]) == (second["id"], "transfer", {"seed": 3}, "allow")
    assert stand_in.finished == 2


def test_wandb_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(broken=1))
    write_log(tmp_path, [1, 2, 3])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert "nothing is sent to W&B from here on: no network; metrics.jsonl has all lines" in capsys.readouterr().out
