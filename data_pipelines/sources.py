"""What clips are known by: the digest of a file's content, and a stamp that tells without reading it that it is still the same.

A stamp is size, time of change of the content and of the inode, and number of the inode. The system sets the second time at every write, so
a file that has its stamp is unchanged; of one that has another, as after a copy, the digest is compared.
"""

from pathlib import Path
from typing import Any

from configs.errors import RequestError
from data_pipelines.manifest import Row
from omnitransfer_jax.folders.atomic import sha256


def stamp(path: Path) -> list[int]:
    """Empty if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def describe(row: Row) -> dict[str, Any]:
    """Stamp and digest of each file of a row; no digest of one that cannot be read. One that is not the manifest's is a `RequestError`."""
    found: dict[str, Any] = {}
    for what, path in row.files.items():
        try:
            found[what] = {"stamp": stamp(path), "sha256": sha256(path)}
        except OSError:
            found[what] = {"stamp": [], "sha256": ""}
    return found


def require_stated(row: Row, described: dict[str, Any]) -> None:
    """A `RequestError` if a file is not the one whose digest the manifest states."""
    for what, digest in row.sha256.items():
        found = described.get(what, {}).get("sha256")
        if found and found != digest:
            raise RequestError(f"{row.files[what]}: not the {what} that the manifest means (SHA-256 {found[:12]}..., not {digest[:12]}...)")


def is_unchanged(row: Row, described: dict[str, Any]) -> bool:
    """Whether the files of a row are those that were described before."""
    for what, path in row.files.items():
        before, now = described.get(what), stamp(path)
        if before is None:
            return False
        if before["stamp"] != now and (not now or not before["sha256"] or sha256(path) != before["sha256"]):
            return False
    return True
