"""The manifest: a file of JSON lines that names the clips, two of them and a task a line.

    {"id": "kite", "task": "motion", "reference": "a.mp4", "target": "b.mp4", "prompt": ""}

Optional are "first_frame" (an image, for temporal tasks; else the target's own first frame is taken) and "start" and "end", seconds into
both clips as a player counts them, or {"reference": seconds, "target": seconds}; and "sha256", the digests of the files that these names
stand for: {"reference": "9f86...", "target": "60303..."}. Paths are relative to the manifest. launch.encode takes none outside its folder
unless that is allowed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from configs.errors import RequestError, require
from omnitransfer_jax import tasks

REQUIRED = ("id", "task", "reference", "target", "prompt")
OPTIONAL = ("first_frame", "start", "end", "sha256")
CLIPS = ("reference", "target")
Item = TypeVar("Item")
LISTED = 8  # problems that a message names; it counts the others


class Clip(NamedTuple):
    """A stretch of a video file."""

    path: Path
    start: float = 0.0
    """Seconds."""
    end: float | None = None
    """Seconds; None is the end of the file."""


class Row(NamedTuple):
    """One pair: `target` shows again what the task takes from `reference`."""

    id: str
    task: str
    reference: Clip
    target: Clip
    prompt: str
    first_frame: Path | None = None
    sha256: dict[str, str] = {}
    """Of `reference`, `target` and `first_frame`, the digests that are known."""

    @property
    def files(self) -> dict[str, Path]:
        """The files it reads, by what they are to it."""
        found = {"reference": self.reference.path, "target": self.target.path}
        return found | ({"first_frame": self.first_frame} if self.first_frame else {})

    @property
    def is_temporal(self) -> bool:
        return tasks.TASKS[tasks.task_index(self.task)].family == "temporal"


def read_manifest(path: str | Path) -> list[Row]:
    """The rows of a manifest, in its order; one `RequestError` lists what is wrong in it, by file and line, up to `LISTED` problems."""
    path = Path(path)
    first_line: dict[str, int] = {}

    def row_of(line: str, number: int) -> tuple[Row | None, list[str]]:
        row, wrong = _parse(line, path.parent)
        if row is not None and row.id in first_line:
            wrong = [f"id {_short(row.id)}: line {first_line[row.id]} has it too; every id once"]
        elif row is not None:
            first_line[row.id] = number
        return row, wrong

    return read_lines(path, row_of, "a manifest", REQUIRED)


def read_lines(path: Path, parse: Callable[[str, int], tuple[Item | None, list[str]]], what: str, required: Sequence[str]) -> list[Item]:
    """The items of a file of JSON lines, itself `what` in messages; `parse` gives that of a line and its number, or what is wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: not {what} that can be read ({_reason(error)}); give a file of JSON lines") from None
    require(
        not "".join(lines[:1000]).lstrip().startswith("["),
        f"{path}: a JSON array; give one object a line, without brackets around them and without commas between them",
    )
    items: list[Item] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item, wrong = parse(line, number)
        problems += [f"{path}:{number}: {problem}" for problem in wrong]
        if item is not None and not wrong:
            items.append(item)
    if problems:
        more = f"; and {len(problems) - LISTED} more problems" if len(problems) > LISTED else ""
        raise RequestError("; ".join(problems[:LISTED]) + more)
    if not items:
        raise RequestError(f"{path}: no rows; give one JSON object a line, with {', '.join(required)}")
    return items


def require_inside(rows: Sequence[Row], root: Path) -> None:
    """A `RequestError` for the first row that names a file outside `root`, by its path or by a link."""
    root, known = root.resolve(), {}
    for row in rows:
        for what, path in row.files.items():
            folder = known.setdefault(path.parent, path.parent.resolve())
            found = (folder / path.name).resolve()
            require(
                found.is_relative_to(root),
                f"{row.id}: {what} {path} lies outside {root}, the folder of the manifest; move it there, or allow it: --allow_outside",
            )


def refuse_same(row: Row) -> None:
    """A `RequestError` if reference and target are the same pictures: one file, or two with the same bytes, from the same second on.

    A model would learn to copy from such a pair. Files that cannot be read are reported when they are decoded.
    """
    reference, target = row.reference, row.target
    if reference.start != target.start:
        return
    try:
        same = reference.path.samefile(target.path) or _same_bytes(reference.path, target.path)
    except OSError:
        return
    if same:
        raise RequestError(
            f"{target.path}: the same clip as the reference, from the same second on; give two clips, or two stretches of one by start"
        )


def _same_bytes(a: Path, b: Path) -> bool:
    """Whether two files have the same bytes; they are only read if they have the same size."""
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        return hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest()


def _parse(line: str, folder: Path) -> tuple[Row | None, list[str]]:
    """The row of one line, or what is wrong with it."""
    content, wrong = read_object(line, REQUIRED, OPTIONAL)
    if wrong:
        return None, wrong
    starts, ends = _of_each(content.get("start"), 0.0), _of_each(content.get("end"), None)
    clips = {name: Clip(folder / content[name], starts[name], ends[name]) for name in CLIPS}
    for name, clip in clips.items():
        if clip.end is not None and clip.end <= clip.start:
            wrong.append(f"end {clip.end:g} of the {name}: not after its start {clip.start:g}")
    frame = content.get("first_frame")
    row = Row(
        content["id"],
        content["task"],
        clips["reference"],
        clips["target"],
        content["prompt"],
        folder / frame if frame else None,
        content.get("sha256", {}),
    )
    if row.first_frame is not None and not row.is_temporal:
        wrong.append(f"first_frame: {row.task} starts from none; leave it out")
    return (None, wrong) if wrong else (row, [])


def read_object(line: str, required: Sequence[str], optional: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The object of a line with these keys, and what is wrong with it."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, [f"not JSON ({_reason(error)}); give one object a line"]
    if not isinstance(content, dict):
        return {}, [f"{_short(content)}: not an object; give {{{', '.join(required)}}}"]
    wrong = [f"{key} is absent; every row needs {', '.join(required)}" for key in required if key not in content]
    known = (*required, *optional)
    wrong += [f"{_short(key)}: no such key; there are {', '.join(known)}" for key in content if key not in known]
    wrong += [f"{key} {_short(content[key])}: {why}" for key in known if key in content and (why := _wrong_value(key, content[key]))]
    return content, wrong


def _wrong_value(key: str, value: Any) -> str:
    """What is wrong with the value of a known key; empty if it is right."""
    if key == "task":
        return "" if value in tasks.NAMES else f"not one of {', '.join(tasks.NAMES)}"
    if key == "prompt":
        return "" if _is_text(value) else 'not a text; "" is none'
    if key in ("start", "end"):
        each = value.values() if isinstance(value, dict) else [value]
        right = bool(each) and all(_is_seconds(v) for v in each) and (not isinstance(value, dict) or set(value) <= set(CLIPS))
        return "" if right else "seconds from 0 on, or of each clip as {reference: seconds, target: seconds}"
    if key == "sha256":
        known = isinstance(value, dict) and set(value) <= {*CLIPS, "first_frame"}
        right = known and all(isinstance(each, str) and re.fullmatch(r"[0-9a-f]{64}", each) for each in value.values())
        return "" if right else "not the digests of files, {reference: 64 hexadecimal digits, target: ...}"
    return "" if _is_text(value) and value else "not a name" if key == "id" else "not a path"


def _is_text(value: Any) -> bool:
    """Whether it is a text that can name a file and be printed: no zero byte, no half of a surrogate pair."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_seconds(value: Any) -> bool:
    """Not negative, and no more than a day: nothing longer is a clip."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 86400


def _of_each(value: Any, default: float | None) -> dict[str, Any]:
    """The seconds of each clip."""
    if isinstance(value, dict):
        return {clip: value.get(clip, default) for clip in CLIPS}
    return {clip: default if value is None else value for clip in CLIPS}


def _short(value: Any) -> str:
    """A value in a message: printable, and cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
