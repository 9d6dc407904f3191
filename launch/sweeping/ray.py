"""The engine `ray`: as many trials at once as a Ray cluster has room for, each in a placement group of its own.

Ray places the trials, and starts one again on another node when its node is gone; which trials go on is decided by the sweep alone, so
that every engine keeps the same ones. Every node needs this project and the sweep's folder at the same path.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import RequestError, require
from launch.sweeping.runner import ROOT, PreemptionError, advance, give_up, stop_signals
from launch.sweeping.trials import Sweep

RETRIES = 20  # of a trial whose Ray worker died, with its node or by the kernel
MOST_ASKED = 64  # placement groups that wait at once, if nobody says how many
LOOK = 0.5  # seconds between looks for a file STOP
STORE = 80 * 2**20  # bytes of the local object store; trials put nothing into it
ACCELERATORS = ("TPU", "GPU")


def connected(address: str, resources: Mapping[str, str], devices: int, at_once: int) -> Callable[..., None]:
    """`bring` on the cluster at an address, or on this machine alone. A `RequestError` if there is none, or no node has what a trial needs.

    A trial takes `resources`, by Ray's names; without them a TPU or GPU for each of `devices`, or one CPU where there are neither.
    """
    try:
        import ray
    except ImportError:
        raise RequestError("--engine=ray: Ray places the trials, and it is not installed: pip install ray") from None
    counts = {name: _count(name, value) for name, value in resources.items()}
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its coming default, of which it warns otherwise
        options: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
        options |= {} if address else {"object_store_memory": STORE}
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RequestError(f"--address={address}: {words}; start the cluster first, or leave --address out for this machine") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = next((name for name in ACCELERATORS if any(node.get(name) for node in nodes)), "")
    counts = counts or ({found: float(devices), "CPU": 1.0} if found else {"CPU": 1.0})
    room = sum(min(int(node.get(name, 0) / count) for name, count in counts.items()) for node in nodes)
    words = ", ".join(f"{name}={count:g}" for name, count in counts.items())
    largest = {name: max(node.get(name, 0) for node in nodes) for name in counts}
    has = ", ".join(f"{name}={count:g}" for name, count in largest.items())
    require(room > 0 or bool(address), f"--resources={words}: no node has that; the most there is {has}")
    print(f"ray            {len(nodes)} nodes, {room} trials at once, each {words}", flush=True)
    if not room:
        print(f"               no node has that now (the most is {has}); trials wait until one comes", flush=True)
    return partial(bring, counts=counts, at_once=at_once or MOST_ASKED)


def bring(
    sweep: Sweep, numbers: Sequence[int], until: int, done: Callable[[int], None], *, counts: Mapping[str, float], at_once: int
) -> None:
    """Brings each trial to step `until`, or to its end; `done` is told of each. At most `at_once` are asked of the cluster together."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    waiting, asked = list(numbers), {}
    with stop_signals(sweep):
        while waiting or asked:
            while waiting and len(asked) < at_once and not sweep.is_asked_to_stop:
                number = waiting.pop(0)
                group = _group(counts)
                asked[_start(sweep, number, until, counts, group)] = number, group
            if sweep.is_asked_to_stop:
                waiting = []
                _forget_unplaced(asked)
            ready = ray.wait(list(asked), timeout=LOOK)[0] if asked else []
            for task in ready:
                number, group = asked.pop(task)
                try:
                    refusal = ray.get(task)
                except RayTaskError as error:
                    if "failed to import" in str(error):
                        last = str(error).strip().splitlines()[-1]
                        raise RequestError(f"a node of Ray cannot load this project: {last}; have it at {ROOT} on every node") from None
                    raise
                except RayError as error:
                    refusal = f"Ray gave it up: {type(error).__name__}"
                ray.util.remove_placement_group(group)
                if refusal:
                    give_up(sweep, number, refusal)
                if not sweep.is_ahead(number, until):
                    done(number)
    if sweep.is_asked_to_stop:
        raise KeyboardInterrupt


def _count(name: str, value: str) -> float:
    try:
        count = float(value)
    except ValueError:
        count = 0.0
    require(count > 0, f"--resources={name}={value}: expected a number above 0, as GPU=1 or TPU=4")
    return count


def _group(counts: Mapping[str, float]) -> Any:
    """The place of a trial, on one node."""
    import ray

    return ray.util.placement_group([dict(counts)], strategy="STRICT_PACK")


def _start(sweep: Sweep, number: int, until: int, counts: Mapping[str, float], group: Any) -> Any:
    """Ray's promise of a trial in its place."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    others = {name: count for name, count in counts.items() if name not in ("CPU", "GPU")}
    options = {"num_cpus": counts.get("CPU", 0), "num_gpus": counts.get("GPU", 0), "resources": others, "name": f"trial {number}"}
    task = ray.remote(_trial).options(
        **options, max_retries=RETRIES, scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group)
    )
    return task.remote(str(sweep.folder), number, until)


def _trial(folder: str, number: int, until: int) -> str:
    """Runs in Ray's worker, on any node; why the trial could not be run there, or nothing."""
    try:
        advance(Sweep.read(Path(folder)), number, until)
    except PreemptionError:
        pass
    except (RequestError, OSError) as error:
        return f"{os.uname().nodename}: {error}"
    return ""


def _forget_unplaced(asked: dict[Any, tuple[int, Any]]) -> None:
    """Takes back what still waits for a place, so that a sweep that is asked to stop does not wait for it."""
    import ray

    for task, (_, group) in list(asked.items()):
        if ray.util.placement_group_table(group)["state"] == "PENDING":
            ray.util.remove_placement_group(group)
            del asked[task]
