"""Similarity of vectors by hand; what a network is given; style vectors of a real network of stylised clips, where it is at hand.

python -m pytest -n 0 -s -m slow tests/evaluation/metrics/test_embeddings.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines import clips
from evaluation.metrics import embeddings

SHARED = Path(__file__).parents[4] / "shared"
PREDICT, STYLES = (SHARED / "weights" / name for name in ("style_predict.onnx", "multistyle26.onnx"))
FILMS = (SHARED / "clips" / "davis" / "lucia.mp4", SHARED / "clips" / "misc" / "01_dog.mp4")


def test_the_mean_and_the_best_cosine():
    a, b = np.array([[1.0, 0], [0, 2]]), np.array([[3.0, 0], [1, 1]])
    mean, best = embeddings.similarity(a, b)
    assert mean == pytest.approx((1 + 0.5**0.5 + 0 + 0.5**0.5) / 4)
    assert best == pytest.approx(1)
    assert embeddings.similarity(-a, b)[1] == pytest.approx(0)


def test_the_frames_of_the_reference():
    clip = np.arange(81, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    assert embeddings.spaced(clip)[:, 0, 0, 0].tolist() == [0, 27, 53, 80]
    assert len(embeddings.spaced(clip[:2])) == 2


class Session:
    """What a network of the mean colour would be in onnxruntime."""

    def __init__(self, *shape):
        self.shape = shape

    def get_inputs(self):
        return [SimpleNamespace(name="x", shape=self.shape)]

    def run(self, names, inputs):
        assert inputs["x"].dtype == np.float32
        return [inputs["x"].mean((2, 3) if self.shape[1] == 3 else (1, 2))[:, None]]


@pytest.mark.parametrize("shape", [("B", 3, 8, 10), (1, 8, 10, 3)])
def test_a_network_is_given_what_it_was_trained_with(shape, monkeypatch, tmp_path):
    monkeypatch.setattr(embeddings, "session", lambda path: Session(*shape))
    frames = np.zeros((2, 20, 30, 3), np.uint8) + np.array([255, 51, 0], np.uint8)
    network = embeddings.Network(str(tmp_path / "a.onnx"), embeddings.ARCFACE)
    np.testing.assert_allclose(network(frames), [[1, -0.6, -1]] * 2, atol=1e-6)
    (tmp_path / "a.json").write_text(json.dumps({"mean": [0, 0.2, 0], "std": [1, 1, 0.5]}))
    network = embeddings.Network(str(tmp_path / "a.onnx"), embeddings.ARCFACE)
    np.testing.assert_allclose(network(frames), [[1, 0, 0]] * 2, atol=1e-6)
    for text in ("{}", "no", '{"mean": [1, 2], "std": [1, 2, 3]}', '{"mean": [0, 0, 0], "std": [0, 1, 1]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(RequestError, match=r"a\.json"):
            embeddings.Network(str(tmp_path / "a.onnx"), embeddings.ARCFACE)


@pytest.mark.parametrize("shape", [("B", 4, 8, 10), ("B", 3, "h", "w"), ("B", 3)])
def test_networks_that_do_not_fit(shape, monkeypatch):
    monkeypatch.setattr(embeddings, "session", lambda path: Session(*shape))
    with pytest.raises(RequestError, match=r"a\.onnx: "):
        embeddings.Network("a.onnx", embeddings.CLIP)


def test_files_that_are_none(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"none")
    with pytest.raises(RequestError, match="no ONNX file that can be read"):
        embeddings.Network(str(tmp_path / "a.onnx"), embeddings.CLIP)


@pytest.mark.slow  # half a minute
@pytest.mark.skipif(not all(path.exists() for path in (PREDICT, STYLES, *FILMS)), reason="the networks and the films are not at hand")
def test_a_clip_in_the_style_of_another_is_nearer_than_one_in_another_style():
    """Two films in six styles each: the same style on the other film against the five other styles on it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    stylise, network = onnxruntime.InferenceSession(str(STYLES)), embeddings.Network(str(PREDICT), embeddings.Scaling())

    def vectors(film, style):
        clip = clips.read_clip(film, frames=3, fps=2, height=256, width=256)
        weights = np.eye(26, dtype=np.float32)[style]
        pictures = [
            stylise.run(None, {"image": (frame / np.float32(255)).transpose(2, 0, 1)[None], "style_weights": weights})[0][0]
            for frame in clip
        ]
        x = np.stack(pictures).transpose(0, 2, 3, 1)
        return network((np.clip(x, 0, 1) * 255).astype(np.uint8))

    styles = (0, 4, 9, 13, 18, 23)
    found = [[vectors(film, style) for style in styles] for film in FILMS]
    table = np.array([[embeddings.similarity(a, b)[0] for b in found[1]] for a in found[0]])
    print(table.round(3))
    assert (table.argmax(1) == np.arange(len(styles))).all()
