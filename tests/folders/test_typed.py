"""Values from JSON are of the types that a configuration's fields have, or the key is named."""

from dataclasses import dataclass
from typing import Literal

import pytest

from configs.errors import RequestError
from omnitransfer_jax.folders.typed import read_fields


@dataclass(frozen=True)
class Sizes:
    count: int
    rate: float
    flag: bool
    word: str
    pair: tuple[int, int]
    list: tuple[float, ...]
    maybe: int | None
    choice: Literal["a", "b"]
    maybe_choice: Literal["a", "b"] | None


GOOD = {"n": 3, "r": 1, "f": False, "w": "x", "p": [1, 2], "l": [1, 2.5], "m": None, "c": "a", "q": None}
NAMES = dict(zip(("count", "rate", "flag", "word", "pair", "list", "maybe", "choice", "maybe_choice"), GOOD, strict=True))


def test_right_values_become_the_fields():
    found = Sizes(**read_fields(Sizes, GOOD, NAMES))
    assert found == Sizes(3, 1.0, False, "x", (1, 2), (1.0, 2.5), None, "a", None)
    assert {type(found.rate), *map(type, found.list)} == {float}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n", "3", "config.json n='3': a whole number"),
        ("n", True, "config.json n=True: a whole number"),
        ("n", 3.0, "config.json n=3.0: a whole number"),
        ("r", "1e-6", "config.json r='1e-6': a number"),
        ("r", 10**400, "config.json r=1000"),
        ("f", 0, "config.json f=0: true or false"),
        ("w", 1, "config.json w=1: a text"),
        ("p", [1], r"config.json p=\[1\]: a list of 2, each a whole number"),
        ("p", {"a": 1}, "config.json p=.*: a list of 2"),
        ("l", [1, "2"], r"config.json l=\[1, '2'\]: a list, each a number"),
        ("m", "x", "config.json m='x': a whole number or null"),
        ("c", "d", "config.json c='d': one of a, b"),
        ("q", "d", "config.json q='d': one of a, b or null"),
        ("n", None, "config.json: no n: all are needed"),
    ],
)
def test_wrong_values_are_named(key, value, words):
    with pytest.raises(RequestError, match=words) as error:
        read_fields(Sizes, GOOD | {key: value}, NAMES)
    assert len(str(error.value)) < 200


def test_all_absent_keys_are_named():
    with pytest.raises(RequestError, match="no n, w: all are needed"):
        read_fields(Sizes, {key: value for key, value in GOOD.items() if key not in "nw"}, NAMES)
