"""Signals in everything that a training does: it saves what it has learnt and ends soon with code 0; a second signal ends it at once."""

import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnitransfer_jax.folders import run_folder
from tortures import tiny
from tortures.kills import train
from tortures.outcome import Outcome
from tortures.processes import HangError, Job

GRACE = 10.0  # seconds; the tiny run needs one or two of a machine that is idle
MARK = "HERE"
AT = 5  # the step at which it comes
LONG = 600.0
SITUATIONS = ("a step", "waiting for data", "a save", "evaluation", "compiling", "twice")


def signals(folder: Path, count: int) -> Outcome:
    """Each situation in turn, SIGTERM and SIGINT."""
    data, failures, slowest = tiny.write_records(folder / "records"), [], 0.0
    for case in range(count):
        situation, number = SITUATIONS[case % len(SITUATIONS)], (signal.SIGTERM, signal.SIGINT)[case // len(SITUATIONS) % 2]
        workdir = folder / "run"
        given = tiny.arguments(workdir, data, train__steps=100_000, train__evaluate_every=AT if situation == "evaluation" else 0)
        try:
            trouble, seconds = signalled(situation, number, given, workdir, folder / "run.log")
            slowest = max(slowest, seconds)
        except HangError as error:
            trouble = str(error)
        if trouble:
            failures.append(f"{situation}, {signal.Signals(number).name}: {trouble}")
        shutil.rmtree(workdir, ignore_errors=True)
    return Outcome(count, failures, f"the slowest ended after {slowest:.1f} s")


def signalled(situation: str, number: int, given: Sequence[str], workdir: Path, log: Path) -> tuple[str, float]:
    """What is wrong with the end of a run that was given a signal, and how long the end took."""
    with Job(in_situation, situation, given, log=log) as job:
        if not job.wait_for(lambda: MARK in job.output):
            return f"it was over before: {job.output[-300:]}", 0.0
        time.sleep(0.2)
        started = time.monotonic()
        job.send(number)
        if situation == "twice":
            job.wait_for(lambda: "again to stop at once" in job.output)
            job.send(number)
        code, seconds = job.wait(), time.monotonic() - started
        last = job.output.strip().splitlines()[-1]
    done = run_folder.steps_done(workdir) if (workdir / run_folder.CHECKPOINTS).exists() else 0
    if situation == "twice":
        return ("" if code in (-number, 130, 0) and done >= AT - 3 else f"code {code}, step {done} is saved: {last}"), seconds
    said = re.fullmatch(r"stopped (after|before) step (\d+) of 100000; the same command goes on from there", last)
    if code or not said or seconds > GRACE:
        return f"code {code} after {seconds:.1f} s: {last}", seconds
    reached = int(said[2]) - (said[1] == "before")
    least = {"compiling": 0, "waiting for data": AT - 1}.get(situation, AT - 1)
    return ("" if reached == done and done >= least else f"{last}, yet step {done} is saved"), seconds


def in_situation(situation: str, given: Sequence[str]) -> None:
    """Trains, says `MARK` when it is in the situation, and stays there."""
    from launch import train as launch_train
    from omnitransfer_jax.folders import checksums
    from omnitransfer_jax.train import log, loop

    def here() -> None:
        os.write(1, f"{MARK}\n".encode())

    if situation == "a step":
        write = log.RunLog.write
        log.RunLog.write = lambda self, step, metrics: (write(self, step, metrics), here() if step == AT else None)[0]
    elif situation in ("waiting for data", "twice"):
        batches = launch_train.batches
        launch_train.batches = lambda *args, **named: Slow(batches(*args, **named), here)
    elif situation == "a save":
        plain = checksums.write
        checksums.write = lambda *args: (here(), time.sleep(1.0), plain(*args))[-1] if str(args[0]).endswith("/6") else plain(*args)
    elif situation == "evaluation":
        plain_train = loop.train

        def evaluate(step: int, params: Any) -> dict[str, float]:
            here()
            time.sleep(LONG)
            return {}

        loop.train = lambda *args, **named: plain_train(*args, **{**named, "evaluate": evaluate})
    elif situation == "compiling":
        loop.Program.compile = lambda self, batch, key: compile_long(here)
    train(given)


def compile_long(here: Any) -> float:
    """A program whose compilation takes minutes, in C++."""
    import jax
    import jax.numpy as jnp

    def program(x: Any) -> Any:
        for number in range(20_000):
            x = jnp.sin(x) * number
        return x

    lowered = jax.jit(program).lower(jnp.zeros((64, 64)))
    here()
    lowered.compile()
    raise AssertionError("compiled before the signal")


class Slow:
    """An iterator of batches that waits at the one of step `AT`, and at once when that was interrupted and asked for again."""

    def __init__(self, plain: Any, here: Any):
        self.plain, self.here, self.given = plain, here, 0

    def __next__(self) -> Any:
        self.given += 1
        if self.given == AT:
            self.here()
            time.sleep(LONG)
        return next(self.plain)

    def get_state(self) -> Any:
        return self.plain.get_state()

    def set_state(self, state: Any) -> None:
        self.plain.set_state(state)
