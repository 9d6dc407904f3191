"""GGUF files of a diffusion transformer, as ComfyUI-GGUF writes them: the original's names, shapes in reverse, some reshaped.

A tensor whose rows are no whole blocks is stored as rows of 256 numbers; `comfy.gguf.orig_shape.NAME` has its shape. The package `gguf`
reads the header and unpacks the blocks; it is not installed by default.
"""

import math
from pathlib import Path
from typing import Any

from configs.errors import RequestError, require
from omnitransfer_jax.weights.files import Tensor


def is_gguf(file: Path) -> bool:
    """Whether a file is of this format, whatever its name."""
    with open(file, "rb") as stream:
        return stream.read(4) == b"GGUF"


def tensors(file: Path) -> list[Tensor]:
    """The tensors of a GGUF file, from its header; a `RequestError` if it holds another kind of model."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise RequestError(f"{file}: a GGUF file, for which the package gguf is needed: pip install gguf") from None
    try:
        reader = GGUFReader(file)
        kind = _content(reader, "general.architecture")
        found = [_tensor(file, tensor, _content(reader, f"comfy.gguf.orig_shape.{tensor.name}")) for tensor in reader.tensors]
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise RequestError(f"{file}: a GGUF file that is cut off or damaged ({type(error).__name__}: {error}); download it again") from None
    require(
        kind in (None, "wan"), f"{file}: a GGUF file of {kind!r}; read is the diffusion transformer, 'wan', so take safetensors of others"
    )
    return found


def _content(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _tensor(file: Path, tensor: Any, shape: list[int] | None) -> Tensor:
    """A tensor of the package as one of ours; `shape` is that before it was stored as rows of 256."""
    stored = tuple(int(size) for size in reversed(tensor.shape))
    if shape is not None and math.prod(shape) != math.prod(stored):
        raise ValueError(f"{tensor.name} has shape {stored}, before it was stored {shape}")
    return Tensor(file, tensor.name, tensor.tensor_type.name, tuple(shape or stored), int(tensor.n_bytes), False, int(tensor.data_offset))
