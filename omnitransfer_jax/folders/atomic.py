"""Files that are there whole or not at all, whenever a process dies and whoever else writes the same file; and their digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO, cast
from uuid import uuid4

from etils import epath

from configs.errors import RequestError, require


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file, and the folders it lies in; readers see the earlier file or the new one, never a part of it."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        place(partial, target)
    except BaseException:  # a full disk, Ctrl-C
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write in; if nothing is raised it becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        place(partial, path)
    except BaseException:  # a full disk, Ctrl-C
        partial.unlink(missing_ok=True)
        raise


def place(partial: epath.PathLike, path: epath.PathLike) -> None:
    """Gives the finished file `partial` its name, once the disk has all of it; a bucket (gs://) has it when the write returns."""
    if os.path.isfile(partial):
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    epath.Path(partial).replace(epath.Path(path))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in; if nothing is raised it becomes `path`, which must be new or empty.

    What an earlier process that was killed has written is removed.
    """
    target = path.resolve()
    require(
        not target.exists() or (target.is_dir() and not any(target.iterdir())),
        f"{path}: not empty; give a new folder with --out, or empty this one",
    )
    require(not target.is_mount(), f"{path}: the root of a disk cannot be replaced; give a new folder in it with --out")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_json(path: epath.PathLike, remedy: str, *keys: str) -> dict[str, Any]:
    """The object in a JSON file that has `keys`, each an object; one that was cut off or changed is a `RequestError` with `remedy`."""
    try:
        content = json.loads(epath.Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({error}); {remedy}") from None
    for name, value in {"the file": content, **{key: content.get(key) for key in keys if isinstance(content, dict)}}.items():
        if not isinstance(value, dict):
            raise RequestError(f"{path}: {name} is no JSON object; {remedy}")
    return content


def sha256(path: epath.PathLike) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
