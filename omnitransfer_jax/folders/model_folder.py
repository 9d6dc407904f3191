"""Our checkpoint of a model: a folder with one Orbax checkpoint for each part, and the configuration of each part.

    DIR/model.json              format version and the configuration of each part
    DIR/{dit,vae,text,image,mllm}/   parameters by path, as `flat_params` names them
    DIR/dit_low_noise/          the second expert of Wan2.2; dit/ is then the high-noise expert
    DIR/tokenizer/              the text encoder's vocabulary, as transformers stores it
    DIR/mllm_tokenizer/         the language model's

Each of these folders holds checksums of its files, which are compared before anything is loaded from it (checksums.py).
Parts are read and written a group of leaves at a time, so that memory never holds a part twice. A small part may be one file,
DIR/dit.safetensors, with the same names of parameters. Such are the parts of the model folder inside this package, named `EMBEDDED`;
its checksums are in DIR itself.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from configs import kinds, named
from configs.base import DiTConfig
from configs.errors import RequestError, require
from configs.run import Config
from omnitransfer_jax.folders import atomic, checksums
from omnitransfer_jax.folders.finite import require_finite
from omnitransfer_jax.folders.processes import first_text
from omnitransfer_jax.folders.typed import require_type
from omnitransfer_jax.weights import files

EMBEDDED = "embedded"  # stands for the model folder inside this package, wherever that is installed
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded"
FORMAT = 1
MODEL_FILE = "model.json"
GROUP_BYTES = 2**28  # leaves are written and read in groups of about this size
CHUNK_BYTES = 2**26  # a process reads every chunk that its shard of an array touches, so chunks are small
Item = TypeVar("Item")
LOW_NOISE = "dit_low_noise"
IMPORT = "python -m launch.import_weights --source=DIR --out=DIR"
AGAIN = f"import again: {IMPORT}"


def resolve(folder: str) -> str:
    """`folder`, or the package's own for `EMBEDDED`."""
    return str(EMBEDDED_FOLDER) if folder == EMBEDDED else folder


def exists(folder: str) -> bool:
    """Whether `folder` is a model folder, imported or that of the package."""
    return bool(folder) and (epath.Path(resolve(folder)) / MODEL_FILE).exists()


def save_file(folder: Path, name: str, leaves: Mapping[str, np.ndarray]) -> Path:
    """Writes part `name` as one safetensors file, in place of an earlier one; for parts of some megabytes."""
    specs = {path: files.Spec(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return files.write(folder, name, specs, leaves.items(), math.inf)[0]


def save_part(folder: epath.PathLike, name: str, leaves: Iterable[tuple[str, Any]]) -> None:
    """Writes part `name` from its leaves, pairs of path and array; the folder has its name when the last leaf is on the disk."""
    path = epath.Path(folder).absolute() / name
    if path.exists():
        raise RequestError(f"{path}: exists already; give another folder, or remove it")
    unfinished = path.parent / f"{name}.partial_save"  # what Orbax leaves behind if an earlier attempt was interrupted
    if unfinished.exists():
        unfinished.rmtree()
    with _context():
        for group in _groups(leaves, size=lambda item: item[1].nbytes):
            ocp.partial.save(path, dict(group))
            group.clear()
        ocp.partial.finalize(path)
    checksums.write(path)


def load_part(
    folder: epath.PathLike,
    name: str,
    params: Mapping[str, Any],
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
    together: bool = False,
) -> dict[str, jax.Array]:
    """Part `name` as arrays by path, for a model whose leaves have the shapes of `params`.

    `sharding` is one sharding for all leaves or one for each path; None puts everything on the first device. `dtype` None keeps the
    stored types. A part whose leaves have other names or shapes is a `RequestError`, and so are a damaged one and one with numbers that
    are not finite. Processes that load it `together`, all at the same time, share the comparison with the checksums.
    """
    require_whole(folder, name, together)
    stored = part_leaves(folder, name)
    misshaped = [path for path in stored if path in params and stored[path].shape != params[path].shape]
    problems = [
        *(f"{path} is {stored[path].shape}, not {params[path].shape}" for path in misshaped),
        *(f"{path} is absent" for path in params if path not in stored),
        *(f"{path} is not of this model" for path in stored if path not in params),
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise RequestError(
            f"{epath.Path(folder) / name}: not the {name} of this configuration: {'; '.join(problems[:6])}{more}; "
            f"give the --config it was made for, or import again: {IMPORT}"
        )
    if not isinstance(sharding, Mapping):
        sharding = dict.fromkeys(stored, sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    targets = {path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding[path]) for path, leaf in stored.items()}
    leaves = dict(_read(folder, name, targets))
    require_finite(leaves, str(epath.Path(folder) / name), AGAIN)
    return leaves


def read_part(folder: epath.PathLike, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Part `name` leaf by leaf, as pairs of path and array in host memory, in the order of `part_leaves`; refused as by `load_part`."""
    require_whole(folder, name)
    # For a numpy target Orbax returns a numpy array. It reads only the target's dtype and shape, so the targets take no memory.
    leaves = part_leaves(folder, name).items()
    for path, leaf in _read(folder, name, {path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in leaves}):
        require_finite({path: leaf}, str(epath.Path(folder) / name), AGAIN)
        yield path, leaf
        del leaf  # the next one may be as large


def require_whole(folder: epath.PathLike, name: str, together: bool = False) -> None:
    """A `RequestError` if a file of part or vocabulary `name` differs from its checksum; a line is printed if there are none."""
    root, file, within = epath.Path(folder) / name, _file(folder, name), ()
    if not (root / checksums.OF_ONE).exists():  # they are those of the whole folder, or there are none
        root, within = epath.Path(folder), (name, file.name)
    share = (jax.process_index(), jax.process_count()) if together else (0, 1)
    reason = checksums.mismatch(root, within, *share)
    reason = first_text(reason) if together else reason
    require(not reason, f"{root}: damaged, {reason}; restore it from a copy, or remove {name} and import again: {IMPORT}")
    if not checksums.known(root, within) and (file.is_file() or (epath.Path(folder) / name).exists()):
        checksums.print_once(f"{folder}: written by an earlier version, without checksums; its values are not compared")


def part_leaves(folder: epath.PathLike, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every leaf of part `name`, without reading it."""
    path = epath.Path(folder).absolute() / name
    if (file := _file(folder, name)).is_file():
        tensors = files.inspect([file])
        wrong = [f"{key} is {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in files.DTYPES]
        wrong += [f"{key} is cut off" for key, tensor in tensors.items() if tensor.truncated]
        require(not wrong, f"{file}: {', '.join(wrong[:6])}; restore it from a copy, or {AGAIN}")
        return {key: jax.ShapeDtypeStruct(tensor.shape, files.DTYPES[tensor.dtype]) for key, tensor in tensors.items()}
    if not path.exists():
        raise RequestError(f"{path}: this checkpoint has no {name}; import one: {IMPORT}")
    with _context():
        metadata = ocp.metadata(path).metadata
    return {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in metadata.items()}


def write_model(folder: epath.PathLike, parts: Mapping[str, Any]) -> None:
    """Writes the configurations of `parts` to model.json, beside those of the parts it already has."""
    path = epath.Path(folder) / MODEL_FILE
    known = read_model(folder) if path.exists() else {}
    content = {"format": FORMAT, "parts": {name: asdict(config) for name, config in {**known, **parts}.items()}}
    atomic.write_whole(path, json.dumps(content, indent=2))


def read_model(folder: epath.PathLike) -> dict[str, Any]:
    """The configuration of each part that `folder` holds, by the part's name in `Config`."""
    path = epath.Path(folder) / MODEL_FILE
    if not path.exists():
        raise RequestError(f"{folder}: no checkpoint, {MODEL_FILE} is absent; make one: {IMPORT}")
    content = atomic.read_json(path, AGAIN, "parts")
    if content.get("format") != FORMAT:
        raise RequestError(f"{path}: format {content.get('format')}, this version reads {FORMAT}; import again: {IMPORT}")
    types, parts = get_type_hints(Config) | {LOW_NOISE: DiTConfig}, {}
    for name, values in content["parts"].items():
        require(is_dataclass(types.get(name)), f"{path}: part {name} is unknown to this version; import again: {IMPORT}")
        parts[name] = configuration(types[name], values, f"{path}: {name}")
    return parts


def require_model(folder: epath.PathLike, config: Config, of: Collection[kinds.Kind] = ("model",)) -> Sequence[str]:
    """The names of the parts in `folder`; a `RequestError` for the first field of these kinds in which `config` differs."""
    stored = read_model(folder)
    for name, part in stored.items():
        for field, value, found in kinds.differences(part, getattr(config, name), of):
            raise RequestError(
                f"{folder}: made with {name}.{field}={value!r}, the configuration has {found!r}; "
                f"give the --config it was made for, or --{name}.{field}={value!r}{named.fitting(stored, of)}"
            )
    return tuple(stored)


def configuration(of: Any, values: Any, at: str, remedy: str = AGAIN) -> Any:
    """A configuration of type `of` from JSON; `at` and `remedy` begin and end the message about fields that it does not have."""
    require(isinstance(values, Mapping), f"{at}: {str(values)[:60]} is no {of.__name__}; {remedy}")
    unknown = sorted(set(values) - {field.name for field in fields(of)})
    require(not unknown, f"{at}: {', '.join(unknown)} of {of.__name__} is unknown to this version; {remedy}")
    hints, found = get_type_hints(of), {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            found[name] = configuration(hints[name], value, f"{at}: {name}", remedy)
        else:
            require_type(value, hints[name], f"{at}: {name}", f"; {remedy}")
            found[name] = tuple(value) if isinstance(value, list) else value
    return of(**found)


def _file(folder: epath.PathLike, name: str) -> Path:
    """Where part `name` lies if it is one file."""
    return Path(folder) / f"{name}.safetensors"


def _context() -> ocp.Context:
    """Orbax's settings for weights: no copy before writing, because the arrays do not change; no compression, which gains 8% at best."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context


def _read(folder: epath.PathLike, name: str, targets: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves that `targets` describe, read in groups, because Orbax takes twice the memory of what it reads at once."""
    if (file := _file(folder, name)).is_file():
        tensors = files.inspect([file])
        for path, array in zip(targets, files.read(tensors[path] for path in targets), strict=True):
            yield path, _placed(array, targets[path])
        return
    size = {path: math.prod(target.shape) * target.dtype.itemsize for path, target in targets.items()}
    for group in _groups(targets, size.__getitem__):
        with _context():
            wanted = dict.fromkeys(targets, ocp.PLACEHOLDER) | {path: targets[path] for path in group}
            arrays = ocp.load(epath.Path(folder).absolute() / name, wanted)
        for path in group:
            yield path, arrays.pop(path)


def _placed(array: np.ndarray, target: Any) -> Any:
    """`array` itself for a numpy target, else a JAX array of the target's type and sharding; each process holds its own shards."""
    if isinstance(target, np.ndarray):
        return array
    cast = array.astype(target.dtype)
    return jax.make_array_from_callback(cast.shape, target.sharding, lambda index: cast[index])


def _groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """`items` in order, in lists that end when their sizes add up to `GROUP_BYTES`. A caller that empties a list frees its items."""
    group, total = [], 0
    for item in items:
        total += size(item)
        group.append(item)
        del item  # the next one may be as large
        if total >= GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group
