"""Manifests, prompts files and overrides with anything in them: each is read, or refused in one line; no traceback reaches the user."""

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from absl import flags

from configs.errors import RequestError
from configs.run import Config
from data_pipelines.manifest import read_manifest
from data_pipelines.prompts import read_prompts
from launch import command
from omnitransfer_jax import tasks
from tortures.outcome import Outcome

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3.5, 1e308, -1e308, 10**40, "", "x", "a.mp4", "../a.mp4", "/etc/passwd", "~", "a\0b", "\ud800", "é" * 300, "\n",
    "http://x/y.mp4", "file:///etc/passwd", "concat:a|b", [], {}, [[]], {"reference": 1}, {"target": -1}, {"reference": "x"}, [1, 2],
)  # fmt: skip
KEYS = ("id", "task", "reference", "target", "prompt", "first_frame", "start", "end", "sha256", "weight", "", "\ud800", "x")
NUMBERS = ("0", "-1", "1", "2", "3", "1e30", "nan", "inf", "-inf", "0x10", "1_0", "9" * 30, "x", "", "None", "True", " 1", "1,2", "[1]")
TEXTS = (*NUMBERS, "--", "-", "=", "a b", "é", "\udcff", "(", ".*", "embedded", "/", "../..", "$(touch x)", "`id`", "a" * 2000)


def texts(folder: Path, count: int) -> Outcome:
    """Two fifths manifests, a fifth prompts files, the rest overrides."""
    failures, read = [], 0
    for case in range(count):
        draw = random.Random(case)
        if case % 5 < 3:
            path = folder / "lines.jsonl"
            path.write_bytes(lines(draw, of_manifest=case % 5 < 2))
            try:
                read_manifest(path) if case % 5 < 2 else read_prompts(path, has_references=draw.random() < 0.5)
                read += 1
            except RequestError as error:
                if "\n" in str(error) or len(str(error)) > 5000:
                    failures.append(f"case {case}: {len(str(error))} letters in {str(error).count(chr(10)) + 1} lines")
            except Exception as error:
                failures.append(f"case {case}: {type(error).__name__}: {str(error)[:200]}")
        else:
            given, errors, output = overrides(draw), io.StringIO(), io.StringIO()
            try:
                with redirect_stderr(errors), redirect_stdout(output):
                    code = command.execute(accept, flags.FlagValues(), given)
                read += code == 0
                if (code, errors.getvalue().count("\n")) not in ((0, 0), (2, 1)):
                    failures.append(f"case {case}, {given}: code {code}: {errors.getvalue()[:300]}")
            except Exception as error:
                failures.append(f"case {case}, {given}: {type(error).__name__}: {str(error)[:200]}")
    return Outcome(count, failures, f"{read} accepted")


def accept(config: Config) -> None:
    """A command that does nothing with a configuration that is valid."""


def lines(draw: random.Random, of_manifest: bool) -> bytes:
    """A few rows of a manifest or of a prompts file with things wrong, or bytes that are none."""
    rows = []
    for number in range(draw.choice([1, 1, 2, 5])):
        row: dict[str, Any] = {"task": draw.choice(tasks.NAMES), "prompt": "x", "reference": "a.mp4"}
        row |= {"id": f"r{number}", "target": "b.mp4"} if of_manifest else draw.choice([{}, {"first_frame": "a.png"}])
        for _ in range(draw.choice([0, 0, 1, 2, 5])):
            key = draw.choice(KEYS)
            if draw.random() < 0.2:
                row.pop(key, None)
            else:
                row[key] = draw.choice(VALUES)
        rows.append(json.dumps(row))
    text = draw.choice(["\n"] * 9 + ["\r\n", "", ",", "\n\n"]).join(rows).encode("utf-8", "surrogatepass")
    kind = draw.random()
    if kind < 0.1:
        at = draw.randrange(len(text) + 1)
        return text[:at] + draw.choice([b"", b"\0", b"\xff", b"{", b"[" * 100_000, b"9" * 5000, b'"', draw.randbytes(20)]) + text[at:]
    return text[: draw.randrange(len(text))] if kind < 0.15 else draw.randbytes(60) if kind < 0.18 else text


def overrides(draw: random.Random) -> list[str]:
    """Arguments of a command that takes a configuration."""
    name = draw.choice(["stage1:smoke"] * 8 + ["stage3:smoke", "stage1:none", "x", ""])
    types = field_types(command.load_config("stage1:smoke"))
    found = [f"--config={name}"]
    for _ in range(draw.choice([1, 1, 2, 3])):
        field = draw.choice(sorted(types)) if draw.random() < 0.9 else draw.choice(["no.such", "", "data", "train", "seed.x", "\udcff"])
        hint = types.get(field)
        known = list(map(str, get_args(hint))) if get_origin(hint) is Literal else []
        value = draw.choice([*known, *TEXTS] if draw.random() < 0.5 else [*known, *NUMBERS[:6]])
        found += draw.choice([[f"--{field}={value}"]] * 5 + [[f"--{field}", value], [f"--{field}"], [value], [f"--{field}={value}", value]])
    return found


def field_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """The types of all fields by their dotted names."""
    hints, found = get_type_hints(type(config)), {}
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        found |= field_types(value, f"{prefix}{name}.") if hasattr(value, "__dataclass_fields__") else {prefix + name: hints[name]}
    return found
