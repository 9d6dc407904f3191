"""Faces put upright, and who is who by dlib's network where it is at hand. Its values against PyTorch: tests/parity/test_face_dlib.py.

python -m pytest -n 0 -s -m slow tests/evaluation/metrics/test_faces.py
"""

from pathlib import Path

import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines import clips
from evaluation import given_files
from evaluation.metrics import embeddings, face_dlib, faces

SHARED = Path(__file__).parents[4] / "shared"
REAL, FILMS = SHARED / "weights" / "face_dlib_resnet.safetensors", SHARED / "clips" / "omnitransfer"
# Eyes, nose and mouth corners (x, y) at 0, 0.5 and 1 s of each film at 480 x 480, found by CenterFace and looked at.
MARKS = {
    "ID__ref1": ((284, 219, 366, 217, 313, 271, 294, 307, 361, 305), (287, 203, 370, 200, 314, 255, 296, 292, 365, 288),
                 (280, 167, 371, 168, 307, 222, 282, 263, 357, 263)),
    "ID__result1": ((340, 120, 393, 103, 367, 150, 376, 181, 419, 165), (348, 133, 404, 113, 383, 159, 385, 190, 432, 172),
                    (335, 155, 369, 140, 344, 183, 370, 216, 396, 203)),
    "Motion__result1": ((178, 191, 247, 166, 223, 218, 216, 251, 276, 230), (180, 190, 246, 166, 223, 217, 217, 249, 275, 229),
                        (202, 174, 262, 149, 248, 200, 244, 232, 295, 212)),
    "Camera__ref2": ((161, 40, 234, 46, 184, 74, 161, 113, 222, 117), (205, 48, 277, 52, 237, 83, 206, 117, 265, 121),
                     (300, 48, 363, 52, 344, 84, 292, 119, 344, 123)),
    "Effect__ref1": ((211, 161, 282, 161, 248, 203, 215, 233, 273, 232), (212, 161, 282, 163, 247, 204, 212, 236, 270, 238),
                     (210, 161, 281, 163, 245, 204, 211, 236, 270, 237)),
    "Effect__result1": ((228, 107, 289, 92, 278, 135, 252, 170, 304, 159), (228, 107, 289, 93, 277, 135, 251, 170, 303, 159),
                        (228, 107, 290, 95, 276, 134, 249, 170, 300, 160)),
}  # fmt: skip
PEOPLE = (("ID__ref1", "ID__result1"), ("Motion__result1",), ("Camera__ref2",), ("Effect__ref1",), ("Effect__result1",))


def test_the_nearest_similarity():
    random = np.random.default_rng(0)
    points, turn = random.normal(size=(5, 2)), np.array([[0.6, -0.8], [0.8, 0.6]]) * 2.5
    matrix = faces.nearest_similarity(points, points @ turn.T + [3, -4])
    np.testing.assert_allclose(matrix, np.concatenate([turn, [[3], [-4]]], 1), atol=1e-9)


def network(side=112):
    return faces.FaceNetwork(lambda x: x.reshape(len(x), -1).astype(float), side, faces.TEMPLATE * side / 112)


def test_a_face_is_put_upright():
    """A picture that was turned, scaled and shifted comes back as it was."""
    cv2 = pytest.importorskip("cv2")
    x, y = np.meshgrid(np.arange(112), np.arange(112))
    face = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 11), x + y], -1).clip(0, 255).astype(np.uint8)
    matrix = cv2.getRotationMatrix2D((56, 56), 25, 1.7) + np.array([[0, 0, 80], [0, 0, 80]])
    picture = cv2.warpAffine(face, matrix, (280, 280))
    found = faces.upright(picture, faces.TEMPLATE @ matrix[:, :2].T + matrix[:, 2], network())
    assert np.abs(found[8:-8, 8:-8].astype(int) - face[8:-8, 8:-8]).mean() < 2
    clip = np.stack([picture, np.zeros_like(picture), picture])
    marks = iter([faces.TEMPLATE, None, faces.TEMPLATE])
    assert faces.faces_of(clip, lambda frame: next(marks), network()).shape == (2, 112, 112, 3)


def test_frames_without_a_face_are_counted(monkeypatch):
    """Mean and best over the frames that have one; a clip without any, or a reference without, is a failure by name."""
    monkeypatch.setattr(given_files, "checked", lambda given: (given, "digest"))
    monkeypatch.setattr(faces, "load", lambda path: network(8))
    monkeypatch.setattr(faces, "detector", lambda: None)
    monkeypatch.setattr(faces, "faces_of", lambda clip, find, network: clip[clip.any((1, 2, 3))])
    (metric,) = given_files.with_faces({"face": "dir/ours.safetensors"})

    class Sample:
        clip = np.zeros((5, 8, 8, 3), np.uint8)
        reference = np.zeros((7, 8, 8, 3), np.uint8)

    Sample.reference[0, 0], Sample.clip[1, 0], Sample.clip[2, 0, 0, 0] = 9, 9, 9
    one = 9 * 9 / (9 * 24**0.5 * 9)  # a frame with one of the 24 numbers of the face
    assert metric.measure(Sample()) == {
        "identity mean (ours)": pytest.approx((1 + one) / 2),
        "identity best (ours)": pytest.approx(1),
        "frames without a face (ours)": pytest.approx(3 / 5),
    }
    Sample.clip = np.zeros_like(Sample.clip)
    with pytest.raises(RequestError, match="no face in 5 frames"):
        metric.measure(Sample())
    Sample.reference = np.zeros_like(Sample.reference)
    with pytest.raises(RequestError, match="no face in 4 frames of the reference"):
        metric.measure(Sample())


@pytest.mark.slow  # half a minute
@pytest.mark.skipif(not REAL.exists() or not FILMS.exists(), reason="the weights of dlib's network and the films are not at hand")
def test_a_person_is_nearer_to_themselves_than_to_others():
    real = faces.load(str(REAL))

    def vectors(name):
        film = clips.read_clip(FILMS / f"{name}.mp4", frames=3, fps=2, height=480, width=480)
        marks = [np.array(each, float).reshape(5, 2) for each in MARKS[name]]
        return real.embed(np.stack([faces.upright(frame, each, real) for frame, each in zip(film, marks, strict=True)]))

    found = {name: vectors(name) for name in MARKS}

    def apart(a, b):
        """dlib's distances of all frames of two films; of one film, of two different frames."""
        distances = np.linalg.norm(found[a][:, None] - found[b][None], axis=-1)
        return distances[np.triu_indices(3, 1)] if a == b else distances.ravel()

    for person in PEOPLE:
        others = [name for name in MARKS if name not in person]
        own = np.concatenate([apart(a, b) for a in person for b in person])
        other = np.concatenate([apart(a, b) for a in person for b in others])
        print(person, f"own {own.min():.2f} to {own.max():.2f}, others {other.min():.2f} to {other.max():.2f}")
        assert own.max() < 0.6, "dlib's threshold"
        assert np.median(own) < other.min()
        for a in person:
            alike = [embeddings.similarity(found[a], found[b])[0] for b in others]
            assert min(embeddings.similarity(found[a], found[b])[0] for b in person) > max(alike)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"none")
    with pytest.raises(RequestError, match="no safetensors"):
        faces.load(str(tmp_path / "a.safetensors"))
    assert len(face_dlib.names()) == 1 + 4 * 29  # 29 convolutions
