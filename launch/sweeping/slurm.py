"""The engine `slurm`: the trials as a job array, which submitit submits. OUT/slurm has its scripts, its output and the jobs' numbers.

A job that is pre-empted, or whose time is over, saves its trial, is queued again and goes on, also while nothing watches it. A sweep that
is started again finds the jobs that are still there. The sweep's folder has to be one that all nodes share.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from configs.errors import RequestError, require
from launch.sweeping.runner import ROOT, PreemptionError, advance, give_up, stop_signals
from launch.sweeping.trials import REMEDY, Sweep
from omnitransfer_jax.folders.atomic import read_json, write_whole

FOLDER, JOBS_FILE = "slurm", "jobs.json"
GRACE = 120  # seconds before the time limit at which a trial is asked to save; --resources=signal=TERM@600 asks sooner
REQUEUES = 100  # of a job
LOOK = 2.0  # seconds between looks at the queue
LATE = 60.0  # seconds until what a node wrote is seen by all


def submitting(options: Mapping[str, str], at_once: int) -> Callable[..., None]:
    """`bring` with options of sbatch; a `RequestError` where there is no submitit or no Slurm."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise RequestError("--engine=slurm: submitit submits its jobs, and it is not installed: pip install submitit") from None
    missing = [name for name in ("sbatch", "squeue", "scontrol", "srun") if shutil.which(name) is None]
    require(not missing, f"--engine=slurm: no {''.join(missing[:1])} on the path; give the command on a host of a Slurm cluster")
    return partial(bring, options=options, at_once=at_once)


def bring(
    sweep: Sweep, numbers: Sequence[int], until: int, done: Callable[[int], None], *, options: Mapping[str, str], at_once: int
) -> None:
    """Brings each trial to step `until`, or to its end; `done` is told of each."""
    left = _jobs(sweep, numbers)
    new = [number for number in numbers if number not in left]
    left |= _submitted(sweep, new, until, options, at_once) if new else {}
    write_whole(sweep.folder / FOLDER / JOBS_FILE, json.dumps({str(number): job for number, job in left.items()}) + "\n")
    gone: dict[int, float] = {}  # trials whose job is no longer there, since when
    told: set[str] = set()
    with stop_signals(sweep):
        while left:
            queue = _queue()
            for number, job in list(left.items()):
                state, why = queue.get(job, ("", "")) if queue is not None else ("UNKNOWN", "")
                if state:
                    gone.pop(number, None)
                if not sweep.is_ahead(number, until):
                    done(number)
                    del left[number]
                elif sweep.is_asked_to_stop and state in ("", "PENDING"):
                    subprocess.run(["scancel", job], capture_output=True)
                    del left[number]
                elif not state and time.monotonic() - gone.setdefault(number, time.monotonic()) > LATE:
                    ended = _state(job) or "Slurm has forgotten it"
                    give_up(sweep, number, f"job {job} ended ({ended}); {sweep.folder / FOLDER} has its output")
                elif "held" in why.lower() and job not in told:  # JobHeldUser, JobHeldAdmin, launch failed requeued held
                    told.add(job)
                    print(f"job {job} of trial {number} is held ({why}): scontrol release {job}", flush=True)
            time.sleep(LOOK if left else 0)
    if sweep.is_asked_to_stop:
        raise KeyboardInterrupt


def _jobs(sweep: Sweep, numbers: Sequence[int]) -> dict[int, str]:
    """Jobs of these trials that are still queued or run, of a sweep that was killed."""
    path = sweep.folder / FOLDER / JOBS_FILE
    if not path.exists():
        return {}
    queue = _queue()
    require(queue is not None, "--engine=slurm: squeue does not answer; see whether slurmctld runs (scontrol ping)")
    before = {int(number): job for number, job in read_json(path, REMEDY).items()}
    return {number: job for number, job in before.items() if number in numbers and job in (queue or {})}


def _submitted(sweep: Sweep, numbers: Sequence[int], until: int, options: Mapping[str, str], at_once: int) -> dict[int, str]:
    """The jobs of trials, submitted as one array."""
    import submitit
    from submitit.core.utils import FailedJobError

    executor = submitit.SlurmExecutor(sweep.folder / FOLDER)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    executor.update_parameters(
        job_name=sweep.folder.name,
        time=None,  # that of the partition; submitit's own is five minutes
        wckey=None,
        array_parallelism=at_once or len(numbers),
        setup=[f'export PYTHONPATH="{path}"'],
        additional_parameters={"requeue": True, "signal": f"TERM@{GRACE}", **options},
    )
    count = len(numbers)
    try:
        jobs = executor.map_array(_trial, [str(sweep.folder)] * count, numbers, [until] * count)
    except FailedJobError as error:
        words = [line.strip() for line in str(error).splitlines() if line.startswith("sbatch: error:")] or [str(error)]
        raise RequestError(f"--engine=slurm: {words[-1]}; change --resources") from None
    return {number: job.job_id for number, job in zip(numbers, jobs, strict=True)}


def _trial(folder: str, number: int, until: int) -> None:
    """Runs in a job of the array, on any node."""
    sweep, asked = Sweep.read(Path(folder)), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))  # Slurm sends it to the training too
    try:
        advance(sweep, number, until, lambda: bool(asked))
    except PreemptionError:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
        # A job that somebody cancels has another state, and stays away.
        if not sweep.is_asked_to_stop and _state(job) == "RUNNING" and int(os.environ.get("SLURM_RESTART_COUNT", "0")) < REQUEUES:
            subprocess.run(["scontrol", "requeue", job], check=True)


def _queue() -> dict[str, tuple[str, str]] | None:
    """State and reason of each of my jobs that has not ended; None if Slurm does not answer."""
    found = subprocess.run(["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r"], capture_output=True, text=True)
    if found.returncode:
        return None
    lines = [line.strip().split("|") for line in found.stdout.splitlines() if line.count("|") == 2]
    return {job: (state, why) for job, state, why in lines}


def _state(job: str) -> str:
    """Slurm's word for what became of a job; empty if it has forgotten."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(r"\bJobState=(\S+)", shown)
    return found.group(1) if found else ""
