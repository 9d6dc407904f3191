"""Values that come from a JSON file, of the types that the fields of a configuration have."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.errors import require

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def read_fields(of: type, json: Mapping[str, Any], names: Mapping[str, str], at: str = "config.json ") -> dict[str, Any]:
    """The fields of dataclass `of` that `names` lists, with the key that each has in `json`.

    A key that is absent, or that has a value of another type than the field, is a `RequestError` that begins with `at`.
    """
    hints, found = get_type_hints(of), {}
    missing = [key for field, key in names.items() if json.get(key) is None and not (key in json and _is_of(None, hints[field]))]
    require(not missing, f"{at.rstrip()}: no {', '.join(missing)}: all are needed; take the file of the published checkpoint")
    for field, key in names.items():
        require_type(json[key], hints[field], f"{at}{key}")
        found[field] = _as(json[key], hints[field])
    return found


def _as(value: Any, hint: Any) -> Any:
    """A value of the right type as the configuration has it: a tuple for a list, 1.0 for a number that JSON writes as 1."""
    if isinstance(value, list):
        return tuple(_as(item, get_args(hint)[0]) for item in value)
    return float(value) if hint is float else value


def require_type(value: Any, hint: Any, at: str, remedy: str = "") -> None:
    """A `RequestError` unless `value`, from JSON, is of the type of a configuration's field."""
    require(_is_of(value, hint), f"{at}={_short(value)}: {_words(hint)}{remedy}")


def _is_of(value: Any, hint: Any) -> bool:
    if hint is int or hint is float:
        right = isinstance(value, int) if hint is int else isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)
        return right and not isinstance(value, bool)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    return any(_is_of(value, kind) for kind in get_args(hint)) if get_args(hint) else isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"a list, each {NAMES[kinds[0]]}" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}, each {NAMES[kinds[0]]}"
    return " or ".join(map(_words, get_args(hint))) or NAMES[hint]


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:60]}..."
