"""The tables of an evaluation, one a task, as text and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from evaluation import results
from evaluation.measures import Score
from evaluation.report.page import Table
from evaluation.results import Line
from evaluation.rows import ROWS, TRANSFER

ARROWS = {"higher": "↑", "lower": "↓", "": ""}
MARK = "!"


class Evaluation(NamedTuple):
    """What tables and page are made of."""

    suite: str
    lines: list[Line]
    scores: Mapping[str, Score]
    """All scores that could have been measured."""
    protocols: Mapping[str, str]
    """By task, whether the suite is as large as the paper's."""
    missing: Mapping[str, str]
    """Metrics and rows that are absent, with the reason."""
    problems: Sequence[str]
    """Rows of the suite that could not be used."""
    against: list[Line] | None = None
    """The lines of another run, which this one is compared with."""
    against_name: str = ""


def of_task(found: Evaluation, task: str) -> Table:
    """The table of one task: a line for each metric, a column for the transfer and each control.

    A metric that rewards a control is marked, and the cells of these controls too.
    """
    names, rows = results.metrics_of(found.lines, task, found.scores), results.rows_of(found.lines, task)
    body = [("clips", *(counts(found.lines, row, task) for row in rows))]
    for name in names:
        better = found.scores[name].better
        marked = results.rewarded(found.lines, task, name, better)
        cells = [results.mean(found.lines, row, task, name).text + (f" {MARK}" if row in marked else "") for row in rows]
        body.append((f"{name} {ARROWS[better]}{f' {MARK}' if marked else ''}".strip(), *cells))
    head = ("", *(ROWS[row].title for row in rows))
    if found.against is not None:
        gains = [results.gain(found.lines, found.against, TRANSFER, task, name, found.scores[name].better) for name in names]
        body = [(*line, text) for line, text in zip(body, ["", *(paired(each) for each in gains)], strict=True)]
        head = (*head, f"gain over {found.against_name}")
    return Table(head, tuple(body), found.protocols.get(task, ""))


def paired(gain: results.Mean) -> str:
    """A paired difference as a cell shows it."""
    return f"{gain.text}, {gain.count} pairs" if gain.count else ""


def counts(lines: Sequence[Line], row: str, task: str) -> str:
    """How many clips, of how many references and seeds, and how many there are not."""
    chosen = [line for line in lines if (line.row, line.task) == (row, task) and line.case != results.ALL]
    there = {line.case for line in chosen if line.metric != results.CLIP}
    failed = {line.case for line in chosen if line.metric == results.CLIP}
    references, seeds = len({line.clip for line in chosen}), len({line.seed for line in chosen})
    text = f"{len(there)}: {references} reference{'s' * (references > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    return text + (f"; {len(failed)} failed" if failed else "")


LEGEND = (
    "Means over clips with 95 % bootstrap intervals: references are drawn, and of each its prompts and seeds. ↑ higher is better, "
    f"↓ lower. {MARK} after a metric: it rewards a control, for the cells with {MARK} are at least as good as the transfer's; alone it "
    "does not measure transfer."
)


def markdown(found: Evaluation) -> str:
    """tables.md."""
    parts = [f"# {found.suite}", LEGEND]
    for task in results.tasks_of(found.lines):
        table = of_task(found, task)
        parts += [f"## {task}", table.caption, lines_of(table)]
    parts += ["## Metrics", lines_of(about(found)), "## Absent", bullets(f"{name}: {reason}" for name, reason in found.missing.items())]
    parts += ["## Failures", bullets(failure_texts(found))]
    return "\n\n".join(part for part in parts if part) + "\n"


def lines_of(table: Table) -> str:
    """A table in Markdown."""
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def bullets(texts: Iterable[str]) -> str:
    """A list, or `none`."""
    return "\n".join(f"- {text}" for text in texts) or "none"


def about(found: Evaluation) -> Table:
    """What each metric that was measured is, and which controls it rewards in which task."""
    rows = []
    for name, score in found.scores.items():
        tasks = [task for task in results.tasks_of(found.lines) if name in results.metrics_of(found.lines, task, found.scores)]
        marks = {task: results.rewarded(found.lines, task, name, score.better) for task in tasks}
        texts = "; ".join(f"{task}: {', '.join(ROWS[row].title for row in rows_)}" for task, rows_ in marks.items() if rows_)
        if tasks:
            rows.append((name, score.about, score.better or "neither", texts or "none"))
    return Table(("metric", "what it is", "better", "controls that it rewards"), tuple(rows))


def failure_texts(found: Evaluation) -> list[str]:
    """Every failure by name: rows of the suite, clips, metrics of a clip."""
    of_lines = [f"{ROWS[line.row].title}, {line.case}, {line.metric}: {line.failure}" for line in results.failures(found.lines)]
    return [*found.problems, *of_lines]
