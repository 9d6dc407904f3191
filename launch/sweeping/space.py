"""The space of a sweep: a TOML file of configuration fields with what each may be, and how points are taken from it.

[fields]
optimizer.learning_rate = {log = [1e-5, 1e-3]}        # any number between, evenly on a logarithmic scale
optimizer.warmup_steps = {range = [0, 200], points = 3}    # whole numbers, as the field is; a grid takes 0, 100 and 200
train.weighting = ["velocity", "clean"]                # one of these

[choices.size]                                          # fields that change together, by a name
small = {dit.dim = 48, dit.num_heads = 4}
large = {dit.dim = 96, dit.num_heads = 8}
"""

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import RequestError, require
from configs.run import RunConfig
from launch import command

FORMS = ("range", "log")
POINTS = "points"
DIGITS = 4  # of a number that is drawn, so that a person can type it
DRAWS = 100  # points that are tried before a sweep whose points depend on its results
Point = dict[str, Any]
"""The value of each dimension by its name; of named choices the name."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One field, or several that change together, and what it may be."""

    name: str
    values: tuple[Any, ...] = ()
    """Everything it may be; empty for a range."""
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The fields behind each of `values`, for named choices."""
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    points: int = 0
    """How many a grid takes of a range; 0 if it was not said."""

    def at(self, share: float) -> Any:
        """The value at a share of the way through, from 0 to 1."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(round(value) if self.whole else float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def grid(self) -> list[Any]:
        """Its values in a grid; a `RequestError` for a range without `points`."""
        if self.values:
            return list(self.values)
        require(self.points > 1, f"{self.name}: a grid has to know how many points it takes of this range; add points = 3")
        return list(dict.fromkeys(self.at(i / (self.points - 1)) for i in range(self.points)))

    def fields(self, value: Any) -> Mapping[str, Any]:
        """The configuration fields of a value, by their dotted names."""
        return self.choices[value] if self.choices else {self.name: value}


@dataclass(frozen=True)
class Space:
    """The dimensions of a sweep around a configuration."""

    config: RunConfig
    dimensions: tuple[Dimension, ...]
    path: str = ""
    """The file, for messages."""

    def at(self, point: Point) -> Any:
        """The configuration at a point; a `RequestError` if its `validate` refuses it."""
        config = self.config
        for dimension in self.dimensions:
            for name, value in dimension.fields(point[dimension.name]).items():
                config = _set(config, name, value)
        try:
            config.validate()
        except RequestError as error:
            raise RequestError(f"{self.path}{shown(point)}: {error}") from None
        return config

    def fields(self) -> set[str]:
        """Every configuration field that changes."""
        return {name for each in self.dimensions for value in each.values or (each.low,) for name in each.fields(value)}

    def grid(self) -> list[Point]:
        """All combinations, the last dimension first."""
        names = [each.name for each in self.dimensions]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*(each.grid() for each in self.dimensions))]

    def random(self, seed: int) -> Iterator[Point]:
        """Points without end, drawn independently. The same seed gives the same ones, however many are taken."""
        for number in itertools.count():
            shares = np.random.default_rng([seed, number]).random(len(self.dimensions))
            yield {each.name: each.at(float(share)) for each, share in zip(self.dimensions, shares, strict=True)}

    def different(self, seed: int, count: int) -> list[Point]:
        """The first `count` of `random` that differ; a `RequestError` if the space has fewer."""
        found: list[Point] = []
        for point in itertools.islice(self.random(seed), 100 * count):
            if len(found) < count and point not in found:
                found.append(point)
        require(len(found) == count, f"--trials={count}: the space has only {len(found)} different points; give --trials={len(found)}")
        return found

    def require_valid(self, points: list[Point]) -> None:
        """A `RequestError` for the first of `points` that `validate` refuses."""
        for point in points:
            self.at(point)

    def corners(self, seed: int) -> list[Point]:
        """Points that show whether all of the space is valid: every end and every listed value once, and some drawn ones."""
        first = {each.name: each.at(0) for each in self.dimensions}
        ends = [first | {each.name: value} for each in self.dimensions for value in each.values or (each.low, each.high)]
        return [*ends, *itertools.islice(self.random(seed), DRAWS)]


def read(path: str, config: RunConfig) -> Space:
    """The space in a file, for this configuration; a `RequestError` names what is wrong with it."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise RequestError(f"--space={path}: {error.strerror}; give a TOML file of fields (docs/sweeps.md)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"--space={path}: not TOML ({error})") from None
    try:
        unknown = [name for name in content if name not in ("fields", "choices")]
        require(not unknown, f"[{''.join(unknown[:1])}]: no such part; there are [fields] and [choices.NAME]")
        for part, tables in content.items():
            require(isinstance(tables, dict), f"{part}: expected a table, [{part}]")
        dimensions = [_dimension(name, value, config) for name, value in _flat(content.get("fields", {}))]
        dimensions += [_choice(name, value, config) for name, value in content.get("choices", {}).items()]
        require(bool(dimensions), "no field; write one under [fields], as optimizer.learning_rate = {log = [1e-5, 1e-3]}")
        _require_apart(dimensions)
    except RequestError as error:
        raise RequestError(f"--space={path}: {error}") from None
    return Space(config, tuple(dimensions), f"--space={path}: ")


def arguments(fields: Mapping[str, Any]) -> list[str]:
    """The arguments with which a command sets these fields."""
    found: list[str] = []
    for name, value in fields.items():
        found += [f"--{name}", *map(str, value)] if isinstance(value, list | tuple) else [f"--{name}={value}"]
    return found


def shown(point: Mapping[str, Any]) -> str:
    """A point for people."""
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested tables by their dotted names; a table that describes a range is a value."""
    for name, value in table.items():
        at = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value and not set(value) & {*FORMS, POINTS}:
            yield from _flat(value, at)
        else:
            yield at, value


def _dimension(name: str, value: Any, config: RunConfig) -> Dimension:
    """A field, as the file has it."""
    if isinstance(value, list):
        require(bool(value), f"{name} = []: empty; give at least one value")
        return Dimension(name=name, values=tuple(dict.fromkeys(_typed(config, name, each) for each in value)))
    forms = [form for form in FORMS if isinstance(value, dict) and form in value]
    words = f"{name}: expected a list of values, {{range = [LOW, HIGH]}} or {{log = [LOW, HIGH]}}"
    require(len(forms) == 1 and not set(value) - {*forms, POINTS}, words)
    ends = value[forms[0]]
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) and math.isfinite(end) for end in ends)
    require(numbers, f"{name}: {forms[0]} = {ends}: expected two numbers, [LOW, HIGH]")
    low, high = (_typed(config, name, end) for end in ends)
    require(type(low) in (int, float), f"{name}: not a number, so it has no range; give a list of values")
    require(low < high, f"{name}: {forms[0]} = {ends}: an empty range; expected LOW below HIGH")
    require(forms[0] != "log" or low > 0, f"{name}: log = {ends}: a logarithmic scale begins above 0")
    points = value.get(POINTS, 0)
    require(isinstance(points, int) and (POINTS not in value or points > 1), f"{name}: points = {points}: a whole number from 2 up")
    return Dimension(name=name, low=low, high=high, log=forms[0] == "log", whole=isinstance(low, int), points=points)


def _choice(name: str, table: Any, config: RunConfig) -> Dimension:
    """Fields that change together."""
    require(isinstance(table, dict) and bool(table), f"[choices.{name}]: empty; give lines as small = {{dit.dim = 48, dit.num_heads = 4}}")
    choices: dict[str, dict[str, Any]] = {}
    for label, fields in table.items():
        require(isinstance(fields, dict) and bool(fields), f"choices.{name}.{label}: expected fields and their values, in {{}}")
        choices[label] = {at: _typed(config, at, value) for at, value in _flat(fields)}
    first = next(iter(choices.values()))
    differs = [label for label, fields in choices.items() if set(fields) != set(first)]
    require(not differs, f"choices.{name}.{''.join(differs[:1])}: expected the fields of the others, {', '.join(first)}")
    return Dimension(name=name, values=tuple(choices), choices=choices)


def _require_apart(dimensions: list[Dimension]) -> None:
    """A `RequestError` if two dimensions have one name or set one field."""
    seen: set[str] = set()
    for each in dimensions:
        for name in {each.name, *each.fields(each.at(0))}:
            require(name not in seen, f"{name}: given twice; leave one out")
            seen.add(name)


def _typed(config: RunConfig, name: str, value: Any) -> Any:
    """A value as the field has it; a `RequestError` if there is no such field or it cannot be that."""
    found: Any = command.override(config, arguments({name: value}))
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _set(config: Any, name: str, value: Any) -> Any:
    """`config` with one field set."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: _set(getattr(config, first), rest, value) if rest else value})
