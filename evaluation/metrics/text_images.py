"""How well a clip fits its prompt, and how it looks, by a CLIP folder in transformers' layout that the user names.

    text similarity   the mean over frames of the cosine of the frame's and the prompt's vectors
    aesthetic score   a linear head on the frames' vectors of norm 1, a tenth of it, mean over frames (LAION's predictor, as in VBench)

The paper's CLIP-T is of a network for whole videos (ViCLIP), so its figures are not comparable. LAION's head belongs to
openai/clip-vit-large-patch14; its file has `weight` (1 D) and `bias` (1).
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from configs.errors import RequestError, require
from evaluation.metrics import weight_file

FRAMES = 16  # evenly spaced, of each clip


class TextAndImages:
    """The two towers of a folder, run by transformers in PyTorch, on the processor."""

    def __init__(self, folder: str):
        try:
            import torch
        except ImportError:
            raise RequestError("needs PyTorch; pip install omnitransfer-jax[torch]") from None
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.torch = torch
        try:
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise RequestError(
                f"{folder}: no CLIP of transformers ({reason}); give a folder with config.json and model.safetensors"
            ) from None
        kind = self.model.config.model_type
        require(kind == "clip", f"{folder}: a {kind}, a clip is needed, with towers of text and images")
        self.longest: int = self.model.config.text_config.max_position_embeddings

    def images(self, frames: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        """A vector of norm 1 for each picture."""
        pixels = self.processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
        with self.torch.inference_mode():
            return unit(self.model.get_image_features(pixel_values=pixels))

    def text(self, prompt: str) -> Float[np.ndarray, " D"]:
        """The vector of norm 1 of a text, cut off where the network's context ends."""
        tokens = self.tokenizer([prompt], truncation=True, max_length=self.longest, return_tensors="pt")
        with self.torch.inference_mode():
            return unit(self.model.get_text_features(**tokens))[0]


def unit(output: Any) -> Float[np.ndarray, "N D"]:
    """The vectors of an output of transformers, with norm 1."""
    found = np.asarray(getattr(output, "pooler_output", output), np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@cache
def load(folder: str) -> TextAndImages:
    """The towers of a folder, read once for all metrics."""
    return TextAndImages(folder)


class AestheticHead:
    """A linear head on vectors of norm 1."""

    def __init__(self, path: str):
        arrays = weight_file.load(path, ("weight", "bias"), "a linear head") if not Path(path).suffix.startswith(".pt") else of_torch(path)
        self.weight, self.bias = arrays["weight"].reshape(-1), float(arrays["bias"].reshape(-1)[0])

    def __call__(self, vectors: Float[np.ndarray, "N D"]) -> float:
        """The mean score, about 0 to 1."""
        width = len(self.weight)
        require(vectors.shape[1] == width, f"the head is for vectors of {width} numbers, those of --clip have {vectors.shape[1]}")
        return float((vectors @ self.weight + self.bias).mean() / 10)


def of_torch(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file of PyTorch (LAION's own form)."""
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: np.asarray(found[name].float()) for name in ("weight", "bias")}
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise RequestError(f"{path}: no linear head ({' '.join(str(error).split())[:100]}); give `weight` (1 D) and `bias` (1)") from None
