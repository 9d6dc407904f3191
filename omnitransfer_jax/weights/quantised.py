"""Weights of 8 bits or fewer: float8 with and without scales, and the blocks of GGUF files. They are read as the numbers they stand for.

    plain     float8 tensors, cast
    scaled    float8 tensors, each with a tensor of float32 beside it that it is multiplied with: X.scale_weight beside X.weight, in a file
              that holds `scaled_fp8`; or, since 2025, X.weight_scale, and X.comfy_quant with the format's name (ComfyUI QUANTIZATION.md)
    blocks    of 32 or 256 numbers with scales of their own (GGUF; gguf_file.py)

Scales of the activations (scale_input, input_scale) belong to kernels of float8, of which there are none here. Computed in float32.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from configs.errors import RequestError, require
from omnitransfer_jax.weights import files, gguf_file
from omnitransfer_jax.weights.files import DTYPES, FP8, Tensor

BLOCKS = {"Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
"""Of each type of block that is read: how many numbers it holds, in how many bytes (ggml-common.h)."""
READ = (*DTYPES, *FP8, *BLOCKS)
GROUP = 2**14  # blocks that are read at a time
SCALES = (".scale_weight", ".weight_scale")
OF_ACTIVATIONS = (".scale_input", ".input_scale")
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def inspect(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, or of one GGUF file, by name, from their headers; those of float8 with their scales."""
    if len(paths) == 1 and gguf_file.is_gguf(paths[0]):
        return {tensor.name: tensor for tensor in gguf_file.tensors(paths[0])}
    return attach_scales(files.inspect(paths))


def kept(code: str) -> np.dtype:
    """The type in which tensors of type `code` are stored here if none is asked for; narrow ones become bfloat16, which has the range."""
    return DTYPES.get(code, np.dtype(ml_dtypes.bfloat16))


def values(tensor: Tensor, read: np.ndarray) -> np.ndarray:
    """What `files.read` yields for `tensor`, as the numbers it stands for: float32 if it is quantised, else itself."""
    if tensor.dtype in BLOCKS:
        return _unpack(read, tensor.dtype).reshape(tensor.shape)
    if tensor.dtype not in FP8:
        return read
    found = read.astype(np.float32)
    return found if tensor.scale is None else np.multiply(found, tensor.scale, out=found)


def _unpack(data: np.ndarray, code: str) -> np.ndarray:
    """The numbers in the blocks `data`."""
    from gguf import GGMLQuantizationType, quants  # an optional package

    numbers, size = BLOCKS[code]
    blocks, found = data.reshape(-1, size), np.empty((data.size // size, numbers), np.float32)
    for start in range(0, len(blocks), GROUP):
        group = slice(start, start + GROUP)
        found[group] = quants.dequantize(blocks[group].reshape(1, -1), GGMLQuantizationType[code]).reshape(-1, numbers)
    return found


def attach_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in which those of float8 have their scales, without the tensors that only say how others are quantised.

    What belongs to no tensor of float8 stays. A scale that is neither one number nor one a row, and a format that is not read, are
    `RequestError`s.
    """
    narrow = {name.removesuffix(".weight"): name for name, tensor in tensors.items() if tensor.dtype in FP8}
    found, scales = dict(tensors), {}
    for name, tensor in tensors.items():
        base, dot, last = name.rpartition(".")
        if last == "scaled_fp8" and narrow:
            del found[name]
        elif last == "comfy_quant":
            _require_format(tensor)
            found.pop(name)
        elif dot + last in (*SCALES, *OF_ACTIVATIONS) and base in narrow:
            del found[name]
            if dot + last in SCALES:
                scales[narrow[base]] = tensor
    for name, scale in zip(scales, files.read(scales.values()), strict=True):
        found[name] = tensors[name]._replace(scale=_scale(scales[name], scale, tensors[name]))
    return found


def _require_format(tensor: Tensor) -> None:
    (content,) = files.read([tensor])
    try:
        name = json.loads(content.tobytes())["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(f"{tensor.file}: {tensor.name} names no format; download it again") from None
    require(name in FORMATS, f"{tensor.file}: {tensor.name} is {name!r}; {', '.join(FORMATS)} are read, so take the file of one of them")


def _scale(scale: Tensor, value: np.ndarray, of: Tensor) -> np.ndarray:
    """A scale in the shape in which it multiplies the tensor that it belongs to."""
    rows = of.shape[:1] + (1,) * (len(of.shape) - 1)
    require(
        scale.dtype in DTYPES and (value.size == 1 or value.shape == rows),
        f"{scale.file}: {scale.name} is {scale.dtype} of shape {scale.shape}; read is one float for {of.name} or one for each row",
    )
    return value.astype(np.float32).reshape(() if value.size == 1 else rows)


def note(tensors: Mapping[str, Tensor]) -> str:
    """What to say of tensors that are quantised; empty if none is."""
    narrow = [tensor for tensor in tensors.values() if tensor.dtype not in DTYPES]
    if not narrow:
        return ""
    scaled = sum(tensor.scale is not None for tensor in narrow)
    return f"{len(narrow)} tensors of {', '.join(sorted({t.dtype for t in narrow}))}" + (f", {scaled} of them scaled" if scaled else "")
