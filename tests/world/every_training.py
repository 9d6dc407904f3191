"""What every training has, whatever its objective: it stops at a signal and goes on exactly, and refuses updates that are not finite."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.run import RunConfig
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.objective import Objective

LOGGED = {"step", "loss", "grad_norm", "learning_rate", "skipped", "seconds", "data_wait"}


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Interrupted(grain.DatasetIterator):
    """Batches, of which the second does not come without SIGTERM."""

    def __init__(self, data: grain.DatasetIterator[Any]):
        super().__init__()
        self.data, self.given = data, 0

    def __next__(self) -> Any:
        self.given += 1
        if self.given == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.data)

    def get_state(self) -> Any:
        return self.data.get_state()

    def set_state(self, state: Any) -> None:
        self.data.set_state(state)


def stop_after_first_step(objective: Objective, config: RunConfig, workdir: Path, data, capsys) -> None:
    """A run that receives SIGTERM while it waits for its second batch."""
    assert loop.train(objective, config, workdir, make_mesh(config.mesh), Interrupted(data)) is None
    assert f"stopped after step 1 of {config.train.steps}" in capsys.readouterr().out
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "checkpoints", "metrics.jsonl"}
    assert not list(workdir.glob("*.safetensors"))


def assert_same_run(workdir: Path, other: Path, name: str) -> None:
    """The same weights, losses and result; times differ."""
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (workdir, other))
    assert [path for path in theirs if not np.array_equal(ours[path], theirs[path])] == []
    times = {"seconds": 0, "data_wait": 0, "compile_seconds": 0}
    ours, theirs = ([line | times for line in lines(folder)] for folder in (workdir, other))
    assert ours == theirs
    assert all(line.keys() >= LOGGED for line in ours)
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) | {"seconds": 0} for folder in (workdir, other))
    assert ours == theirs


def assert_not_finite_is_refused(objective: Objective, config: RunConfig, workdir: Path, data) -> None:
    """With one weight that is no number, no update is taken, and the tenth ends the run."""

    def init():
        params = objective.init()
        return params | {(path := max(params)): params[path].at[..., 0].set(jnp.nan)}

    with pytest.raises(FloatingPointError, match=r"step 10: .* 10 times in a row; the weights are those of step 0"):
        loop.train(replace(objective, init=init), config, workdir, make_mesh(config.mesh), data)
    assert all(line["loss"] is None and line["skipped"] == line["step"] for line in lines(workdir))
