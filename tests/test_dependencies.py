"""What pyproject.toml asks for: everything that is imported, with bounds that the pinned versions meet."""

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layers import FILES, LAYERS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {canonicalize_name(each.name): each for each in map(Requirement, PROJECT["dependencies"])}
PACKAGES = tuple(f"{layer}/" for layer in LAYERS if layer not in ("benchmarks", "tests"))
OPTIONAL = {"cv2", "gguf", "torch"}  # imported where a command needs them, or not at all


def imported(tree: ast.Module) -> set[str]:
    """The packages that a module imports, by the first part of their names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    return {name.partition(".")[0] for name in names}


def test_what_is_imported_is_asked_for():
    names = set().union(*(imported(tree) for path, tree in FILES.items() if path.startswith(PACKAGES)))
    others = names - set(sys.stdlib_module_names) - set(LAYERS) - OPTIONAL
    homes = metadata.packages_distributions()
    undeclared = {name: homes.get(name) for name in others if not {canonicalize_name(home) for home in homes.get(name, [])} & set(REQUIRED)}
    assert undeclared == {}
    assert "numpy" in others


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_the_pinned_version_is_within_the_bounds(name):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {canonicalize_name(package): version for package, version in pinned.items()}
    assert REQUIRED[name].specifier.contains(versions[name])


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_is_installed_is_within_the_bounds(name):
    """At both ends: the constraints' versions, and the newest of everything in `make test-newest`."""
    assert REQUIRED[name].specifier.contains(metadata.version(name))
