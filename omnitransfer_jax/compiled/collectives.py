"""What the devices of a compiled program send to each other, read off XLA's text of the program (HLO).

The text is a list of computations; each has instructions, some of which call other computations: a loop its body, a fusion its insides.
A collective counts as often as the loops around it turn.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")
SHOWS_ASYNC = ("async_collective", "AsyncCollective", "async-collective")


class Collective(NamedTuple):
    """One instruction."""

    kind: str
    dtype: str
    bytes: int
    """Of its result on one device; of a reduce-scatter, of what it reads."""
    group: tuple[int, ...]
    """The devices, by number, that exchange with the first one."""
    count: int
    """How often a device runs it."""
    overlaps: bool
    """Whether the compiler lets the device compute meanwhile."""
    where: str
    """The operation in the source, as JAX names it."""


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    type: str
    opcode: str
    rest: str


def collectives(text: str) -> list[Collective]:
    """All collectives of a program's text, those over one device left out."""
    computations, entry = _computations(text)
    found: list[Collective] = []

    def walk(name: str, count: int, overlaps: bool) -> None:
        for line in computations.get(name, ()):
            kind = next((kind for kind in KINDS if line.opcode in (kind, f"{kind}-start")), None)
            if kind is not None:
                collective = _collective(kind, line, count, overlaps or line.opcode.endswith("-start"))
                found.extend([collective] if len(collective.group) > 1 else [])
                continue
            inside = overlaps or line.opcode.endswith("-start") or any(word in line.name + line.rest for word in SHOWS_ASYNC)
            turns = _turns(computations, line) if line.opcode == "while" else 1
            for called in _called(line):
                walk(called, count * turns, inside)

    walk(entry, 1, False)
    return found


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions by its name, and the name of the first one that runs."""
    computations: dict[str, list[Instruction]] = defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[1]
            entry = name if line.startswith("ENTRY") else entry
        elif instruction := INSTRUCTION.match(line):
            computations[name].append(Instruction(*instruction.groups()))
    return computations, entry


def _called(line: Instruction) -> Iterator[str]:
    """The computations an instruction runs; of a collective or a reduction it is how two numbers are combined, which is no matter here."""
    if line.opcode in ("reduce", "reduce-window", "scatter", "sort", "select-and-scatter"):
        return
    for match in CALLED.finditer(line.rest):
        yield from (name.strip().lstrip("%") for name in (match[1] or match[2]).split(","))


def _turns(computations: dict[str, list[Instruction]], line: Instruction) -> int:
    """How often a loop turns: as XLA says, or else the number its condition compares with."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
    numbers = [1]

    def look(name: str) -> None:
        for inner in computations.get(name, ()):
            if inner.opcode == "constant" and inner.type.startswith(("s32[]", "u32[]")):
                numbers.append(int(re.match(r"-?\d+", inner.rest)[0]))  # type: ignore[index]
            for called in _called(inner):
                look(called)

    if condition:
        look(condition[1])
    return max(numbers)


def _collective(kind: str, line: Instruction, count: int, overlaps: bool) -> Collective:
    parts = _elements(line.type)
    if line.opcode.endswith("-start") and kind != "all-reduce":  # a start's type is (what it reads, what it writes, ...)
        parts = _elements(parts[1])
    arrays = [match for part in parts for match in ARRAY.findall(part)]
    size = sum(math.prod(int(n) for n in shape.split(",") if n) * BYTES[dtype] for dtype, shape in arrays)
    group = _group(line.rest)
    size *= len(group) if kind == "reduce-scatter" else 1
    where = re.search(r'op_name="([^"]*)"', line.rest)
    return Collective(kind, arrays[0][0], size, group, count, overlaps, where[1] if where else "")


def _elements(kind: str) -> list[str]:
    """The elements of a tuple's type, or the one type it is."""
    if not kind.startswith("("):
        return [kind]
    found, depth, start = [], 0, 1
    for i, letter in enumerate(kind):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            found.append(kind[start:i].strip())
            start = i + 1
            if depth == 0:
                break
    return found


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
    order = [int(n) for n in match[5].split(",")] if match[5] else list(range(len(shape)))
    devices = np.arange(groups * size).reshape(shape).transpose(order).reshape(groups, size)
    return tuple(devices[0].tolist())
