"""What the devices of a compiled program send to each other. A collective counts as often as the loops around it turn."""

import re
from typing import NamedTuple

import numpy as np

from omnitransfer_jax.compiled.hlo import Run, runs, shapes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")


class Collective(NamedTuple):
    """One instruction."""

    kind: str
    dtype: str
    bytes: int
    """Of its result on one device; of a reduce-scatter, of what it reads."""
    group: tuple[int, ...]
    """The devices, by number, that exchange with each other in the first group."""
    count: int
    """How often a device runs it."""
    overlaps: bool
    """Whether the compiler lets the device compute meanwhile."""
    where: str
    """The operation in the source, as JAX names it."""


def collectives(text: str) -> list[Collective]:
    """All collectives of a program's text, those over one device left out."""
    begun = (run for run in runs(text) if not run.goes_on)
    found = [_collective(kind, run) for run in begun for kind in KINDS if run.instruction.opcode in (kind, f"{kind}-start")]
    return [each for each in found if len(each.group) > 1]


def _collective(kind: str, run: Run) -> Collective:
    line = run.instruction
    written = shapes(line.type)
    if line.opcode.endswith("-start") and kind != "all-reduce":  # its type is (what it reads, what it writes, ...)
        written = written[len(run.operands) : 2 * len(run.operands)]
    group = _group(line.rest)
    size = sum(each.bytes for each in written) * (len(group) if kind == "reduce-scatter" else 1)
    where = re.search(r'op_name="([^"]*)"', line.rest)
    return Collective(kind, written[0].dtype, size, group, run.count, run.overlaps, where[1] if where else "")


def _group(rest: str) -> tuple[int, ...]:
    """The devices of the first group."""
    match = GROUP.search(rest)
    if match is None:
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
        return (int(pairs[1]), int(pairs[2])) if pairs else ()
    if match[1]:
        return tuple(int(n) for n in match[1].split(","))
    groups, size = int(match[2]), int(match[3])
    shape = [int(n) for n in match[4].split(",")]
    order = [int(n) for n in match[5].split(",")] if match[5] else range(len(shape))
    return tuple(np.arange(groups * size).reshape(shape).transpose(order).reshape(groups, size)[0].tolist())
