"""A run that is killed, at random moments and at named ones inside a save, and resumed at every step: it ends as one that never stopped."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import RequestError
from omnitransfer_jax.folders import run_folder
from tortures import tiny
from tortures.outcome import Outcome
from tortures.processes import Job, command

LATEST_KILL = 5.0  # seconds after the start of a process, or after its first step; a run of 60 steps takes longer
TRAINING = 0.75  # share of the kills that come after the first step
SHORT_STEPS = 12  # of the runs that are killed inside a save
train = partial(command, "launch.train")


def reference(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Records, and the workdir of a run on them that is not interrupted and keeps all its checkpoints."""
    data, whole = tiny.write_records(folder / "records"), folder / "whole"
    with Job(train, tiny.arguments(whole, data, checkpoint__keep=99, **changes), log=folder / "whole.log") as job:
        if code := job.wait(600):
            raise RuntimeError(f"the run without kills ended with {code}: {job.output[-500:]}")
    return data, whole


def random_kills(folder: Path, count: int) -> Outcome:
    """SIGKILL at random moments, until each of several runs is done. After each kill the newest checkpoint is that of the whole run."""
    data, whole = reference(folder)
    expected = {int(path.name): tiny.state(whole, int(path.name)) for path in (whole / "checkpoints").iterdir()}
    draw, killed, runs, failures = random.Random(0), 0, 0, []
    workdir = folder / "run0"
    while killed < count or workdir.exists():
        with Job(train, tiny.arguments(workdir, data), log=folder / "run.log") as job:
            if killed < count and draw.random() < TRAINING:
                job.wait_for(lambda job=job: "\nstep " in job.output)
                job.process.join(draw.uniform(0, LATEST_KILL))
            else:
                job.process.join(draw.uniform(0.1, LATEST_KILL) if killed < count else 600)
            if job.process.is_alive():
                job.send(signal.SIGKILL)
                job.wait()
                killed += 1
                if killed % 25 == 0:
                    print(f"{killed} kills, {len(failures)} failures", file=sys.stderr, flush=True)
                if trouble := against(workdir, expected):
                    failures.append(f"kill {killed}: {trouble}")
                workdir.mkdir(exist_ok=True)
                continue
            code = job.wait()
            if trouble := f"ended with {code}: {job.output[-300:]}" if code else tiny.difference(workdir, whole):
                failures.append(f"run {runs}, after {killed} kills: {trouble}")
        shutil.rmtree(workdir)
        runs += 1
        workdir = folder / f"run{runs}"
    return Outcome(killed, failures, f"{runs} runs of {tiny.STEPS} steps")


def against(workdir: Path, expected: dict[int, dict[str, str]]) -> str:
    """How the newest checkpoint of a killed run differs from that of the whole run after the same step; empty if it does not."""
    if not (workdir / run_folder.CHECKPOINTS).exists():
        return ""
    try:
        newest = run_folder.latest(workdir)
    except RequestError as error:
        return "" if "no checkpoint yet" in str(error) else str(error)
    step = int(newest.name)
    return "" if tiny.state(workdir, step) == expected[step] else f"checkpoint {step} differs"


# Where a process is killed: the module and the function, whether before or after it, or once it has done half of its work.
POINTS: dict[str, tuple[str, str, str]] = {
    "before a save": ("omnitransfer_jax.folders.checkpoints", "Checkpoints.save", "before"),
    "while arrays are written": ("omnitransfer_jax.folders.checkpoints", "Checkpoints.save", "after"),
    "before the temporary folder": ("orbax.checkpoint._src.path.atomicity", "AtomicRenameTemporaryPath.create", "before"),
    "after the temporary folder": ("orbax.checkpoint._src.path.atomicity", "AtomicRenameTemporaryPath.create", "after"),
    "before a checkpoint has its name": ("orbax.checkpoint._src.path.atomicity", "AtomicRenameTemporaryPath.finalize", "before"),
    "after a checkpoint has its name": ("orbax.checkpoint._src.path.atomicity", "AtomicRenameTemporaryPath.finalize", "after"),
    "before checksums": ("omnitransfer_jax.folders.checksums", "write", "before"),
    "while checksums are written": ("omnitransfer_jax.folders.atomic", "place", "before checksums"),
    "after checksums": ("omnitransfer_jax.folders.checksums", "write", "after"),
    "before an old one is removed": ("omnitransfer_jax.folders.checkpoints", "remove", "before"),
    "while an old one is removed": ("omnitransfer_jax.folders.checkpoints", "shutil.rmtree", "half"),
    "after an old one is removed": ("omnitransfer_jax.folders.checkpoints", "remove", "after"),
    "before config.json": ("omnitransfer_jax.folders.run_folder", "write_config", "before"),
    "while config.json is written": ("omnitransfer_jax.folders.atomic", "place", "before config"),
    "after config.json": ("omnitransfer_jax.folders.run_folder", "write_config", "after"),
    "before a line of the log": ("omnitransfer_jax.train.log", "Lines.flush", "before"),
    "in a line of the log": ("omnitransfer_jax.train.log", "Lines.flush", "half a line"),
    "after a line of the log": ("omnitransfer_jax.train.log", "Lines.flush", "after"),
    "while the log is cut": ("omnitransfer_jax.train.log", "write_whole", "before"),
}  # fmt: skip


def kills_inside_a_save(folder: Path, count: int) -> Outcome:
    """Each of `POINTS` in turn, at the first, second, ... time that it is reached; then the run goes on to its end."""
    changes = {"train__steps": SHORT_STEPS, "checkpoint__keep": 2}
    data, whole = reference(folder, **{"train__steps": SHORT_STEPS})
    failures, reached = [], set()
    for case in range(count):
        point, time = list(POINTS)[case % len(POINTS)], case // len(POINTS) + 1
        workdir = folder / "run"
        given = tiny.arguments(workdir, data, **changes)
        if point == "while the log is cut":  # there is one to cut after a kill
            with Job(killed_at, "before checksums", time + 1, given, log=folder / "killed.log") as job:
                job.wait(300)
        with Job(killed_at, point, 1 if point == "while the log is cut" else time, given, log=folder / "killed.log") as job:
            if (code := job.wait(300)) == -signal.SIGKILL:
                reached.add(point)
            elif code:
                failures.append(f"{point}, time {time}: ended with {code}: {job.output[-300:]}")
        with Job(train, given, log=folder / "again.log") as job:
            code = job.wait(300)
            if trouble := f"ended with {code}: {job.output[-300:]}" if code else tiny.difference(workdir, whole) or leftovers(workdir):
                failures.append(f"{point}, time {time}: {trouble}")
        shutil.rmtree(workdir)
    failures += [f"{point}: never reached" for point in list(POINTS)[:count] if point not in reached]
    return Outcome(count, failures, f"{min(count, len(POINTS))} points")


def leftovers(workdir: Path) -> str:
    """What is in the folder of checkpoints besides checkpoints."""
    others = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]
    return f"left behind: {', '.join(others)}" if others else ""


def killed_at(point: str, time: int, arguments: Sequence[str]) -> None:
    """Trains, and kills itself when `point` is reached for the `time`-th time."""
    from importlib import import_module

    module, name, when = POINTS[point]
    holder, left = import_module(module), [time]
    *outer, last = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    plain = getattr(holder, last)

    def reach(*args: Any) -> bool:
        if when.startswith("before ") and when.removeprefix("before ") not in str(args):
            return False
        left[0] -= 1
        return left[0] == 0

    setattr(
        holder, last, _async_patch(plain, when, reach) if point.endswith("folder") or "its name" in point else _patch(plain, when, reach)
    )
    train(arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patch(plain: Callable[..., Any], when: str, reach: Callable[..., bool]) -> Callable[..., Any]:
    def patched(*args: Any, **named: Any) -> Any:
        now = reach(*args)
        if now and when == "half":
            files = sorted(path for path in Path(args[0]).rglob("*") if path.is_file())
            for path in files[: len(files) // 2]:
                path.unlink()
            die()
        if now and when == "half a line":
            lines: Any = args[0]
            content = "".join(lines.waiting).encode()
            os.write(lines.file, content[: len(content) // 2])
            die()
        if now and when.startswith("before"):
            die()
        found = plain(*args, **named)
        if now:
            die()
        return found

    return patched


def _async_patch(plain: Callable[..., Any], when: str, reach: Callable[..., bool]) -> Callable[..., Any]:
    async def patched(*args: Any, **named: Any) -> Any:
        now = reach(*args)
        if now and when == "before":
            die()
        found = await plain(*args, **named)
        if now:
            die()
        return found

    return patched


STAGES = {"stage1": 20, "stage2": 20, "stage3": 20}  # steps of each; together the steps 1 to 60


def every_step(folder: Path, count: int) -> Outcome:
    """Three stages, each from the one before. From each of their steps a run goes on to the end of its stage."""
    from launch import command as launch_command
    from launch import train as launch_train

    def run(workdir: Path, stage: str, before: Path | None, **changes: Any) -> None:
        given = tiny.arguments(workdir, data, stage, train__steps=STAGES[stage], train__init_from=before or "", **changes)
        if launch_command.execute(launch_train.main, launch_train.FLAGS, given):
            raise RuntimeError(f"{workdir}: did not train")

    data, before, failures, done = tiny.write_records(folder / "records", stage="stage3"), None, [], 0
    for stage, steps in STAGES.items():
        whole = folder / stage
        run(whole, stage, before, checkpoint__every=1, checkpoint__keep=99)
        for step in [n for n in range(1, steps + 1) if (done + n) % max(1, 60 // count) == 0 or n == steps]:
            again = shutil.copytree(whole, folder / "again")
            for path in (again / "checkpoints").iterdir():
                if int(path.name) != step:
                    shutil.rmtree(path)
            run(again, stage, before, checkpoint__every=steps)
            if trouble := tiny.difference(again, whole):
                failures.append(f"{stage}, step {step}: {trouble}")
            shutil.rmtree(again)
        done, before = done + steps, whole
    return Outcome(count, failures, "3 stages of 20 steps")
