"""Which point a trial has: drawn or counted before the sweep begins, or proposed by Optuna's TPE when the trial starts.

TPE is asked anew for each trial, with everything that is known by then, so that it needs no server and goes on with the sweep: the values
of other trials at the first rung, and what still runs.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from configs.errors import RequestError, require
from configs.kinds import FIXED, RUN, differences
from launch import command
from launch.sweeping.space import Dimension, Point, Space, arguments
from launch.sweeping.trials import Sweep, Trial, locked

TRIES = 50  # of TPE, for a point that the configuration's `validate` takes
KINDS = (*FIXED, RUN["kind"])


def points(space: Space, search: str, trials: int, seed: int) -> list[Point]:
    """All points of a sweep that are known before it begins: none with `tpe`. All are valid, or it is a `RequestError`."""
    if search == "tpe":
        require_optuna()
        require(trials > 0, "--trials: not given; TPE has to know how many trials there will be")
        space.require_valid(space.corners(seed))
        return []
    found = space.grid() if search == "grid" else space.different(seed, trials) if trials else []
    require(bool(found), "--trials: not given; say how many points are drawn, or take --search=grid")
    require(trials in (0, len(found)), f"--trials={trials}: the grid has {len(found)} points; leave it out, or take --search=random")
    space.require_valid(found)
    return found


def require_optuna() -> None:
    """A `RequestError` if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise RequestError("--search=tpe: Optuna proposes its points, and it is not installed: pip install optuna") from None


def definition(space: Space) -> tuple[dict[str, Any], ...]:
    """The dimensions as sweep.json has them."""
    return tuple(asdict(each) for each in space.dimensions)


def space_of(sweep: Sweep) -> Space:
    """The space that sweep.json describes."""
    config = command.override(command.load_config(sweep.config), sweep.base)
    return Space(config, tuple(Dimension(**{**each, "values": tuple(map(_plain, each["values"]))}) for each in sweep.space))


def arguments_of(config: Any, name: str) -> list[str]:
    """The arguments of a command that make of the configuration NAME[:VARIANT] this one."""
    named = command.load_config(name)
    return arguments({field: now for field, _, now in differences(named, config, KINDS)})


def begin(sweep: Sweep, trial: Trial, space: Space, point: Point) -> None:
    """Writes a trial of this point."""
    config = space.at(point)
    trial.write(point, [f"--config={sweep.config}", *arguments_of(config, sweep.config)], config.train.steps)


def propose(sweep: Sweep, trial: Trial) -> None:
    """Writes a trial that is not there yet, of a point that TPE proposes."""
    with locked(sweep.folder / "proposals"):
        if trial.exists:
            return
        space = space_of(sweep)
        for point in _asked(sweep, space, trial.number):
            try:
                begin(sweep, trial, space, point)
                return
            except RequestError:
                continue
    raise RequestError(f"{sweep.folder}: TPE proposed {TRIES} points, and the configuration takes none; make the space smaller")


def _asked(sweep: Sweep, space: Space, number: int) -> Iterator[Point]:
    """Points that TPE proposes for trial `number`, one after the other."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is new in Optuna
        sampler = optuna.samplers.TPESampler(seed=sweep.seed * 1_000_003 + number, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if sweep.objective.goal == "min" else "maximize")
    scales = {each.name: _distribution(optuna, each) for each in space.dimensions}
    first = str(sweep.rungs[0])
    for trial in sweep.all():
        state, found = trial.state, {each.name: _index(each, trial.point[each.name]) for each in space.dimensions}
        value = state.values.get(first, next(iter(state.values.values()), None))
        if value is not None:
            study.add_trial(optuna.trial.create_trial(params=found, distributions=scales, value=value))
        elif state.status in ("waiting", "running"):
            running = optuna.trial.create_trial(params=found, distributions=scales, state=optuna.trial.TrialState.RUNNING)
            study.add_trial(running)
        else:  # diverged or failed: TPE takes those for worse than all others
            study.add_trial(optuna.trial.create_trial(params=found, distributions=scales, state=optuna.trial.TrialState.PRUNED))
    for _ in range(TRIES):
        params = study.ask(scales).params
        yield {each.name: _value(each, params[each.name]) for each in space.dimensions}


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    """The dimension as Optuna has it; listed values by their number, because Optuna takes no tuples."""
    if dimension.values:
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    if dimension.whole:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _index(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(_plain(value)) if dimension.values else value


def _value(dimension: Dimension, found: Any) -> Any:
    if dimension.values:
        return dimension.values[found]
    return found if dimension.whole else min(max(float(f"{found:.4g}"), dimension.low), dimension.high)


def _plain(value: Any) -> Any:
    """A value that JSON had as a list."""
    return tuple(value) if isinstance(value, list) else value
