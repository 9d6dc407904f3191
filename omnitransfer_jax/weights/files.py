"""safetensors files: their headers, their tensors one at a time, and new files that are whole or absent."""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from configs.errors import RequestError
from omnitransfer_jax.folders import atomic

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}  # in the order in which the library writes them
CODES = {dtype: code for code, dtype in DTYPES.items()}
FP8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
OTHERS = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8", "I64": "i8", "F64": "f8",
    "C64": "c8",
}  # fmt: skip
FORMAT = {**DTYPES, **FP8, "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), **{code: np.dtype(name) for code, name in OTHERS.items()}}
"""Every type of the format that has whole bytes; weights have few of them."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SHARD_BYTES = 5 * 10**9  # the size of the published shards
LARGEST_HEADER = 100_000_000  # the library's own limit


class Tensor(NamedTuple):
    """Where a tensor lies, its type and its shape, as the header of its file says."""

    file: Path
    name: str
    """Its name in the file."""
    dtype: str
    """The format's code, F32."""
    shape: tuple[int, ...]
    nbytes: int
    truncated: bool
    """The file ends before the tensor does."""
    start: int
    """Where its bytes begin in the file."""
    scale: np.ndarray | None = None
    """What its numbers are multiplied with (quantised.py)."""


class Spec(NamedTuple):
    """Shape and type of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def find(source: Path, pattern: str = "*.safetensors", variant: str = "") -> list[Path]:
    """The safetensors files of `source`: the file itself, or the folder's files that its index names or `pattern` matches.

    Files may be there in several variants (`STEM.fp16.safetensors`). `variant` is taken if there is such a one, else the files without
    a variant if they are complete, else the one variant that is. A pickle is refused, because reading one runs the code that it holds.
    """
    if source.is_file():
        refuse_pickles([source])
        return [source]
    if not source.is_dir():
        raise RequestError(f"{source}: no such file or folder; give the one that holds the .safetensors files")
    indices, found = _by_variant(source, f"{pattern}.index*.json", pattern), _by_variant(source, pattern, pattern)
    names = sorted(indices | found)
    if not names:
        refuse_pickles(sorted(path for path in source.iterdir() if path.suffix in PICKLES))
        gguf = next(source.glob("*.gguf"), None)
        raise RequestError(f"{source}: no {pattern} in it; give {f'{gguf} itself' if gguf else 'the folder that holds the weights'}")
    if variant and variant in names:
        return _complete(source, indices.get(variant, []), found.get(variant, []))
    complete, problems = {}, []
    for name in names:
        try:
            complete[name] = _complete(source, indices.get(name, []), found.get(name, []))
        except RequestError as error:
            problems.append(error)
        if "" in complete:
            return complete[""]
    if len(complete) > 1:
        raise RequestError(f"{source}: weights in the variants {', '.join(complete)}; give one of them with --variant")
    if problems and not complete:
        raise problems[0]
    return next(iter(complete.values()))


def variant_of(file: Path, pattern: str) -> str:
    """The variant in the name of a file that matches `pattern`, or of its index; empty if there is none.

    It is fp16 in model.fp16.safetensors, model-00001-of-00002.fp16.safetensors and model.safetensors.index.fp16.json.
    """
    rest = file.name.removeprefix(pattern.partition("*")[0])
    found = re.fullmatch(r"(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", rest)
    return next(filter(None, found.groups()), "") if found else ""


def _by_variant(source: Path, glob: str, pattern: str) -> dict[str, list[Path]]:
    """The files of a folder that `glob` matches, by their variants."""
    found: dict[str, list[Path]] = {}
    for path in filter(Path.is_file, sorted(source.glob(glob))):  # not a pipe or a device, which would never end
        found.setdefault(variant_of(path, pattern), []).append(path)
    return found


def _complete(source: Path, indices: Sequence[Path], found: Sequence[Path]) -> list[Path]:
    """The files of one variant; a `RequestError` if one of them is absent."""
    if len(indices) != 1:
        shards = max([0, *(int(number) for path in found for number in re.findall(r"-\d+-of-(\d+)\b", path.name))])
        if not found:
            raise RequestError(f"{source}: {', '.join(path.name for path in indices)} and no weights; download the folder again")
        if len(found) < shards:
            raise RequestError(f"{source}: {len(found)} of {shards} files like {found[0].name}; download the folder again")
        return list(found)
    names = atomic.read_json(indices[0], "download it again", "weight_map")["weight_map"].values()
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or not names:
        raise RequestError(f"{indices[0]}: weight_map names {f'{str(wrong[0])[:60]} as a file' if wrong else 'no file'}; download it again")
    present = {path.name for path in source.iterdir() if path.is_file()}
    absent = sorted(set(names) - present)
    if absent:
        raise RequestError(f"{source}: {indices[0].name} names {', '.join(absent[:6])}, absent here; download the folder again")
    return sorted(source / name for name in set(names))


def refuse_pickles(paths: Sequence[Path]) -> None:
    """A `RequestError` with the command that converts it, if any of `paths` is a PyTorch pickle."""
    pickles = [path for path in paths if path.suffix in PICKLES]
    if pickles:
        raise RequestError(
            f"{', '.join(map(str, pickles))}: a pickle, which can run code when it is read; convert it where you trust it: "
            f"import torch; from safetensors.torch import save_file; save_file({{k: v.contiguous() for k, v in "
            f"torch.load({pickles[0].name!r}, map_location='cpu', weights_only=True).items()}}, "
            f"{pickles[0].with_suffix('.safetensors').name!r})"
        )


def inspect(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of all `files` by name, from their headers alone.

    A `RequestError` names all files that are no safetensors files, and names that two files have. Tensors that the end of a file cuts
    off are marked as `truncated`.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    twice: dict[tuple[Path, Path], str] = {}
    for file in files:
        try:
            found, end = _tensors(file)
        except (ValueError, OSError, RecursionError) as error:
            problems.append(f"{file}: {error}")
            continue
        if (surplus := file.stat().st_size - end) > 0:
            problems.append(f"{file}: {surplus} bytes more than its header lists; download it again")
        for tensor in found:
            if tensor.name in tensors:
                twice.setdefault((tensors[tensor.name].file, file), tensor.name)
            tensors[tensor.name] = tensor
    problems += [f"{name} and maybe more is in {one} and in {other}; remove one of them" for (one, other), name in twice.items()]
    if problems:
        raise RequestError("; ".join(problems))
    return tensors


def _tensors(file: Path) -> tuple[list[Tensor], int]:
    """The tensors of one file, one after the other without a gap, and where they end; a `ValueError` says what is wrong with its header."""
    header, start = _header(file)
    size, end, found = file.stat().st_size, 0, []
    places = sorted((_place(name, entry), name) for name, entry in header.items())
    for (first, last), name in places:
        if first != end:
            raise ValueError(f"{name}.data_offsets begin at {first}, the tensor before ends at {end}; download it again")
        end = last
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        found.append(Tensor(file, name, dtype, shape, last - first, start + last > size, start + first))
    return found, start + end


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its data starts; read here, because the library opens no damaged file."""
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LARGEST_HEADER + 1
        text = stream.read(length) if length <= LARGEST_HEADER else b""
    if not text.startswith(b"{") or len(text) != length:
        raise ValueError(f"no safetensors file, it starts with {prefix!r} and has {file.stat().st_size} bytes; download it again")
    header = json.loads(text, object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, whose names must differ: the format allows no name twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice; download it again")
    return found


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where the header says that tensor `name` begins and ends, counted from the first; a `ValueError` names the key that is wrong."""
    keys: dict[str, Any] = entry if isinstance(entry, dict) else {}
    values: list[Any] = [keys.get(key) for key in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = values
    right = {
        "dtype": isinstance(dtype, str) and dtype in FORMAT,
        "shape": _naturals(shape),
        "data_offsets": _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
    }
    for key in right:
        if not right[key]:
            found = f"is {str(keys[key])[:60]}" if key in keys else "is absent"
            raise ValueError(f"{name}.{key} {found}, which the format does not allow; download it again")
    nbytes = math.prod(shape) * FORMAT[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{name}.data_offsets span {offsets[1] - offsets[0]} bytes, {dtype} of shape {shape} has {nbytes}; download it again"
        )
    return offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def read(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The values of `tensors` in the order given, one at a time; a file is open only while its tensors are read.

    It reads into new memory, because the pages of a memory map stay in memory until the file is closed: up to a whole shard. What has no
    type of numpy's, as the blocks of a GGUF file, comes as bytes.
    """
    for file, group in groupby(tensors, key=lambda tensor: tensor.file):
        with open(file, "rb") as stream:
            for tensor in group:
                stream.seek(tensor.start)
                values = np.fromfile(stream, np.uint8, tensor.nbytes)
                if values.size != tensor.nbytes:
                    raise RequestError(f"{file}: ends within {tensor.name}; download it again")
                yield values.view(FORMAT[tensor.dtype]).reshape(tensor.shape) if tensor.dtype in FORMAT else values


def write(
    folder: Path, stem: str, specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]], shard_bytes: int | float = SHARD_BYTES
) -> list[Path]:
    """Writes the tensors of `specs`, whose values `arrays` yields in any order, in files of at most `shard_bytes`.

    The names are those of diffusers and transformers: `stem.safetensors`, or numbered shards and an index. No file has its name before
    all are complete. The bytes are those that the library writes, but it needs a whole file in memory: here the headers, which follow
    from the specs, come first, and each array is written to its place.
    """
    shards = _shards(specs, shard_bytes)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    partial = [folder / f".{name}.partial" for name in names]
    try:
        with ExitStack() as stack:
            places: dict[str, tuple[IO[bytes], int]] = {}
            for path, shard in zip(partial, shards, strict=True):
                stream = stack.enter_context(open(path, "wb"))
                places |= {name: (stream, offset) for name, offset in _write_header(stream, shard).items()}
            for name, array in arrays:
                if Spec(array.shape, array.dtype) != specs[name]:
                    raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {specs[name]}")
                stream, offset = places.pop(name)
                stream.seek(offset)
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if places:
                raise ValueError(f"no values for {sorted(places)}")
        for path, name in zip(partial, names, strict=True):
            atomic.place(path, folder / name)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        _write_index(folder / f"{stem}.safetensors.index.json", dict(zip(names, shards, strict=True)))
    return [folder / name for name in names]


def _shards(specs: Mapping[str, Spec], shard_bytes: int | float) -> list[dict[str, Spec]]:
    """`specs` in order, cut where the next tensor would make a shard larger than `shard_bytes`."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _write_header(stream: IO[bytes], shard: Mapping[str, Spec]) -> dict[str, int]:
    """Writes the header of a file and returns the offset of each tensor; the widest types come first, then the order is by name."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in sorted(shard.items(), key=lambda item: (list(CODES).index(item[1].dtype), item[0])):
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    start = 8 + len(text)
    stream.truncate(start + end)
    return {name: start + header[name]["data_offsets"][0] for name in shard}


def _write_index(path: Path, shards: Mapping[str, Mapping[str, Spec]]) -> None:
    index = {
        "metadata": {"total_size": sum(spec.nbytes for shard in shards.values() for spec in shard.values())},
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    atomic.write_whole(path, json.dumps(index, indent=2))
