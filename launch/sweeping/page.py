"""OUT/sweep.html and OUT/sweep.csv: the trials of a sweep, sorted by the objective. The page is one file and loads nothing else.

It can be written while the sweep runs: what is not finished is shown as it is. Its form is page.html.j2.
"""

import csv
import io
from collections.abc import Sequence

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launch.sweeping import figures
from launch.sweeping.findings import importance, power_law
from launch.sweeping.proposals import space_of
from launch.sweeping.rows import Row, rows
from launch.sweeping.space import shown
from launch.sweeping.trials import Sweep
from omnitransfer_jax.folders.atomic import write_whole

PAGE, TABLE = "sweep.html", "sweep.csv"
IN_SUMMARY = 10  # trials that the console lists


def write(sweep: Sweep, planned: str) -> None:
    """Writes page and table, each as a whole."""
    found = rows(sweep)
    if not found:
        return
    write_whole(sweep.folder / TABLE, table(sweep, found))
    write_whole(sweep.folder / PAGE, page(sweep, found, planned))


def table(sweep: Sweep, found: Sequence[Row]) -> str:
    """The trials as CSV."""
    file = io.StringIO()
    names = [str(each["name"]) for each in sweep.space]
    writer = csv.writer(file, lineterminator="\n")
    columns = ["trial", "status", *names, sweep.objective.metric, "step", "flops", "tokens", "seconds", "restarts", "reason", "workdir"]
    writer.writerow(columns)
    for row in found:
        values = [row.point[name] for name in names]
        state = row.state
        rest = [row.steps, row.flops, row.tokens, round(state.seconds, 1), state.restarts, state.reason, str(row.trial.workdir)]
        writer.writerow([row.trial.number, state.status, *values, "" if row.value is None else row.value, *rest])
    return file.getvalue()


def page(sweep: Sweep, found: Sequence[Row], planned: str) -> str:
    """The document."""
    space = space_of(sweep)
    compared = [(row.point, row.compared) for row in found if row.compared is not None]
    finished = [row for row in found if row.state.status == "finished"]
    sign = 1 if sweep.objective.goal == "min" else -1
    law = power_law([row.flops for row in finished], [float(row.value or 0) for row in finished]) if sign > 0 and _sizes(finished) else None
    loader = ChoiceLoader([PackageLoader("launch.sweeping", "."), PackageLoader("evaluation.report", ".")])
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.globals |= {"number": number}
    counts = {status: sum(row.state.status == status for row in found) for status in ("finished", "stopped", "diverged", "failed")}
    return template.get_template("page.html.j2").render(
        sweep=sweep,
        rows=found,
        names=[each.name for each in space.dimensions],
        counts={status: count for status, count in counts.items() if count},
        planned=planned,
        curves=[drawn for kind in ("step", "tokens", "FLOPs") if (drawn := figures.curves(found, sweep.objective.metric, kind))],
        parallel=figures.parallel(found, space.dimensions, sweep.objective) if found else Markup(),
        importance=importance([point for point, _ in compared], [value for _, value in compared]),
        compared_at=f"at step {sweep.rungs[0]}" if sweep.halving else "at their end",
        law=law,
        law_figure=figures.power_law(finished, law, sweep.objective.metric) if law else Markup(),
        ended=[row for row in found if row.state.reason],
        command=best_command(finished[0]) if finished else "",
    )


def _sizes(finished: Sequence[Row]) -> bool:
    """Whether trials cost different numbers of operations a step."""
    return len({row.shape.flops for row in finished}) > 2


def best_command(row: Row) -> str:
    """The training of a trial, in a workdir of its own."""
    words = [f"'{arg}'" if set(arg) & set(" *()[]|$\\") else arg for arg in row.trial.args]
    return " ".join(["python -m launch.train", *words, "--workdir=NEW"])


def summary(sweep: Sweep) -> str:
    """The first trials for the console, and the command of the best one."""
    found = rows(sweep)
    lines = []
    for row in found[:IN_SUMMARY]:
        reason = f"; {row.state.reason}" if row.state.reason else ""
        lines.append(f"trial {row.trial.number:>4}  {number(row.value):>10}  {shown(row.point)}  ({row.label}{reason})")
    more = [f"and {len(found) - IN_SUMMARY} more"] if len(found) > IN_SUMMARY else []
    best = [f"The best trial again: {best_command(found[0])}"] if found and found[0].state.status == "finished" else []
    ended = [row for row in found[IN_SUMMARY:] if row.state.status in ("diverged", "failed")]
    return "\n".join([*lines, *more, *(f"trial {row.trial.number} {row.label}: {row.state.reason}" for row in ended), *best])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
