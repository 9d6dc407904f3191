"""The configurations by their names on the command line: NAME[:VARIANT] is a variant of configs/NAME.py."""

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from functools import cache
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import configs
from configs.kinds import Kind, differences
from configs.run import Config, RunConfig

SHARED = ("base", "buckets", "chips", "errors", "kinds", "named", "ranges", "run")  # modules that hold what the configurations share
Run = TypeVar("Run", bound=RunConfig)


def names(of: tuple[type, ...] = (RunConfig,)) -> list[str]:
    """The files that hold configurations of these types."""
    found = [module.name for module in pkgutil.iter_modules(configs.__path__) if module.name not in SHARED]
    return [name for name in found if issubclass(get_type_hints(module_of(name).get_config)["return"], of)]


def module_of(name: str) -> ModuleType:
    """The file `name`, one of `names`."""
    return importlib.import_module(f"configs.{name}")


@cache
def variants(of: type[Run]) -> Mapping[str, Run]:
    """All configurations of a type, by NAME:VARIANT."""
    found = [(name, module_of(name).VARIANTS) for name in names((of,))]
    return {f"{name}:{variant}" if variant else name: config for name, each in found for variant, config in each.items()}


def fitting(parts: Mapping[str, Any], of: Collection[Kind]) -> str:
    """The end of a message that names the configurations whose models equal `parts` in all fields of these kinds; empty if none does.

    Those of methods on the same models are named only if no other fits.
    """

    def fits(config: RunConfig) -> bool:
        return not any(any(differences(part, getattr(config, name), of)) for name, part in parts.items())

    return fit({name: config for name, config in variants(Config).items() if fits(config)})


def fit(fitting: Mapping[str, RunConfig]) -> str:
    """The end of a message that names these configurations, those of methods only if there are no others; empty if there is none."""
    found = [name for name, config in fitting.items() if not isinstance(config, Config) or type(config) is Config] or list(fitting)
    return f"; what fits is --config={' or '.join(filter(None, (', '.join(found[:-1]), *found[-1:])))}" if found else ""
