"""Files that are there whole or not at all, whenever a process dies and whoever else writes the same file; and their digests."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from etils import epath

from configs.errors import RequestError


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file, and the folders it lies in; readers see the earlier file or the new one, never a part of it."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    place(partial, target)


def place(partial: epath.PathLike, path: epath.PathLike) -> None:
    """Gives the finished file `partial` its name, once the disk has all of it; a bucket (gs://) has it when the write returns."""
    if os.path.isfile(partial):
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    epath.Path(partial).replace(epath.Path(path))


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


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
