"""What may change, and where: every configuration field is of one of four kinds.

    model      decides which function the weights compute, or their shapes
    data       decides what a record holds
    training   decides what is learnt, and neither of the above
    run        changes speed, memory, logging or rounding alone

A checkpoint agrees with the configuration in its model fields, records agree in the data fields, and a training that goes on agrees in
all but the run fields. A run that starts from the weights of another may change everything but the model fields. Sampler fields are of
kind `run`, because no training reads them.

A class states the kind of its fields as `KIND`; a field of another kind states its own: `threads: int = field(default=4, metadata=RUN)`.
"""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, Literal

Kind = Literal["model", "data", "training", "run"]
DATA: dict[str, Kind] = {"kind": "data"}
TRAINING: dict[str, Kind] = {"kind": "training"}
RUN: dict[str, Kind] = {"kind": "run"}
FIXED: tuple[Kind, ...] = ("model", "data", "training")
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


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted paths."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in flat(branch, f"{path}.{name}" if path else name).items()}
