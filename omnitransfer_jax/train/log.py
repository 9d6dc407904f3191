"""The log of a run: a line on the console, a line in WORKDIR/metrics.jsonl, and TensorBoard events.

    {"step": 30, "loss": 0.91, "grad_norm": 0.4, "learning_rate": 1e-05, "skipped": 0, "seconds": 0.52, "data_wait": 0.01}

`seconds` is the time a step took, compilation not counted; `data_wait` the share of it spent waiting for the batch. A number that is
not finite is null. Of several processes the first one writes.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX import SummaryWriter

from configs.errors import RequestError
from configs.run import TrainConfig
from omnitransfer_jax.folders.atomic import write_whole

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """The log of a run that has done `step` steps; the file keeps no line of a later one, nor one that was cut off."""

    def __init__(self, workdir: Path, config: TrainConfig, step: int):
        self.config, self.writes = config, jax.process_index() == 0
        self.logged = self.first = step
        self.started = self.marked = time.perf_counter()
        self.waited = 0.0
        if self.writes:
            path = workdir / METRICS_FILE
            truncate(path, step)
            self.file = path.open("a")
            self.events = SummaryWriter(str(workdir), purge_step=step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writes:
            self.file.close()
            self.events.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not counted."""
        before = time.perf_counter()
        yield
        spent = time.perf_counter() - before
        self.started, self.marked = self.started + spent, self.marked + spent

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of `step`, if it is one of every `log_every` or the last of all."""
        if not self.writes or (step % self.config.log_every and step != self.config.steps):
            return
        now = time.perf_counter()
        elapsed, steps = now - self.marked, step - self.logged
        line = {"step": step, "loss": metrics["loss"], **metrics, "seconds": elapsed / steps, "data_wait": self.waited / max(elapsed, 1e-9)}
        left = (now - self.started) / (step - self.first) * (self.config.steps - step)
        self.logged, self.marked, self.waited = step, now, 0.0
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items():
            if value is not None and name != "step":
                self.events.add_scalar(name, value, step)
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        eta = timedelta(seconds=round(left))
        print(f"step {step}/{self.config.steps}  loss {loss}  {line['seconds']:.3g} s/step  {eta} to go", flush=True)


def truncate(path: Path, step: int) -> None:
    """Takes the lines of steps after `step` out of the file, and a last line that was not written to its end."""
    if not path.exists():
        return
    kept = [text for text, line in _parsed(path) if line["step"] <= step]
    write_whole(path, "".join(kept))


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without a last one that was not written to its end; another that is no such line is a `RequestError`."""
    path = workdir / METRICS_FILE
    return [line for _, line in _parsed(path)] if path.exists() else []


def _parsed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line of the file, as it is and read."""
    for number, text in enumerate(path.read_text(errors="replace").splitlines(keepends=True), start=1):
        if text.endswith("\n"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise RequestError(f"{path}:{number}: {text[:60]!r} is no line of this log; remove it")
            yield text, line
