"""The instructions of a compiled program, read off XLA's text of it (HLO), each with how often it runs.

The text is a list of computations; each has instructions, some of which run other computations: a loop its body, a fusion its insides.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
COMBINES = ("reduce", "reduce-window", "scatter", "sort", "select-and-scatter")  # what they call says how two numbers are combined
STARTED, STEP, DONE = "AsyncCollectiveStart", "async_collective_fusion", "AsyncCollectiveDone"
"""How the TPU's compiler marks a gather beside which others run: where it starts, where it goes on inside another fusion, its end."""

Computations = Mapping[str, list["Instruction"]]


class Shape(NamedTuple):
    """An array's type."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.elements * BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    """One line of the text."""

    name: str
    type: str
    opcode: str
    rest: str
    """Its operands and attributes."""

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


class Run(NamedTuple):
    """An instruction as one device runs it."""

    instruction: Instruction
    count: int
    overlaps: bool
    """Whether it is part of something that the compiler starts and lets the device compute beside."""
    goes_on: bool
    """Whether it was started elsewhere and is written here once more: one collective is in several fusions then."""
    operands: list[Shape]
    """The types of its operands."""


def runs(text: str) -> Iterator[Run]:
    """All instructions that a program runs, those inside of fusions and loops too."""
    computations, entry = _computations(text)

    def walk(name: str, count: int, overlaps: bool) -> Iterator[Run]:
        lines = computations.get(name, ())
        types = {line.name: line.type for line in lines}
        overlaps = overlaps or any(STARTED in line.rest for line in lines)
        goes_on = name.startswith(STEP) or any(DONE in line.rest for line in lines)
        for line in lines:
            starts = line.opcode.endswith("-start")
            operands = [shape for operand in line.operands for shape in shapes(types.get(operand, ""))]
            yield Run(line, count, overlaps or starts, goes_on, operands)
            turns = _turns(computations, line) if line.opcode == "while" else 1
            for called in _called(line):
                yield from walk(called, count * turns, overlaps or starts)

    return walk(entry, 1, False)


def shapes(kind: str) -> list[Shape]:
    """The arrays of a type, which may be a tuple."""
    return [Shape(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in ARRAY.findall(kind)]


def _computations(text: str) -> tuple[Computations, str]:
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
    """The computations that an instruction runs."""
    if line.opcode in COMBINES or line.opcode.startswith(("all-reduce", "reduce-scatter")):
        return
    for match in CALLED.finditer(line.rest):
        yield from (name.strip().lstrip("%") for name in (match[1] or match[2]).split(","))


def _turns(computations: Computations, line: Instruction) -> int:
    """How often a loop turns: as XLA says, or else the number its condition compares with."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.rest)
    if known:
        return int(known[1])
    numbers = [1]

    def look(name: str) -> None:
        for inner in computations.get(name, ()):
            number = re.match(r"-?\d+", inner.rest)
            if inner.opcode == "constant" and inner.type.startswith(("s32[]", "u32[]")) and number:
                numbers.append(int(number[0]))
            for called in _called(inner):
                look(called)

    if condition := re.search(r"condition=%?([\w.\-]+)", line.rest):
        look(condition[1])
    return max(numbers)
