"""A training run, from where it starts to its last checkpoint.

    mesh -> where it starts -> compile -> [ batch -> step -> log the step before -> checkpoint ] x steps

Started again on the same workdir it goes on after its latest checkpoint, as if it had never stopped: bit for bit on the same devices.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key
from orbax.checkpoint import v1 as ocp

from configs.errors import require
from configs.run import Config
from omnitransfer_jax.batch import Batch, batch_spec
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import DATA, specs
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import SHARDING, OmniTransfer
from omnitransfer_jax.train.log import RunLog
from omnitransfer_jax.train.optimizer import learning_rate, make_optimizer
from omnitransfer_jax.train.step import (
    Params,
    TrainState,
    abstract_params,
    abstract_state,
    init_state,
    make_train_step,
)

RANDOM_LIMIT = 200_000_000  # parameters; a larger network is not worth training from random weights, so their absence is a mistake
IMPORTED = {"dit.": "dit", "alignment.mllm.": "mllm"}  # where paths begin, and the part of launch.import_weights they come from
PATIENCE = 10  # updates in a row that may fail to be finite

Step = Callable[[TrainState, Batch, Array, Array], tuple[TrainState, dict[str, Array]]]


def train(config: Config, workdir: Path, mesh: Mesh, data: grain.DatasetIterator[Batch], empty_text: Float[np.ndarray, "S E"]) -> None:
    """Trains up to `config.train.steps`; `data` gives this process's share of each batch, as `data_share` says."""
    config, workdir = with_absolute_paths(config), workdir.absolute()
    optimizer = make_optimizer(config.optimizer)
    spec = specs(abstract_params(config), SHARDING, config.mesh.data)
    like = abstract_state(config, mesh, spec, optimizer)
    with run_folder.open_checkpoints(workdir, config.checkpoint) as checkpoints, stop_signals() as stopping:
        done, steps = checkpoints.latest.step if checkpoints.latest else 0, config.train.steps
        if done >= steps:
            print(f"{workdir}: {done} steps are done, {steps} are asked for; raise --train.steps to go on", flush=True)
            return
        state = start(config, workdir, checkpoints, like, optimizer, data)
        if jax.process_index() == 0:
            run_folder.write_config(workdir, config)
        step = compile_step(config, mesh, spec, like, optimizer)
        everywhere = NamedSharding(mesh, P())
        key = jax.jit(lambda: root_keys(config)[1], out_shardings=everywhere)()
        empty = jax.device_put(np.asarray(empty_text), everywhere)
        finite, pending = Finiteness(int(state.skipped)), {}
        with RunLog(workdir, config.train, done) as log:

            def settle(n: int, metrics: Mapping[str, Array]) -> None:
                """Waits for step `n` and tells of it."""
                values = {name: value.item() for name, value in jax.device_get(metrics).items()}
                log.write(n, values)
                finite.watch(n, values["skipped"])

            for n in range(done + 1, steps + 1):
                with log.waiting():
                    batch = to_mesh(next(data), mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, batch, key, empty)
                if pending:
                    settle(n - 1, pending)
                pending, stop = metrics, stopping(n)
                if stop or n == steps or n % config.checkpoint.every == 0:
                    settle(n, metrics)  # before it is saved, for a resumed run does not log it again
                    pending = {}
                    run_folder.save(checkpoints, n, state, data)
                if stop and n < steps:
                    print(f"stopped after step {n} of {steps}; the same command goes on from there", flush=True)
                    return


def start(
    config: Config,
    workdir: Path,
    checkpoints: ocp.training.Checkpointer,
    like: TrainState,
    optimizer: optax.GradientTransformation,
    data: grain.DatasetIterator[Batch],
) -> TrainState:
    """The state to go on from, placed as `like`; `data` moves to where it was."""
    params, origin = like.trainable | like.frozen, config.train.init_from
    place = {path: leaf.sharding for path, leaf in params.items()}
    if checkpoints.latest:  # 1. The run's own latest checkpoint,
        run_folder.require_same_run(workdir, config)
        print(f"{workdir}: going on after step {checkpoints.latest.step}", flush=True)
        return run_folder.restore(checkpoints, like, data)
    weights = {}
    if run_folder.is_run(origin):  # 2. else the weights of another run, averaged if it keeps an average,
        run_folder.require_same_model(origin, config)
        weights = run_folder.load_params(origin, params, place, jnp.float32)
    source = run_folder.imported_weights(origin)
    if source:  # 3. else imported weights,
        weights |= imported_params(source, config, {path: leaf for path, leaf in params.items() if path not in weights}, place)
    left = {path: leaf for path, leaf in params.items() if path not in weights}
    if left:  # 4. else random ones: what no checkpoint can have, and everything if there is none.
        weights |= random_params(config, left, place)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda weights: init_state(weights, config, optimizer), donate_argnums=0, out_shardings=places)(weights)


def imported_params(folder: str, config: Config, params: Mapping[str, Any], place: Mapping[str, Any]) -> Params:
    """Those of `params` that are in a folder of launch.import_weights; it need not have every part."""
    present, found = model_folder.require_model(folder, config), {}
    for prefix, part in IMPORTED.items():
        wanted = {path.removeprefix(prefix): path for path in params if path.startswith(prefix) and ".lora." not in path}
        if wanted and part not in present:
            print(f"{folder}: has no {part}, which starts from random weights", flush=True)
        elif wanted:
            stored = model_folder.part_leaves(folder, part)
            unread = {path: leaf for path, leaf in stored.items() if path.startswith("vision.")}  # the tower stays in the records
            everywhere = NamedSharding(next(iter(place.values())).mesh, P())
            leaves = {path: params[name] for path, name in wanted.items()} | unread
            places = {path: place[name] for path, name in wanted.items()} | dict.fromkeys(unread, everywhere)
            loaded = model_folder.load_part(folder, part, leaves, places, jnp.float32)
            found |= {name: loaded[path] for path, name in wanted.items()}
    return found


def random_params(config: Config, params: Mapping[str, Any], place: Mapping[str, Any]) -> Params:
    """`params` drawn from the seed."""
    require_small(config, params)

    def draw() -> Params:
        drawn = flat_params(OmniTransfer(config, rngs=nnx.Rngs(root_keys(config)[0])))
        return {path: drawn[path] for path in params}

    return jax.jit(draw, out_shardings={path: place[path] for path in params})()


def require_weights(config: Config) -> None:
    """A `RequestError` that says which weights are missing, if a run of this configuration could not start; nothing is read."""
    origin = config.train.init_from
    require(
        not origin or run_folder.is_run(origin) or (epath.Path(model_folder.resolve(origin)) / model_folder.MODEL_FILE).exists(),
        f"train.init_from={origin!r}: neither imported weights nor a run; import them with {model_folder.IMPORT}",
    )
    if not origin:
        require_small(config, abstract_params(config))


def require_small(config: Config, params: Mapping[str, Any]) -> None:
    """A `RequestError` unless the networks `params` belong to are small enough to learn from random weights."""
    sizes = {
        part: sum(leaf.size for path, leaf in params.items() if path.startswith(prefix) and ".lora." not in path)
        for prefix, part in IMPORTED.items()
    }
    missing = [f"{part} ({size / 1e9:.1f} billion parameters)" for part, size in sizes.items() if size > RANDOM_LIMIT]
    require(
        not missing,
        f"train.init_from={config.train.init_from!r} has no weights for {' and '.join(missing)}, too large to start from random ones: "
        f"give --train.init_from=DIR, made with {model_folder.IMPORT}",
    )


def root_keys(config: Config) -> Key[Array, "2"]:
    """The keys of the initial weights and of the steps."""
    return jax.random.split(jax.random.key(config.seed))


def compile_step(config: Config, mesh: Mesh, spec: Mapping[str, P], like: TrainState, optimizer: optax.GradientTransformation) -> Step:
    """The training step as a program for `mesh`; step n draws from the key folded with n, and the state it is given is used up."""
    train_step = make_train_step(config, mesh, spec, optimizer)

    def step(state: TrainState, batch: Batch, key: Array, empty_text: Array) -> tuple[TrainState, dict[str, Array]]:
        after, metrics = train_step(state, batch, jax.random.fold_in(key, state.step), empty_text)
        return after, metrics | {"learning_rate": learning_rate(state.step - state.skipped, config.optimizer)}

    rows, everywhere = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch_spec(config))
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=everywhere)
    empty_text = jax.ShapeDtypeStruct(batch.text.shape[1:], batch.text.dtype, sharding=everywhere)
    places = jax.tree.map(lambda leaf: leaf.sharding, like), everywhere
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0, out_shardings=places).lower(like, batch, key, empty_text).compile()
    print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
    return compiled


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of every batch this process reads.

    Processes that hold the same samples and divide their tokens read the same part.
    """
    rows = sorted({row for row, devices in enumerate(mesh.devices) for device in devices if device.process_index == jax.process_index()})
    return rows[0] // len(rows), mesh.shape[DATA] // len(rows)


def to_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """This process's samples as its part of the batch over all devices."""
    rows = NamedSharding(mesh, P(DATA))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)


def with_absolute_paths(config: Config) -> Config:
    """The configuration as the workdir keeps it: its paths mean the same from any folder."""

    def absolute(path: str) -> str:
        return str(epath.Path(path).absolute()) if path not in ("", model_folder.EMBEDDED) else path

    data, train = replace(config.data, path=absolute(config.data.path)), replace(config.train, init_from=absolute(config.train.init_from))
    return replace(config, data=data, train=train)


class Finiteness:
    """Ends a run whose updates have stopped being finite; each of them was left out of the weights."""

    def __init__(self, skipped: int):
        self.skipped, self.in_a_row = skipped, 0

    def watch(self, step: int, skipped: int) -> None:
        """Takes the number of updates left out up to `step`."""
        self.in_a_row = self.in_a_row + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        if self.in_a_row == PATIENCE:
            raise FloatingPointError(
                f"step {step}: loss or gradients were not finite {PATIENCE} times in a row; the weights are those of step "
                f"{step - PATIENCE}. Look for a damaged record, or lower --optimizer.learning_rate"
            )


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Gives stopping(step): whether the run was asked to stop, by SIGTERM or SIGINT; a second signal ends the process at once.

    Several processes have to stop at the same step; there JAX receives SIGTERM and finds the step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        os.write(2, b"stopping after this step; again to stop at once\n")  # print may be interrupted by us and cannot be entered twice
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
