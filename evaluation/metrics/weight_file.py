"""Weights that the user names: a safetensors file with arrays of known names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.errors import RequestError, require
from omnitransfer_jax.folders import fingerprint
from omnitransfer_jax.folders.atomic import sha256


def load(path: str, names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """The arrays `names` of a file, float32; a `RequestError` if it has not all of them, and so is not `what`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: no safetensors that can be read ({error})") from None
    absent = [name for name in names if name not in found]
    require(not absent, f"{path}: no {', '.join(absent[:2])}: not {what}")
    return {name: found[name].astype(np.float32) for name in names}


def checked(given: str) -> tuple[str, str]:
    """The path and the SHA-256 of `FILE` or `FILE@SHA256`; a `RequestError` where the file is absent or another one.

    The digest of a folder is that of the names and digests of all its files.
    """
    path, _, expected = given.partition("@")
    try:
        digest = of_folder(Path(path)) if Path(path).is_dir() else sha256(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    require(not expected or digest == expected.lower(), f"{path}: SHA-256 {digest}, {expected} expected; give the file that was meant")
    return path, digest


def of_folder(folder: Path) -> str:
    """The digest of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint.of_pairs((path.relative_to(folder).as_posix(), sha256(path)) for path in files)
