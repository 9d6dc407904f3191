"""A run that is saved on one mesh by some processes and goes on with others: the same samples, the same state, the same losses but for
rounding."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np

from omnitransfer_jax.folders import run_folder
from tortures import tiny
from tortures.kills import train
from tortures.outcome import Outcome
from tortures.processes import Job

SETUPS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (8, 1, 1), (2, 1, 2), (2, 2, 2))  # mesh.data, mesh.heads, processes
HALF, STEPS = 4, 8
CLOSE = 2e-3  # of losses, after so few steps: a mesh sums in another order, and AdamW's first steps turn the last bit of a small gradient
# into a whole step


def topologies(folder: Path, count: int) -> Outcome:
    """Pairs of setups: saved after half of the steps by the first, finished by the second. `print_start` says what the second restored."""
    data, failures = tiny.write_records(folder / "records", (9, 8)), []
    whole = {}
    for setup in SETUPS[: 2 + count]:
        whole[setup] = folder / f"half_{'_'.join(map(str, setup))}"
        if trouble := finish(whole[setup], data, setup, HALF, folder):
            return Outcome(count, [f"{setup}: {trouble}"])
    alone = shutil.copytree(whole[SETUPS[0]], folder / "alone")
    if trouble := finish(alone, data, SETUPS[0], STEPS, folder):
        return Outcome(count, [f"alone: {trouble}"])
    expected, pairs = losses(alone), [(a, b) for a in whole for b in whole if a != b]
    step = max(1, len(pairs) // count)
    for saved_by, resumed_by in pairs[::step][:count]:
        workdir = shutil.copytree(whole[saved_by], folder / "run")
        before = tiny.state(workdir, HALF)
        restored = folder / "restored.json"
        trouble = finish(workdir, data, resumed_by, STEPS, folder, restored)
        if not trouble and json.loads(restored.read_text()) != digests(before):
            trouble = "the restored state differs"
        if not trouble:
            found = losses(workdir)
            off = max(abs(found[n] - expected[n]) / expected[n] for n in expected)
            trouble = f"losses are off by {off:.1e}" if off > CLOSE or found.keys() != expected.keys() else ""
            data_position = {name: value for name, value in tiny.state(workdir, STEPS).items() if "data" in name}
            if data_position != {name: value for name, value in tiny.state(alone, STEPS).items() if "data" in name}:
                trouble += " the position in the data differs"
        if trouble:
            failures.append(f"{saved_by} -> {resumed_by}: {trouble}")
        shutil.rmtree(workdir)
    return Outcome(min(count, len(pairs)), failures, "mesh.data x mesh.heads x processes")


def digests(state: dict[str, str]) -> dict[str, str]:
    """Those of the trained parameters, which have the same paths on disk and in memory."""
    return {name.split("']['")[-1].strip("[]'"): value for name, value in state.items() if name.startswith("['trainable']")}


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in tiny.metrics(workdir)}


def finish(workdir: Path, data: Path, setup: tuple[int, int, int], steps: int, folder: Path, restored: Path | None = None) -> str:
    """Trains up to `steps` with that setup; what went wrong."""
    parts, heads, processes = setup
    given = tiny.arguments(
        workdir, data, train__steps=steps, train__batch_size=8, checkpoint__every=HALF, mesh__data=parts, mesh__heads=heads
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = parts * heads // processes
    jobs = [
        Job(train_as, index, processes, port, str(restored or ""), given, log=folder / f"process{index}.log", devices=devices)
        for index in range(processes)
    ]
    try:
        codes = [job.wait(300) for job in jobs]
    finally:
        for job in jobs:
            job.__exit__()
    wrong = [f"process {index} ended with {code}: {jobs[index].output[-400:]}" for index, code in enumerate(codes) if code]
    return wrong[0] if wrong else ""


def train_as(index: int, processes: int, port: int, restored: str, given: list[str]) -> None:
    """Trains as one of several processes; the first writes digests of what it restored."""
    import hashlib

    import jax
    from jax.experimental import multihost_utils

    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    plain = run_folder.restore

    def restore(*args: Any) -> Any:
        state = plain(*args)
        trained = {}
        for path, leaf in sorted(state.trainable.items()):
            array = np.ascontiguousarray(multihost_utils.process_allgather(leaf, tiled=True) if processes > 1 else leaf)
            trained[path] = f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if index == 0 and restored:
            Path(restored).write_text(json.dumps(trained))
        return state

    run_folder.restore = restore
    train(given)
