"""Digests of the weights and vocabularies in a model folder: of their values, wherever the folder lies and however its files are cut.

    DIR/digests.json     of each part its digest, and the stamp of the files it was made from: names, sizes, times

Reading 65 GB takes minutes, so the digest of a part is made while launch.import_weights writes it, or when it is first needed, and kept.
It is made anew if the stamp has changed, as after a copy that sets new times. A part that is one file, of some megabytes, has its
digest made each time.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from configs.errors import RequestError
from omnitransfer_jax.folders import atomic, checksums, model_folder

DIGESTS_FILE = "digests.json"
LENGTH = 32  # hexadecimal digits of SHA-256 that are kept


class Digest:
    """The digest of a part, made leaf by leaf in any order."""

    def __init__(self) -> None:
        self.leaves: dict[str, str] = {}

    def add(self, item: tuple[str, Any]) -> tuple[str, Any]:
        """Takes a pair of path and array, and gives it back."""
        path, leaf = item[0], np.ascontiguousarray(item[1])
        found = hashlib.sha256(f"{path} {leaf.dtype} {leaf.shape} ".encode())
        found.update(leaf.reshape(-1).view(np.uint8).data)
        self.leaves[path] = found.hexdigest()
        return item

    def value(self) -> str:
        return of_pairs(self.leaves.items())


def of_part(folder: epath.PathLike, name: str) -> str:
    """The digest of part `name`, kept or made now."""
    kept = _kept(folder).get(name)
    if isinstance(kept, dict) and kept.get("stamp") == _stamp(folder, name) and isinstance(kept.get("digest"), str):
        return kept["digest"]
    digest = Digest()
    for item in model_folder.read_part(folder, name):
        digest.add(item)
    with suppress(OSError):  # a folder that cannot be written to
        keep(folder, name, digest)
    return digest.value()


def keep(folder: epath.PathLike, name: str, digest: Digest) -> None:
    """Writes the digest of a part that is complete, unless it is one file."""
    if (epath.Path(folder) / name).is_dir():
        entry = {"digest": digest.value(), "stamp": _stamp(folder, name)}
        atomic.write_whole(epath.Path(folder) / DIGESTS_FILE, json.dumps(_kept(folder) | {name: entry}, indent=2))


def of_files(folder: Path) -> str:
    """The digest of the files of a vocabulary."""
    paths = [path for path in folder.iterdir() if path.is_file() and not checksums.NAME.fullmatch(path.name)]
    return of_pairs((path.name, atomic.sha256(path)) for path in paths)


def of_model(folder: epath.PathLike, parts: Collection[str], vocabularies: Collection[str]) -> dict[str, str]:
    """The digest of each of `parts` and `vocabularies` that `folder` has, by name."""
    stored = model_folder.read_model(folder)
    found = {name: of_part(folder, name) for name in parts if name in stored}
    return found | {name: of_files(Path(folder, name)) for name in vocabularies if Path(folder, name).is_dir()}


def of_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """A digest of pairs of texts in any order."""
    return hashlib.sha256(json.dumps(sorted(pairs)).encode()).hexdigest()[:LENGTH]


def _kept(folder: epath.PathLike) -> dict[str, Any]:
    """The content of digests.json; nothing if it is absent or damaged, because everything in it can be made again."""
    try:
        return atomic.read_json(epath.Path(folder) / DIGESTS_FILE, "")
    except (OSError, RequestError):
        return {}


def _stamp(folder: epath.PathLike, name: str) -> str:
    """What changes if the files of a part are replaced: their names, sizes and times."""
    root = epath.Path(folder) / name
    stats = [(path, path.stat()) for path in (_files(root) if root.is_dir() else ())]
    return of_pairs((str(path.relative_to(root)), f"{stat.length} {stat.mtime}") for path, stat in stats)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else [path]
