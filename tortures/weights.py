"""Weights of strangers: pickles with code, headers that lie, names that lead elsewhere. None is executed, nothing written outside."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch import command as launch_command
from launch import export
from tortures.outcome import Outcome
from tortures.processes import HangError, Job, command

PART = "transformer"
import_weights = partial(command, "launch.import_weights")


class Call:
    """An object whose pickle calls `function` when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def payloads(marker: Path) -> list[bytes]:
    """Pickles that would make the file `marker`."""
    code = f"open({str(marker)!r}, 'w').write('x')"
    calls = [Call(os.system, f"touch {marker}"), Call(eval, code), Call(exec, code), Call(shutil.copy, "/etc/hostname", str(marker))]
    return [pickle.dumps({"weight": call}, protocol) for call in calls for protocol in (0, 4)]


def as_zip(content: bytes) -> bytes:
    """How PyTorch stores it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("../../escaped", "x")
    return file.getvalue()


def headers() -> list[bytes]:
    """Safetensors files that are not what they say."""
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

    def file(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    return [
        file({"a": tensor}, length=2**63), file({"a": tensor}, length=99_999_999), file({"a": tensor}, length=2**40),
        file({"a": tensor | {"data_offsets": [0, 2**62]}}), file({"a": tensor | {"data_offsets": [-16, 0]}}),
        file({"a": tensor, "b": tensor}), file({"a": tensor | {"shape": [2**40, 2**40]}}), file({"a": tensor | {"shape": [-1, -4]}}),
        file({"a": tensor | {"dtype": "PYTHON"}}), file(b'{"a": ' * 100_000), file(b"[" * 1_000_000), file({"../../../escaped": tensor}),
        file(b'{"a": %(a)s, "a": %(a)s}' % {b"a": json.dumps(tensor).encode()}),
        file({"__metadata__": {"format": "os.system('x')"}, "a": tensor}), file({"a": tensor | {"shape": [4.5]}}), b"",
    ]  # fmt: skip


def hostile_weights(folder: Path, count: int) -> Outcome:
    """An export of the model inside the package, one thing of which is replaced in each case."""
    good = folder / "good"
    given = ["--config=stage1:tiny", "--checkpoint=embedded", "--layout=diffusers", f"--out={good}"]
    if launch_command.execute(export.main, export.FLAGS, given):
        raise RuntimeError("nothing to import was exported")
    marker, failures, accepted = folder / "executed", [], 0
    cases = replacements(marker, folder)
    for case, (name, replace) in enumerate(cases[:count]):
        source, out = shutil.copytree(good, folder / "source"), folder / "out"
        replace(source)
        before = sorted(path.name for path in folder.iterdir())
        with Job(import_weights, [f"--source={source}", f"--out={out}"], log=folder / "log") as job:
            try:
                code = job.wait(100)
            except HangError as error:
                code = str(error)
            output = job.output
        accepted += code == 0
        after = sorted(path.name for path in folder.iterdir() if path != out)
        if marker.exists() or after != sorted({*before, "log"}):
            failures.append(f"case {case}, {name}: executed, or written outside: {after}")
        if code not in (0, 2) or "Traceback" in output:
            failures.append(f"case {case}, {name}: code {code}: {output[-300:]}")
        for path in (source, out):
            shutil.rmtree(path, ignore_errors=True)
        marker.unlink(missing_ok=True)
    return Outcome(min(count, len(cases)), failures, f"{accepted} imported: what was hostile in them is not read")


def replacements(marker: Path, folder: Path) -> list[tuple[str, Callable[[Path], None]]]:
    """Name, and what it does to a source."""

    def weights(source: Path) -> list[Path]:
        return sorted((source / PART).glob("*.safetensors"))

    def instead(content: bytes, suffix: str) -> Callable[[Path], None]:
        def replace(source: Path) -> None:
            (first, *others) = weights(source)
            for path in (first, *others):
                path.unlink()
            first.with_suffix(suffix).write_bytes(content)

        return replace

    def linked(target: str) -> Callable[[Path], None]:
        def replace(source: Path) -> None:
            (first, *_) = weights(source)
            first.unlink()
            first.symlink_to(target)

        return replace

    def fifo(source: Path) -> None:
        (first, *_) = weights(source)
        first.unlink()
        os.mkfifo(first)

    def index(name: str) -> Callable[[Path], None]:
        def replace(source: Path) -> None:
            shutil.copyfile(weights(source)[0], folder / "elsewhere.safetensors")
            (source / PART / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

        return replace

    def python(source: Path) -> None:
        code = f"open({str(marker)!r}, 'w').write('x')\n"
        for place in (source, *(path for path in source.iterdir() if path.is_dir())):
            for name in ("__init__.py", "modeling.py", "tokenization.py", "sitecustomize.py", "conftest.py"):
                (place / name).write_text(code)
            for config in place.glob("*config*.json"):
                content = json.loads(config.read_text())
                config.write_text(
                    json.dumps(content | {"auto_map": {"AutoTokenizer": ["tokenization.T", None], "AutoModel": "modeling.M"}})
                )

    def tokenizer(source: Path) -> None:
        for path in source.glob("tokenizer*/*"):
            path.write_bytes(payloads(marker)[0])

    found: list[tuple[str, Callable[[Path], None]]] = []
    for number, content in enumerate(payloads(marker)):
        found.append((f"pickle {number} as .bin", instead(content, ".bin")))
        found.append((f"pickle {number} as .safetensors", instead(content if number % 2 else as_zip(content), ".safetensors")))
    found += [(f"header {number}", instead(content, ".safetensors")) for number, content in enumerate(headers())]
    found += [("/dev/zero", linked("/dev/zero")), ("a link to itself", linked("x.safetensors")), ("a pipe", fifo)]
    found += [("an index that leads out", index("../../elsewhere.safetensors")), ("an index with a root", index("/etc/passwd"))]
    found += [("Python files", python), ("a vocabulary that is a pickle", tokenizer)]
    found += [("a zip as .pth", instead(as_zip(payloads(marker)[0]), ".pth"))]
    return found
