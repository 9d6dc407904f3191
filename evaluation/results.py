"""What a run of launch.evaluate found: scores.csv, a row a clip and metric, and the means, intervals and marks that are made of it."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError, require
from evaluation.intervals import interval
from evaluation.measures import Metric, Score
from evaluation.rows import CONTROLS, ROWS, TRANSFER
from evaluation.suites import Case
from omnitransfer_jax import tasks

FILE = "scores.csv"
COLUMNS = ("row", "task", "case", "clip", "prompt", "seed", "metric", "value", "failure")
CLIP = "clip"
"""The metric of a line that says why there is no clip at all."""
ALL = "(all)"
"""The case of a line that is about all clips of a row and task together."""


class Line(NamedTuple):
    """One line of scores.csv."""

    row: str
    task: str
    case: str
    clip: str
    prompt: str
    seed: int
    metric: str
    value: float | None
    failure: str = ""


def write(lines: Sequence[Line]) -> bytes:
    """The bytes of scores.csv, the same for the same lines."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        writer.writerow(line._replace(value="" if line.value is None else repr(line.value)))  # type: ignore[arg-type]
    return file.getvalue().encode()


def of_sets(metrics: Sequence[Metric], cases: Sequence[Case], rows: Sequence[str], kept: Callable[[str, Case], Path]) -> list[Line]:
    """The lines of the metrics of all clips of a row and task together; `kept` is the file of what was measured of a clip."""
    lines = []
    for metric in (each for each in metrics if each.of_all is not None):
        for task in tasks.NAMES:
            of_task = [case for case in cases if case.task == task]
            values = {row: [found for case in of_task if (found := metric.kept_in(kept(row, case)))] for row in rows}
            lines += [line for row in rows if of_task for line in _of_set(metric, row, task, values[row], values[TRANSFER])]
    return lines


def _of_set(metric: Metric, row: str, task: str, own: Sequence[dict[str, float]], transfer: Sequence[dict[str, float]]) -> list[Line]:
    """The lines of one row of a task."""
    assert metric.of_all is not None
    found, failure = {}, ""
    try:
        found = metric.of_all(own, transfer)
    except RequestError as error:
        failure = str(error)
    names = list(metric.scores) if failure else list(found)
    return [Line(row, task, ALL, ALL, "", 0, name, found.get(name), failure) for name in names]


def read(path: Path) -> list[Line]:
    """The lines of a scores.csv; a `RequestError` says what is wrong with it."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read ({reason}); give the folder of a finished launch.evaluate") from None
    absent = [name for name in COLUMNS if rows and name not in rows[0]]
    require(bool(rows) and not absent, f"{path}: {f'no column {absent[0]}' if absent else 'empty'}; give the folder of a launch.evaluate")
    try:
        return [
            Line(**{**row, "seed": int(row["seed"] or 0), "value": float(row["value"]) if row["value"] else None})  # type: ignore[arg-type]
            for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise RequestError(f"{path}: {error}; give the folder of a finished launch.evaluate") from None


class Mean(NamedTuple):
    """The mean of a metric over the clips of a row and task."""

    value: float
    low: float
    high: float
    """Of the 95% interval; NaN where there is none."""
    count: int
    failures: int

    @property
    def text(self) -> str:
        """As a cell of a table shows it."""
        if math.isnan(self.value):
            return f"none of {self.failures}" if self.failures else ""
        shown = number(self.value)
        if not math.isnan(self.low):
            shown += f" ({number(self.low)} to {number(self.high)})"
        return shown + (f", {self.failures} failed" if self.failures else "")


def number(value: float) -> str:
    """Three digits, or one decimal from 100 on."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def mean(lines: Sequence[Line], row: str, task: str, metric: str) -> Mean:
    """The mean of one cell. Clips without a file count as failures of every metric."""
    chosen = [line for line in lines if (line.row, line.task) == (row, task) and line.metric in (metric, CLIP)]
    known = [line for line in chosen if line.value is not None]
    values, failed = [line.value for line in known], len(chosen) - len(known)
    if not known:
        return Mean(math.nan, math.nan, math.nan, 0, failed)
    low, high = interval(values, [line.clip for line in known])  # type: ignore[arg-type]
    return Mean(float(np.mean(values)), low, high, len(known), failed)  # type: ignore[arg-type]


def gain(lines: Sequence[Line], base: Sequence[Line], row: str, task: str, metric: str, better: str) -> Mean:
    """The mean difference to `base` over the cases that both have; positive is better."""

    def values(of: Sequence[Line]) -> dict[str, Line]:
        return {
            line.case: line
            for line in of
            if (line.row, line.task, line.metric) == (row, task, metric) and line.value is not None and line.case != ALL
        }

    here, there = values(lines), values(base)
    both = [case for case in here if case in there]
    if not both:
        return Mean(math.nan, math.nan, math.nan, 0, 0)
    sign = -1 if better == "lower" else 1
    found = [sign * (here[case].value - there[case].value) for case in both]  # type: ignore[operator]
    low, high = interval(found, [here[case].clip for case in both])
    return Mean(float(np.mean(found)), low, high, len(both), 0)


def metrics_of(lines: Sequence[Line], task: str, scores: Mapping[str, Score]) -> list[str]:
    """The metrics that were measured of a task, in the order of `scores`."""
    there = {line.metric for line in lines if line.task == task}
    return [name for name in scores if name in there]


def rows_of(lines: Sequence[Line], task: str) -> list[str]:
    """The rows that a task has."""
    there = {line.row for line in lines if line.task == task}
    return [row for row in ROWS if row in there]


def tasks_of(lines: Sequence[Line]) -> list[str]:
    """The tasks that occur."""
    there = {line.task for line in lines}
    return [task for task in tasks.NAMES if task in there]


def rewarded(lines: Sequence[Line], task: str, metric: str, better: str) -> list[str]:
    """The controls whose mean is at least as good as the transfer's: such a metric alone says nothing about transfer."""
    if not better:
        return []
    own = mean(lines, TRANSFER, task, metric).value
    worse: Callable[[float], bool] = (lambda value: value < own) if better == "higher" else (lambda value: value > own)
    found = {row: mean(lines, row, task, metric).value for row in CONTROLS}
    return [row for row, value in found.items() if not math.isnan(value) and not math.isnan(own) and not worse(value)]


def failures(lines: Sequence[Line]) -> list[Line]:
    """Every line that has no value, by name."""
    return [line for line in lines if line.value is None]
