"""Weights by a table, both ways: a checkpoint's tensors to the leaves of a model, and leaves to tensors.

Loading is strict: every tensor of the checkpoint is used, every leaf is filled, and all shapes and types are right, or one message names
everything that is wrong. Loading and saving stream: memory holds one leaf and one tensor at a time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from configs.errors import RequestError
from omnitransfer_jax.folders.finite import require_finite
from omnitransfer_jax.weights import files, quantised
from omnitransfer_jax.weights.files import SHARD_BYTES, Spec, Tensor
from omnitransfer_jax.weights.table import Entry

Abstract = Mapping[str, Any]  # path -> anything with a shape and a dtype
WRAPPERS = ("module.", "model.")  # of DataParallel and of training frameworks
COMPILED = "_orig_mod."  # of torch.compile, also around single blocks
NAMED = 6  # how many tensors a message names; it counts the others


def select(
    tensors: Mapping[str, Tensor],
    table: Sequence[Entry],
    prefixes: Sequence[str] = (),
    ignored: Sequence[str] = (),
    copies: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """`tensors` by the names that `table` has for them, without those that it has no name for and a pattern of `ignored` matches.

    A name in the checkpoint, in the table or in a pattern may have some of `prefixes` and `WRAPPERS` or leave them off. An ignored tensor
    that `copies` names as the copy of another takes its place if that is absent.
    """
    names = {bare(entry.theirs, prefixes): entry.theirs for entry in table}
    selected: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        known = bare(stored, prefixes)
        name, spellings = names.get(known, stored), (known, *(prefix + known for prefix in prefixes))
        if known not in names and any(fnmatch(spelling, pattern) for spelling in spellings for pattern in ignored):
            unused[known] = tensor
            continue
        if name in selected:
            raise RequestError(f"{tensor.file}: {selected[name].name} and {stored} are the same tensor; remove one of them")
        selected[name] = tensor
    return {name: unused[copy] for copy, name in copies.items() if copy in unused and name in names.values()} | selected


def bare(name: str, prefixes: Sequence[str] = ()) -> str:
    """A tensor's name without `prefixes` and what PyTorch's wrappers add: `_orig_mod.` anywhere, the others in front, in any order."""
    name = name.replace(COMPILED, "")
    while prefix := next((prefix for prefix in (*prefixes, *WRAPPERS) if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def problems(tensors: Mapping[str, Tensor], table: Sequence[Entry], params: Abstract, dtype: np.dtype | None = None) -> list[str]:
    """Everything because of which `tensors` cannot fill `params`, one line for each kind of problem. Reads no data.

    Shapes in messages are the checkpoint's. Without a `dtype` to convert to, all tensors of one leaf must have the same type.
    """
    expected = specs(table, params)
    known = {name: tensor for name, tensor in tensors.items() if name in expected}
    misshaped = [name for name, tensor in known.items() if tensor.shape != expected[name].shape]
    rows = _rows(table)
    mixed = [path for path in rows if len({quantised.kept(tensors[e.theirs].dtype) for e in rows[path] if e.theirs in tensors}) > 1]
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshaped": [f"{name} is {_shape(known[name].shape)}, not {_shape(expected[name].shape)}" for name in misshaped],
        f"of a type other than {', '.join(quantised.READ)}": [
            f"{n} is {t.dtype}" for n, t in known.items() if t.dtype not in quantised.READ
        ],
        "of several types in one stack, so give --dtype": [
            " and ".join(f"{name} is {tensors[name].dtype}" for name in _first_of_each_type(rows[path], tensors))
            for path in (mixed if dtype is None else [])
        ],
        "cut off, so download again": [f"{name} in {t.file.name}" for name, t in known.items() if t.truncated],
    }
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def load(
    tensors: Mapping[str, Tensor], table: Sequence[Entry], params: Abstract, *, dtype: np.dtype | None = None
) -> dict[str, np.ndarray]:
    """All leaves by path; if there are problems, a `RequestError` names them all. `dtype` None keeps the checkpoint's types."""
    found = problems(tensors, table, params, dtype)
    if found:
        raise RequestError("; ".join(found))
    return dict(leaves(tensors, table, params, dtype=dtype))


def leaves(
    tensors: Mapping[str, Tensor], table: Sequence[Entry], params: Abstract, *, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves one after the other, as path and array; `tensors` must have no `problems`. Numbers that are not finite are refused."""
    for path, entries in _rows(table).items():
        entries = sorted(entries, key=lambda entry: tensors[entry.theirs].file)
        sources = [tensors[entry.theirs] for entry in entries]
        leaf = np.empty(params[path].shape, dtype or quantised.kept(sources[0].dtype))
        for entry, tensor, array in zip(entries, sources, files.read(sources), strict=True):
            index, parts = entry.part
            row = ... if entry.layer is None else entry.layer
            leaf[row] = entry.layout.to_ours(np.split(quantised.values(tensor, array), parts)[index])
            require_finite({tensor.name: leaf[row]}, str(tensor.file), "download it again")
        yield path, leaf


def specs(table: Sequence[Entry], params: Abstract) -> dict[str, Spec]:
    """Shape and type of every tensor that `table` makes of `params`, in the order of the table.

    It needs no memory, because the layouts change broadcast views. A table that does not cover the model exactly is a `ValueError`.
    """
    _require_cover(table, params)
    found: dict[str, Spec] = {}
    for entry in table:
        leaf = params[entry.ours]
        shape = leaf.shape if entry.layer is None else leaf.shape[1:]
        piece = entry.layout.to_theirs(np.broadcast_to(np.zeros((), bool), shape)).shape
        if entry.part[1] > 1:
            piece = (piece[0] * entry.part[1], *piece[1:])
        spec = Spec(piece, np.dtype(leaf.dtype))
        if found.setdefault(entry.theirs, spec) != spec:
            raise ValueError(f"{entry.theirs}: its parts are {found[entry.theirs]} and {spec}")
    return found


def save(
    leaves: Iterable[tuple[str, Any]],
    params: Abstract,
    table: Sequence[Entry],
    folder: Path,
    stem: str,
    *,
    prefix: str = "",
    shard_bytes: int | float = SHARD_BYTES,
) -> list[Path]:
    """Writes `leaves`, pairs of path and array in any order, as safetensors files and returns their paths; `params` has their shapes."""
    announced = {prefix + name: spec for name, spec in specs(table, params).items()}
    values = ((prefix + name, array) for name, array in _tensors(leaves, table))
    return files.write(folder, stem, announced, values, shard_bytes)


def _tensors(leaves: Iterable[tuple[str, Any]], table: Sequence[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of each leaf in turn; a tensor that several leaves are fused into comes after the last of them."""
    rows = _rows(table)
    waiting: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for path, leaf in leaves:
        array = np.asarray(leaf)
        for entry in rows[path]:
            piece = entry.layout.to_theirs(array if entry.layer is None else array[entry.layer])
            index, parts = entry.part
            waiting[entry.theirs][index] = piece
            if len(waiting[entry.theirs]) == parts:
                pieces = waiting.pop(entry.theirs)
                yield entry.theirs, piece if parts == 1 else np.concatenate([pieces[i] for i in range(parts)])


def _rows(table: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each leaf, by its path."""
    rows: dict[str, list[Entry]] = defaultdict(list)
    for entry in table:
        rows[entry.ours].append(entry)
    return rows


def _require_cover(table: Sequence[Entry], params: Abstract) -> None:
    """A `ValueError` unless the table has every leaf, every layer of a stack and every part of a fused tensor exactly once."""
    rows = _rows(table)
    if set(rows) != set(params):
        raise ValueError(f"table and model differ in {sorted(set(rows) ^ set(params))}")
    for path, entries in rows.items():
        layers = [entry.layer for entry in entries]
        if layers != [None] and sorted(layers, key=lambda layer: (layer is None, layer)) != list(range(params[path].shape[0])):
            raise ValueError(f"{path} of shape {params[path].shape} is filled by layers {layers}")
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for entry in table:
        parts[entry.theirs].append(entry.part)
    for name, found in parts.items():
        if sorted(found) != [(i, len(found)) for i in range(len(found))]:
            raise ValueError(f"{name} is used in parts {found}")


def _first_of_each_type(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> list[str]:
    firsts: dict[np.dtype, str] = {}
    for entry in entries:
        if entry.theirs in tensors:
            firsts.setdefault(quantised.kept(tensors[entry.theirs].dtype), entry.theirs)
    return list(firsts.values())


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
