"""The folder of a sweep and its trials, which any process that sees it can read.

OUT/sweep.json                what is swept, and how
OUT/trials/0003/trial.json    the point, and the arguments of launch.train
OUT/trials/0003/state.json    what became of it
OUT/trials/0003/log.txt       what launch.train printed
OUT/trials/0003/run/          its workdir
OUT/programs/                 programs that were compiled, for all trials
OUT/STOP                      made by a person or a signal: all trials save and end
OUT/sweep.html, sweep.csv     what came out
"""

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from configs.errors import RequestError, require
from omnitransfer_jax.folders.atomic import read_json, write_whole
from omnitransfer_jax.train.log import LOSS, read_lines

SWEEP_FILE, TRIAL_FILE, STATE_FILE, LOG_FILE, LOCK_FILE = "sweep.json", "trial.json", "state.json", "log.txt", "sweep.lock"
TRIALS, RUN, PROGRAMS, STOP = "trials", "run", "programs", "STOP"
BY_TIME = "loss_by_time"
"""The objective that is the mean of the losses by ranges of time: it does not depend on how often each time is drawn."""
TIMES = f"{LOSS}t0"
REMEDY = "restore it from a copy, or give another --out"
Status = Literal["waiting", "running", "reached", "finished", "stopped", "diverged", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "diverged", "failed")
"""Nothing is done about a trial in one of these states."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What trials are compared by: the mean of a metric over the last steps."""

    metric: str = "loss"
    goal: str = "min"
    """min or max."""
    window: float = 0.1
    """The share of the steps until then, at their end, over which the mean is taken."""

    def value(self, lines: Sequence[Mapping[str, Any]], until: int) -> float | None:
        """Of a log, up to a step; None if there is no finite one. A `RequestError` if the log has no such metric."""
        before = [line for line in lines if line["step"] <= until]
        if not before:
            return None
        last = before[-1]["step"]
        names = sorted({name for line in before for name in line if name.startswith(TIMES)}) if self.metric == BY_TIME else [self.metric]
        known = sorted({name for line in before for name in line})
        require(bool(names) and set(names) <= set(known), f"--objective={self.metric}: metrics.jsonl has {', '.join(known)}")
        means = []
        for name in names:
            having = [line for line in before if name in line]
            recent = [line[name] for line in having if line["step"] > last - self.window * until] or [having[-1][name]]
            if any(value is None for value in recent):  # not finite
                return None
            means.append(sum(recent) / len(recent))
        return sum(means) / len(means)

    def best_first(self, values: Mapping[int, float]) -> list[int]:
        """The keys of `values`, that of the best one first."""
        sign = 1 if self.goal == "min" else -1
        return sorted(values, key=lambda number: (sign * values[number], number))


@dataclass(frozen=True, kw_only=True)
class State:
    """What became of a trial."""

    status: Status = "waiting"
    until: int = 0
    """The step it has reached of those it was asked for."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The objective at each of these."""
    reason: str = ""
    """Why it did not finish: the last line of its log, or how it compares."""
    restarts: int = 0
    """How often it went on after it was killed or pre-empted."""
    seconds: float = 0.0
    """For how long processes of it ran."""


@dataclass(frozen=True)
class Trial:
    """A trial in its folder."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def workdir(self) -> Path:
        return self.folder / RUN

    @property
    def point(self) -> dict[str, Any]:
        """What it has of each dimension."""
        return read_json(self.folder / TRIAL_FILE, REMEDY, "point")["point"]

    @property
    def args(self) -> list[str]:
        """The arguments of launch.train, without --workdir."""
        return read_json(self.folder / TRIAL_FILE, REMEDY)["args"]

    @property
    def steps(self) -> int:
        """All steps of its training."""
        return read_json(self.folder / TRIAL_FILE, REMEDY)["steps"]

    @property
    def exists(self) -> bool:
        return (self.folder / TRIAL_FILE).exists()

    def write(self, point: Mapping[str, Any], args: Sequence[str], steps: int) -> None:
        write_whole(self.folder / TRIAL_FILE, json.dumps({"point": point, "steps": steps, "args": args}, indent=2) + "\n")

    @property
    def state(self) -> State:
        if not (self.folder / STATE_FILE).exists():
            return State()
        content = read_json(self.folder / STATE_FILE, REMEDY)
        try:
            return State(**content)
        except TypeError:
            raise RequestError(f"{self.folder / STATE_FILE}: not the state of a trial; {REMEDY}") from None

    def set(self, state: State) -> State:
        write_whole(self.folder / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
        return state

    def end(self, status: Status, reason: str) -> State:
        return self.set(replace(self.state, status=status, reason=reason))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl."""
        return read_lines(self.workdir)

    def last_words(self) -> str:
        """The last line of its log."""
        path = self.folder / LOG_FILE
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 10_000, 0))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:500]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What OUT/sweep.json holds. With the same one a sweep goes on."""

    config: str
    """NAME[:VARIANT]."""
    base: tuple[str, ...]
    """The arguments of all trials, which differ from the named configuration."""
    space: tuple[Mapping[str, Any], ...]
    """The dimensions (`space.Dimension`)."""
    search: str
    """random, grid or tpe."""
    trials: int
    seed: int
    rungs: tuple[int, ...]
    """The steps after which trials are compared and some of them stopped; the last is the end of the longest."""
    halving: int
    objective: Objective
    folder: Path
    """Its own, absolute."""
    home: Path
    """Where the command was given."""

    def trial(self, number: int) -> Trial:
        return Trial(self.folder / TRIALS / f"{number:04d}")

    def all(self) -> list[Trial]:
        """Those that were begun."""
        return [trial for trial in map(self.trial, range(self.trials)) if trial.exists]

    def is_ahead(self, number: int, until: int) -> bool:
        """Whether a trial is still to reach a step, or its end."""
        trial = self.trial(number)
        return not trial.exists or (trial.state.status not in ENDED and trial.state.until < min(until, trial.steps))

    @property
    def stop_file(self) -> Path:
        return self.folder / STOP

    @property
    def is_asked_to_stop(self) -> bool:
        return self.stop_file.exists()

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """The sweep in a folder, wherever that is now."""
        found = read_json(folder / SWEEP_FILE, REMEDY, "objective")
        found |= {name: tuple(found[name]) for name in ("base", "space", "rungs")}
        return cls(**found | {"objective": Objective(**found["objective"]), "folder": folder, "home": Path(found["home"])})

    def write(self) -> None:
        write_whole(self.folder / SWEEP_FILE, json.dumps(self.definition(), indent=2) + "\n")

    def definition(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self) | {"folder": str(self.folder), "home": str(self.home)}))

    def require_same(self) -> None:
        """A `RequestError` if the folder holds another sweep. The folder may move, and without halving have more trials."""
        if not (self.folder / SWEEP_FILE).exists():
            return
        before, now = read_json(self.folder / SWEEP_FILE, REMEDY), self.definition()
        more = self.search != "grid" and self.halving < 2 and before.get("trials", 0) <= self.trials
        for name in now:
            if name in ("folder", "home") or (name == "trials" and more):
                continue
            require(
                before.get(name) == now[name],
                f"{self.folder}: was begun with {name} {before.get(name)}, now it is {now[name]}; give the same, or another --out",
            )


@contextmanager
def locked(folder: Path, refusal: str = "") -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process. Waits for it, or with a `refusal` raises it as a `RequestError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise RequestError(refusal) from None
        yield


def rungs(steps: int, trials: int, halving: int, first: int, every: int) -> tuple[int, ...]:
    """The steps at which trials are compared, the last of all included; those of a log with a line every so many steps.

    Without `first` there are as many as leave one trial.
    """
    if halving < 2:
        return (steps,)
    first = first or math.ceil(steps / halving ** int(math.log(max(trials, 1), halving) + 1e-9))
    found, step = [], first
    while step < steps:
        found.append(min(math.ceil(step / every) * every, steps))
        step *= halving
    return tuple(dict.fromkeys([*found, steps]))
