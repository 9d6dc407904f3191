"""One trial: launch.train as a process with a workdir of its own, watched until it has reached a step. Every engine calls `advance`.

A process that was killed or pre-empted is started again and goes on where it stopped. One that ends by itself with an error is not: its
last line is the reason. `touch OUT/trials/0003/STOP` stops a trial for good. With `touch OUT/STOP` every trial saves and ends, on whatever
machine it runs; so do Ctrl-C and SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import RequestError, require
from launch.sweeping.proposals import propose
from launch.sweeping.trials import LOG_FILE, PROGRAMS, STOP, State, Sweep, Trial, locked
from omnitransfer_jax.train.log import METRICS_FILE

ROOT = Path(__file__).parents[2]
LOOK = 0.2  # seconds between looks at a trial
PATIENCE = 3  # starts in a row that end without a new step
WAIT = 2.0  # seconds before another start
TRAINING = "launch.train"
BUSY, NOT_FINITE = "a training runs there", "not finite"
# The kernel ends a trial whose sweep was killed, by the signal at which it saves; nothing else would.
LAUNCH = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""
TAIL = 20_000  # bytes of a log in which its last line is


class PreemptionError(Exception):
    """The trial was asked to give up its place; it has saved, or was killed, and is to go on later."""


def advance(sweep: Sweep, number: int, until: int, is_asked_to_stop: Callable[[], bool] = lambda: False) -> None:
    """Brings a trial to step `until`, or to its end, unless another process did; a `PreemptionError` if it is asked to stop."""
    trial = sweep.trial(number)

    def asked() -> bool:
        return is_asked_to_stop() or sweep.is_asked_to_stop

    with locked(trial.folder):  # a job of this sweep may still run that was started before the sweep was killed
        if not sweep.is_ahead(number, until):
            return
        if asked():
            raise PreemptionError
        if not trial.exists:
            propose(sweep, trial)
        run(sweep, trial, until, asked)


def give_up(sweep: Sweep, number: int, words: str) -> None:
    """Ends a trial that an engine could not run; a `RequestError` if it has no point yet."""
    require(sweep.trial(number).exists, f"trial {number}: {words}")
    sweep.trial(number).end("failed", words)


@contextmanager
def stop_signals(sweep: Sweep) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask all trials to save and end; a second one is obeyed at once, as it would be outside."""

    def note(number: int, frame: Any) -> None:
        sweep.stop_file.touch()
        print("the trials that run save and end; again to stop at once", flush=True)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(sweep: Sweep, trial: Trial, until: int, is_asked_to_stop: Callable[[], bool]) -> State:
    """Brings a trial to step `until`, or to its end, and returns its state."""
    state, misses, until = trial.state, 0, min(until, trial.steps)
    if state.status == "running":  # what ran it was killed
        state = replace(state, restarts=state.restarts + 1)
    furthest = (_last_line(trial) or {}).get("step", 0)
    while True:
        trial.set(replace(state, status="running"))
        started = time.monotonic()
        code = _process(sweep, trial, until, is_asked_to_stop)
        state = replace(state, seconds=state.seconds + time.monotonic() - started)
        reached, words = (_last_line(trial) or {}).get("step", 0), trial.last_words()
        if (trial.folder / STOP).exists():
            return trial.set(replace(state, status="stopped", reason=f"asked by a file {STOP}, after step {reached}"))
        if code == 0 and reached >= until:
            return trial.set(_reached(sweep, trial, state, until))
        if code == 2 and BUSY in words:  # a process that outlived its sweep saves
            time.sleep(WAIT)
            continue
        if code == 1 and NOT_FINITE in words:
            return trial.set(replace(state, status="diverged", reason=words))
        if code > 0 and (code != 1 or reached <= furthest):
            return trial.set(replace(state, status="failed", reason=f"exit code {code}: {words}"))
        misses, furthest = (0 if reached > furthest else misses + 1), max(furthest, reached)
        if is_asked_to_stop():
            trial.set(replace(state, status="reached" if state.until else "waiting", restarts=state.restarts + 1))
            raise PreemptionError
        if misses == PATIENCE:
            name = signal.Signals(-code).name if code < 0 else "no signal"
            return trial.set(replace(state, status="failed", reason=f"ended {misses} times by {name} without a new step: {words}"))
        state = replace(state, restarts=state.restarts + 1)
        time.sleep(WAIT)


def _process(sweep: Sweep, trial: Trial, until: int, is_asked_to_stop: Callable[[], bool]) -> int:
    """The exit code of one process of a trial, which is stopped after step `until`."""
    wish = trial.workdir / STOP
    wish.unlink(missing_ok=True)  # of a process that ended before it looked
    command = [sys.executable, "-c", LAUNCH, TRAINING, *trial.args, f"--workdir={trial.workdir}"]
    with (trial.folder / LOG_FILE).open("a") as log:
        # A session of its own: Ctrl-C is for the sweep, which asks the trial to save and end.
        process = subprocess.Popen(
            command, cwd=sweep.home, env=_environment(sweep), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        while (code := process.poll()) is None:
            line = _last_line(trial)
            is_there = bool(line and line["step"] >= until) or is_asked_to_stop() or (trial.folder / STOP).exists()
            if is_there and trial.workdir.is_dir() and not wish.exists():
                wish.touch()
            time.sleep(LOOK)
    return code


def _reached(sweep: Sweep, trial: Trial, state: State, until: int) -> State:
    """The state of a trial that has reached a step."""
    try:
        value = sweep.objective.value(trial.lines(), until)
    except RequestError as error:
        return replace(state, status="failed", reason=str(error))
    if value is None:
        return replace(state, status="diverged", reason=f"the objective is not finite at step {until}")
    status = "finished" if until == trial.steps else "reached"
    return replace(state, status=status, until=until, values={**state.values, str(until): value})


def _environment(sweep: Sweep) -> dict[str, str]:
    """Of a trial: with this project, and one cache of compiled programs."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH", ""))))
    found["PYTHONUNBUFFERED"] = "1"
    if "JAX_COMPILATION_CACHE_DIR" not in found:
        found["JAX_COMPILATION_CACHE_DIR"] = str(sweep.folder / PROGRAMS)
        found["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(100 * 2**30)  # with a limit jax locks the folder
    return found


def _last_line(trial: Trial) -> dict[str, Any] | None:
    """The last whole line of its metrics.jsonl, without reading all of it; None if there is none."""
    path = trial.workdir / METRICS_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    try:
        line = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
