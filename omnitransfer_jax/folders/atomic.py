"""Files that are there whole or not at all, whenever a process dies and whoever else writes the same file; and their digests."""

import hashlib
import os
from pathlib import Path
from uuid import uuid4

from etils import epath


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


def place(partial: epath.PathLike, path: epath.PathLike) -> None:
    """Gives the finished file `partial` its name, once the disk has all of it; a bucket (gs://) has it when the write returns."""
    if os.path.isfile(partial):
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    epath.Path(partial).replace(epath.Path(path))


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
