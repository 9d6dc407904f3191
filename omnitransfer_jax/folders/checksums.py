"""Checksums of the files of a checkpoint: written last, beside what Orbax stored, and compared before anything is loaded.

    FOLDER/checksums.I-of-N.json    the SHA-256 of every N-th file from the I-th on, written by process I of N

Orbax finds no bit that has flipped in its data files. A checksum is of a file as it lies, not of an array, so it covers all that a load
reads (parameters, moments, counters, the position in the data, Orbax's own metadata) and holds for every mesh and dtype that the
checkpoint is loaded to. The processes of a run share the files, on a shared disk and in a bucket alike, and exchange no arrays. A
digest of each array, as fingerprint.py makes of imported parts, would need whole arrays in one process, or depend on their sharding.

The cost is one more read. SHA-256 does 1.8 GB/s on one core that has instructions for it (AMD EPYC), and up to 16 threads read. A 14B
training's checkpoint, 16.4 billion parameters and two moments in float32, is 197 GB (262 with an average): 110 core seconds. Samples and
exports read the parameters alone, 66 GB or 36 core seconds. What is damaged before the file is read back, on the way from memory to the
disk, is not found.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

from etils import epath

from configs.errors import RequestError
from omnitransfer_jax.folders import atomic

NAME = re.compile(r"checksums\.(\d+)-of-(\d+)\.json")
OF_ONE = "checksums.0-of-1.json"  # of all files, written by one process
THREADS = 16


def write(folder: epath.PathLike, process: int = 0, count: int = 1) -> None:
    """Writes the checksums of this process's share of the files in `folder`, which do not change any more."""
    root = epath.Path(folder)
    share = sorted(_files(root))[process::count]
    found = dict(zip(share, _each(lambda name: atomic.sha256(root / name), share), strict=True))
    atomic.write_whole(root / f"checksums.{process}-of-{count}.json", json.dumps(found, indent=1))


def known(folder: epath.PathLike, within: Collection[str] = ()) -> dict[str, str]:
    """By file, the checksums that were written: all, or those of the files and folders of `folder` that `within` names.

    Empty if a part of them is not there: an earlier version wrote the folder, or the processes were killed before the end.
    """
    shares = {path.name: path for path in epath.Path(folder).iterdir() if NAME.fullmatch(path.name)} if epath.Path(folder).is_dir() else {}
    count = len(shares)
    if shares.keys() != {f"checksums.{i}-of-{count}.json" for i in range(count)}:
        return {}
    found = {name: value for path in shares.values() for name, value in atomic.read_json(path, "restore it from a copy").items()}
    return {name: value for name, value in found.items() if not within or name.partition("/")[0] in within}


def mismatch(folder: epath.PathLike, within: Collection[str] = (), process: int = 0, count: int = 1) -> str:
    """The first file that differs from its checksum, in a few words; empty if there is none. `within` as for `known`.

    Each of `count` processes compares its share.
    """
    try:
        share = sorted(known(folder, within).items())[process::count]
    except RequestError:
        return "its checksums cannot be read"
    return next(filter(None, _each(partial(_difference, epath.Path(folder)), share)), "")


@cache
def print_once(line: str) -> None:
    """Prints a line that many loads have reason to print."""
    print(line, flush=True)


def _difference(folder: epath.Path, item: tuple[str, str]) -> str:
    """What is wrong with one file of `folder`, given with its checksum."""
    name, value = item
    path = folder / name
    try:
        stamp = int(path.stat().mtime) if "://" in str(path) else os.stat(path).st_mtime_ns
        return "" if _sha256(str(path), path.stat().length, stamp) == value else f"{name} differs from its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is absent"


@cache
def _sha256(path: str, size: int, stamp: int) -> str:
    """The SHA-256 of a file, once in a process unless its size or time changes: an export asks for every array."""
    return atomic.sha256(path)


def _each(function: Callable, items: Iterable) -> list:
    """`function` of each of `items`, by threads, which hash at the same time."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files in `folder` by their paths in it, without checksums."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif not NAME.fullmatch(path.name) and not path.name.endswith(".partial"):
            yield prefix + path.name
