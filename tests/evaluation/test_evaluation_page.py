"""Which clips the page shows of a task."""

import pytest

from evaluation.evaluation_page import extremes
from evaluation.measures import Score
from evaluation.results import Line
from evaluation.suites import Case
from evaluation.tables import Evaluation


@pytest.mark.parametrize(
    ("better", "values", "worst", "best"),
    [
        ("higher", [0.3], ["0"], []),
        ("higher", [0.3, 0.1], ["1"], ["0"]),
        ("higher", [0.3, 0.1, 0.2], ["1", "2"], ["0"]),
        ("higher", [0.3, 0.1, 0.2, 0.5, 0.4], ["1", "2"], ["3", "4"]),
        ("lower", [0.3, 0.1, 0.2, 0.5, 0.4], ["3", "4"], ["1", "2"]),
        ("higher", [None, 0.1, None], ["1"], []),
    ],
)
def test_the_worst_and_the_best_clips_are_shown_once_each(better, values, worst, best):
    cases = [Case(str(i), "motion", "", 0, str(i), lambda size: None) for i in range(len(values))]
    lines = [Line("transfer", "motion", case.id, case.id, "", 0, "m", value) for case, value in zip(cases, values, strict=True)]
    lines += [line._replace(row="copied", value=9.0) for line in lines]
    found = extremes(Evaluation("a", lines, {"m": Score(better, "")}, {}, {}, []), "motion", "m", cases)
    assert [case.id for title, case in found if title.startswith("worst")] == worst
    assert [case.id for title, case in found if title.startswith("best")] == best
