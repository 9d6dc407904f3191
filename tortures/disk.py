"""A disk that fills up, or refuses, at a random moment and recovers: the run goes on and ends as one whose disk was well."""

import errno
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnitransfer_jax.folders import run_folder
from tortures import kills, tiny
from tortures.outcome import Outcome
from tortures.processes import Job

MEBIBYTES = 24  # of the small disk
STEPS = 24
REFUSALS = (errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ESTALE)
PLACES = (
    ("omnitransfer_jax.folders.checksums", "write"),
    ("omnitransfer_jax.folders.checkpoints", "Checkpoints.orbax_save"),
    ("omnitransfer_jax.train.log", "os_write"),
)


def disk_faults(folder: Path, count: int) -> Outcome:
    """Half of them a small disk (tmpfs) that is filled and emptied while the run goes on, the others errors of single writes."""
    data, whole = kills.reference(folder, train__steps=STEPS)
    small, failures, note = folder / "small", [], ""
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "none", small], capture_output=True).returncode == 0
    if not mounted:
        note = "no tmpfs could be mounted: errors of single writes alone"
    try:
        for case in range(count):
            draw = random.Random(case)
            filled = mounted and case % 2 == 0
            workdir = (small if filled else folder) / "run"
            given = tiny.arguments(workdir, data, train__steps=STEPS)
            log = folder / "run.log"
            if filled:
                trouble = fill(given, workdir, draw, log)
            else:
                place, number, times = PLACES[case // 2 % len(PLACES)], draw.choice(REFUSALS), draw.randrange(1, 5)
                with Job(refusing, place, number, draw.randrange(1, 4), times, given, log=log) as job:
                    trouble = ended(job, workdir)
            trouble = trouble or tiny.difference(workdir, whole) or kills.leftovers(workdir)
            if trouble:
                failures.append(f"case {case}, {'full' if filled else place[1]}: {trouble}")
            shutil.rmtree(workdir, ignore_errors=True)
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    return Outcome(count, failures, note)


def fill(given: Sequence[str], workdir: Path, draw: random.Random, log: Path) -> str:
    """Takes all room of the disk of `workdir` for a while, once or twice, while a run trains there."""
    with Job(patient, given, log=log) as job:
        for _ in range(draw.choice([1, 1, 2])):
            job.wait_for(lambda: "step 2/" in job.output)
            time.sleep(draw.uniform(0, 4))
            filler = workdir.parent / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            time.sleep(draw.uniform(0.5, 4))
            if (workdir / run_folder.CHECKPOINTS).exists():
                run_folder.steps_done(workdir)  # what is there can be read at any time
            filler.unlink()
        return ended(job, workdir)


def ended(job: Job, workdir: Path) -> str:
    code = job.wait(300)
    return f"ended with {code}: {job.output[-500:]}" if code else ""


def patient(given: Sequence[str]) -> None:
    """Trains; tries again sooner than a real run does, and takes its time for a step."""
    from omnitransfer_jax.train import log, saving

    saving.RETRIES, saving.PAUSE = (0.0, 0.3, 0.6), 0.3
    plain = log.RunLog.write
    log.RunLog.write = lambda self, step, metrics: (plain(self, step, metrics), time.sleep(0.2))[0]
    kills.train(given)


def refusing(place: tuple[str, str], number: int, first: int, times: int, given: Sequence[str]) -> None:
    """Trains with a disk that refuses one kind of write, from the `first` on, so many `times`."""
    from omnitransfer_jax.folders import checkpoints, checksums
    from omnitransfer_jax.train import log

    count = [0]

    def refuse(plain: Any) -> Any:
        def patched(*args: Any, **named: Any) -> Any:
            count[0] += 1
            if first <= count[0] < first + times:
                raise OSError(number, errno.errorcode[number], "a file")
            return plain(*args, **named)

        return patched

    if place[1] == "write":
        checksums.write = refuse(checksums.write)
    elif place[1] == "os_write":

        class System:
            """The module os with another write."""

            write = staticmethod(refuse(log.os.write))

            def __getattr__(self, name: str) -> Any:
                import os

                return getattr(os, name)

        log.os = System()
    else:
        opened = checkpoints.ocp.training.Checkpointer
        opened.save_checkpointables_async = refuse(opened.save_checkpointables_async)
    patient(given)
