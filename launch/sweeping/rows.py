"""What is known of each trial of a sweep, read from its folder: point, state, curve and cost."""

import json
import math
from dataclasses import dataclass
from typing import Any

from launch.sweeping.plan import Shape, Shapes
from launch.sweeping.proposals import space_of
from launch.sweeping.trials import BY_TIME, TIMES, State, Sweep, Trial
from omnitransfer_jax.train.log import METRICS_FILE

MOST_LINES = 400  # of a trial's log that are read for its curve, evenly spaced


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial with what is known of it."""

    trial: Trial
    point: dict[str, Any]
    state: State
    value: float | None
    """The objective at the last rung that it reached."""
    compared: float | None
    """The objective at the first rung, at which all trials compare; without halving at the end."""
    shape: Shape
    curve: tuple[tuple[int, float], ...]
    """Steps and the objective's metric."""
    steps: int
    """That it did."""

    @property
    def flops(self) -> int:
        return self.steps * self.shape.flops

    @property
    def tokens(self) -> int:
        return self.steps * self.shape.tokens

    @property
    def label(self) -> str:
        """What became of it, in a word or two."""
        return f"at step {self.state.until}" if self.state.status == "reached" else self.state.status


def rows(sweep: Sweep) -> list[Row]:
    """All trials that were begun: the finished ones by their objective, then the others by how far they came."""
    space, shape_of, found = space_of(sweep), Shapes(), {}
    for trial in sweep.all():
        state, point = trial.state, {name: _plain(value) for name, value in trial.point.items()}
        curve = read_curve(trial, sweep.objective.metric)
        found[trial.number] = Row(
            trial=trial,
            point=point,
            state=state,
            value=state.values.get(str(state.until)),
            compared=state.values.get(str(sweep.rungs[0] if sweep.halving else state.until)),
            shape=shape_of(space.at(point)),
            curve=curve,
            steps=curve[-1][0] if curve else state.until,
        )
    valued = {number: row.value for number, row in found.items() if row.value is not None}
    place = {number: place for place, number in enumerate(sweep.objective.best_first(valued))}

    def order(number: int) -> tuple[bool, int, int]:
        row = found[number]
        return row.state.status != "finished", 0 if row.state.status == "finished" else -row.state.until, place.get(number, len(found))

    return [found[number] for number in sorted(found, key=order)]


def read_curve(trial: Trial, metric: str) -> tuple[tuple[int, float], ...]:
    """Steps and values of a metric, of at most `MOST_LINES` lines of the log and its last one."""
    path = trial.workdir / METRICS_FILE
    if not path.exists():
        return ()
    texts = path.read_bytes().split(b"\n")[:-1]
    every = math.ceil(len(texts) / MOST_LINES) or 1
    chosen = [*texts[every - 1 :: every], *(texts[-1:] if len(texts) % every else [])]
    found = []
    for text in chosen:
        try:
            line = json.loads(text)
        except ValueError:  # the training itself refuses such a log
            continue
        names = [name for name in line if name.startswith(TIMES)] if metric == BY_TIME else [metric]
        values = [line[name] for name in names if line.get(name) is not None]
        if values:
            found.append((line["step"], sum(values) / len(values)))
    return tuple(found)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
