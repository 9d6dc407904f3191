"""Trains many times over a space of configurations: --config=NAME --space=FILE.toml --trials=N --out=DIR. Started again it goes on.

    python -m launch.sweep --config=stage1 --space=space.toml --trials=16 --device=v5p --dry_run
    python -m launch.sweep --config=stage1 --space=space.toml --trials=16 --data.path=RECORDS --train.init_from=WEIGHTS --out=DIR

A trial is launch.train as a process with its own workdir, DIR/trials/N/run. DIR/sweep.html and sweep.csv say what came out, also while
it runs (docs/sweeps.md).
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import jax
from absl import flags

from configs.errors import require
from configs.mllm import MLLMTraining
from configs.run import Config
from configs.vae import VAETraining
from data_pipelines.batches import data_digest
from launch import command
from launch.sweeping import local, page, plan, proposals, ray, slurm
from launch.sweeping import space as spaces
from launch.sweeping.trials import BY_TIME, ENDED, Objective, Sweep, locked, rungs
from launch.train import ONE_CLIP, objective
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.train import loop

FLAGS = flags.FlagValues()
SPACE = flags.DEFINE_string("space", None, "TOML file of the fields and what each may be", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "", "folder of the sweep", flag_values=FLAGS)
TRIALS = flags.DEFINE_integer("trials", 0, "how many; of a grid all if it is left out", lower_bound=0, flag_values=FLAGS)
ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray", "slurm"], "what runs the trials", flag_values=FLAGS)
ADDRESS = flags.DEFINE_string("address", "", "of a Ray cluster, as HOST:6379 or auto; without it Ray has this machine", flag_values=FLAGS)
NEEDS = flags.DEFINE_list("resources", [], "of a trial: Ray's, as GPU=1,CPU=4; or of sbatch, as gpus=1,partition=P", flag_values=FLAGS)
AT_ONCE = flags.DEFINE_integer("at_once", 0, "trials at most, of ray and slurm; 0: as there is room", lower_bound=0, flag_values=FLAGS)
SEARCH = flags.DEFINE_enum("search", "random", ["random", "grid", "tpe"], "how points are taken from the space", flag_values=FLAGS)
SEARCH_SEED = flags.DEFINE_integer("search_seed", 0, "of the points", lower_bound=0, upper_bound=2**31 - 1, flag_values=FLAGS)
HALVING = flags.DEFINE_integer("halving", 0, "of so many trials one goes on after a rung; 0: all", lower_bound=0, flag_values=FLAGS)
FIRST_RUNG = flags.DEFINE_integer("first_rung", 0, "step of the first rung; 0: so that one is left", lower_bound=0, flag_values=FLAGS)
METRIC = flags.DEFINE_string("objective", "loss", f"a metric of metrics.jsonl, or {BY_TIME}", flag_values=FLAGS)
GOAL = flags.DEFINE_enum("goal", "min", ["min", "max"], "whether less of it is better, or more", flag_values=FLAGS)
WINDOW = flags.DEFINE_float("window", 0.1, "share of the steps over which its mean is taken", 0.0, 1.0, flag_values=FLAGS)
DEVICE = flags.DEFINE_string("device", "", "of the plan: v5e, v5p, v6e, A100, H100, ..., or its peak in TFLOP/s", flag_values=FLAGS)
EFFICIENCY = flags.DEFINE_float("efficiency", 0.4, "of the plan: share of that peak (docs/pods.md)", 0.001, 1.0, flag_values=FLAGS)
COMPILE = flags.DEFINE_string("compile", "", "of the plan: a topology, as v5p:2x2x1, to compile each shape of trial for", flag_values=FLAGS)
BUDGET = flags.DEFINE_float("budget_device_hours", 0.0, "refuse a plan of more; 0: no limit", 0.0, flag_values=FLAGS)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the plan and stop", flag_values=FLAGS)
PAGE_SECONDS = 30.0  # between two writings of the page
OF_THE_LOSS = ("train.shift", "train.weighting", "train.references", "data.path", "data.more", "data.weights", "data.text_drop")
"""Fields that change what the loss measures, so that losses do not compare."""

TrainConfig = Config | VAETraining | MLLMTraining


def main(config: Config | VAETraining | MLLMTraining) -> None:
    require(not isinstance(config, ONE_CLIP), f"--config={FLAGS['config'].value}: learns from one clip; sweeps are of trainings on records")
    config = cast(TrainConfig, loop.with_absolute_paths(config))
    space = spaces.read(SPACE.value, config)
    points = proposals.points(space, SEARCH.value, TRIALS.value, SEARCH_SEED.value)
    sweep = described(config, space, len(points) or TRIALS.value)
    shown = points or space.corners(sweep.seed)
    found = plan.plan(sweep, [(spaces.shown(point), space.at(point)) for point in shown], DEVICE.value, EFFICIENCY.value, COMPILE.value)
    print(found, flush=True)
    for line in notes(space):
        print(line, flush=True)
    plan.require_budget(found, BUDGET.value)
    if DRY_RUN.value:
        return
    require(bool(OUT.value), "--out: not given, and a sweep needs it; name its folder")
    outputs.require_folder("--out", OUT.value, [config.train.init_from, getattr(getattr(config, "data", None), "path", "")])
    plan.require_storage(found, sweep.folder)
    sweep.require_same()
    first = space.at(shown[0])
    loop.require_weights(objective(first), first)
    if isinstance(first, Config):
        data_digest(first)  # reads a few records
    bring = engine(max(shape.devices for _, shape in found.shapes))
    with locked(sweep.folder, f"{sweep.folder}: a sweep runs there; wait for its end or stop it, or give another --out"):
        sweep.write()
        sweep.stop_file.unlink(missing_ok=True)
        for number, point in enumerate(points):
            if not sweep.trial(number).exists:
                proposals.begin(sweep, sweep.trial(number), space, point)
        run(sweep, bring, str(found))


def described(config: TrainConfig, space: spaces.Space, trials: int) -> Sweep:
    """The sweep that the flags ask for."""
    name, lengths = str(FLAGS["config"].value), {"train.steps", "train.log_every"} & space.fields()
    require(HALVING.value != 1, "--halving=1: one of one goes on; give 2 or more, or leave it out")
    require(
        not (HALVING.value and lengths),
        f"--halving={HALVING.value}: trials are compared at the same step; take {''.join(lengths)} out",
    )
    steps = config.train.steps
    require(FIRST_RUNG.value <= steps, f"--first_rung={FIRST_RUNG.value}: at most train.steps={steps}")
    if "train.steps" in space.fields():
        steps = max(value for each in space.dimensions for value in ends(each, "train.steps"))
    return Sweep(
        config=name,
        base=tuple(proposals.arguments_of(config, name)),
        space=proposals.definition(space),
        search=SEARCH.value,
        trials=trials,
        seed=SEARCH_SEED.value,
        rungs=rungs(steps, trials, HALVING.value, FIRST_RUNG.value, config.train.log_every),
        halving=HALVING.value,
        objective=Objective(metric=METRIC.value, goal=GOAL.value, window=WINDOW.value),
        folder=Path(OUT.value).absolute(),
        home=Path.cwd(),
    )


def ends(dimension: spaces.Dimension, name: str) -> list[int]:
    """What a dimension may make of a field, at most; nothing if it sets another."""
    values = dimension.values or (dimension.high,)
    return [dimension.fields(value)[name] for value in values if name in dimension.fields(value)]


def notes(space: spaces.Space) -> list[str]:
    """What the space makes of the comparison."""
    changed = sorted(set(OF_THE_LOSS) & space.fields())
    if not changed or METRIC.value != "loss":
        return []
    words = f"--objective={BY_TIME} compares them at all times equally" if changed == ["train.shift"] else "compare samples of the best"
    return [f"note           the loss of trials with another {', '.join(changed)} is not the same measure; {words}"]


def engine(devices: int) -> Callable[..., None]:
    """What brings trials of at most so many devices to a step; a `RequestError` if a library of it is absent, or the cluster."""
    name, needs = ENGINE.value, {}
    for each in NEEDS.value:
        key, sign, value = each.partition("=")
        require(bool(key and sign and value), f"--resources={each}: expected NAME=VALUE, and commas between several")
        needs[key] = value
    require(name == "ray" or not ADDRESS.value, f"--address={ADDRESS.value}: of a Ray cluster; give --engine=ray, or leave it out")
    require(name != "local" or not (needs or AT_ONCE.value), "--resources, --at_once: --engine=local runs one trial with all there is")
    if name == "ray":
        return ray.connected(ADDRESS.value, needs, devices, AT_ONCE.value)
    return slurm.submitting(needs, AT_ONCE.value) if name == "slurm" else local.bring


def run(sweep: Sweep, bring: Callable[..., None], planned: str) -> None:
    """All rungs of a sweep, then its page."""
    numbers, watch = list(range(sweep.trials)), Watch(sweep, planned)
    for index, rung in enumerate(sweep.rungs):
        ahead = [number for number in numbers if sweep.is_ahead(number, rung)]
        watch.begin(index, len(ahead))
        bring(sweep, ahead, rung, watch.done)
        if rung != sweep.rungs[-1]:
            numbers = halve(sweep, numbers, rung)
    watch.write()
    print(page.summary(sweep), flush=True)
    print(f"\nOpen {sweep.folder / page.PAGE} in a browser; {sweep.folder / page.TABLE} has the numbers.")


def halve(sweep: Sweep, numbers: Sequence[int], rung: int) -> list[int]:
    """The trials that go on after a rung; the others are stopped. Those that failed do not go on and take no place."""
    states = {number: sweep.trial(number).state for number in numbers}
    values = {number: state.values[str(rung)] for number, state in states.items() if str(rung) in state.values}
    ranked = sweep.objective.best_first(values)
    kept = plan.survivors(len(numbers), sweep.halving)
    for place, number in enumerate(ranked[kept:], start=kept + 1):
        if states[number].status not in ENDED:
            words = f"{sweep.objective.metric} {values[number]:.4g} at step {rung}: place {place} of {len(numbers)}, {kept} went on"
            sweep.trial(number).end("stopped", words)
    return sorted(ranked[:kept])


class Watch:
    """Tells how a sweep goes, and writes its page and table now and then."""

    def __init__(self, sweep: Sweep, planned: str):
        self.sweep, self.planned, self.started, self.written = sweep, planned, time.monotonic(), 0.0
        self.runs = plan.schedule(sweep.trials, sweep.rungs, sweep.halving)
        self.made, self.left = 0, 0  # steps of all trials
        self.index = self.count = self.of = 0

    def begin(self, index: int, of: int) -> None:
        """`of` trials are to reach the rung of this index."""
        self.index, self.count, self.of = index, 0, of
        self.left = of * self.runs[index][1] + sum(trials * steps for trials, steps in self.runs[index + 1 :])

    def done(self, number: int) -> None:
        """A trial has reached the rung, or has ended."""
        trial, steps, elapsed = self.sweep.trial(number), self.runs[self.index][1], time.monotonic() - self.started
        self.count, self.made, self.left = self.count + 1, self.made + steps, self.left - steps
        state, value = trial.state, trial.state.values.get(str(trial.state.until))
        words = f"{state.status}: {state.reason}" if state.reason else f"{self.sweep.objective.metric} {value:.4g} at step {state.until}"
        times = [timedelta(seconds=round(seconds)) for seconds in (elapsed, elapsed / self.made * self.left)]
        point = spaces.shown(trial.point)
        print(f"[{self.count}/{self.of}] trial {number} ({point}): {words}  {times[0]} so far, about {times[1]} to go", flush=True)
        if time.monotonic() - self.written > PAGE_SECONDS:
            self.write()

    def write(self) -> None:
        """The page and the table; what the disk refuses is told, for the trials do not depend on it."""
        try:
            page.write(self.sweep, self.planned)
        except OSError as error:
            print(f"no {page.PAGE} this time: {error}", flush=True)
        self.written = time.monotonic()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the plan needs no accelerator, and the trials need all there are
    command.run(main, FLAGS)
