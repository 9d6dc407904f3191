"""The lines of metrics.jsonl in Weights & Biases too (`train.wandb=PROJECT`; the extra `wandb`).

A run that goes on continues the same W&B run, whose id is in WORKDIR/wandb_id. Steps that are done again after a kill are sent again, with
the same numbers. W&B's own variables decide where to: WANDB_MODE=offline keeps everything in WORKDIR/wandb, `wandb sync` sends it later.
"""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import require
from omnitransfer_jax.folders.atomic import write_whole

ID_FILE = "wandb_id"


def require_installed(project: str) -> None:
    """A `RequestError` if W&B is asked for and not installed."""
    there = not project or importlib.util.find_spec("wandb") is not None
    require(there, f"train.wandb={project!r}: the package wandb is not installed; pip install wandb, or leave train.wandb out")


class WandB:
    """One run of W&B. An error of it ends the sink, in one line: a training does not depend on it."""

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        self._run = None
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra

            path = workdir / ID_FILE
            if not path.exists():
                write_whole(path, secrets.token_hex(8))
            name = path.read_text().strip()
            self._run = wandb.init(project=project, id=name, name=workdir.name, resume="allow", dir=str(workdir), config=dict(config))
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of many types: no key, no network
            self._end(error)

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._call("log", {name: value for name, value in line.items() if value is not None})

    def close(self) -> None:
        self._call("finish")

    def _call(self, name: str, *args: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, name)(*args)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        self._run = None
        print(f"nothing is sent to W&B from here on: {' '.join(str(error).split())[:200]}; metrics.jsonl has all lines", flush=True)
