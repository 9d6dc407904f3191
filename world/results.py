"""What the trainings of the tiny model's parts leave at their end: WORKDIR/NAME.safetensors and WORKDIR/NAME.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.train.log import read_lines
from omnitransfer_jax.train.objective import Params


def write(workdir: Path, name: str, params: Params, result: Mapping[str, Any]) -> None:
    """Float32 parameters by path, and `result` with the seconds of training."""
    model_folder.save_file(workdir, name, {path: np.asarray(x) for path, x in params.items()})
    seconds = round(trained_seconds(workdir))
    write_whole(workdir / f"{name}.json", json.dumps({**result, "seconds": seconds}, indent=2))


def trained_seconds(workdir: Path) -> float:
    """The time of all steps of a run, pauses between its processes not counted."""
    lines = read_lines(workdir)
    steps = np.diff([0, *(line["step"] for line in lines)])
    return float(steps @ np.array([line["seconds"] for line in lines]))
