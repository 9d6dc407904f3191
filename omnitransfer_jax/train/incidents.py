"""What a run met that a person should look at: updates that were left out, losses far above the others, and damaged records.

WORKDIR/incidents.jsonl    {"step": 12, "kind": "skipped", "loss": null, "grad_norm": null, "samples": ["n3", "n5"]}
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from omnitransfer_jax.quarantine import Damage
from omnitransfer_jax.train.log import Lines, read_lines, truncate

INCIDENTS_FILE = "incidents.jsonl"
PATIENCE = 10  # updates in a row that may fail to be finite
WINDOW, FEWEST, FAR = 100, 20, 6.0  # a spike is so many standard deviations above the mean of the losses before
Identify = Callable[[int], Sequence[str]]


class Incidents:
    """The incidents of a run that has done `step` steps, of which it left out `skipped`."""

    def __init__(self, workdir: Path, step: int, skipped: int, identify: Identify | None = None):
        """`identify` gives the names of the samples of a step."""
        self.skipped, self.in_a_row, self.identify = skipped, 0, identify
        path = workdir / INCIDENTS_FILE
        self.before = deque((line["loss"] for line in read_lines(workdir) if line["step"] <= step and line.get("loss") is not None), WINDOW)
        self.lines = None
        if jax.process_index() == 0:
            truncate(path, step)
            self.lines = Lines(path)

    def watch(self, step: int, metrics: Mapping[str, float], is_logged: bool) -> None:
        """Takes the metrics of a step; a `FloatingPointError` if its update is the last of too many that were left out in a row."""
        left_out, loss = metrics["skipped"] > self.skipped, metrics["loss"]
        self.in_a_row, self.skipped = self.in_a_row + 1 if left_out else 0, int(metrics["skipped"])
        if left_out:
            self._note(step, "skipped", metrics, "its update is left out: loss or gradients are not finite")
        elif is_logged and self._is_far(loss):
            self._note(step, "spike", metrics, f"loss {loss:.4g}, far above the {statistics.fmean(self.before):.4g} of the steps before")
        if is_logged and math.isfinite(loss):
            self.before.append(loss)
        if self.in_a_row == PATIENCE:
            raise FloatingPointError(
                f"step {step}: loss or gradients were not finite {PATIENCE} times in a row; the weights are those of step "
                f"{step - PATIENCE}. Look for a damaged record, or lower --optimizer.learning_rate"
            )

    def _is_far(self, loss: float) -> bool:
        if len(self.before) < FEWEST:
            return False
        return loss > statistics.fmean(self.before) + FAR * max(statistics.pstdev(self.before), 1e-6)

    def set_aside(self, step: int, damaged: Sequence[Damage], count: int, most: int) -> None:
        """Tells of records that fail their check, met on the way to the batch of `step`; every process does of its own."""
        for damage in damaged:
            words = f"{damage.name} is set aside, damaged record {count} of at most {most}, and the next good one is read in its place"
            print(f"step {step}: {words}: {damage.reason}", flush=True)
            if self.lines is not None:
                line = {"step": step, "kind": "quarantined", "loss": None, "grad_norm": None, "samples": [damage.name]}
                self.lines.add(json.dumps(line) + "\n")

    def _note(self, step: int, kind: str, metrics: Mapping[str, float], words: str) -> None:
        if self.lines is None:
            return
        samples = list(self.identify(step)) if self.identify else []
        known = f"; its samples: {', '.join(samples)}" if samples else ""
        print(f"step {step}: {words}{known}", flush=True)
        line: dict[str, Any] = {name: metrics[name] if math.isfinite(metrics[name]) else None for name in ("loss", "grad_norm")}
        self.lines.add(json.dumps({"step": step, "kind": kind} | line | {"samples": samples}) + "\n")
