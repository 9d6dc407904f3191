"""Which values a configuration field may hold: `require_ranges` answers any other in one line, before anything is computed with it.

A whole number counts something: it is at least 1, and at most 2^31 - 1, because JAX counts with 32 bits. A real number is finite and more
than 0. A field with another range states it beside its kind: `warmup_steps: int = field(default=100, metadata=FROM_0)`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

from configs.errors import RequestError, require

LARGEST = 2**31 - 1


class Range(NamedTuple):
    """The numbers that a field may hold."""

    holds: Callable[[float], bool]
    words: str
    """The range in a message."""
    largest: int = LARGEST
    """Of whole numbers."""


COUNT = Range(lambda x: x >= 1, "at least 1")
POSITIVE = Range(lambda x: x > 0, "more than 0")
FROM_0: dict[str, Any] = {"range": Range(lambda x: x >= 0, "at least 0")}
FROM_1: dict[str, Any] = {"range": COUNT}
BELOW_1: dict[str, Any] = {"range": Range(lambda x: 0 <= x < 1, "from 0 to below 1")}
SHARE: dict[str, Any] = {"range": Range(lambda x: 0 <= x <= 1, "a share from 0 to 1")}
SEED: dict[str, Any] = {"range": Range(lambda x: x >= 0, "at least 0", 2**32 - 1)}  # JAX takes larger seeds modulo 2^32
ANY: dict[str, Any] = {"range": Range(lambda x: True, "any number")}
PATTERNS: dict[str, Any] = {"patterns": True}
"""The field holds regular expressions."""


def require_ranges(config: Any, at: str) -> None:
    """A `RequestError` for the first field of a configuration, itself named `at` in messages, whose value cannot be.

    Configurations inside it are not looked at: their own `validate` does that.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, name, hint = getattr(config, field.name), f"{at}.{field.name}" if at else field.name, hints[field.name]
        require(hint is not int or isinstance(value, int), f"{name}={value!r}: a whole number")
        require(hint is not float or isinstance(value, int | float), f"{name}={value!r}: a number")
        values = value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _require_number(number, field.metadata.get("range", COUNT if isinstance(number, int) else POSITIVE), f"{name}={value}")
        if "patterns" in field.metadata:
            _require_patterns(values, name)


def _require_number(number: float, range: Range, given: str) -> None:
    require(math.isfinite(number) if isinstance(number, float) else True, f"{given}: a finite number, {range.words}")
    require(range.holds(number), f"{given}: {range.words}")
    require(isinstance(number, float) or number <= range.largest, f"{given}: at most {range.largest}")


def _require_patterns(patterns: Iterable[Any], name: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise RequestError(f"{name}: {pattern!r} is not a regular expression ({error}); `.*` stands for any characters") from None
