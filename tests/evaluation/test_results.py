"""Means, intervals, marks and paired gains against what they are by hand."""

import json
import math

import numpy as np
import pytest

from configs.errors import RequestError, require
from evaluation import intervals, results, tables
from evaluation.measures import Metric, Score
from evaluation.results import Line
from evaluation.suites import Case
from evaluation.tables import Evaluation
from world import scores as world_scores


def test_an_interval_of_single_values_is_the_worlds():
    values = np.random.default_rng(1).normal(size=30)
    assert intervals.interval(values, [str(i) for i in range(30)]) == pytest.approx(world_scores.interval(values), abs=1e-12)


def test_seeds_of_one_clip_are_not_independent():
    clips = np.random.default_rng(2).normal(size=10)
    values = np.repeat(clips, 5)
    low, high = intervals.interval(values, np.repeat([str(i) for i in range(10)], 5).tolist())
    alone = intervals.interval(clips, [str(i) for i in range(10)])
    assert (low, high) == pytest.approx(alone, abs=1e-9)  # five times the same number tells no more
    naive = intervals.interval(values, [str(i) for i in range(50)])
    assert high - low > 1.5 * (naive[1] - naive[0])


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """Clips with seeds of unequal number; 95 % of 300 such draws, three standard errors allowed."""
    random, hits = np.random.default_rng(3), 0
    names = [str(i) for i in range(40) for _ in range(1 + i % 3)]
    for _ in range(300):
        effect = random.normal(size=40)
        values = [effect[int(name)] + random.normal() for name in names]
        low, high = intervals.interval(values, names)
        hits += low <= 0 <= high
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300) - 0.015 <= hits / 300 <= 1  # few clips make intervals a little narrow


def test_one_clip_has_no_interval():
    assert all(map(math.isnan, intervals.interval([1.0, 2.0], ["a", "a"])))


def line(row, case, value, metric="m", task="motion", failure="", clip="", seed=0):
    return Line(row, task, case, clip or case, "", seed, metric, value, failure)


LINES = [
    line("transfer", "a", 0.5),
    line("transfer", "b", 0.7),
    line("copied", "a", 0.9),
    line("copied", "b", 0.6),
    line("still", "a", 0.1),
    line("still", "b", 0.2),
    line("transfer", "c", None, "clip", failure="no clip"),
    line("transfer", "d", None, failure='no face, "none"'),
]


def test_a_file_of_scores_comes_back(tmp_path):
    (tmp_path / "scores.csv").write_bytes(results.write(LINES))
    assert results.read(tmp_path / "scores.csv") == LINES
    assert results.write(LINES).decode().splitlines()[0] == "row,task,case,clip,prompt,seed,metric,value,failure"


@pytest.mark.parametrize("content", ["", "row,task\n1,2\n", "row,task,case,clip,prompt,seed,metric,value,failure\na,b,c,d,e,x,g,1,\n"])
def test_a_file_that_is_none(tmp_path, content):
    (tmp_path / "scores.csv").write_text(content)
    with pytest.raises(RequestError, match=r"scores\.csv"):
        results.read(tmp_path / "scores.csv")
    with pytest.raises(RequestError, match="cannot be read"):
        results.read(tmp_path / "none.csv")


def test_a_mean_counts_its_failures():
    found = results.mean(LINES, "transfer", "motion", "m")
    assert (found.value, found.count, found.failures) == (pytest.approx(0.6), 2, 2)
    assert found.text.endswith("2 failed")
    assert results.mean(LINES, "none", "motion", "m").text == ""


def test_a_metric_that_rewards_a_control_is_marked():
    assert results.rewarded(LINES, "motion", "m", "higher") == ["copied"]
    assert results.rewarded(LINES, "motion", "m", "lower") == ["still"]
    assert results.rewarded(LINES, "motion", "m", "") == []
    found = Evaluation("s", LINES, {"m": Score("higher", "a number")}, {}, {}, [])
    table = tables.of_task(found, "motion")
    assert table.columns == ("", "transfer", "first frame held", "reference copied")
    assert table.rows[0] == ("clips", "3: 4 references, 1 seed; 1 failed", "2: 2 references, 1 seed", "2: 2 references, 1 seed")
    name, own, still, copied = table.rows[1]
    assert (name, copied[-1], still[-1], own[:3]) == ("m ↑ !", "!", ")", "0.6")
    text = tables.markdown(found)
    assert "transfer, c, clip: no clip" in text
    assert "motion: reference copied" in text


def test_a_gain_is_paired():
    base = [line("transfer", "b", 0.4), line("transfer", "a", 0.1), line("transfer", "z", 9.0)]
    found = results.gain(LINES, base, "transfer", "motion", "m", "higher")
    assert (found.value, found.count) == (pytest.approx(0.35), 2)
    assert (found.low, found.high) == pytest.approx((0.3, 0.4))
    assert results.gain(LINES, base, "transfer", "motion", "m", "lower").value == pytest.approx(-0.35)


def test_a_metric_of_all_clips_together(tmp_path):
    """It reads what was kept of each clip, has one line a row and task, and a failure where there is too little."""

    def of_all(own, transfer):
        require(len(own) > 1, f"{len(own)} clip")
        return {"apart": sum(each["x"] for each in own) - sum(each["x"] for each in transfer)}

    metric = Metric("sets", {"apart": Score("lower", "")}, lambda sample: {}, weights="f" * 64, of_all=of_all)
    cases = [Case(name, "id", "", 0, name, lambda size: None) for name in "abc"]
    for row, values in (("transfer", (1, 2, 4)), ("copied", (1, 5, None)), ("still", (3, None, None))):
        for case, value in zip(cases, values, strict=True):
            kept = {} if value is None else {metric.key: {"x": value}}
            (tmp_path / f"{row}-{case.id}.json").write_text(json.dumps({"sha256": "", "values": kept}))
    found = results.of_sets([metric], cases, ["transfer", "copied", "still"], lambda row, case: tmp_path / f"{row}-{case.id}.json")
    assert [(each.row, each.case, each.metric, each.value, each.failure) for each in found] == [
        ("transfer", "(all)", "apart", 0, ""), ("copied", "(all)", "apart", -1, ""), ("still", "(all)", "apart", None, "1 clip"),
    ]  # fmt: skip
    together = results.mean(found, "transfer", "id", "apart")
    assert together.value == 0
    assert math.isnan(together.low)
    assert results.rewarded(found, "id", "apart", "lower") == ["copied"]
