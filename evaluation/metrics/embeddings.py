"""How alike two clips are to a network that describes pictures: style descriptors, faces. The network is an ONNX file that the user names.

As in the paper's measure (section 5.2), `REFERENCES` evenly spaced frames of the reference are compared with all frames of the clip, by
the cosine of their vectors: the mean over all pairs, and the best pair.

An ONNX network has one input, a batch of pictures (B 3 H W or B H W 3), and its first output is a vector for each. It is given pixels in
[0, 1], less `mean`, divided by `std`. A file NAME.json beside NAME.onnx may say {"mean": [r, g, b], "std": [r, g, b]}.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from configs.errors import RequestError, require

REFERENCES = 4  # frames of the reference
Frames = UInt8[np.ndarray, "N H W 3"]
Embed = Callable[[Frames], Float[np.ndarray, "N D"]]


class Scaling(NamedTuple):
    """What is taken from pixels in [0, 1], and by what they are then divided; red, green, blue."""

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


CLIP = Scaling((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # OpenAI CLIP, which CSD starts from
ARCFACE = Scaling((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Network:
    """An ONNX file as a function of pictures."""

    def __init__(self, path: str, scaling: Scaling):
        self.path, self.scaling, self.session = path, beside(Path(path), scaling), session(path)
        self.input = self.session.get_inputs()[0]
        shape = self.input.shape
        require(len(self.session.get_inputs()) == 1 and len(shape) == 4, f"{path}: its inputs are not one batch of pictures")
        require(3 in (shape[1], shape[3]), f"{path}: input {shape}; B 3 H W or B H W 3 needed")
        self.channels_first = shape[1] == 3
        self.size = tuple(shape[2:] if self.channels_first else shape[1:3])
        require(all(isinstance(side, int) for side in self.size), f"{path}: input {shape}; its height and width must be fixed")
        self.batch = shape[0] if isinstance(shape[0], int) else None

    def __call__(self, frames: Frames) -> Float[np.ndarray, "N D"]:
        """A vector for each picture, resized whole."""
        height, width = self.size
        pictures = [np.asarray(Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC)) for each in frames]
        x = ((np.stack(pictures) / 255 - self.scaling.mean) / self.scaling.std).astype(np.float32)
        x = x.transpose(0, 3, 1, 2) if self.channels_first else x
        require(self.batch in (None, 1), f"{self.path}: made for batches of {self.batch}; export it for 1, or any number")
        parts = [self.session.run(None, {self.input.name: each[None]})[0] for each in x]
        return np.concatenate([each.reshape(1, -1) for each in parts])


def session(path: str) -> Any:
    """The file in onnxruntime; a `RequestError` where either is absent."""
    try:
        import onnxruntime
    except ImportError:
        raise RequestError("needs the package onnxruntime; pip install onnxruntime") from None
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common type
        raise RequestError(f"{path}: no ONNX file that can be read ({' '.join(str(error).split())[:120]})") from None


def beside(path: Path, scaling: Scaling) -> Scaling:
    """What the JSON file beside a network says of its pixels; `scaling` without one."""
    file = path.with_suffix(".json")
    if not file.exists():
        return scaling
    try:
        content = json.loads(file.read_text())
        found = Scaling(*(tuple(map(float, content[key])) for key in Scaling._fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f'{file}: {error!r}; give {{"mean": [r, g, b], "std": [r, g, b]}}') from None
    require(len(found.mean) == len(found.std) == 3 and min(found.std) > 0, f"{file}: three numbers each, std above 0")
    return found


def spaced(clip: Frames, count: int = REFERENCES) -> Frames:
    """Evenly spaced frames, the first and the last among them."""
    return clip[np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)]


def similarity(of_clip: Float[np.ndarray, "N D"], of_reference: Float[np.ndarray, "M D"]) -> tuple[float, float]:
    """The mean and the best cosine of the vectors of two clips."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (of_clip.astype(np.float64), of_reference))
    found = a @ b.T
    return float(found.mean()), float(found.max())
