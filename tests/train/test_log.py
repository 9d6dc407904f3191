"""metrics.jsonl: one line a step whatever was interrupted, every line JSON; console and TensorBoard agree."""

import json

import pytest

from configs.errors import RequestError
from configs.run import TrainConfig
from omnitransfer_jax.train.log import RunLog, read_lines
from tests.train import event_files

METRICS = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "skipped": 0}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, done, steps, **fields):
    with RunLog(folder, TrainConfig(**{"steps": 8} | fields), done) as log:
        for step in steps:
            log.write(step, METRICS)


def test_a_line_has_what_is_promised(tmp_path):
    write(tmp_path, 0, [1])
    (line,) = lines(tmp_path)
    assert {"step", "loss", "grad_norm", "learning_rate", "skipped", "seconds", "data_wait"} <= line.keys()
    assert line["step"] == 1
    assert line["seconds"] > 0
    assert 0 <= line["data_wait"] <= 1


def test_a_restart_repeats_no_step(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    write(tmp_path, 3, [4, 5, 6])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", ["{", "", "3", "[]", '{"loss": 1.0}', '{"step": "two"}', "[" * 100_000, "\udcff"])
def test_a_line_that_is_none_is_one_short_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad.encode(errors="surrogateescape") + b'\n{"step": 2}\n{"st')
    before = path.read_bytes()
    for use in (lambda: write(tmp_path, 1, [2]), lambda: read_lines(tmp_path)):
        with pytest.raises(RequestError, match=rf"^{path}:2: .* is no line of this log; remove it") as error:
            use()
        assert len(str(error.value)) < 300
        assert path.read_bytes() == before


def test_the_lines_of_a_run_are_read_without_a_cut_one(tmp_path):
    assert read_lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_only_every_nth_step_and_the_last(tmp_path):
    write(tmp_path, 0, range(1, 9), log_every=3)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 8]


def test_what_is_not_finite_is_null(tmp_path, capsys):
    with RunLog(tmp_path, TrainConfig(steps=8), 0) as log:
        log.write(1, METRICS | {"loss": float("nan"), "grad_norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines(tmp_path)[0]["loss"] is None
    assert "loss not finite" in capsys.readouterr().out


def test_waiting_is_counted_apart(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 12.0])  # made at 0, waits from 1 to 4, writes step 1 at 10 and step 2 at 12
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with RunLog(tmp_path, TrainConfig(steps=8), 0) as log:
        with log.waiting():
            pass
        log.write(1, METRICS)
        log.write(2, METRICS)
    first, second = lines(tmp_path)
    assert (first["seconds"], first["data_wait"]) == (10.0, pytest.approx(0.3))
    assert (second["seconds"], second["data_wait"]) == (2.0, 0.0)


def test_the_console_line(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    write(tmp_path, 2, [4])  # two steps in 6 s, four to go
    assert capsys.readouterr().out == "step 4/8  loss 0.5000  grad 1  3 s/step  data 0%  0:00:12 to go\n"


def scalars(folder):
    """(step, tag, value) of every scalar event."""
    return [(step, value.tag, value.simple_value) for step, value in event_files.values(folder)]


def test_tensorboard_events(tmp_path):
    write(tmp_path, 0, [1, 2])
    found = scalars(tmp_path)
    assert (2, "loss", 0.5) in found
    assert {tag for _, tag, _ in found} == lines(tmp_path)[0].keys() - {"step"}
