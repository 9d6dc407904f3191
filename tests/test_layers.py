"""How the code is laid out: packages depend downwards only, no modules import in a circle, files and functions stay short."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the bottom up
    "configs", "omnitransfer_jax", "data_pipelines", "omnitransfer_torch", "world", "evaluation", "launch", "benchmarks", "tortures",
    "tests",
)  # fmt: skip
FILE_LINES, FUNCTION_LINES = 500, 60
ORACLES = ("torch", "torchvision", "diffusers", "peft", "safetensors.torch", "tests.parity")
LONGER: dict[str, str] = {}  # "path" or "path:function" -> why it is longer


class Import(NamedTuple):
    """One import statement of one module, inside functions too."""

    line: int
    module: str


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


FILES = {path.relative_to(ROOT).as_posix(): parse(path) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}


def imports(module: str, tree: ast.Module) -> Iterator[Import]:
    """The modules of this project that `module` imports. `from package import name` means the module package.name if there is one."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else str(node.module) for name in names]
        yield from (Import(node.lineno, name) for name in found if name in MODULES and name != module)


GRAPH = {module: list(imports(module, FILES[path])) for module, path in MODULES.items()}


def upward(graph: dict[str, list[Import]]) -> list[str]:
    """The imports that go from a lower layer to a higher one."""

    def layer(module: str) -> int:
        return LAYERS.index(module.partition(".")[0])

    return [
        f"{MODULES.get(module, module)}:{line} imports {target}"
        for module, found in graph.items()
        for line, target in found
        if layer(target) > layer(module)
    ]


def cycle(graph: dict[str, list[Import]]) -> list[str]:
    """The modules of one import cycle, the first one twice; empty if there is none."""
    try:
        TopologicalSorter({module: {target for _, target in found} for module, found in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def oracle_imports(path: str, tree: ast.Module) -> list[str]:
    """Where a test outside tests/parity imports a PyTorch oracle: without PyTorch it is to be skipped, by pytest.importorskip."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        found += [f"{path}:{node.lineno} imports {name}" for name in names if any(f"{name}.".startswith(f"{each}.") for each in ORACLES)]
    return found


def bound_twice(path: str, tree: ast.Module) -> list[str]:
    """The names that a module binds again at its top level, to what does not begin with their value: its functions read the last one."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            bound = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            read = {each.id for each in bound if isinstance(each.ctx, ast.Load)}
            names += [each.id for each in bound if isinstance(each.ctx, ast.Store) and each.id not in read]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [f"{path}: {name}" for name, count in Counter(names).items() if count > 1]


def lengths() -> Iterator[tuple[str, int, int]]:
    """Name, lines and limit of every file and function."""
    for path, tree in FILES.items():
        yield path, len((ROOT / path).read_text().splitlines()), FILE_LINES
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, FUNCTION_LINES


def test_every_package_is_a_layer():
    packages = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py") if not path.relative_to(ROOT).parts[0].startswith(".")}
    assert packages <= {*LAYERS, "build", "comfyui_omnitransfer"}  # which ComfyUI imports, from a folder of its own


def test_packages_depend_downwards_only():
    assert upward(GRAPH) == []


def test_no_modules_import_in_a_circle():
    assert cycle(GRAPH) == []


def test_no_name_of_a_module_is_bound_twice():
    assert [name for path, tree in FILES.items() for name in bound_twice(path, tree)] == []
    assert bound_twice("a", ast.parse("A, B = 1, 2\ndef f(): A = 3\nA: int = 4")) == ["a: A"]


def test_files_and_functions_are_short():
    long = {name: lines for name, lines, limit in lengths() if lines > limit}
    assert {name: lines for name, lines in long.items() if name not in LONGER} == {}
    assert set(LONGER) <= set(long), "shorter now: no exception is needed"


def test_tests_without_pytorch_import_none():
    tests = {path: tree for path, tree in FILES.items() if path.startswith("tests/") and not path.startswith("tests/parity/")}
    assert [line for path, tree in tests.items() for line in oracle_imports(path, tree)] == []


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import torch", True),
        ("def f():\n    from safetensors.torch import save_file", True),
        ("from tests.parity import bridge", True),
        ("from safetensors.numpy import save_file\nimport torchless", False),
        ("torch = pytest.importorskip('torch')", False),
    ],
)
def test_an_import_of_pytorch_is_seen(source, seen):
    assert bool(oracle_imports("a.py", ast.parse(source))) == seen


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("world.scores", "def f():\n    from launch import demo", ["world.scores:2 imports launch.demo"]),
        ("configs.wan", "import world.scores", ["configs.wan:1 imports world.scores"]),
        ("launch.demo", "from world.scores import distance", []),
        ("world.scores", "import numpy\nimport launchpad", []),
    ],
)
def test_an_upward_import_is_seen(module, source, found):
    seen = upward({module: list(imports(module, ast.parse(source)))})
    assert [line.replace(MODULES.get(module, module), module) for line in seen] == found


def test_a_circle_is_seen():
    graph = {"a": [Import(1, "b")], "b": [Import(3, "c")], "c": [Import(2, "a")], "d": [Import(1, "a")]}
    assert set(cycle(graph)) == {"a", "b", "c"}
