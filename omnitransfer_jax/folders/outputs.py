"""What is checked of an output before anything is computed: it can be written, and no input is written over.

Whether it can be written is found by writing beside it, for file systems refuse in too many ways to ask for each. Addresses (gs://) are
not tried. What was tried is removed.
"""

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from configs.errors import RequestError, require
from omnitransfer_jax.folders import inputs, model_folder


def require_file(flag: str, path: str, reads: Iterable[str] = ()) -> None:
    """A `RequestError` unless the file `path`, the value of `flag`, can be written; `reads` are the paths that the command reads."""
    require(bool(path), f"{flag}='': empty; give the name of a file")
    if "://" in path:
        return
    target = Path(path).absolute()
    with _refusals(flag, path):
        require(target.is_file() or not target.exists(), f"{flag}={path}: a folder, or no file; give the name of a file in it")
        _require_apart(flag, path, reads)
        _try(target.parent, f".{target.name}.{uuid4().hex}.partial")


def require_folder(flag: str, path: str, reads: Iterable[str] = (), holds: inputs.Kind = "", owns: Iterable[str] = ()) -> None:
    """A `RequestError` unless files can be written into the folder `path`, the value of `flag`, which need not be there yet.

    It may be a folder of kind `holds`, which this command goes on with, and of no other. `owns` names what the command may remove or
    replace, a folder in `path` or `path` itself: no input may lie there.
    """
    require(bool(path), f"{flag}='': empty; give a folder")
    if "://" in path:
        return
    with _refusals(flag, path):
        target = Path(path).absolute()
        require(target.is_dir() or not os.path.lexists(target), f"{flag}={path}: a file is there, or a link to nothing; give a folder")
        _require_apart(flag, path, reads, [Path(os.path.realpath(target / name)) for name in owns])
        kind = inputs.kind_of(target)
        require(kind in ("", holds), f"{flag}={path}: {inputs.NAMES.get(kind)}; give another folder")
        _try(target, f".{uuid4().hex}.partial")


def require_new_folder(flag: str, path: str, reads: Iterable[str] = ()) -> None:
    """A `RequestError` unless `path` can become a folder of `atomic.new_folder`: it is absent or empty, and so on as above."""
    require_folder(flag, path, reads)
    with _refusals(flag, path):
        target = Path(os.path.realpath(path))
        require(not target.exists() or not any(target.iterdir()), f"{flag}={path}: not empty; give a new folder, or empty this one")
        unfinished = target.with_name(f".{target.name}.unfinished")
        _require_apart(flag, path, reads, [unfinished])
        _try(target.parent, unfinished.name)


def _require_apart(flag: str, path: str, reads: Iterable[str], owned: Collection[Path] = ()) -> None:
    """A `RequestError` if `path` is one of `reads` or lies inside of a checkpoint, or if one of `reads` lies in `owned`."""
    for each in filter(None, reads):
        read = Path(os.path.realpath(model_folder.resolve(each)))
        require(not _is_same(Path(path), read), f"{flag}={path}: this command reads it; give another name")
        inside = any(folder in (read, *read.parents) for folder in owned)
        require(not inside, f"{flag}={path}: this command reads {each}, where it would write; give another place")
    home = inputs.owner(os.path.realpath(path))
    if home is not None:
        raise RequestError(f"{flag}={path}: inside of {home}, {inputs.NAMES[inputs.kind_of(home)]}; give another place")


def _is_same(one: Path, other: Path) -> bool:
    """Whether both are one file or folder, by whatever name: of a link, of a hard link, or in other capitals."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)
    except OSError:  # one of them is absent
        return False


def _try(folder: Path, name: str) -> None:
    """Writes a file `name` as it would lie in `folder`, with the folders that are absent, and removes all of it.

    The absent folders are made in one with a name of its own, so that processes that begin together do not remove each other's.
    """
    there, absent = folder, []
    while not os.path.lexists(there):
        there, absent = there.parent, [there.name, *absent]
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
    tried = there / f".{uuid4().hex}.partial"
    try:
        inside = tried.joinpath(*absent)
        inside.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    finally:
        shutil.rmtree(tried, ignore_errors=True)


@contextmanager
def _refusals(flag: str, path: str) -> Iterator[None]:
    """Makes one line of what the operating system raises."""
    try:
        yield
    except OSError as error:
        reason, shown = error.strerror or error, path if len(path) < 300 else f"{path[:300]}..."
        raise RequestError(f"{flag}={shown}: cannot be written ({reason}); give another place") from None
