"""What a sweep would cost, found before anything starts: steps, operations, device-hours, memory of a trial, storage of its checkpoints.

Operations are the useful ones (omnitransfer_jax/train/flops.py); device-hours follow from them, a device's peak and an efficiency that is
said beside them. Memory is that of the state (`launch.train --dry_run`), or what the compiler finds (`launch.compile`).
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.chips import CHIPS, chip_of
from configs.errors import RequestError, require
from configs.run import MeshConfig, OptimizerConfig
from launch.sweeping.proposals import arguments_of
from launch.sweeping.runner import ROOT
from launch.sweeping.trials import Sweep
from launch.train import objective
from omnitransfer_jax.train.log import PEAKS
from omnitransfer_jax.train.plan import GIB, memory

TERA, HOUR = 1e12, 3600
UNKNOWN = "not counted"
RATES = ("learning_rate", "vector_learning_rate", "adapter_share", "warmup_steps", "schedule", "b1", "b2", "weight_decay", "clip_norm")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one trial costs; trials that differ in rates, times or seeds have the same."""

    flops: int
    """Useful operations of a step; 0 if they are not counted."""
    tokens: int
    devices: int
    state_gib: float
    """Of one device, without activations."""
    checkpoint_gib: float
    """All checkpoints that are kept, and the one that is being written."""


class Shapes:
    """The shapes of configurations, each found once."""

    def __init__(self) -> None:
        self.found: dict[str, Shape] = {}

    def __call__(self, config: Any) -> Shape:
        key = json.dumps(asdict(_without_rates(config)), sort_keys=True, default=str)
        if key not in self.found:
            trained, single = objective(config), replace(config, mesh=MeshConfig())
            whole = memory(trained, single)
            base = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in trained.base.values())
            saved = whole["parameters"] - base + whole["optimizer"] + whole["average"]
            self.found[key] = Shape(
                flops=trained.flops or 0,
                tokens=trained.tokens or 0,
                devices=config.mesh.devices,
                state_gib=sum(memory(trained, config).values()) / GIB,
                checkpoint_gib=saved * (config.checkpoint.keep + 1) / GIB,
            )
        return self.found[key]


def _without_rates(config: Any) -> Any:
    """The configuration without what changes no shape."""
    optimizer = replace(config.optimizer, **{name: getattr(OptimizerConfig(), name) for name in RATES})
    train = replace(config.train, steps=1, **({"shift": 1.0} if hasattr(config.train, "shift") else {}))
    return replace(config, optimizer=optimizer, train=train, seed=0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a sweep."""

    trials: int
    steps: float
    """Of all trials together."""
    flops: float
    """0 if they are not counted."""
    device_hours: float | None
    assumption: str
    shapes: tuple[tuple[str, Shape], ...]
    """Each different shape, with the point it belongs to."""
    fits: tuple[str, ...]
    """How much each of them needs, of what there is."""
    storage_gib: float
    halving: str

    def __str__(self) -> str:
        hours = UNKNOWN if self.device_hours is None else f"{self.device_hours:.4g} device-hours"
        flops = f"{self.flops:.4g} useful FLOPs" if self.flops else f"FLOPs {UNKNOWN}"
        lines = [f"trials         {self.trials}, {self.steps:,.0f} steps in all{self.halving}", f"work           {flops}"]
        lines += [f"time           {hours}: {self.assumption}"]
        lines += [f"memory         {point}: {fit}" for (point, _), fit in zip(self.shapes, self.fits, strict=True)]
        return "\n".join([*lines, f"checkpoints    {self.storage_gib:.4g} GiB, with those of stopped trials"])


def schedule(trials: int, rungs: Sequence[int], halving: int) -> list[tuple[int, int]]:
    """Before each rung: how many trials run, and how many steps each of them does."""
    found, before = [], 0
    for rung in rungs:
        found.append((trials, rung - before))
        trials, before = survivors(trials, halving), rung
    return found


def survivors(trials: int, halving: int) -> int:
    """How many of so many go on after a rung."""
    return math.ceil(trials / halving) if halving > 1 else trials


def plan(sweep: Sweep, configs: Sequence[tuple[str, Any]], device: str = "", efficiency: float = 0.4, compiled: str = "") -> Plan:
    """The cost of a sweep whose trials are like `configs`, each with its point in words.

    `device` is a name (`peak`) or empty; `compiled` a topology for which each shape is compiled, or empty.
    """
    count, rungs, halving = sweep.trials, sweep.rungs, sweep.halving
    shape_of, shapes = Shapes(), {}
    for point, config in configs:
        shapes.setdefault(shape_of(config), (point, config))
    each = [(shape_of(config), config.train.steps) for _, config in configs]
    runs = schedule(count, rungs, halving)
    steps = sum(number * more for number, more in runs) if halving > 1 else count * sum(steps for _, steps in each) / len(each)
    share = steps / (count * sum(steps for _, steps in each) / len(each))  # which sizes are stopped is not known before
    flops = share * count * sum(shape.flops * steps for shape, steps in each) / len(each)
    counted = all(shape.flops for shape, _ in each)
    rate, name = peak(device) if device else (0.0, "")
    assumption = f"{efficiency:.0%} of {rate:g} TFLOP/s a device ({name})" if rate else "give --device=v5p, H100, ... or a peak in TFLOP/s"
    known = counted and rate > 0
    return Plan(
        trials=count,
        steps=steps,
        flops=flops if counted else 0,
        device_hours=flops / (rate * TERA * efficiency) / HOUR if known else None,
        assumption=assumption if counted else "the operations of this training are not counted",
        shapes=tuple((point if len(shapes) > 1 else "each trial", shape) for shape, (point, _) in shapes.items()),
        fits=tuple(fit(shape, config, sweep.config, device, compiled) for shape, (_, config) in shapes.items()),
        storage_gib=count * sum(shape.checkpoint_gib for shape, _ in each) / len(each),
        halving=", " + ", ".join(f"{number} to step {rung}" for (number, _), rung in zip(runs, rungs, strict=True)) if halving > 1 else "",
    )


def peak(device: str) -> tuple[float, str]:
    """Peak TFLOP/s of a device, by name or as a number, and its name; a `RequestError` for another."""
    if device in CHIPS:
        return CHIPS[device].peak, device
    for name, operations in PEAKS.items():
        if name.removeprefix("NVIDIA ") == device:
            return operations / TERA, name
    try:
        rate = float(device)
    except ValueError:
        rate = 0.0
    names = [*CHIPS, *(name.removeprefix("NVIDIA ") for name in PEAKS if name.startswith("NVIDIA"))]
    require(0 < rate < math.inf, f"--device={device}: expected one of {', '.join(names)}, or the peak of a device in TFLOP/s")
    return rate, "as --device says"


def fit(shape: Shape, config: Any, name: str, device: str, compiled: str) -> str:
    """What a shape needs of a device's memory; a `RequestError` if that is more than it has."""
    if compiled:
        found = compile_(config, name, compiled)
        require(
            found["fits"],
            f"--compile={compiled}: it does not fit: {found.get('refused', '')}; divide it with --mesh.data",
        )
        mesh = " ".join(f"--mesh.{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
        return (
            f"{found['hbm_gib_per_device']} of {found['hbm_limit_gib']} GiB a device, compiled for {compiled} with {mesh or 'one device'}"
        )
    limit = CHIPS[device].memory if device in CHIPS else 0
    require(
        not limit or shape.state_gib < limit,
        f"--device={device}: the state alone is {shape.state_gib:.1f} GiB a device, there are {limit}; divide it with --mesh.data",
    )
    of = f" of {limit}" if limit else ""
    return f"{shape.state_gib:.4g}{of} GiB of state a device, {shape.devices} devices; activations are not counted, --compile=TOPOLOGY does"


def compile_(config: Any, name: str, topology: str) -> dict[str, Any]:
    """What launch.compile finds, in a process of its own: it needs TPU's compiler."""
    chip_of(topology)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled.json"
        command = [sys.executable, "-m", "launch.compile", f"--topology={topology}", f"--json={path}"]
        command += [f"--config={name}", *arguments_of(config, name)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise RequestError(f"--compile={topology}: {(done.stderr.strip().splitlines() or ['no reason was given'])[-1]}")
        return json.loads(path.read_text())


def require_budget(found: Plan, budget: float) -> None:
    """A `RequestError` if a sweep costs more device-hours than it may, or nobody knows how many."""
    if not budget:
        return
    if found.device_hours is None:
        raise RequestError(f"--budget_device_hours={budget:g}: the device-hours are not known; {found.assumption}")
    require(
        found.device_hours <= budget,
        f"--budget_device_hours={budget:g}: the plan is {found.device_hours:.4g} device-hours; take fewer --trials, fewer --train.steps, "
        "or --halving=3",
    )


def require_storage(found: Plan, folder: Path) -> None:
    """A `RequestError` if the checkpoints of a sweep do not fit on the disk of a folder."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    require(
        found.storage_gib < free,
        f"--out={folder}: checkpoints of all trials need {found.storage_gib:.4g} GiB, {free:.4g} are free; give another disk, or "
        "--checkpoint.keep=1",
    )


def costs(trials: Mapping[int, Any]) -> dict[int, Shape]:
    """The shape of each configuration, by the number of its trial."""
    shape_of = Shapes()
    return {number: shape_of(config) for number, config in trials.items()}
