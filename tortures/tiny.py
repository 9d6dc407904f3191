"""The training that is tortured: `launch.train` at the smallest size with all branches alive, on records of random numbers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from configs import stage1, stage2, stage3
from configs.run import Config, DataConfig, VideoConfig
from data_pipelines import batches, records
from omnitransfer_jax.batch import sample_spec
from omnitransfer_jax.folders.run_folder import CHECKPOINTS, latest

STEPS = 60
FIELDS = {
    "dit.dim": 24, "dit.ffn_dim": 32, "dit.freq_dim": 16, "dit.text_len": 16, "video.frames": 5, "video.height": 32, "video.width": 32,
    "data.reference.frames": 5, "data.reference.height": 32, "data.reference.width": 32, "data.text_drop": 0.3, "data.threads": 2,
    "train.batch_size": 2, "train.ema": 0.9, "train.steps": STEPS, "checkpoint.every": 2, "optimizer.warmup_steps": 3,
}  # fmt: skip
TIMED = ("seconds", "data_wait", "tokens_per_second", "mfu", "compile_seconds")  # of a line of metrics.jsonl: what no two runs share


def arguments(workdir: Path, data: Path, stage: str = "stage1", **changes: Any) -> list[str]:
    """Of `launch.train`. Dots of the names in `changes` are two underscores."""
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    given = [f"--{name}={value}" for name, value in fields.items()]
    return [f"--config={stage}:smoke", f"--workdir={workdir}", f"--data.path={data}", *given]


def config(stage: str = "stage1") -> Config:
    """What these arguments say of a record."""
    found = {"stage1": stage1, "stage2": stage2, "stage3": stage3}[stage].get_config("smoke")
    video = VideoConfig(frames=5, height=32, width=32, fps=found.video.fps)
    dit = replace(found.dit, dim=24, ffn_dim=32, freq_dim=16, text_len=16)
    return replace(found, dit=dit, video=video, data=DataConfig(reference=replace(video, fps=found.data.reference.fps)))


def random_record(number: int, of: Config) -> dict[str, Any]:
    """Record `number`: task `number % 5`, a prompt of 1 to 4 rows."""
    rng = np.random.default_rng(number)

    def draw(leaf: Any) -> np.ndarray:
        integers = np.issubdtype(leaf.dtype, np.integer) or leaf.dtype == bool
        return (rng.integers(0, 2, leaf.shape) if integers else rng.normal(size=leaf.shape)).astype(leaf.dtype)

    sample = jax.tree.map(draw, sample_spec(of))
    sample = sample._replace(task=np.int32(number % 5), has_image=np.float32(number % 5 > 1))
    return records.to_record(f"n{number}", sample, 1 + number % 4)


def write_records(folder: Path, lengths: Sequence[int] = (3, 4), stage: str = "stage1") -> Path:
    """A data set of shards with so many records each."""
    of, number = config(stage), 0
    records.begin(folder, of, {"world": "random", "weights": records.RANDOM})
    records.write_empty_text(folder, np.ones((1, of.text.dim), np.float32))
    for shard, length in enumerate(lengths):
        with records.shard_writer(records.shard_path(folder, shard, len(lengths)), records.schema(of)) as append:
            for _ in range(length):
                append(random_record(number, of))
                number += 1
    records.finish(folder, of, lengths, [f"n{i}" for i in range(number)])
    return folder


def state(workdir: Path, step: int | None = None) -> dict[str, str]:
    """A digest of every array of a run's newest whole checkpoint, or of that after `step`, counters and position too; of any mesh."""
    folder = latest(workdir) if step is None else workdir / CHECKPOINTS / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(found: Any) -> Any:
        return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=here) if hasattr(found, "shape") else found

    items = [path.name for path in Path(folder).iterdir() if path.is_dir()]
    wanted = {name: jax.tree.map(target, ocp.metadata(folder, checkpointable_name=name).metadata) for name in items}
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(folder, wanted))

    def of(leaf: Any) -> str:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return repr(leaf)
        array = np.ascontiguousarray(leaf)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"

    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in leaves}


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def difference(workdir: Path, other: Path) -> str:
    """The first thing in which the end of two runs differs, in a few words; empty if they are equal bit for bit."""
    ours, theirs = state(workdir), state(other)
    if ours != theirs:
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return f"{len(names)} arrays differ, {names[0]} among them"
    lines, others = metrics(workdir), metrics(other)
    if lines != others:
        step = next((a["step"] for a, b in zip(lines, others, strict=False) if a != b), "the last")
        return f"the log differs at step {step} ({len(lines)} lines, {len(others)} lines)"
    return ""


def sample_order(data: Path, steps: int) -> list[int]:
    """Tasks and sums that tell the samples of the first batches apart."""
    read = batches.batches(replace(config(), data=replace(config().data, path=str(data))), seed=0)
    return [int(np.abs(next(read).target.astype(np.float32)).sum() * 1000) for _ in range(steps)]
