"""A training run of any objective, from where it starts to its last checkpoint.

    where it starts -> [ batch -> step -> log the step before -> evaluate -> checkpoint ] x steps

Started again on the same workdir it goes on after its latest checkpoint, as if it had never stopped: bit for bit on the same devices.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from configs.chips import compiler_options
from configs.kinds import flat
from configs.run import Config, RunConfig
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import inputs, model_folder, run_folder
from omnitransfer_jax.folders.lock import alone
from omnitransfer_jax.folders.processes import require_same
from omnitransfer_jax.mesh import Specs, batch_sharding, placed, replicated, specs, to_mesh
from omnitransfer_jax.quarantine import Quarantine
from omnitransfer_jax.train import report
from omnitransfer_jax.train.control import Control
from omnitransfer_jax.train.incidents import Identify, Incidents
from omnitransfer_jax.train.log import RunLog, Work, read_lines
from omnitransfer_jax.train.objective import Objective, Params
from omnitransfer_jax.train.optimizer import learning_rate, make_optimizer
from omnitransfer_jax.train.profiling import Profile
from omnitransfer_jax.train.saving import Saver
from omnitransfer_jax.train.step import TrainState, init_state, make_train_step, placed_state, split_trainable
from omnitransfer_jax.train.stopping import Stopped, Stopping, Watchdog, stop_signals
from omnitransfer_jax.train.wandb_sink import require_installed

REPORT_SECONDS = 60.0  # between two writings of the report

Evaluate = Callable[[int, Params], Mapping[str, float]]
Sample = Callable[[int, Params], bytes | None]


def train(
    objective: Objective,
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    data: grain.DatasetIterator[Any],
    evaluate: Evaluate | None = None,
    data_digest: str = "",
    base: Params | None = None,
    identify: Identify | None = None,
    sample: Sample | None = None,
    quarantine: Quarantine | None = None,
) -> Params | None:
    """All parameters but `base` after `config.train.steps`; None if a signal stopped the run before.

    `data` gives this process's share of each batch (`mesh.data_share`), a tree of numpy arrays; a run goes on if `data_digest` is the same.
    `evaluate` measures the parameters after a step, averaged if there is an average, every `train.evaluate_every` steps, for the log.
    `base` are the arrays of `objective.base` on `mesh`. `identify` gives the names of the samples of a step, for the log of incidents.
    `sample` makes samples with the same parameters, and may give a JPEG of them: before the first step, every `train.sample_every`, after
    the last, and when the file SAMPLE asks for it. `quarantine` is where `data` sets damaged records aside.
    """
    config, workdir = with_absolute_paths(config), workdir.absolute()
    require_installed(config.train.wandb)
    require_same({"--workdir": workdir, "digest of the data": data_digest} | {f"--{k}": v for k, v in flat(asdict(config)).items()})
    optimizer = make_optimizer(config.optimizer, config.train.steps, objective.matrices)
    aside = quarantine if quarantine is not None else Quarantine()
    spec = specs({**objective.params, **objective.base}, objective.sharding, config.mesh)
    like = placed_state(objective, config, optimizer, mesh, spec)
    with (
        stop_signals() as stopping,
        alone(workdir),
        run_folder.open_checkpoints(workdir, config.checkpoint) as checkpoints,
        Watchdog(config.train.hang_seconds) as watchdog,
        Profile(workdir, config.train.profile_window) as profile,
    ):
        done, steps = checkpoints.latest, config.train.steps
        origin = checked_origin(objective, config, workdir, data_digest, done)
        if done >= steps:
            print(f"{workdir}: {done} steps are done, {steps} are asked for; raise --train.steps to go on", flush=True)
            return run_folder.restore(checkpoints, like, data).params if done == steps and evaluate else None
        state = start(objective, config, workdir, checkpoints, like, optimizer, data, aside)
        run_folder.write_config(workdir, config, data_digest or known_digest(workdir, done), origin)
        key = jax.jit(objective.root_key, out_shardings=replicated(mesh))()
        step = Program(make_step(objective, config, optimizer, mesh, spec), like, mesh, base or {})
        with stopping.ends_at_once(f"stopped before step {done + 1} of {steps}; the same command goes on from there"):
            compiled = sum(step.compile(placed(mesh, form.batch, batch_sharding(mesh).spec), key) for form in objective.forms)
        works = {form_of(form.batch): Work(form.flops, form.tokens) for form in objective.forms}
        with RunLog(workdir, config.train, done, mesh.size, asdict(config)) as log:
            log.compiled = compiled
            incidents = Incidents(workdir, done, int(state.skipped), identify)
            saver = Saver(checkpoints, config.checkpoint.every, stopping, log.flush, aside)
            run = Run(
                config, workdir, state, data, mesh, step, key, stopping, watchdog, log, incidents, saver, Control(workdir), evaluate,
                sample, works, aside, profile,
            )  # fmt: skip
            reached = run.to_the_end(done)
            if reached < steps:
                print(f"stopped after step {reached} of {steps}; the same command goes on from there", flush=True)
                return None
    return run.state.params


@dataclass
class Run:
    """A run between its start and its end."""

    config: RunConfig
    workdir: Path
    state: TrainState
    data: grain.DatasetIterator[Any]
    mesh: Mesh
    step: "Program"
    key: Array
    stopping: Stopping
    watchdog: Watchdog
    log: RunLog
    incidents: Incidents
    saver: Saver
    control: Control
    evaluate: Evaluate | None
    sample: Sample | None
    works: Mapping[Any, Work]
    quarantine: Quarantine
    profile: Profile
    next_report: float = 0.0

    def to_the_end(self, done: int) -> int:
        """The step after which it ended, saved: the last, or the one after which it was asked to stop."""
        steps, pending = self.config.train.steps, {}
        if self.sample is not None and not done:
            self.sample_now(0)
        for n in range(done + 1, steps + 1):
            self.watchdog.progress(f"step {n}, waiting for its batch")
            batch = self.next_batch(n)
            if batch is None:  # asked to stop
                return self.end(n - 1, pending, is_saved=n - 1 == done)
            self.watchdog.progress(f"step {n}")
            with self.log.paused():
                self.step.compile(batch, self.key)
            with self.log.paused():
                profiled = self.profile.step(n)
            with profiled:
                self.state, metrics = self.step(self.state, batch, self.key)
            with self.log.paused():
                self.profile.after(n, partial(jax.block_until_ready, metrics))
            if pending:
                self.settle(n - 1, pending)
            self.log.add_work(self.works.get(form_of(batch), Work()))
            asked = self.control.asked()
            pending, stop = metrics, self.stopping(n) or "STOP" in asked
            last, samples = stop or n == steps, self.is_to_sample(n, asked)
            due = last or bool(asked & {"SAVE", "PAUSE"}) or self.saver.is_due(n)
            if due or samples or evaluates(self.config, n):
                self.settle(n, metrics)  # before it is saved, for a resumed run does not log it again
                pending = {}
            if due:
                self.watchdog.progress(f"step {n}, waiting for its checkpoint")
                self.saver.save(n, self.state, self.data, last or "PAUSE" in asked)
            if samples and not stop:
                self.sample_now(n)
            if last:
                if samples and jax.process_index() == 0:
                    self.report()
                return n
            if "PAUSE" in asked:
                self.pause(n)
        raise AssertionError("the last step returns")

    def is_to_sample(self, n: int, asked: Collection[str]) -> bool:
        """Whether step `n` is followed by samples; a training that makes none says so."""
        if self.sample is None:
            if "SAMPLE" in asked:
                print(f"step {n}: SAMPLE is left out, for this training was started without --train.sample_prompts=FILE", flush=True)
            return False
        every = self.config.train.sample_every
        return "SAMPLE" in asked or n == self.config.train.steps or (every > 0 and n % every == 0)

    def sample_now(self, n: int) -> None:
        """Makes the samples of step `n`; not counted as time of a step. What the system refuses of it is told and ends nothing."""
        assert self.sample is not None
        self.watchdog.progress(f"step {n}, samples")
        try:
            with self.log.paused(), self.stopping.interruptible():
                self.log.picture(n, self.sample(n, self.averaged))
            self.next_report = 0.0
        except Stopped:
            print(f"step {n}: its samples are left out, for the run was asked to stop", flush=True)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            self.told("samples", n, error)

    @property
    def averaged(self) -> Params:
        """All parameters, averaged if there is an average."""
        return self.state.ema | self.state.frozen if self.state.ema else self.state.params

    def told(self, what: str, n: int, error: Exception) -> None:
        """Tells that something was refused beside the training, a full disk or no memory; of several processes it ends the run."""
        if jax.process_count() > 1:
            raise error
        print(f"step {n}: no {what}, {' '.join(str(error).split())[:300]}; training goes on", flush=True)

    def pause(self, n: int) -> None:
        """Waits while the file PAUSE is there; a signal or the file STOP ends it."""
        print(f"paused after step {n}, which is saved; remove {self.workdir / 'PAUSE'} to go on", flush=True)
        with self.log.paused(), suppress(Stopped), self.stopping.interruptible():
            while self.control.is_paused():
                self.watchdog.progress(f"step {n}, paused")

    def next_batch(self, n: int) -> Any | None:
        """The batch of step `n`, on its way to the devices while these compute the step before; None if asked to stop while it waited."""
        position = self.data.get_state()
        try:
            with self.log.waiting(), self.stopping.interruptible():
                batch = next(self.data)
        except Stopped:
            self.data.set_state(position)
            self.quarantine.take_back()
            return None
        if damaged := self.quarantine.news():
            self.incidents.set_aside(n, damaged, len(self.quarantine.places), self.quarantine.most)
        return to_mesh(batch, self.mesh)

    def end(self, n: int, pending: Mapping[str, Array], is_saved: bool) -> int:
        """Settles and saves step `n`, after which the run stops."""
        if pending:
            self.settle(n, pending)
        if not is_saved and self.saver.saved != n:
            self.saver.save(n, self.state, self.data, last=True)
        return n

    def settle(self, n: int, metrics: Mapping[str, Array]) -> None:
        """Waits for step `n` and logs it."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if self.evaluate is not None and evaluates(self.config, n):
            self.watchdog.progress(f"step {n}, evaluation")
            try:
                with self.log.paused(), self.stopping.interruptible():
                    measured = self.evaluate(n, self.averaged)
                print(f"step {n}  " + "  ".join(f"{name} {value:.4g}" for name, value in measured.items()), flush=True)
                values |= measured
            except Stopped:
                print(f"step {n}: its evaluation is left out, for the run was asked to stop", flush=True)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                self.told("evaluation", n, error)
        self.log.write(n, values)
        self.incidents.watch(n, values, self.log.is_logged(n))
        if jax.process_index() == 0 and (time.monotonic() > self.next_report or n == self.config.train.steps):
            self.report()

    def report(self) -> None:
        """Writes the page of the run; what the system refuses is told, for a training does not depend on it."""
        try:
            report.write(self.workdir, self.config.train.steps)
        except OSError as error:
            print(f"no {report.REPORT_FILE} this time: {error}", flush=True)
        self.next_report = time.monotonic() + REPORT_SECONDS


def checked_origin(objective: Objective, config: RunConfig, workdir: Path, data_digest: str, done: int) -> str:
    """The digest of the weights that the run starts from.

    A `RequestError`, before anything is loaded, unless a run with steps `done` can go on: it is this one, and its log can be read.
    """
    before = run_folder.digests(workdir)[run_folder.ORIGIN_DIGEST] if done else ""
    origin = run_folder.origin_digest(config.train.init_from, set(objective.imported.values()), before)
    if done:
        run_folder.require_same_run(workdir, config, data_digest, origin)
        read_lines(workdir)
    return origin or before


def known_digest(workdir: Path, done: int) -> str:
    """The digest of its data that a run which has done `done` steps was started with."""
    return run_folder.digests(workdir)[run_folder.DATA_DIGEST] if done else ""


def evaluates(config: RunConfig, n: int) -> bool:
    """Whether step `n` is followed by an evaluation."""
    return config.train.evaluate_every > 0 and n % config.train.evaluate_every == 0


def start(
    objective: Objective,
    config: RunConfig,
    workdir: Path,
    checkpoints: run_folder.Checkpoints,
    like: TrainState,
    optimizer: optax.GradientTransformation,
    data: grain.DatasetIterator[Any],
    quarantine: Quarantine | None = None,
) -> TrainState:
    """The state to go on from, placed as `like`; `data` moves to where it was."""
    params, origin = like.trainable | like.frozen, config.train.init_from
    place, known = {path: leaf.sharding for path, leaf in params.items()}, model_of(origin, objective, config)
    if checkpoints.latest:  # 1. The run's own latest checkpoint,
        print(f"{workdir}: going on after step {checkpoints.latest}", flush=True)
        return run_folder.restore(checkpoints, like, data, quarantine)
    weights: Params = {}
    if run_folder.is_run(origin):  # 2. else the weights of another run, averaged if it keeps an average,
        run_folder.require_same_model(origin, known)
        weights = run_folder.load_params(origin, params, place, jnp.float32)
    source = run_folder.imported_weights(origin, type(known))
    if source:  # 3. else imported weights,
        weights |= imported_params(source, objective, {path: leaf for path, leaf in params.items() if path not in weights}, place)
    left = [path for path in params if path not in weights]
    if left:  # 4. else random ones: what no checkpoint can have, and everything if there is none.
        require_small(objective, config, left)

        def draw() -> Params:
            drawn = objective.init()
            return {path: drawn[path] for path in left}

        weights |= jax.jit(draw, out_shardings={path: place[path] for path in left})()
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda weights: init_state(weights, objective, config, optimizer), donate_argnums=0, out_shardings=places)(weights)


def imported_params(folder: str, objective: Objective, params: Mapping[str, Any], place: Mapping[str, Any]) -> Params:
    """Those of `params` that are in a folder of launch.import_weights; it need not have every model. A model that is frozen whole is read
    in the type in which it is kept."""
    present, found = model_folder.require_model(folder, objective.models), {}
    for prefix, part in objective.imported.items():
        wanted = {path.removeprefix(prefix): path for path in params if path.startswith(prefix) and ".lora" not in path}
        if wanted and part not in present:
            print(f"{folder}: has no {part}, which starts from random weights", flush=True)
        elif wanted:
            stored = model_folder.part_leaves(folder, part)
            unread = {path: leaf for path, leaf in stored.items() if path not in wanted and path.startswith("vision.")}
            everywhere = replicated(next(iter(place.values())).mesh)
            leaves = {path: params[name] for path, name in wanted.items()} | unread
            places = {path: place[name] for path, name in wanted.items()} | dict.fromkeys(unread, everywhere)
            trained, _ = split_trainable({name: params[name] for name in wanted.values()}, objective)
            dtype = jnp.float32 if trained else objective.frozen_dtype
            loaded = model_folder.load_part(folder, part, leaves, places, dtype, together=True)
            found |= {name: loaded[path] for path, name in wanted.items()}
    return found


def require_weights(objective: Objective, config: RunConfig) -> None:
    """A `RequestError` if a run of this configuration could not start: no weights, or those of another model; none are read."""
    origin = config.train.init_from
    if not origin:
        require_small(objective, config, [*objective.params, *objective.base])
        return
    known = model_of(origin, objective, config)
    inputs.require_checkpoint(load_models.INIT_FROM, origin, type(known))
    if run_folder.is_run(origin):
        run_folder.require_same_model(origin, known)
        inputs.require_trained(load_models.INIT_FROM, origin)
    if source := run_folder.imported_weights(origin, type(known)):
        model_folder.require_model(source, objective.models)


def model_of(origin: str, objective: Objective, config: RunConfig) -> RunConfig:
    """The configuration with which the run `origin` is compared: `config` if it is a run of the same training."""
    same = run_folder.is_run(origin) and run_folder.training_of(origin) == config.training
    return config if same else objective.models


def require_small(objective: Objective, config: RunConfig, paths: Iterable[str]) -> None:
    """A `RequestError` unless the networks `paths` belong to are small enough to learn from random weights."""
    params = {**objective.params, **objective.base}
    sizes = {
        part: sum(params[path].size for path in paths if path.startswith(prefix) and ".lora" not in path)
        for prefix, part in objective.imported.items()
    }
    load_models.require_small(sizes, config.train.init_from)


Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def make_step(objective: Objective, config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, specs: Specs) -> Step:
    """The training step as the loop calls it: step n draws from the key folded with n, and the learning rate is a metric."""
    train_step = make_train_step(objective, config, optimizer, mesh, specs)

    def step(state: TrainState, batch: Any, key: Array, base: Params | None = None) -> tuple[TrainState, dict[str, Array]]:
        after, metrics = train_step(state, batch, jax.random.fold_in(key, state.step), base)
        return after, metrics | {"learning_rate": learning_rate(state.step - state.skipped, config.optimizer, config.train.steps)}

    return step


def form_of(batch: Any) -> Any:
    """What decides which program a batch needs."""
    return jax.tree.structure(batch), tuple(leaf.shape for leaf in jax.tree.leaves(batch))


class Program:
    """A step compiled once for each form of batch; the state it is given is used up."""

    def __init__(self, step: Step, like: TrainState, mesh: Mesh, base: Params):
        places = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(mesh)
        self.step, self.like, self.base = jax.jit(step, donate_argnums=0, out_shardings=places), like, base
        self.compiled: dict[Any, Any] = {}
        self.options: dict[str, str | bool] = {**compiler_options(mesh.devices.flat[0].device_kind)}

    def compile(self, batch: Any, key: Array) -> float:
        """Compiles the step for batches of this form, unless that is done; how many seconds it took."""
        form, started = form_of(batch), time.perf_counter()
        if is_new := form not in self.compiled:
            self.compiled[form] = self.step.lower(self.like, batch, key, self.base).compile(self.options)
            print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
        self.chosen = self.compiled[form]
        return time.perf_counter() - started if is_new else 0.0

    def __call__(self, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        with jax.transfer_guard("disallow"):
            return self.chosen(state, batch, key, self.base)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration as the workdir keeps it: its paths mean the same from any folder."""

    def absolute(path: str) -> str:
        return str(epath.Path(path).absolute()) if path not in ("", model_folder.EMBEDDED) else path

    config = replace(config, train=replace(config.train, init_from=absolute(config.train.init_from)))
    if not isinstance(config, Config):
        return config
    config = replace(config, train=replace(config.train, sample_prompts=absolute(config.train.sample_prompts)))
    if Path(config.train.evaluate_suite).is_file():  # not the world's
        config = replace(config, train=replace(config.train, evaluate_suite=absolute(config.train.evaluate_suite)))
    return replace(config, data=replace(config.data, path=absolute(config.data.path), more=tuple(map(absolute, config.data.more))))
