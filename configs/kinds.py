"""What may change, and where: every configuration field is of one of five kinds.

    model      decides which function the weights compute, or their shapes
    method     decides how the weights read references, at sampling as at training; any weights can learn any way
    data       decides what a record holds
    training   decides what is learnt, and none of the above
    run        changes speed, memory, logging or rounding alone

| what | agrees with the configuration in |
|---|---|
| records that a training reads | data fields, and model fields of the encoders |
| weights that a training starts from | model fields |
| imported weights that are used, for samples or an export | model and method fields |
| a run that is used | the same, and the data fields of its networks: rows of text, frames that the language model reads |
| a run that goes on | all but run fields |

Sampler fields are of kind `run`, because no training reads them.

A class states the kind of its fields as `KIND`; a field of another kind states its own: `threads: int = field(default=4, metadata=RUN)`.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal

Kind = Literal["model", "method", "data", "training", "run"]
METHOD: dict[str, Kind] = {"kind": "method"}
DATA: dict[str, Kind] = {"kind": "data"}
TRAINING: dict[str, Kind] = {"kind": "training"}
RUN: dict[str, Kind] = {"kind": "run"}
FIXED: tuple[Kind, ...] = ("model", "method", "data", "training")
"""What a training that goes on may not change."""


def select(config: Any, kinds: Collection[Kind]) -> dict[str, Any]:
    """The values of the fields of these kinds, in dictionaries nested as the configuration is; parts without such fields are left out."""
    found = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            if inner := select(value, kinds):
                found[field.name] = inner
        elif field.metadata.get("kind", config.KIND) in kinds:
            found[field.name] = value
    return found


def differences(one: Any, other: Any, kinds: Collection[Kind], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields of these kinds in which two configurations of one class differ: dotted name, the value of `one` and that of `other`.

    Values that a field's metadata names as the `same` do not differ.
    """
    for field in fields(one):
        name, value, found = path + field.name, getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(value):
            yield from differences(value, found, kinds, f"{name}.")
        elif field.metadata.get("kind", one.KIND) in kinds:
            same = field.metadata.get("same", {})
            if same.get(value, value) != same.get(found, found):
                yield name, value, found


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted paths."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in flat(branch, f"{path}.{name}" if path else name).items()}
