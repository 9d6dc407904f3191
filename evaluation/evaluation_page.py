"""report.html of an evaluation: tables with intervals, the worst and the best clips of each task side by side, failures by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from configs.errors import RequestError
from configs.run import VideoConfig
from evaluation import results, tables
from evaluation.report.page import Picture, Report, Row, Section, Table
from evaluation.rows import ROWS, TRANSFER
from evaluation.suites import Case
from evaluation.tables import Evaluation

Clip = UInt8[np.ndarray, "T H W 3"]
SIDE, FRAMES = 176, 25  # of a clip on the page, at most
EACH = 2  # worst and best clips of a task
FIRST = ("retrieval", "identity mean", "style mean", "MF")  # a task's clips are ordered by the first metric that begins with one of these
LISTED = 200  # failures on the page; scores.csv has all


def page(
    found: Evaluation,
    cases: Sequence[Case],
    size: VideoConfig,
    read: Callable[[str, Case], Clip],
    facts: Mapping[str, str],
    next_steps: Sequence[tuple[str, str]],
) -> Report:
    """The report. `read` gives the clip of a row and case, or raises a `RequestError`."""
    sections = []
    for task in results.tasks_of(found.lines):
        name = ordering(found, task)
        rows = [row_of(title, case, size, read, found) for title, case in extremes(found, task, name, cases)]
        text = "" if sections else tables.LEGEND
        if rows:
            text += f"\n\nWorst and best clips by {name} are below the table."
        sections.append(Section(task.capitalize(), text, tuple(rows), tables.of_task(found, task)))
    sections.append(Section("Metrics", "What was measured.", (), tables.about(found)))
    absent = Table(("what", "why"), tuple(found.missing.items()))
    sections.append(Section("Absent", "Metrics and rows that are not in the tables." if found.missing else "Nothing.", (), absent))
    failed = tables.failure_texts(found)
    more = f" The first {LISTED} of {len(failed)}; scores.csv has all." if len(failed) > LISTED else ""
    listed = Table(("failure",), tuple((text,) for text in failed[:LISTED]))
    sections.append(Section("Failures", (f"{len(failed)} in all.{more}" if failed else "None."), (), listed if failed else None))
    return Report(
        f"Evaluation: {Path(found.suite).name}",  # environment.json has the whole path
        f"{len({(line.task, line.case) for line in found.lines if line.case != results.ALL})} cases of "
        f"{len(results.tasks_of(found.lines))} tasks; every table has the controls that a sound metric must not prefer.",
        (),
        (),
        tuple(sections),
        (),
        Table(("", ""), tuple(facts.items())),
        tuple(next_steps),
        fps=size.fps,
    )


def ordering(found: Evaluation, task: str) -> str:
    """The metric by which the clips of a task are ordered; empty if it has none."""
    names = results.metrics_of([line for line in found.lines if line.case != results.ALL], task, found.scores)
    better = [name for name in names if found.scores[name].better]
    return next((name for first in FIRST for name in names if name.startswith(first)), better[0] if better else "")


def extremes(found: Evaluation, task: str, name: str, cases: Sequence[Case]) -> list[tuple[str, Case]]:
    """The worst and the best cases, with their values; ties go to the first in the suite (in the world: by PSNR)."""
    known = {
        line.case: line.value
        for line in found.lines
        if (line.row, line.task, line.metric) == (TRANSFER, task, name) and line.value is not None and line.case != results.ALL
    }
    tie = {line.case: line.value for line in found.lines if (line.row, line.task, line.metric) == (TRANSFER, task, "psnr")}
    sign = -1 if name and found.scores[name].better == "lower" else 1
    ordered = sorted(known, key=lambda case: (sign * (known[case] or 0), tie.get(case) or 0.0))
    by_id = {case.id: case for case in cases}
    each = min(EACH, (len(ordered) + 1) // 2)
    worst, best = ordered[:each], ordered[each:][::-1][:each]

    def label(kind: str, case: str) -> str:
        return f"{kind}: {case}, {name} {results.number(known[case] or 0.0)}"

    return [(label("worst", case), by_id[case]) for case in worst] + [(label("best", case), by_id[case]) for case in best]


def row_of(title: str, case: Case, size: VideoConfig, read: Callable[[str, Case], Clip], found: Evaluation) -> Row:
    """What the network was given, the truth where it is known, and the clips of all rows."""
    pictures = [Picture("reference", small(case.reference(size)))]
    if case.first_frame is not None and case.is_temporal:
        pictures.append(Picture("first frame", small(case.first_frame(size)[None])[0]))
    if case.truth is not None:
        pictures.append(Picture("truth", small(case.truth(size)), "truth"))
    for row in results.rows_of(found.lines, case.task):
        if not ROWS[row].network:
            continue
        try:
            pictures.append(Picture(ROWS[row].title, small(read(row, case)), "generated" if row == TRANSFER else "control"))
        except RequestError:  # it is among the failures
            continue
    return Row(title, tuple(pictures), case.prompt)


def small(clip: Clip) -> Clip:
    """A clip of at most `FRAMES` frames and `SIDE` pixels a side."""
    clip = clip[np.linspace(0, len(clip) - 1, min(len(clip), FRAMES)).round().astype(int)]
    scale = min(1.0, SIDE / max(clip.shape[1:3]))
    if scale == 1:
        return clip
    shape = max(1, round(clip.shape[2] * scale)), max(1, round(clip.shape[1] * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(shape, Image.Resampling.BOX)) for frame in clip])
