"""The log of a run: a line on the console, a line in WORKDIR/metrics.jsonl, TensorBoard events, and W&B if it is asked for.

    {"step": 30, "loss": 0.91, "grad_norm": 0.4, "learning_rate": 1e-05, "skipped": 0, "loss/id": 0.8, "seconds": 0.52, "data_wait": 0.01}

`seconds` is the time a step took, compilation not counted; `data_wait` the share of it spent waiting for the batch; `tokens_per_second`
and `mfu`, the share of the devices' peak that the useful operations are, where they are known. `compile_seconds` is in the first line after
a start. `evaluate/METRIC/TASK` is what an evaluation after the step found. A metric `loss/NAME` is the loss of those samples of the step
that NAME describes, left out if there are none. A number that is not finite is null. Of several processes the first one writes. A line that
the disk refuses is kept and written later.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax

from configs.errors import RequestError
from configs.run import TrainConfig
from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.train.events import Events
from omnitransfer_jax.train.wandb_sink import WandB

METRICS_FILE = "metrics.jsonl"
LOSS, SHARE, EVALUATION = "loss/", "share/", "evaluate/"
# Dense bfloat16 operations a second of one device, by the beginning of its name in JAX (the makers' data sheets).
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 2307e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


class Work(NamedTuple):
    """What a step does, or several, for the speeds in the log; 0 is unknown."""

    flops: int = 0
    tokens: int = 0


class RunLog:
    """The log of a run that has done `step` steps; the file keeps no line of a later one, nor one that was cut off."""

    def __init__(self, workdir: Path, config: TrainConfig, step: int, devices: int = 1, of: Mapping[str, Any] | None = None):
        """`of` is the whole configuration, for W&B."""
        self.config, self.devices, self.writes = config, devices, jax.process_index() == 0
        self.work = Work()
        self.logged = self.first = step
        self.started = self.marked = time.perf_counter()
        self.waited = self.compiled = 0.0
        if self.writes:
            path = workdir / METRICS_FILE
            truncate(path, step)
            self.lines = Lines(path)
            self.events = Events(workdir, step)
            self.wandb = WandB(config.wandb, workdir, of or {}) if config.wandb else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writes:
            self.lines.flush()
            self.events.close()
            if self.wandb is not None:
                self.wandb.close()

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

    def add_work(self, work: Work) -> None:
        """What the next step to be written has done."""
        self.work = Work(self.work.flops + work.flops, self.work.tokens + work.tokens)

    def flush(self) -> str:
        """Writes all lines; what the system refuses of it, in a few words."""
        return self.lines.flush() if self.writes else ""

    def is_logged(self, step: int) -> bool:
        """Whether `step` is one of every `log_every` or the last of all."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of `step`, if it is to be logged."""
        if not self.writes or not self.is_logged(step):
            return
        now = time.perf_counter()
        elapsed, steps = now - self.marked, step - self.logged
        seconds = elapsed / steps
        line = {"step": step, "loss": metrics["loss"], **of_groups(metrics)}
        line |= {"seconds": seconds, "data_wait": self.waited / max(elapsed, 1e-9)} | self._speeds(elapsed)
        left = (now - self.started) / (step - self.first) * (self.config.steps - step)
        self.logged, self.marked, self.waited, self.compiled, self.work = step, now, 0.0, 0.0, Work()
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.lines.add(json.dumps(line) + "\n")
        self.events.write(step, {name: value for name, value in line.items() if value is not None and name != "step"})
        if self.wandb is not None:
            self.wandb.write(line)
        print(console(line, self.config.steps, left), flush=True)

    def picture(self, step: int, content: bytes | None) -> None:
        """Shows the samples of a step, a JPEG, in TensorBoard."""
        if self.writes and content is not None:
            self.events.picture(step, "samples", content)

    def _speeds(self, elapsed: float) -> dict[str, float]:
        """Tokens a second, the share of the devices' peak, and how long it took to compile, as far as they are known."""
        found, peak = {}, peak_of(jax.devices()[0].device_kind)
        if self.work.tokens:
            found["tokens_per_second"] = self.work.tokens / elapsed
        if self.work.flops and peak:
            found["mfu"] = self.work.flops / elapsed / (peak * self.devices)
        return found | ({"compile_seconds": self.compiled} if self.compiled else {})


def console(line: Mapping[str, Any], steps: int, left: float) -> str:
    """One line for people; `left` seconds are to go."""

    def number(name: str, form: str) -> str:
        return "not finite" if line[name] is None else format(line[name], form)

    parts = [f"step {line['step']}/{steps}", f"loss {number('loss', '.4f')}"]
    tasks = [
        f"{name.removeprefix(LOSS)} {number(name, '.3f')}" for name in line if name.startswith(LOSS) and not name.startswith(f"{LOSS}t0")
    ]
    parts += [f"({', '.join(tasks)})"] if tasks else []
    parts += [f"grad {number('grad_norm', '.3g')}"] if "grad_norm" in line else []
    parts.append(f"{line['seconds']:.3g} s/step")
    parts += [f"{line['tokens_per_second']:.3g} tokens/s"] if line.get("tokens_per_second") else []
    parts += [f"MFU {line['mfu']:.1%}"] if line.get("mfu") else []
    parts += [f"data {line['data_wait']:.0%}", f"{timedelta(seconds=round(left))} to go"]
    return "  ".join(parts)


def of_groups(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with the losses of groups: `loss/NAME` divided by `share/NAME`, which is left out."""
    plain = {name: value for name, value in metrics.items() if not name.startswith((LOSS, SHARE))}
    groups = {name.removeprefix(SHARE): share for name, share in metrics.items() if name.startswith(SHARE)}
    return plain | {LOSS + name: metrics[LOSS + name] / share for name, share in groups.items() if share > 0}


def peak_of(kind: str) -> float:
    """Operations a second of a device of this name; 0 if it is not known, as of a CPU."""
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), 0.0)


class Lines:
    """A file of lines that grows; lines that the disk refuses wait, and none is there in part."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, []
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.size = os.fstat(self.file).st_size
        self.told = False

    def __del__(self) -> None:
        os.close(self.file)

    def add(self, line: str) -> None:
        self.waiting.append(line)
        if refusal := self.flush():
            if not self.told:
                print(f"{self.path}: {refusal}; its lines wait until they can be written", flush=True)
            self.told = True
        else:
            self.told = False

    def flush(self) -> str:
        """Writes what waits; what the system refuses, in a few words."""
        content = "".join(self.waiting).encode()
        try:
            while content:
                content = content[os.write(self.file, content) :]
            self.size = os.fstat(self.file).st_size
        except OSError as error:
            os.ftruncate(self.file, self.size)
            return f"{self.path}: {error.strerror}"
        self.waiting = []
        return ""


def truncate(path: Path, step: int) -> None:
    """Takes the lines of steps after `step` out of the file, and a last line that was not written to its end."""
    if not path.exists():
        return
    kept = [text for text, line in parsed(path) if line["step"] <= step]
    write_whole(path, "".join(kept))


def read_lines(workdir: Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The lines of a run's log, without a last one that was not written to its end; another that is no such line is a `RequestError`."""
    path = workdir / name
    return [line for _, line in parsed(path)] if path.exists() else []


def parsed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
