"""The loop that trains one part of the tiny model by itself, on clips of the procedural world. That of the stages is run.py.

Started again on the same workdir it goes on after its latest checkpoint, bit for bit as if it had never stopped.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from jaxtyping import Array

from configs.errors import require
from configs.run import PartTraining, TrainConfig
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.train.log import METRICS_FILE, RunLog
from omnitransfer_jax.train.loop import stop_signals
from omnitransfer_jax.train.optimizer import promoting
from omnitransfer_jax.train.step import Params, TrainState
from omnitransfer_jax.weights import files

CONFIG_FILE = run_folder.CONFIG_FILE
TrainStep = Callable[[int, TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]
"""train_step(number of the step, from 1, state, batch, the run's key)."""


def train(
    config: PartTraining,
    workdir: Path,
    state: TrainState,
    data: grain.DatasetIterator,
    train_step: TrainStep,
    evaluate: Callable[[Params], Mapping[str, float]],
) -> Params | None:
    """The parameters after `config.steps`, or None if it was told to stop before; `evaluate` looks at held-out clips on the way."""
    begin(workdir, config)
    key = jax.random.key(config.seed)
    with run_folder.open_checkpoints(workdir, config.checkpoint) as checkpoints, stop_signals() as stopping:
        if checkpoints.latest:
            print(f"{workdir}: going on after step {checkpoints.latest.step}", flush=True)
            state = run_folder.restore(checkpoints, state, data)
        done = int(state.step)
        with RunLog(workdir, TrainConfig(steps=config.steps, log_every=config.log_every), done) as log:
            for n in range(done + 1, config.steps + 1):
                with log.waiting():
                    batch = next(data)
                state, metrics = train_step(n, state, batch, key)
                if n % config.log_every == 0 or n == config.steps:
                    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
                    if not math.isfinite(values["loss"]):
                        raise FloatingPointError(f"step {n}: the loss is not finite; lower --learning_rate")
                    if n % config.evaluate_every == 0:
                        seen = evaluate(state.trainable)
                        values |= seen
                        print(f"step {n}  " + "  ".join(f"{name} {value:.4g}" for name, value in seen.items()), flush=True)
                    log.write(n, values)
                stop = stopping(n)
                if stop or n == config.steps or n % config.checkpoint.every == 0:
                    run_folder.save(checkpoints, n, state, data)
                if stop and n < config.steps:
                    print(f"stopped after step {n} of {config.steps}; the same command goes on from there", flush=True)
                    return None
    return state.trainable


def begin(workdir: Path, config: PartTraining) -> None:
    """Writes the configuration, or compares it with the one there: a `RequestError` for the first field that makes it another run."""
    path = workdir / CONFIG_FILE
    fields = json.loads(json.dumps(asdict(config)))
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in fields.items():
            require(
                name in config.free or before.get(name) == value,
                f"--{name}={value}: the run in {workdir} was started with {before.get(name)}; give that, or another --workdir",
            )
    write_whole(path, json.dumps(fields, indent=2).encode())


def make_optimizer(config: PartTraining, dimension_numbers: Any) -> optax.GradientTransformation:
    """Muon on matrices, as `dimension_numbers` tells them, and Adam on the rest; it learns several times as fast as Adam alone."""

    def rate(highest: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, highest, config.warmup_steps, config.steps)

    of_vectors = rate(config.vector_learning_rate)
    return promoting(
        optax.contrib.muon(rate(config.learning_rate), adam_learning_rate=of_vectors, muon_weight_dimension_numbers=dimension_numbers)
    )


def finish(workdir: Path, name: str, params: Params, result: Mapping[str, Any]) -> None:
    """Writes WORKDIR/NAME.safetensors, float32 parameters by path, and WORKDIR/NAME.json: `result`, and the seconds of training."""
    arrays = {path: np.asarray(x) for path, x in params.items()}
    files.write(workdir, name, {path: files.Spec(x.shape, x.dtype) for path, x in arrays.items()}, arrays.items())
    seconds = round(trained_seconds(workdir))
    write_whole(workdir / f"{name}.json", json.dumps({**result, "seconds": seconds}, indent=2).encode())


def trained_seconds(workdir: Path) -> float:
    """The time of all steps of a run, pauses between its processes not counted."""
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    steps = np.diff([0, *(line["step"] for line in lines)])
    return float(steps @ np.array([line["seconds"] for line in lines]))
